"""Byte pair encoding in its most readable form: plain Python, slow and correct.

Start from the bytes of the text. Count the pairs of neighbouring tokens, merge the most frequent pair into a new token,
and repeat until the vocabulary is full. Encoding replays the merges, earliest first.

    merges = train(["low lower lowest"], num_merges=3)
    ids = encode(b"lowest", merges)
    assert decode(ids, merges) == b"lowest"

The fast trainer and encoder are tested against these functions, which define the result:

    next pair      the one with the highest count; among equals the one that occurs first in the text as merged so far.
                   Occurrences may overlap when counting: "aaa" has the pair (a, a) twice.
    replacement    every occurrence, from left to right without overlap: "aaa" becomes Xa.
    chunks         a pair never crosses from one chunk into the next. Text that is not split is one chunk.

`compute_bigram_statistics` and `replace_bigram` follow Sennrich et al. 2016 (arXiv:1508.07909), the byte-level alphabet
GPT-2 (Radford et al. 2019).
"""

import unicodedata
from itertools import pairwise


def compute_bigram_statistics(token_ids, counter=None):
    """Count neighbouring pairs: [1, 2, 3, 1, 2] -> {(1, 2): 2, (2, 3): 1, (3, 1): 1}.

    The pairs are in the order of their first occurrence. With `counter`, the counts are added to that dict, which is
    also returned.
    """
    counter = {} if counter is None else counter
    for pair in pairwise(token_ids):
        counter[pair] = counter.get(pair, 0) + 1
    return counter


def replace_bigram(token_ids, bigram, bigram_id):
    """Replace each occurrence of a pair, from the left: [1, 2, 3, 1, 2], (1, 2), 4 -> [4, 3, 4]."""
    out, i = [], 0
    while i < len(token_ids):
        if i + 1 < len(token_ids) and (token_ids[i], token_ids[i + 1]) == tuple(bigram):
            out.append(bigram_id)
            i += 2
        else:
            out.append(token_ids[i])
            i += 1
    return out


def replace_control_character(s):
    """Escape control characters, which a terminal would interpret: "a\\n" -> "a\\\\u000a"."""
    return "".join(c if unicodedata.category(c)[0] != "C" else f"\\u{ord(c):04x}" for c in s)


def render_token(t):
    """The bytes of a token as text; what is not valid UTF-8 by itself becomes "�": b"hi\\n" -> "hi\\\\u000a"."""
    return replace_control_character(t.decode("utf-8", errors="replace"))


def train(chunks, num_merges):
    """Learn up to `num_merges` merges from an iterable of str or bytes -> {(int, int): int}, in order.

    Fewer are returned when no pair is left.
    """
    chunks = [list(c.encode("utf-8") if isinstance(c, str) else c) for c in chunks]
    merges = {}  # (int, int) -> int
    for new_id in range(256, 256 + num_merges):
        counter = {}
        for ids in chunks:
            compute_bigram_statistics(ids, counter)
        if not counter:
            break
        # max() keeps the first of equals, and a dict keeps the order of first occurrence
        best = max(counter, key=counter.get)
        chunks = [replace_bigram(ids, best, new_id) for ids in chunks]
        merges[best] = new_id
    return merges


def encode(data, merges):
    """Encode one chunk: bytes -> token ids. Of the pairs present, always merge the one that was learned earliest."""
    rank = {pair: i for i, pair in enumerate(merges)}
    ids = list(data)
    while len(ids) > 1:
        best = min(pairwise(ids), key=lambda pair: rank.get(pair, len(rank)))
        if best not in merges:
            break
        ids = replace_bigram(ids, best, merges[best])
    return ids


def decode(ids, merges):
    """Token ids -> bytes."""
    vocab = {i: bytes([i]) for i in range(256)}
    for (left, right), new_id in merges.items():
        vocab[new_id] = vocab[left] + vocab[right]
    return b"".join(vocab[i] for i in ids)
