"""The fast trainer against the naive algorithm."""

import io
import random
from collections import Counter
from contextlib import redirect_stderr
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bpe.trainer
from bpe import Tokenizer, reference
from bpe.trainer import LinkedTokens, check_size, flat, learn_merges
from common import UsageError

TRAINED, WITH_GAP = Tokenizer("gpt4"), Tokenizer("gpt4")
TRAINED.train("the cat sat on the mat " * 9, 262)
WITH_GAP.__setstate__({"pattern": "gpt4", "merges": {(97, 98): 300}})


def learn(chunks, num_merges):
    return {pair: token for pair, token, _ in learn_merges(Counter(chunks), 256 + num_merges)}


@pytest.fixture(params=[0, 2, 48])
def few(request, monkeypatch):
    """Run with the vectorised, the mixed and the plain-Python paths of the trainer."""
    monkeypatch.setattr(bpe.trainer, "FEW", request.param)


small_bytes = st.text(alphabet="ab", max_size=60).map(str.encode) | st.binary(max_size=40)


@pytest.mark.core
@given(st.lists(small_bytes, max_size=8), st.integers(0, 40))
@settings(max_examples=150, deadline=None)
def test_merges_equal_the_naive_algorithm(chunks, num_merges):
    # order included: == on dicts ignores it
    assert list(learn(chunks, num_merges).items()) == list(reference.train(chunks, num_merges).items())


@pytest.mark.parametrize("text", ["a" * 1000, "aaab" * 300, "abab" * 200 + "ba" * 100, "aabaaabaaaab" * 80])
def test_runs_and_overlaps(few, text):
    for chunks in ([text.encode()], [c.encode() for c in text.split("b")]):
        assert list(learn(chunks, 25).items()) == list(reference.train(chunks, 25).items())


def test_counts_are_reported_and_exact(few):
    got = list(learn_merges({b"aaa": 2, b"ab": 3}, 300))
    # (a,a) overlaps: 2 each; (a,b): 3
    assert got == [((97, 97), 256, 4), ((97, 98), 257, 3), ((256, 97), 258, 2)]


@pytest.mark.core
def test_counts_beyond_32_and_53_bits(few):
    """tokenizers#2058: counts that overflow 32 bits corrupt the merges."""
    big = 2**53
    got = list(learn_merges({b"ab": big, b"cd": big + 1, b"ef": 2**31 + 1}, 300))
    assert [(pair, n) for pair, _, n in got] == [((99, 100), big + 1), ((97, 98), big), ((101, 102), 2**31 + 1)]


def test_the_order_of_the_text_decides_between_equal_counts_alone(few):
    """minbpe#90: merges that depend on the order of the text."""
    counts = {b"ab": 7, b"abc": 5, b"cd": 6, b"efg": 4}  # (ab) 12, (cd) 6, (ab, c) 5, (ef) and (fg) 4
    orders = [dict(order) for order in permutations(counts.items())]
    assert {tuple(pair for pair, _, _ in learn_merges(order, 259)) for order in orders} == {
        ((97, 98), (99, 100), (256, 99))
    }
    assert {list(learn_merges(order, 260))[-1][0] for order in orders} == {(101, 102)}  # of equals the first


def test_many_chunks_with_many_rebuilds(few):
    rnd = random.Random(7)
    words = ["".join(rnd.choices("abcdefg", k=rnd.randint(1, 9))) for _ in range(150)]
    chunks = [rnd.choice(words).encode() for _ in range(600)]
    assert list(learn(chunks, 120).items()) == list(reference.train(chunks, 120).items())


def test_linked_tokens_merge_without_overlap(few):
    tokens = LinkedTokens(*flat([b"aaaaa", b"aa"]))
    where = tokens.occurrences([1, 2, 3, 4, 7], 97, 97)
    if bpe.trainer.FEW == 0:
        where = bpe.trainer.np.array(where)
    tokens.merge(where, 97, 97, 256)
    tokens.compact()
    assert tokens.tok.tolist() == [-1, 256, 256, 97, -1, 256, -1]


def naive_train(tok, chunks, vocab_size, max_token_length=10**6):
    """The merges of an existing tokenizer, then those that the naive algorithm adds to them."""
    merges, vocab = dict(tok.merges), dict(tok.vocab)
    chunks = [reference.encode(chunk, merges) for chunk in chunks]
    while len(vocab) < vocab_size:
        counts = {}
        for ids in chunks:
            reference.compute_bigram_statistics(ids, counts)
        short = [(p, q) for p, q in counts if len(vocab[p] + vocab[q]) <= max_token_length]
        if not short:
            break
        p, q = best = max(short, key=counts.get)
        merges[best] = len(vocab)
        chunks = [reference.replace_bigram(ids, best, len(vocab)) for ids in chunks]
        vocab[len(vocab)] = vocab[p] + vocab[q]
    return merges


@pytest.mark.core
@pytest.mark.parametrize("limit", [2, 3, 4, 7, 30])
def test_no_token_is_longer_than_allowed(few, limit):
    rnd = random.Random(limit)
    for case in range(20):
        text = "".join(rnd.choices(["ab", "aab", "the cat ", "北", "1234", "\n"], k=rnd.randint(0, 60)))
        tok = Tokenizer("none" if case % 2 else "gpt4")
        with redirect_stderr(io.StringIO()):
            tok.train(text, 256 + 60, max_token_length=limit)
        expected = naive_train(Tokenizer(), [chunk.encode() for chunk in tok._split(text)], 256 + 60, limit)
        assert list(tok.merges.items()) == list(expected.items())
        assert max(map(len, tok.vocab.values())) <= limit


@pytest.mark.core
def test_a_vocabulary_is_continued(few):
    rnd = random.Random(5)
    for limit in [None, 4, 7] * 10:
        pieces = rnd.choice([["a", "b"], ["the ", "cat", "北大", "12", "\n"], ["aa", "aaa", " "]])
        first, second = ("".join(rnd.choices(pieces, k=rnd.randint(0, 80))) for _ in range(2))
        tok, more = Tokenizer(pattern := rnd.choice(["none", "gpt4"])), Tokenizer(pattern)
        with redirect_stderr(io.StringIO()):
            tok.train(first, 256 + rnd.randint(0, 12))
            expected = naive_train(tok, [c.encode() for c in tok._split(second)], 290, limit or 10**6)
            tok.register_special_tokens({"<s>": tok.n_vocab})
            more.train(second, 290, init=tok, max_token_length=limit)
        assert list(more.merges.items()) == list(expected.items()) and not more.special_tokens
        assert list(more.merges.items())[: len(tok.merges)] == list(tok.merges.items())
        assert more.encode(second) == [i for c in tok._split(second) for i in reference.encode(c.encode(), expected)]


def test_gpt2s_vocabulary_is_continued():
    """Its bytes are in another order than their values."""
    gpt2, more, text = Tokenizer.from_tiktoken("gpt2"), Tokenizer("gpt2"), "zxqv zxqv vqxz!"
    more.train(text, 50258, init=gpt2)
    assert list(more.merges.items())[:50000] == list(gpt2.merges.items()) and more.n_vocab == 50258
    assert more.decode([50256]) in text and more.decode(more.encode(text)) == text
    assert len(more.encode(text)) < len(gpt2.encode(text))


@pytest.mark.parametrize(
    "init, size, says",
    [
        (Tokenizer("gpt2"), 300, "init splits text by the pattern 'gpt2', not by 'gpt4'"),
        ("tok.model", 300, "init is a Tokenizer"),
        (TRAINED, 260, "vocab_size 260 is too small: init has 262 tokens"),
        (WITH_GAP, 300, "init cannot be continued"),
    ],
)
def test_a_vocabulary_that_cannot_be_continued_is_refused(init, size, says):
    with pytest.raises(UsageError, match=says):
        Tokenizer("gpt4").train("hello", size, init=init)


@pytest.mark.parametrize("size, says", [(255, "too small"), (0, "too small"), (-1, "too small"), (10**10, "too large")])
def test_a_vocabulary_that_cannot_be_is_refused(size, says):
    with pytest.raises(UsageError, match=says):
        Tokenizer().train("hello", size)


def test_the_limit_depends_on_the_text():
    check_size(2**16, 2**30 - 2)
    with pytest.raises(UsageError, match="it can be 65,536"):
        check_size(2**17, 2**30 - 2)


@pytest.mark.parametrize("text", ["", "a", "hello hello"])
def test_training_stops_early_and_says_so(text):
    tok, said = Tokenizer(), io.StringIO()
    with redirect_stderr(said):
        tok.train(text, 500)
    assert "no pair is left" in said.getvalue()
    assert tok.n_vocab == 256 + len(tok.merges) and tok.decode(tok.encode(text)) == text
    assert tok.merges == reference.train([text], 244)
