"""5,000 seeded differential cases, fast against naive: training, encoding, decoding, in every path of the code."""

import io
import random
from contextlib import redirect_stderr

import pytest

import bpe.encoder
import bpe.tokenizer
import bpe.trainer
from bpe import Tokenizer, reference
from common import valid

ALPHABETS = [
    "a", "ab", "aab", "abc", "abcdefgh ", "the cat's 1234 \n", "ACGT", "北大模型的 ", "😀👩‍👩‍👧é", "\x00\xff\x01",
    "\x1c\x1d\x1e\x1f a\n", "\ud800\udc00a\udfff", " \t\r\n\u3000\xa0", "aA1 '’.",
]  # fmt: skip
PATTERNS = ["none", "none", "gpt2", "gpt4", r"[a-c]+|\s"]


def some_text(rnd):
    alphabet, n = rnd.choice(ALPHABETS), rnd.choice([0, 1, 2, 5, 20, 60])
    if rnd.random() < 0.3:  # long runs: aaaa
        return "".join(rnd.choice(alphabet) * rnd.randint(1, 9) for _ in range(n // 4))
    return "".join(rnd.choices(alphabet, k=n))


@pytest.mark.parametrize("seed", range(10))
def test_500_cases_without_a_difference(seed, monkeypatch):
    rnd = random.Random(seed)
    for case in range(500):
        monkeypatch.setattr(bpe.trainer, "FEW", rnd.choice([0, 2, 48]))
        monkeypatch.setattr(bpe.encoder, "MANY", rnd.choice([0, 48]))
        monkeypatch.setattr(bpe.encoder, "LONG", rnd.choice([64, 3]))
        monkeypatch.setattr(bpe.tokenizer, "SHORT_TEXT", rnd.choice([0, 1000]))
        num_merges = rnd.randint(0, 40)
        documents = [some_text(rnd) for _ in range(rnd.choice([1, 1, 2, 6]))]
        tok = Tokenizer(rnd.choice(PATTERNS))
        with redirect_stderr(io.StringIO()):  # early stops are said there
            tok.train(documents if len(documents) > 1 else documents[0], 256 + num_merges)
        chunks = [chunk for document in documents for chunk in chunks_of(tok, document)]
        merges = reference.train(chunks, num_merges)
        where = (seed, case, tok.pattern, documents)
        assert list(tok.merges.items()) == list(merges.items()), where
        for text in (documents[0], some_text(rnd)):
            expected = [i for chunk in chunks_of(tok, text) for i in reference.encode(chunk, merges)]
            assert tok.encode(text) == expected == tok.encode(text), where  # the second time from the cache
            assert tok.decode_bytes(expected) == valid(text).encode() == reference.decode(expected, merges), where


def chunks_of(tok, text):
    """The chunks in UTF-8, cut by the pattern itself."""
    import regex

    from bpe.pretokenizer import lossless_pattern

    text = valid(text)
    return [chunk.encode() for chunk in regex.findall(lossless_pattern(tok.pattern), text)]
