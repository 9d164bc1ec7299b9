"""Apply merges to bytes, fast, and exactly as `bpe/reference.py` does: lowest rank first, from the left.

Two ways to the same ids. A short chunk is rescanned in plain Python until no pair of it is in the merges. Much at once
(one long text, or a thousand chunks a tokenizer has not met) goes into `LinkedTokens`, and the ranks that occur are
worked off in ascending order, each at all its places together. A merge of rank r can only bring about pairs that hold
its new token, so each place is looked at when a neighbour changes and never again: the time is linear in the length,
for "a" * 10**6 and a book without spaces alike.
"""

import heapq
from itertools import pairwise

import numpy as np

from bpe.trainer import SEP, LinkedTokens

NO_RANK = 2**31 - 1
SHORT = 2048  # bytes; below it the set-up of arrays costs more than it saves


class Encoder:
    """Merges made ready for encoding.

    merges: {(int, int): int} in order of rank. byte_ids: the token id of each of the 256 bytes.

    Inside, ids are dense: 0..255 for the bytes, 256 + k for the k-th new token; `_outer` leads back to the caller's.
    """

    def __init__(self, merges, byte_ids):
        inner = {token: b for b, token in enumerate(byte_ids)}
        for token in merges.values():
            inner.setdefault(token, len(inner))  # two merges may make the same token
        self._outer = list(inner)
        self._merges = [(inner[p], inner[q], inner[token]) for (p, q), token in merges.items()]
        self._rank = {(p, q): rank for rank, (p, q, _) in enumerate(self._merges)}
        self._arrays = None

    def encode(self, data):
        """bytes of one chunk -> list of ids."""
        return self._encode_short(data) if len(data) < SHORT else self._encode_long([data])[0]

    def encode_all(self, chunks):
        """list of bytes, chunk by chunk -> list of lists of ids."""
        if sum(map(len, chunks)) < SHORT:
            return [self._encode_short(chunk) for chunk in chunks]
        return self._encode_long(chunks)

    def _encode_short(self, data):
        ids, rank = list(data), self._rank
        while len(ids) > 1:
            best = min([rank.get(pair, NO_RANK) for pair in pairwise(ids)])
            if best == NO_RANK:
                break
            p, q, new = self._merges[best]
            i, end = 0, len(ids) - 1
            while i < end:
                if ids[i] == p and ids[i + 1] == q:
                    ids[i : i + 2] = [new]
                    end -= 1
                i += 1
        outer = self._outer
        return [outer[i] for i in ids]

    def _encode_long(self, chunks):
        if self._arrays is None:
            self._arrays = _RankTables(self._merges, len(self._outer))
        tokens = LinkedTokens(chunks)
        todo = _Agenda()
        where, ranks = self._arrays.of_bytes(tokens.tok)
        todo.add_grouped(where, ranks)
        while todo.ranks:
            rank, where = todo.pop()
            p, q, new = self._merges[rank]
            where = tokens.occurrences(where, p, q)
            if not len(where):
                continue
            done, before, left, right = tokens.merge(where, p, q, new)
            if isinstance(done, list):
                self._find_few(todo, new, done, before, left, right)
            else:
                hits = self._arrays.after(new, right)
                todo.add_grouped(done[hits[0]], hits[1])
                hits = self._arrays.before(new, left)
                todo.add_grouped(before[hits[0]], hits[1])
        return self._collect(tokens, len(chunks))

    def _find_few(self, todo, new, done, before, left, right):
        found, rank_of = {}, self._rank.get
        for i, x in zip(done, right):
            rank = rank_of((new, x))
            if rank is not None:
                found.setdefault(rank, []).append(i)
        for i, x in zip(before, left):
            rank = rank_of((x, new))
            if rank is not None and x != new:  # (new, new) is known from the right side already
                found.setdefault(rank, []).append(i)
        for rank, where in found.items():
            todo.add(rank, where)

    def _collect(self, tokens, n_chunks):
        tokens.compact()
        borders = np.flatnonzero(tokens.tok == SEP).tolist()
        ids = np.array([*self._outer, -1])[tokens.tok].tolist()  # SEP is -1: it picks the last entry
        return [ids[borders[k] + 1 : borders[k + 1]] for k in range(n_chunks)]


class _Agenda:
    """Which positions to look at for which rank, lowest rank first."""

    def __init__(self):
        self.ranks = []  # heap
        self.where = {}  # rank -> ascending positions

    def add(self, rank, where):
        if rank in self.where:  # only where two merges make the same token
            self.where[rank] = sorted({*map(int, self.where[rank]), *map(int, where)})
        else:
            self.where[rank] = where
            heapq.heappush(self.ranks, rank)

    def add_grouped(self, where, ranks):
        """Add ascending positions, each with its own rank."""
        if not len(where):
            return
        order = np.argsort(ranks, kind="stable")
        ranks, where = ranks[order], where[order]
        starts = np.flatnonzero(np.diff(ranks, prepend=-1))
        ends = [*starts[1:].tolist(), len(where)]
        for rank, start, end in zip(ranks[starts].tolist(), starts.tolist(), ends):
            self.add(rank, where[start:end])

    def pop(self):
        rank = heapq.heappop(self.ranks)
        return rank, self.where.pop(rank)


class _RankTables:
    """Ranks of many pairs at once."""

    def __init__(self, merges, n_ids):
        self._bytes = np.full((257, 257), NO_RANK, np.int32)  # row and column 256, which is also -1, for SEP
        extensions = {}  # (token, side) -> partners and ranks
        for rank, (p, q, _) in enumerate(merges):
            if p < 256 and q < 256:
                self._bytes[p, q] = rank
            extensions.setdefault((p, "after"), []).append((q, rank))
            extensions.setdefault((q, "before"), []).append((p, rank))
        self._extensions = extensions
        self._scratch = np.full(n_ids + 1, NO_RANK, np.int32)  # the last entry, which is also -1, for SEP

    def of_bytes(self, tok):
        """Positions whose token and the next one are in the merges, and their ranks; tok holds bytes and SEP."""
        ranks = self._bytes[tok[:-1], tok[1:]]
        where = np.flatnonzero(ranks != NO_RANK)
        return where.astype(np.int32), ranks[where]

    def after(self, token, neighbours):
        """Indices of the neighbours x for which (token, x) is in the merges, and the ranks."""
        return self._extend((token, "after"), neighbours)

    def before(self, token, neighbours):
        """The same for (x, token), without (token, token)."""
        return self._extend((token, "before"), neighbours, without=token)

    def _extend(self, key, neighbours, without=None):
        partners = self._extensions.get(key)
        if partners is None:
            return np.empty(0, np.int64), np.empty(0, np.int32)
        if not isinstance(partners, np.ndarray):
            partners = self._extensions[key] = np.array(partners, np.int32).T
        self._scratch[partners[0]] = partners[1]
        if without is not None:
            self._scratch[without] = NO_RANK
        ranks = self._scratch[neighbours]
        self._scratch[partners[0]] = NO_RANK
        hits = np.flatnonzero(ranks != NO_RANK)
        return hits, ranks[hits]
