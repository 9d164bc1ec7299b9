import json
import re

import pytest

from bpe import Tokenizer
from bpe.compare import compare, load_any, table
from runlog import read_run

TEXT = "The tokenizer of the <b>handbook</b>, 北京大学"


@pytest.fixture
def model(tmp_path):
    tok = Tokenizer("gpt2")
    tok.train(TEXT * 3, 280)
    tok.save(tmp_path / "own")
    tok.save_tiktoken(tmp_path / "rank.tiktoken")
    tok.save_huggingface(tmp_path / "hf")
    (tmp_path / "t.json").write_text(json.dumps({"one": TEXT, "two": "x" * 9}), encoding="utf-8")
    return tok


def test_every_kind_of_tokenizer_counts_the_same(model, tmp_path):
    for name in ("own.model", "rank.tiktoken", "hf/tokenizer.json", "hf"):
        _, encode, n_vocab = load_any(str(tmp_path / name))
        if name != "rank.tiktoken":  # a rank file knows no split pattern
            assert [i for i, _ in encode(TEXT)] == model.encode(TEXT)
        assert n_vocab == 280
    assert "".join(shown for _, shown in load_any(str(tmp_path / "hf"))[1]("plain text")) == "plain text"


@pytest.mark.core
def test_the_table_shows_colours_or_bars():
    def encode(text):
        return [(i, word) for i, word in enumerate(text.split())]

    rows = [compare("t", "one two three", "words", encode, 6)]
    assert table(rows, 0, color=False).splitlines()[1].endswith("50.0%  one|two|three")
    assert table(rows, 2, color=False).splitlines()[1].endswith("one|two … 1 more")
    assert "\x1b[30;48;5;153mone\x1b[0m\x1b[30;48;5;223mtwo\x1b[0m" in table(rows, 2, color=True)


def test_table_page_and_record(model, tmp_path, script):
    args = (
        "--texts",
        tmp_path / "t.json",
        "--tokenizers",
        "gpt2",
        tmp_path / "own.model",
        "--run-dir",
        tmp_path / "run",
    )
    out = script("bpe/compare.py", *args).stdout
    n = len(model.encode(TEXT))
    assert re.search(rf"^one +own +{n} ", out, re.M) and re.search(r"^two +gpt2 +\d+ ", out, re.M)
    assert "\x1b[" not in out and "\x1b[" in script("bpe/compare.py", *args, "--color", "always").stdout
    rows = read_run(tmp_path / "run").result["rows"]
    assert [(r["text_name"], r["type"]) for r in rows] == [(t, k) for t in ("one", "two") for k in ("gpt2", "own")]
    assert rows[1]["length"] == n and rows[1]["bytes_per_token"] == round(len(TEXT.encode()) / n, 3)


def test_the_original_passages_give_the_original_counts(shared_data):
    passages = json.loads((shared_data / "passages.json").read_text(encoding="utf-8"))
    gpt2 = load_any("gpt2")
    assert {name: compare(name, text, *gpt2)["length"] for name, text in passages.items()} == {
        "english": 185,
        "chinese": 306,
    }
    tok = Tokenizer()
    tok.train((shared_data / "pku_manual.txt").read_bytes().decode("utf-8"), 1024)
    assert {name: len(tok.encode(text)) for name, text in passages.items()} == {"english": 942, "chinese": 118}


def test_usage_errors_are_one_line(tmp_path, assert_refuses):
    (tmp_path / "t.json").write_text("[1]")
    assert_refuses("bpe/compare.py", "--texts", tmp_path / "none.txt", says="none.txt")
    assert_refuses("bpe/compare.py", "--texts", tmp_path / "t.json", says="{name: text}")
    assert_refuses("bpe/compare.py", "--texts", __file__, "--tokenizers", "no/such", says="no/such")
