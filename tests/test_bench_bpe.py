import random

from runlog import read_run


def test_the_bench_measures_everybody_and_says_against_what(tmp_path, script):
    rnd = random.Random(0)
    (tmp_path / "t.txt").write_text("".join(rnd.choices("abcd 大学\n", k=3000)), encoding="utf-8")
    args = ("--input", tmp_path / "t.txt", "--vocab-size", 300, "--pattern", "none", "--rounds", 1)
    out = script("bench/bench_bpe.py", *args, "--run-dir", tmp_path / "run").stdout
    assert "merges equal to those of the naive algorithm: yes" in out and "no --minbpe DIR" in out
    run = read_run(tmp_path / "run")
    assert run.result["status"] == "success" and (tmp_path / "run" / "bench.png").stat().st_size > 5000
    rows = {(r["name"], r["who"].split()[0]): r for r in run.result["rows"]}
    assert {("train", "ours"), ("train", "naive"), ("train", "tokenizers"), ("encode", "tiktoken")} <= rows.keys()
    assert all(r["seconds"] > 0 and r["ratio_to"] == "seconds of ours" and r["threads"] >= 1 for r in rows.values())
    assert rows["encode", "tiktoken"]["ids_equal_ours"] and rows["train", "ours"]["ratio"] == 1


def test_mistakes_are_one_line(tmp_path, refuses):
    (tmp_path / "t.txt").write_text("abc")
    args = ("--input", tmp_path / "t.txt", "--run-dir", tmp_path / "run")
    refuses("bench/bench_bpe.py", *args, "--minbpe", tmp_path, says="not a checkout of minbpe")
    refuses("bench/bench_bpe.py", *args, "--pattern", "[", says="regular expression")
    assert not (tmp_path / "run").exists()
