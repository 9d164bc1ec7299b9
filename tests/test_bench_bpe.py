import random

import pytest

from bench import bench_bpe
from runlog import read_run


def write_text(folder):
    rnd = random.Random(0)
    (folder / "t.txt").write_text("".join(rnd.choices("abcd 大学\n", k=3000)), encoding="utf-8")
    return folder / "t.txt"


def test_all_are_measured_and_compared_with_ours(tmp_path, in_process, contestants_here):
    args = ("--input", write_text(tmp_path), "--vocab-size", 300, "--rounds", 2, "--run-dir", tmp_path / "run")
    code, out, err = in_process(bench_bpe.main, *args)
    assert code == 0 and "merges equal to those of the naive algorithm: yes" in out, err
    run = read_run(tmp_path / "run")
    assert run.result["status"] == "success" and (tmp_path / "run" / "bench.png").stat().st_size > 5000
    rows = {(r["name"], r["who"].split()[0]): r for r in run.result["rows"] if "failed" not in r}
    everyone = {("train", "ours"), ("train", "naive"), ("train", "tokenizers"), ("encode warm", "tiktoken")}
    assert everyone | {("encode cold", "ours")} <= rows.keys()
    assert all(r["seconds"] > 0 and r["ratio_to"] == "seconds of ours" and r["threads"] >= 1 for r in rows.values())
    assert rows["encode cold", "tiktoken"]["ids_equal_ours"] and rows["train", "ours"]["ratio"] == 1
    assert all(r["turns"] == 2 and r["spread"] >= 0 and r["mb_per_sec"] > 0 for r in rows.values())
    code, _, err = in_process(bench_bpe.main, *args)
    assert code == 2 and "--overwrite" in err  # what was measured is not replaced unasked
    assert in_process(bench_bpe.main, *args, "--overwrite")[0] == 0


def test_each_turn_is_a_fresh_process_that_can_be_stopped(tmp_path, script):
    args = ("--input", write_text(tmp_path), "--vocab-size", 300, "--pattern", "none", "--rounds", 1)
    out = script("bench/bench_bpe.py", *args, "--run-dir", tmp_path / "run").stdout
    assert "merges equal to those of the naive algorithm: yes" in out
    rows = read_run(tmp_path / "run").result["rows"]
    assert {"train", "encode"} == {r["name"] for r in rows} and all(r["peak_mb"] is not None for r in rows)
    assert [r["peak_mb"] < 100 for r in rows if r["who"] == "ours"] == [True, True]  # of the work, not of imports


def test_published_vocabularies_are_encoded_as_tiktoken_does(tmp_path, in_process, contestants_here):
    args = ("encode", "--input", write_text(tmp_path), "--rounds", 1, "--run-dir", tmp_path / "run")
    code, _, err = in_process(bench_bpe.main, *args)
    assert code == 0, err
    rows = {(r["name"], r["who"].split()[0]): r for r in read_run(tmp_path / "run").result["rows"]}
    for phase in bench_bpe.PHASES:
        mine, theirs = (rows[f"gpt2, t.txt, {phase}", who] for who in ("ours", "tiktoken"))
        assert mine["ids_equal_ours"] and theirs["ids_equal_ours"] and theirs["ratio"] == 1
        assert mine["ratio"] == pytest.approx(theirs["seconds"] / mine["seconds"])
    code, _, err = in_process(bench_bpe.main, *args, "--tokenizers", "gpt3", "--overwrite")
    assert code == 2 and "gpt3" in err and err.count("\n") == 1


MINBPE = """
class BasicTokenizer:
    merges = {}

    def train(self, text, vocab_size):
        self.merges = {(0, 1): 256}

    def encode(self, text):
        return [len(self.merges)] * len(text)
"""


def test_minbpe_comes_from_a_checkout(tmp_path, in_process):
    (tmp_path / "checkout/minbpe").mkdir(parents=True)
    (tmp_path / "checkout/minbpe/__init__.py").write_text(MINBPE, encoding="utf-8")
    args = ("--input", write_text(tmp_path), "--vocab-size", 300, "--pattern", "none", "--rounds", 1)
    args = (*args, "--run-dir", tmp_path / "run", "--minbpe", tmp_path / "checkout")
    code, _, err = in_process(bench_bpe.main, *args)
    assert code == 0, err
    rows = {r["name"]: r for r in read_run(tmp_path / "run").result["rows"] if r["who"] == "minbpe"}
    assert rows.keys() == {"train", "encode"} and not rows["encode"]["ids_equal_ours"]
    code, _, err = in_process(bench_bpe.main, *args[:-1], tmp_path, "--overwrite")
    assert code == 2 and "minbpe/__init__.py: No such file" in err


def test_usage_errors_are_one_line(tmp_path, in_process):
    args = ("--input", write_text(tmp_path), "--run-dir", tmp_path / "run")
    code, _, err = in_process(bench_bpe.main, *args, "--pattern", "[")
    assert code == 2 and "regular expression" in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
