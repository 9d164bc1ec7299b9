import gzip
import json

import pytest

from bpe.tokenizer import Tokenizer
from runlog import read_run

TEXT = "It is a truth universally acknowledged, that a tokenizer must be in want of a text.\n" * 5


@pytest.fixture
def corpus(tmp_path):
    docs = [{"text": TEXT}, {"text": "北京大学 " * 9}]
    lines = "".join(json.dumps(d) + "\n" for d in docs)
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.txt").write_text(TEXT + "北京大学 " * 9, encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(lines)
    return tmp_path


def test_it_trains_saves_and_finds_its_files_again(corpus, script):
    args = ("--input", corpus / "c.jsonl", "--vocab-size", 300, "--out", corpus / "tok", "--run-dir", corpus / "run")
    script("bpe/train_bpe.py", *args)
    tok = Tokenizer.load(corpus / "tok.model")
    assert tok.n_vocab == 301 and tok.eot_token == 300 and tok.pattern == "gpt4"
    result = read_run(corpus / "run").result
    assert result["status"] == "success" and result["sha256"] == tok.sha256 and result["bytes_per_token"] > 1.5
    assert result["bytes"] == len((TEXT + "北京大学 " * 9).encode()) and result["measured_on"] == "the input itself"
    before = (corpus / "tok.model").stat().st_mtime_ns
    assert "already" in script("bpe/train_bpe.py", *args).stdout
    assert (corpus / "tok.model").stat().st_mtime_ns == before
    (corpus / "c.jsonl").write_text(json.dumps({"text": TEXT}), encoding="utf-8")
    assert "already" not in script("bpe/train_bpe.py", *args).stdout


def test_compression_is_reported_on_held_out_text(corpus, script):
    (corpus / "other.txt").write_text("another text", encoding="utf-8")
    args = ("--input", corpus / "c.txt", "--held-out", corpus / "other.txt", "--vocab-size", 300, "--pattern", "none")
    script("bpe/train_bpe.py", *args, "--out", corpus / "tok", "--run-dir", corpus / "run")
    result = read_run(corpus / "run").result
    tok = Tokenizer.load(corpus / "tok.model")
    n = len(tok.encode("another text"))
    assert result["measured_on"] == "held-out text" and result["tokens"] == n
    assert result["bytes_per_token"] == round(12 / n, 4)


def test_all_kinds_of_input_give_the_same_documents(corpus):
    from bpe.train_bpe import read_documents

    assert list(read_documents([corpus / "c.jsonl"])) == list(read_documents([corpus / "c.jsonl.gz"]))
    assert "".join(read_documents([corpus / "c.jsonl"])) == "".join(read_documents([corpus / "c.txt"]))


def test_mistakes_are_one_line(corpus, refuses):
    (corpus / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (corpus / "bad.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n', encoding="utf-8")
    (corpus / "not.gz").write_bytes(b"plain")
    out = ("--out", corpus / "x")
    refuses("bpe/train_bpe.py", "--input", corpus / "none.txt", *out, says="none.txt")
    refuses("bpe/train_bpe.py", "--input", corpus / "latin.txt", *out, says="not UTF-8")
    refuses("bpe/train_bpe.py", "--input", corpus / "bad.jsonl", *out, says="line 2")
    refuses("bpe/train_bpe.py", "--input", corpus / "not.gz", *out, says="damaged gzip")
    refuses("bpe/train_bpe.py", "--input", corpus / "c.txt", *out, "--vocab-size", 100, says="too small")
    refuses("bpe/train_bpe.py", "--input", corpus / "c.txt", *out, "--pattern", "(", says="pattern")
    assert not list(corpus.glob("x*"))
