import random

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from bpe.pretokenizer import (
    CL100K_SPLIT_PATTERN,
    GPT2_SPLIT_PATTERN,
    GPT4_SPLIT_PATTERN,
    PATTERNS,
    Splitter,
)
from common import UsageError, valid

KNOWN = ("gpt2", "gpt4", CL100K_SPLIT_PATTERN)
# what the patterns tell apart, the separators that `re` takes for whitespace, and letters, digits, spaces beyond ASCII
PARTS = ["a", "Zb", "'s", "'LL", "'", " ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x1f", "\x85", "\xa0", "\u3000"]
PARTS += ["7", "1234", "²", "①", "٣", "é", "ſ", "北京", "。", "!", "...", "_", "’", "😀", "e\u0301", "\x00", "\ufeff"]


def by_the_book(pattern, text):
    return regex.findall(PATTERNS.get(pattern, pattern), text)


@pytest.mark.parametrize("pattern", KNOWN)
@given(text=st.text(alphabet=st.characters(max_codepoint=127), max_size=60))
@settings(max_examples=200, deadline=None)
def test_ascii_is_split_as_by_the_pattern(pattern, text):
    assert Splitter(pattern)(text) == by_the_book(pattern, text)


@pytest.mark.core
@pytest.mark.parametrize("pattern", KNOWN)
def test_mixed_and_long_text_is_split_as_by_the_pattern(pattern):
    rnd = random.Random(11)
    for case in range(400):
        words = rnd.choices(PARTS, k=rnd.randint(0, 60))
        if case % 2:  # long stretches of ASCII with islands in between
            words = [w + "the cat sat on 99 mats; it's so!\n  " * rnd.randint(0, 4) for w in words]
        text = "".join(words)
        splitter = Splitter(pattern)
        chunks = [chunk for block in splitter.blocks(text, 1 + case % 50) for chunk in splitter.split_block(block)]
        assert chunks == splitter(text) == by_the_book(pattern, text)
        assert "".join(chunks) == text


def test_the_published_patterns_are_tiktokens():
    from tiktoken_ext.openai_public import r50k_pat_str

    assert r50k_pat_str == GPT2_SPLIT_PATTERN
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
