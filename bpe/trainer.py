"""Learn BPE merges fast, with the same result as `bpe/reference.py`.

The naive algorithm scans the whole text for each merge. This one visits only the positions that a merge changes, in
numpy while there are many of them and in plain Python once there are few.

The text is one flat array of token ids with SEP around every chunk (unsplit text is a single chunk). `LinkedTokens`
also keeps the next and the previous live position of each, so that a merge rewrites the left half of a pair and unlinks
the right half. Equal chunks are stored once, in order of first appearance, with their count as the weight of each of
their positions; the first occurrences of two pairs have the same order in that array as in the full text.

Why the next pair is always the right one:

1.  An occurrence of (p, q) appears only in the step that creates max(p, q): neighbours change only where a new
    id is written, and p and q are written in no later step than their own. So from that step on the count of a pair
    only falls, and the position of its first occurrence only moves right.
2.  Therefore the key (-count, first position) that a pair had when it was pushed on the heap is a lower bound of its
    true key. Pop the least key and check the pair's occurrences; if all remain, its key is exact and no other pair can
    have a lower one. Otherwise push it again with its true key.
3.  Only pairs with a count of at least `floor` are on the heap. By (1) no other pair can grow to reach the floor, so a
    popped pair whose true count is at least `floor` is the best of all. When the heap is exhausted, the array is
    compacted, the floor lowered to a tenth of the highest count, and the index rebuilt by one sort.

Occurrences are counted with overlap and merged from the left without ("aaaa" counts three, merges two), which selects
the even offsets within a run of overlapping occurrences.

Counts are int64.
"""

import heapq
import math

import numpy as np

from common import UsageError

SEP = -1  # around every chunk
DEAD = -2  # the right half of a merged pair
FEW = 48  # occurrences up to which plain Python is faster than a dozen numpy calls


def flat(chunks):
    """List of bytes -> (all bytes concatenated (n,) uint8, the length of each)."""
    lengths = np.fromiter(map(len, chunks), np.int64, len(chunks))
    return np.frombuffer(b"".join(chunks), np.uint8), lengths


class LinkedTokens:
    """Token ids in one flat array, doubly linked: the cost of a merge is proportional to its occurrences.

    data, lengths: the ids of chunks concatenated, bytes at first, and how many each chunk has.
    tok: the ids, with SEP around every chunk.
    """

    def __init__(self, data, lengths):
        # the ids of chunk k are shifted by the k + 1 separators before them
        tok = np.full(len(data) + len(lengths) + 1, SEP, np.int32)
        ends = np.cumsum(lengths + 1)
        inside = np.ones(len(tok), bool)
        inside[0] = inside[ends] = False
        tok[inside] = data
        self._adopt(tok)

    def _adopt(self, tok):
        n = len(tok)
        self.tok = tok
        # numpy uses int64 indices without conversion; for a large text, memory matters more
        index = np.int64 if n < 1 << 22 else np.int32
        self.next = np.arange(1, n + 1, dtype=index)
        self.prev = np.arange(-1, n - 1, dtype=index)
        self.next[-1] = n - 1  # never used; keeps every entry a valid index
        self.prev[0] = 0
        # scalars are read three times faster through a memoryview than from an array
        self._tok, self._next, self._prev = map(memoryview, (self.tok, self.next, self.prev))

    def compact(self):
        """Drop dead positions, so that neighbours are adjacent -> mask of those that were kept."""
        alive = self.tok != DEAD
        if not alive.all():
            self._adopt(self.tok[alive])
        return alive

    def occurrences(self, where, p, q):
        """The positions in `where` (ascending: a list if few, else an array) at which p is still followed by q."""
        if isinstance(where, list):
            tok, next_ = self._tok, self._next
            return [i for i in where if tok[i] == p and tok[next_[i]] == q]
        where = where[self.tok[where] == p]
        where = where[self.tok[self.next[where]] == q]
        return where.tolist() if len(where) <= FEW else where

    def merge(self, where, p, q, new_id):
        """Replace p q by `new_id` at the positions `where` (as `occurrences` returns them).

        Returns the positions where it was done, the positions before them, the tokens before and the tokens after.
        Lists if `where` is one, else arrays.
        """
        return (self._merge_few if isinstance(where, list) else self._merge_many)(where, p, q, new_id)

    def _merge_few(self, where, p, q, new_id):
        tok, next_, prev = self._tok, self._next, self._prev
        done = []
        for i in where:
            if tok[i] == p:  # else the occurrence before has just merged it, as in "aaa"
                right = next_[i]
                after = next_[right]
                tok[i], tok[right] = new_id, DEAD
                next_[i] = after
                prev[after] = i
                done.append(i)
        before = [prev[i] for i in done]
        return done, before, [tok[i] for i in before], [tok[next_[i]] for i in done]

    def _merge_many(self, where, p, q, new_id):
        right = self.next[where]
        if p == q:
            where = _without_overlap(where, right)
            right = self.next[where]
        after = self.next[right]
        self.tok[where] = new_id
        self.tok[right] = DEAD
        self.next[where] = after
        self.prev[after] = where
        before = self.prev[where]
        return where, before, self.tok[before], self.tok[after]


def _without_overlap(where, right):
    """Of occurrences of (p, p), keep those at even offsets within each run of overlapping ones."""
    starts = np.empty(len(where), bool)
    starts[0] = True
    np.not_equal(right[:-1], where[1:], out=starts[1:])
    offset = np.arange(len(where))
    return where[(offset - np.maximum.accumulate(offset * starts)) % 2 == 0]


class _PairIndex:
    """The positions of each frequent pair, and a lazy heap that yields the most frequent one."""

    def __init__(self, tokens, weights, token_lengths, max_token_length):
        """tokens: LinkedTokens. weights: int64 per position, or None for one each. token_lengths: bytes of each id."""
        self.tokens, self.weights = tokens, weights
        self.token_lengths, self.max_token_length = token_lengths, max_token_length
        self.where = {}  # (p, q) -> ascending positions, some of them stale
        self.heap = []  # (-count, first position, p, q), each a lower bound
        self.floor = None

    def count(self, where):
        if self.weights is None:
            return len(where)
        if isinstance(where, list):
            weights = self._weights
            return sum([weights[i] for i in where])
        return int(self.weights[where].sum())

    def rebuild(self):
        """Index every pair with at least a tenth of the highest count. False if there is no pair."""
        alive = self.tokens.compact()
        if self.weights is not None:
            self.weights = self.weights[alive]
            self._weights = memoryview(self.weights)
        self.where.clear()
        self.heap.clear()
        n_ids = len(self.token_lengths)
        where, starts, counts, pairs = _all_pairs(self.tokens, n_ids, self.weights)
        p, q = np.divmod(pairs, n_ids)
        lengths = np.array(self.token_lengths)
        counts[lengths[p] + lengths[q] > self.max_token_length] = 0
        if not counts.any():
            return False
        self.floor = max(int(counts.max()) // 10, 1)
        ends = np.append(starts[1:], len(where))
        for g in np.flatnonzero(counts >= self.floor):
            self.add(int(p[g]), int(q[g]), where[starts[g] : ends[g]], int(counts[g]))
        return True

    def add(self, p, q, where, count):
        """Add a pair to the index and the heap, unless its token would be too long."""
        if self.token_lengths[p] + self.token_lengths[q] > self.max_token_length:
            return
        if not isinstance(where, list) and len(where) <= FEW:
            where = where.tolist()
        self.where[p, q] = where
        heapq.heappush(self.heap, (-count, int(where[0]), p, q))

    def pop(self):
        """-> (p, q, positions, count) of the best pair, or None when no pair reaches the floor."""
        while self.heap:
            count, _, p, q = heapq.heappop(self.heap)
            where = self.tokens.occurrences(self.where.pop((p, q)), p, q)
            true_count = self.count(where)
            if true_count == -count:  # weights are positive: the same count means the same occurrences
                return p, q, where, true_count
            if true_count >= self.floor:
                self.add(p, q, where, true_count)
        return None

    def merge(self, p, q, where, new_id):
        """Merge a pair and index the frequent ones among the new pairs."""
        self.token_lengths.append(self.token_lengths[p] + self.token_lengths[q])
        done, before, left, right = self.tokens.merge(where, p, q, new_id)
        find = self._find_few if isinstance(done, list) else self._find_many
        for x, positions, count in find(done, done, right):
            self.add(new_id, x, positions, count)
        for x, positions, count in find(done, before, left):
            if x != new_id:  # (new_id, new_id) was added from the right side
                self.add(x, new_id, positions, count)

    def _find_few(self, done, positions, neighbours):
        found = {}
        for i, x in zip(positions, neighbours):
            if x != SEP:
                found.setdefault(x, []).append(i)
        for x, where in found.items():
            count = self.count(where)
            if count >= self.floor:
                yield x, where, count

    def _find_many(self, done, positions, neighbours):
        counts = np.zeros(len(self.token_lengths) + 1, np.int64)  # shifted by one: index 0 takes the separators
        np.add.at(counts, neighbours + 1, 1 if self.weights is None else self.weights[done])
        counts[0] = 0
        for x in (np.flatnonzero(counts >= self.floor) - 1).tolist():
            yield x, positions[neighbours == x], int(counts[x + 1])


def _all_pairs(tokens, n_ids, weights):
    """Group the neighbours of compact LinkedTokens by pair.

    -> positions (by pair, ascending within), start of each group, count of each group, p * n_ids + q of each group.
    """
    tok, index_type = tokens.tok, tokens.next.dtype
    bits = len(tok).bit_length()
    packed = np.multiply(tok[:-1], n_ids, dtype=np.int64)
    packed += tok[1:]
    packed <<= bits
    packed |= np.arange(len(packed))
    packed = packed[(tok[:-1] != SEP) & (tok[1:] != SEP)]
    packed.sort()
    where = (packed & ((1 << bits) - 1)).astype(index_type, copy=False)
    packed >>= bits
    is_start = np.ones(len(packed), bool)
    np.not_equal(packed[1:], packed[:-1], out=is_start[1:])
    starts = np.flatnonzero(is_start)
    counts = np.diff(starts, append=len(packed)) if weights is None else np.add.reduceat(weights[where], starts)
    return where, starts, counts, packed[starts]


def check_size(vocab_size, positions):
    """UsageError for sizes that do not fit: for sorting, a pair and a position share one 63-bit number."""
    if vocab_size < 256:
        raise UsageError(f"vocab_size {vocab_size} is too small: the 256 bytes come first, so ask for 256 or more")
    room = 63 - (positions + 1).bit_length()
    limit = 1 << (room // 2)
    if positions >= 2**31 - 1:
        raise UsageError(f"{positions:,} bytes of different chunks are more than the trainer's 2,147,483,646 positions")
    if vocab_size > limit:
        raise UsageError(f"vocab_size {vocab_size} is too large: with {positions:,} bytes of text it can be {limit:,}")


def learn_merges(chunk_counts, vocab_size, max_token_length=math.inf, token_lengths=(1,) * 256, merge=None):
    """Yield ((p, q), new_id, count) for each merge in order, until the vocabulary is full or no pair is left.

    chunk_counts: {chunk as bytes: how often it occurs}, in order of first appearance.
    vocab_size: the 256 bytes and the merges.
    max_token_length: bytes; a pair whose token would be longer is not merged.
    token_lengths, merge: of a vocabulary to continue, the bytes of each id, and a function that applies its merges to
        what `flat` returns -> ids and lengths, as Encoder.merge.
    """
    chunks = [c for c in chunk_counts if len(c) > 1]
    check_size(vocab_size, sum(map(len, chunks)) + len(chunks) + 1)
    numbers = np.fromiter((chunk_counts[c] for c in chunks), np.int64, len(chunks))
    ids, lengths = merge(*flat(chunks)) if merge else flat(chunks)
    tokens = LinkedTokens(ids, lengths)
    weights = None
    if (numbers != 1).any():
        weights = np.concatenate(([0], np.repeat(numbers, lengths + 1)))  # position 0 is a separator
    del chunks, ids, lengths
    index = _PairIndex(tokens, weights, [*token_lengths], max_token_length)
    for new_id in range(len(token_lengths), vocab_size):
        best = index.pop() or (index.rebuild() and index.pop())
        if not best:
            return
        p, q, where, count = best
        index.merge(p, q, where, new_id)
        yield (p, q), new_id, count
