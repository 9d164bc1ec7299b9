import pytest

from bpe import compute_bigram_statistics, reference, render_token, replace_bigram, replace_control_character

pytestmark = pytest.mark.core


def test_the_helpers_do_what_their_docstrings_say():
    assert compute_bigram_statistics([1, 2, 3, 1, 2]) == {(1, 2): 2, (2, 3): 1, (3, 1): 1}
    counter = {(1, 2): 1}
    assert compute_bigram_statistics([1, 2], counter) is counter and counter == {(1, 2): 2}
    assert compute_bigram_statistics([]) == {} and compute_bigram_statistics([1, 1, 1]) == {(1, 1): 2}
    assert replace_bigram([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]
    assert replace_bigram([1, 1, 1], (1, 1), 2) == [2, 1] and replace_bigram([], (1, 2), 3) == []
    assert replace_control_character("a\nb\x7f\u200b北") == "a\\u000ab\\u007f\\u200b北"
    assert render_token("北".encode()) == "北" and render_token(b"\xe5\n") == "�\\u000a"


def test_the_example_of_the_wikipedia_article():
    # "aaabdaaabac": aa -> 256 (counted 4 times), then (256, a) before (a, b) as it stands first, then (257, b)
    merges = reference.train(["aaabdaaabac"], 3)
    assert list(merges) == [(97, 97), (256, 97), (257, 98)]
    assert reference.encode(b"aaabdaaabac", merges) == [258, 100, 258, 97, 99]
    assert reference.decode([258, 100, 258, 97, 99], merges) == b"aaabdaaabac"


def test_ties_go_to_the_pair_that_stands_first():
    assert list(reference.train(["cdabab.cd"], 1)) == [(99, 100)]
    assert list(reference.train(["ab", "cd", "cd", "ab"], 1)) == [(97, 98)]


def test_pairs_do_not_cross_chunks():
    assert reference.train(["a", "b", "a", "b"], 5) == {}
