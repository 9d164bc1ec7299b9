import random
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import regex
import tiktoken
from conftest import SPLIT_PARTS
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe.pretokenizer
from bpe.pretokenizer import (
    GPT2_SPLIT_PATTERN,
    GPT4_SPLIT_PATTERN,
    O200K_SPLIT_PATTERN,
    PATTERNS,
    RULES,
    STABLE,
    Splitter,
    kinds,
)
from common import UsageError, valid

KNOWN = tuple(RULES)
PARTS = [*SPLIT_PARTS, "Zb", "'ve", "'ſ", "É", "ſ", "ǅ", "ʰ", "AB", "iPad", "/", "\n/", "\ufe0f", "\u0903"]


def by_the_book(pattern, text):
    return regex.findall(PATTERNS.get(pattern, pattern), text)


def split_together(pattern, texts):
    """Split all at once -> list of lists of chunks."""
    data, starts = Splitter(pattern).split(texts)
    chunks = [data[i:j].tobytes() for i, j in pairwise([*starts, None])]
    cut = [-1, *(i for i, chunk in enumerate(chunks) if chunk.startswith(b"\xff"))]
    return [[chunk.decode("utf-8") for chunk in chunks[i + 1 : j]] for i, j in pairwise(cut)]


def random_texts(rnd, n):
    for _ in range(n):
        parts = rnd.choice((PARTS, rnd.sample(PARTS, 6), ["a", "B", "'", "s", "L", " ", "\n", "1", "!", "/"]))
        yield "".join(rnd.choices(parts, k=rnd.randint(0, 14)))


@pytest.mark.core
@pytest.mark.parametrize("n", [6000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", KNOWN)
def test_random_texts_are_split_as_by_the_pattern(pattern, n):
    texts = list(random_texts(random.Random(n), n))
    assert split_together(pattern, texts) == [by_the_book(pattern, text) for text in texts]
    assert all(Splitter(pattern)(text) == by_the_book(pattern, text) for text in texts[:300])


@pytest.mark.parametrize("pattern", KNOWN)
def test_all_pairs_and_triples_of_kinds_are_split_as_by_the_pattern(pattern):
    one_of_each = ["\n", "\t", " ", "!", "'", "/", "\u0301", "5", "s", "北", "L"]
    texts = ["".join(parts) for n in (2, 3, 4) for parts in product(one_of_each, repeat=n)]
    assert split_together(pattern, texts) == [by_the_book(pattern, text) for text in texts]


def test_the_kinds_of_characters_are_those_of_tiktokens_regular_expressions():
    """bpe/unicode16.txt is made in this way."""
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    ranks, expected = {bytes([b]): b for b in range(256)}, np.full(0x110000, bpe.pretokenizer.OTHER)
    sources = {"BLANK": r"\s", "MARK": r"\p{M}", "NUMBER": r"\p{N}", "LOWER": r"\p{Ll}", "CASELESS": r"[\p{Lm}\p{Lo}]"}
    sources |= {"UPPER": r"[\p{Lu}\p{Lt}]", "NEWLINE": "[\r\n]", "SPACE": " ", "APOSTROPHE": "'", "SLASH": "/"}
    for kind, source in sources.items():
        encoding = tiktoken.Encoding(kind, pat_str=source, mergeable_ranks=ranks, special_tokens={})
        found = bytes(encoding.encode_to_numpy(everything).astype(np.uint8)).decode()  # the rest is dropped
        expected[[*map(ord, found)]] = getattr(bpe.pretokenizer, kind)
    expected[0xD800] = bpe.pretokenizer.END
    assert np.array_equal(kinds(), expected)
    assert (kinds() >> 2 == bpe.pretokenizer.LETTERS).sum() == 141_028  # letters of Unicode 16.0


@pytest.mark.parametrize("pattern", KNOWN)
@given(text=st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
@settings(max_examples=200, deadline=None)
def test_ascii_is_split_as_by_the_pattern(pattern, text):
    assert Splitter(pattern)(text) == by_the_book(pattern, text)


@pytest.mark.parametrize("pattern", KNOWN)
def test_regex_splits_stable_characters_as_the_pinned_classes_do(pattern):
    chars = [char for char in map(chr, range(0xD800)) if STABLE.fullmatch(char)]
    assert len(chars) > 20_000 and "北" in chars and "\u0558" not in chars
    texts = [f"a{char}b A{char}B {char} 1{char}\n{char}" for char in chars]
    assert split_together(pattern, texts) == [Splitter(pattern).findall(text) for text in texts]


@pytest.mark.core
@pytest.mark.parametrize("pattern", KNOWN)
def test_long_text_is_split_as_by_the_pattern(pattern, monkeypatch):
    rnd = random.Random(11)
    for case in range(24):
        words = rnd.choices(PARTS, k=rnd.randint(0, 60))
        if case % 2:  # long stretches of ASCII with islands in between
            words = [w + "the cat sat on 99 mats; it's so!\n  " * rnd.randint(0, 4) for w in words]
        texts = ["".join(words), "", "".join(words[::-1])]
        monkeypatch.setattr(bpe.pretokenizer, "BLOCK", 1 + case % 50)
        blocks = list(Splitter(pattern).blocks(texts, 1 + case % 50))
        for number, text in enumerate(texts):
            pieces = [piece for block in blocks for n, piece in block if n == number]
            assert "".join(pieces) == text
            assert [chunk for piece in pieces for chunk in Splitter(pattern)(piece)] == by_the_book(pattern, text)
        expected = Counter(chunk.encode() for text in texts for chunk in by_the_book(pattern, text))
        assert list(Splitter(pattern).count(texts).items()) == list(expected.items())  # order included


def test_the_published_patterns_are_tiktokens(monkeypatch):
    from tiktoken_ext import openai_public
    from tiktoken_ext.openai_public import o200k_base, r50k_pat_str

    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})

    assert r50k_pat_str == GPT2_SPLIT_PATTERN and o200k_base()["pat_str"] == O200K_SPLIT_PATTERN
    original = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # of the GPT-2 repository
    rnd = random.Random(5)
    for _ in range(300):
        text = "".join(rnd.choices(PARTS, k=30))
        assert regex.findall(original, text) == regex.findall(GPT2_SPLIT_PATTERN, text)
        assert "".join(regex.findall(GPT4_SPLIT_PATTERN, text)) == text


@pytest.mark.parametrize("pattern", ["none", r"\w+", r"(a)|(b)", r"[a-z]+(?= )|\d", "x"])
@given(text=st.text(max_size=50))
@settings(max_examples=50, deadline=None)
def test_nothing_is_lost_with_any_pattern(pattern, text):
    assert "".join(Splitter(pattern)(text)) == text


def test_impossible_patterns_are_refused():
    with pytest.raises(UsageError, match="valid regular expression"):
        Splitter("[")
    with pytest.raises(UsageError, match="empty"):
        Splitter("a*")("bcd")


def test_lone_surrogates_become_replacement_characters():
    assert valid("a\ud800b") == "a\ufffdb" and valid("\ud83d\ude00") == "😀"
