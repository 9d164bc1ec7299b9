import random

from bpe import questions
from bpe.tokenizer import Tokenizer
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


def test_the_ten_answers_hold():
    gpt2 = Tokenizer.from_tiktoken("gpt2")
    answers = {question.__name__: question(gpt2) for question in questions.QUESTIONS}
    assert len(answers) == 10
    assert [row["ord"] for row in answers["code_points"]] == [21271, 22823, 27169, 22411]
    sizes = answers["vocabulary_size"]
    assert [r["bytes_per_token"] for r in sizes] == sorted(r["bytes_per_token"] for r in sizes)
    assert answers["spelling"]["tokens_reversed"] != answers["spelling"]["string_reversed"]
    assert sum(answers["arithmetic"]["digits_per_token"].values()) == 9000
    assert answers["python_code"]["share_blank"] > 0.1
    assert (
        answers["end_of_text"]["allowed_special=all"] == [50256] and answers["end_of_text"]["by_default"] == "refused"
    )
    assert answers["unseen_tokens"]["ids"] == [43453] and answers["unseen_tokens"]["occurrences_of_the_glitch"] == 0
    assert answers["yaml_or_json"]["yaml"]["tokens"] < answers["yaml_or_json"]["json_indented"]["tokens"]
    assert answers["not_end_to_end"]["spellings"] > 1000


def test_the_number_of_spellings_is_right():
    # ab, a|b, and nothing else
    assert questions.spellings(b"ab", {b"a", b"b", b"ab", b"c"}) == 2
    assert questions.spellings(b"aaaa", {b"a", b"aa"}) == 5 and questions.spellings(b"ax", {b"a"}) == 0
