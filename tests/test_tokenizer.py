import json
import random

import numpy as np
import pytest

import bpe.encoder
import bpe.trainer
from bpe import Tokenizer, reference
from bpe.tokenizer import load_tokenizer
from runlog import UserError

TEXT = "The cat's 1234 hats\n  don't fit; 北京大学的大学生。😀 naïve\x1c\x1f\r\n\t tab\n\n" * 8


@pytest.fixture(scope="module", params=["none", "gpt2", "gpt4", r"\w+|\s+"])
def tok(request):
    tok = Tokenizer(request.param)
    tok.train(TEXT, 300)
    tok.register_special_tokens({"<|endoftext|>": 300, "<|pad|>": 301})
    return tok


def naive_ids(tok, text):
    return [i for chunk in tok._split(text) for i in reference.encode(chunk.encode(), tok.merges)]


def test_encoding_equals_applying_the_merges_in_order(tok):
    for text in (TEXT, TEXT[5:33], "", "a", "unseen words, 北北北 aaaa"):
        assert tok.encode(text) == tok.encode(text) == naive_ids(tok, text)
        assert tok.decode(tok.encode(text)) == text


def test_long_texts_encode_the_same(tok, monkeypatch):
    monkeypatch.setattr(bpe.encoder, "SHORT", 0)
    rnd = random.Random(3)
    for few in (0, 2, 48):
        monkeypatch.setattr(bpe.trainer, "FEW", few)
        text = "".join(rnd.choice(TEXT) for _ in range(300)) + "a" * 99 + "\n" * 50
        tok._cache.clear()
        assert tok.encode(text) == naive_ids(tok, text)


def test_special_tokens_have_the_semantics_of_tiktoken(tok):
    text = "a<|endoftext|>b"
    a, b = tok.encode("a"), tok.encode("b")
    with pytest.raises(ValueError, match=r"<\|endoftext\|>"):
        tok.encode(text)
    assert tok.encode(text, allowed_special="all") == [*a, 300, *b]
    assert tok.encode(text, allowed_special={"<|endoftext|>"}) == [*a, 300, *b]
    plain = tok.encode(text, allowed_special="none")
    assert 300 not in plain and tok.decode(plain) == text and plain == tok.encode_ordinary(text)
    with pytest.raises(UserError, match="pad"):
        tok.encode("<|pad|>" + text, allowed_special={"<|endoftext|>"})
    with pytest.raises(UserError, match="unknown"):
        tok.encode("x<|im_end|>", allowed_special={"<|im_end|>"})
    with pytest.raises(UserError, match="allowed_special"):
        tok.encode("x", allowed_special="some")
    assert tok.decode([300, 301]) == "<|endoftext|><|pad|>"
    assert tok.eot_token == 300 and tok.n_vocab == 302


def test_decode_names_an_unknown_id(tok):
    for ids in ([97, 999], [-1], np.array([5000])):
        with pytest.raises(ValueError, match=r"id (999|-1|5000) is not in the vocabulary"):
            tok.decode(ids)


def test_decode_replaces_or_raises():
    tok = Tokenizer()
    assert tok.decode([0xE5, 0x8C]) == "\ufffd" and tok.decode_bytes([0xE5, 0x8C]) == b"\xe5\x8c"
    with pytest.raises(UnicodeDecodeError):
        tok.decode([0xE5], errors="strict")
    assert tok.decode(np.array([104, 105], np.uint16)) == "hi"


def test_a_saved_tokenizer_is_the_same(tok, tmp_path):
    model, vocab = tok.save(tmp_path / "t")
    assert (tmp_path / "t.model").samefile(model) and (tmp_path / "t.vocab").samefile(vocab)
    for loaded in (Tokenizer.load(model), Tokenizer().load(model), load_tokenizer(model)):
        assert list(loaded.merges.items()) == list(tok.merges.items())
        assert (loaded.vocab, loaded.special_tokens, loaded.pattern) == (tok.vocab, tok.special_tokens, tok.pattern)
        assert loaded.sha256 == tok.sha256 == json.loads((tmp_path / "t.model").read_text())["sha256"]
        assert loaded.encode(TEXT) == tok.encode(TEXT)
    assert len((tmp_path / "t.vocab").read_text(encoding="utf-8").splitlines()) == tok.n_vocab
    other = Tokenizer()
    other.load(model)
    assert other.merges == tok.merges


def test_the_sha256_follows_the_content():
    a, b = Tokenizer("gpt2"), Tokenizer("gpt4")
    assert a.sha256 != b.sha256 and a.sha256 == Tokenizer("gpt2").sha256
    before = a.sha256
    a.register_special_tokens({"<|endoftext|>": 256})
    assert a.sha256 != before
