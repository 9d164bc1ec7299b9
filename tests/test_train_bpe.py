"""`bpe/train_bpe.py` as a command; most tests call its `main` in this process."""

import gzip
import json

import pytest

from bpe import Tokenizer, train_bpe
from common import UsageError, read_documents
from runlog import read_run
from runlog.__main__ import main as runlog_main

TEXT = "It is a truth universally acknowledged, that a tokenizer must be in want of a text.\n" * 5
EXPORTS = ("tok.vocab", "tok.tiktoken", "tok-hf/tokenizer.json", "tok-hf/tokenizer_config.json")


@pytest.fixture
def corpus(tmp_path):
    docs = [{"text": TEXT}, {"text": "北京大学 " * 9}]
    lines = "".join(json.dumps(d) + "\n" for d in docs)
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "c.txt").write_text(TEXT + "北京大学 " * 9, encoding="utf-8")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt", encoding="utf-8") as f:
        f.write(lines)
    return tmp_path


@pytest.fixture
def train(in_process, corpus):
    """train(*flags) -> stdout of train_bpe.py that writes corpus/tok.*."""

    def run(*flags):
        code, out, err = in_process(train_bpe.main, "--out", corpus / "tok", *flags)
        assert code == 0, out + err
        return out

    return run


def test_the_script_trains_and_writes_all_formats(corpus, script):
    out = script("bpe/train_bpe.py", "--input", corpus / "c.jsonl", "--vocab-size", 300, "--out", corpus / "tok").stdout
    assert "44 merges from" in out and "loaded, encoded, decoded, identical" in out
    assert Tokenizer.load(corpus / "tok.model").n_vocab == 301 and all((corpus / file).is_file() for file in EXPORTS)


@pytest.mark.core
def test_it_trains_saves_and_finds_its_files_again(corpus, train):
    args = ("--input", corpus / "c.jsonl", "--vocab-size", 300, "--run-dir", corpus / "run")
    train(*args)
    tok = Tokenizer.load(corpus / "tok.model")
    assert tok.n_vocab == 301 and tok.eot_token == 300 and tok.pattern == "gpt4"
    result = read_run(corpus / "run").result
    assert result["status"] == "success" and result["sha256"] == tok.sha256 and result["bytes_per_token"] > 1.5
    assert result["bytes"] == len((TEXT + "北京大学 " * 9).encode()) and result["train_seconds"] > 0
    before = (corpus / "tok.model").stat().st_mtime_ns
    assert "already" in train(*args)
    assert (corpus / "tok.model").stat().st_mtime_ns == before
    (corpus / "tok.tiktoken").unlink()
    assert "already" not in train(*args) and (corpus / "tok.tiktoken").is_file()
    (corpus / "c.jsonl").write_text(json.dumps({"text": TEXT}), encoding="utf-8")
    assert "already" not in train(*args)


def test_compression_is_measured_on_the_input(corpus, train):
    text = (corpus / "c.txt").read_bytes().decode("utf-8")
    train("--input", corpus / "c.txt", "--vocab-size", 300, "--pattern", "none", "--run-dir", corpus / "run")
    result, n = read_run(corpus / "run").result, len(Tokenizer.load(corpus / "tok.model").encode(text))
    assert result["tokens"] == n and result["bytes_per_token"] == round(len(text.encode()) / n, 4)


def test_rare_and_long_tokens_are_left_out(corpus, train, in_process):
    args = ("--input", corpus / "c.txt", "--vocab-size", 400, "--min-frequency", 3, "--max-token-length", 4)
    train(*args, "--run-dir", corpus / "run")
    tok, same = Tokenizer.load(corpus / "tok.model"), Tokenizer("gpt4")
    same.train((corpus / "c.txt").read_text(encoding="utf-8"), 400, min_frequency=3, max_token_length=4)
    assert tok.merges == same.merges and 256 < tok.n_vocab - 1 < 400
    code, out, err = in_process(runlog_main, "verify", corpus / "run")
    assert code == 0 and "trained again" in out, out + err
    assert "already" in train(*args)


def test_it_continues_a_vocabulary(corpus, train, in_process):
    args, first = ("--input", corpus / "c.txt", "--run-dir", corpus / "run"), corpus / "first.model"
    train("--input", corpus / "c.jsonl", "--vocab-size", 280)
    (corpus / "tok.model").rename(first)
    train(*args, "--vocab-size", 300, "--init", first)
    tok, before = Tokenizer.load(corpus / "tok.model"), Tokenizer.load(first)
    assert tok.n_vocab == 301 and list(tok.merges)[:24] == list(before.merges)
    assert "already" in train(*args, "--vocab-size", 300, "--init", first)
    code, out, err = in_process(runlog_main, "verify", corpus / "run")
    assert code == 0 and "trained again" in out, out + err
    refused = ("--input", corpus / "c.txt", "--out", corpus / "x", "--init", first, "--pattern", "gpt2")
    code, _, err = in_process(train_bpe.main, *refused)
    assert code == 2 and "init splits text by" in err and err.count("\n") == 1 and not list(corpus.glob("x*"))


def test_the_model_is_saved_even_if_an_export_fails(corpus, train, in_process, monkeypatch):
    """And what an earlier tokenizer left there does not stay beside it."""
    train("--input", corpus / "c.txt", "--vocab-size", 300)

    def fail(tok, file):
        raise UsageError("this vocabulary cannot be expressed")

    monkeypatch.setattr(Tokenizer, "save_tiktoken", fail)
    args = ("--input", corpus / "c.txt", "--vocab-size", 290, "--out", corpus / "tok")
    code, _, err = in_process(train_bpe.main, *args)
    assert code == 2 and err == "error: this vocabulary cannot be expressed\n"
    assert Tokenizer.load(corpus / "tok.model").n_vocab == 291
    assert not (corpus / "tok.tiktoken").exists() and not (corpus / "tok-hf/tokenizer.json").exists()


def test_all_kinds_of_input_give_the_same_documents(corpus):
    read = read_documents
    assert list(read([corpus / "c.jsonl"])) == list(read([corpus / "c.jsonl.gz"]))
    assert "".join(read([corpus / "c.jsonl"])) == "".join(read([corpus / "c.txt"]))
    (corpus / "s.jsonl").write_text('{"text": "a\\ud800b"}\n', encoding="utf-8")
    assert list(read([corpus / "s.jsonl"])) == ["a\ufffdb"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (("--input", "none.txt"), "none.txt"),
        (("--input", "latin.txt"), "not UTF-8"),
        (("--input", "bad.jsonl"), "line 2"),
        (("--input", "not.gz"), "damaged gzip"),
        (("--vocab-size", 100), "too small"),
        (("--max-token-length", 1), "max_token_length 1 is too small"),
        (("--init", "x.model"), "--init and --out are both x.model"),
        (("--init", "none.model"), "none.model"),
        (("--init", "c.jsonl"), "c.jsonl is not valid JSON"),
        (("--pattern", "("), "pattern"),
        (("--pattern", "gpt-4"), "no pattern named gpt-4"),
        (("--pattern", r"\p{Script=Han}+|\s"), "Hugging Face's tokenizers cannot express the pattern"),
        (("--pattern", r"\X"), "tiktoken cannot express the pattern"),
    ],
)
def test_usage_errors_are_one_line_and_leave_nothing(corpus, in_process, monkeypatch, flags, says):
    (corpus / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (corpus / "bad.jsonl").write_text('{"text": "a"}\n{"txet": "b"}\n', encoding="utf-8")
    (corpus / "not.gz").write_bytes(b"plain")
    monkeypatch.chdir(corpus)
    code, out, err = in_process(train_bpe.main, "--input", "c.txt", "--out", "x", *flags)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err, out + err
    assert not list(corpus.glob("x*"))


def test_the_script_refuses_in_one_line(corpus, assert_refuses):
    assert_refuses("bpe/train_bpe.py", "--input", corpus / "none.txt", "--out", corpus / "x", says="none.txt")
