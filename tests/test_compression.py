import random

import pytest

from bench.bench_bpe import halves, main, with_merges
from bpe import Tokenizer
from data.sources import documents
from runlog import read_run


@pytest.fixture
def text():
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdé北京大", k=rng.randint(1, 6))) for _ in range(200)]
    return "".join(" ".join(rng.choices(words, k=9)) + "\n" for _ in range(2000))


def test_a_prefix_of_the_merges_is_the_smaller_vocabulary(text):
    large, small = Tokenizer("gpt4"), Tokenizer("gpt4")
    large.train(text, 300)
    small.train(text, 270)
    prefix = with_merges(large, dict(list(large.merges.items())[:14]))
    assert prefix.merges == small.merges
    assert prefix.encode(text) == small.encode(text) != large.encode(text)


@pytest.mark.core
def test_held_out_text_is_not_trained_on(text, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text(text, encoding="utf-8")
    seen, unseen = halves(file)
    docs = list(documents("files", [file]))
    assert sorted([*seen, *unseen]) == sorted(docs) and 0.05 < len(unseen) / len(docs) < 0.15


def test_rows_are_what_the_tokenizer_does(text, tmp_path, in_process):
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    sizes = ("--vocab-sizes", 256, 280, 99999)
    code, out, err = in_process(
        main, "compression", "--input", tmp_path / "t.txt", *sizes, "--run-dir", tmp_path / "run"
    )
    assert code == 0, err
    seen, unseen = halves(tmp_path / "t.txt")
    rows = read_run(tmp_path / "run").result["rows"]
    tok, all_merges = Tokenizer("gpt4"), Tokenizer("gpt4")
    tok.train(seen, 280)
    all_merges.train(seen, 99999)
    sizes = [("ours", 256), ("ours", 280), ("ours", all_merges.n_vocab), ("gpt2", 50257)]
    assert [(r["who"], r["n_vocab"]) for r in rows] == sizes and 280 < all_merges.n_vocab < 99999
    assert rows[0]["bytes_per_token"] == 1 and f"{rows[1]['bytes_per_token']:.4g}" in out
    assert rows[1]["tokens"] == sum(len(tok.encode(t)) for t in unseen)
    assert (tmp_path / "run" / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_usage_errors_are_one_line(tmp_path, in_process):
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    args = ("compression", "--input", tmp_path / "short.txt", "--run-dir", tmp_path / "none")
    for flags, says in [((), "too short"), (("--vocab-sizes", 9), "256 bytes")]:
        code, _, err = in_process(main, *args, *flags)
        assert code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "none").exists()
