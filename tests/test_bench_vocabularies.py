from itertools import islice

import pytest

from bench import bench_vocabularies
from runlog import read_run

TEXTS = {"scripts": bench_vocabularies.SCRIPTS, "whitespace": bench_vocabularies.WHITESPACE}


@pytest.fixture
def few(monkeypatch):
    """Two short texts, and the vocabularies of the one package that requirements.txt installs."""
    published = bench_vocabularies.published
    monkeypatch.setattr(bench_vocabularies, "seven_texts", lambda files: TEXTS)
    monkeypatch.setattr(bench_vocabularies, "published", lambda folder: islice(published(folder), 3))


def test_each_vocabulary_is_compared_with_its_own_library(few, tmp_path, in_process, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    code, _, err = in_process(bench_vocabularies.main, "--run-dir", tmp_path / "run")
    assert code == 0, err
    rows = read_run(tmp_path / "run").result["rows"]
    assert [row["vocabulary"] for row in rows] == ["gpt2", "r50k_base", "p50k_base"]
    for row in rows:
        assert row["texts"] == row["same_ids"] == row["decoded"] == 2
        assert row["to_tiktoken"] == row["to_huggingface"] == "same ids"
        assert row["model_file"] == row["from_huggingface"] == "same sha256"


def test_other_ids_are_an_error(few, tmp_path, in_process, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(bench_vocabularies, "tiktoken_encode", lambda *_: lambda text: [0])
    with pytest.raises(RuntimeError, match="not the same: gpt2"):
        in_process(bench_vocabularies.main, "--run-dir", tmp_path / "run")
