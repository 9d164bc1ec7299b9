"""Apply merges to bytes, fast, and exactly as `bpe/reference.py` does: lowest rank first, from the left.

Three ways to the same ids:

    a few short chunks   each rescanned in plain Python until no pair of it is in the merges
    many short chunks    one row each of a table; each round merges the best pair of every row, in numpy
    long chunks          one flat array of linked tokens; the ranks that occur are merged in ascending order, each at
                         all its positions together

The last one is linear in the length, for "a" * 10**6 and a book without spaces alike: a merge can only bring about
pairs that hold its new token, so a place is looked at when a neighbour changes and never again.
"""

import heapq
from itertools import pairwise

import numpy as np

from bpe.trainer import SEP, LinkedTokens

NO_RANK = 2**31 - 1
MANY = 48  # chunks; below it, setting up arrays costs more than it saves
SHORT = 160  # bytes of one of a few chunks; the same
ROW_WIDTH = 16  # bytes of one of many chunks; a table of longer rows would be mostly shifting


class Encoder:
    """Merges prepared for encoding.

    merges: {(int, int): int} in order of rank. byte_ids: the token id of each of the 256 bytes.

    Inside, ids are dense: 0..255 for the bytes, 256 + k for the k-th new token; `_outer` maps back to the caller's.
    """

    def __init__(self, merges, byte_ids):
        inner = {token: b for b, token in enumerate(byte_ids)}
        for token in merges.values():
            inner.setdefault(token, len(inner))  # two merges may make the same token
        self._outer = [*inner, SEP]  # SEP is -1: it picks the last entry
        self._outer_table = np.array(self._outer)
        self._merges = [(inner[p], inner[q], inner[token]) for (p, q), token in merges.items()]
        self._rank = {(p, q): rank for rank, (p, q, _) in enumerate(self._merges)}
        self._tables = _RankTables(self._merges, len(inner))

    def encode_all(self, chunks):
        """list of bytes -> list of lists of ids."""
        many = len(chunks) >= MANY
        limit = ROW_WIDTH if many else SHORT
        short, long = [c for c in chunks if len(c) <= limit], [c for c in chunks if len(c) > limit]
        short = iter(self._encode_rows(short) if many else map(self._encode_short, short))
        long = iter(self._encode_long(long) if long else ())
        return [next(short if len(c) <= limit else long) for c in chunks]

    def _encode_short(self, data):
        """Merge the pair of lowest rank wherever it is, until there is none."""
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

    def _encode_rows(self, chunks):
        """The same with all chunks at once, one merge of each chunk per round."""
        tables = self._tables
        tok, rank = tables.rows(chunks)  # (n_rows, ROW_WIDTH) each; rank[i, j] is that of the pair at j and j + 1
        result, rows, column = np.empty_like(tok), np.arange(len(tok)), np.arange(ROW_WIDTH - 1)
        while len(rows):
            at = rank.argmin(axis=1)  # the first of equals, so from the left
            live = rank[np.arange(len(rows)), at] != NO_RANK
            if not live.all():  # continue with the rows that are not done
                result[rows] = tok
                rows, tok, rank, at = (a[live] for a in (rows, tok, rank, at))
            each = np.arange(len(rows))
            new = tables.made[rank[each, at]]
            # close the gap that the right half leaves, then look at the two pairs that the new token is part of
            beyond = column > at[:, None]
            for table, filler in ((tok, SEP), (rank, NO_RANK)):
                np.copyto(table[:, :-1], table[:, 1:].copy(), where=beyond)
                table[:, -1] = filler
            tok[each, at] = new
            rank[each, at] = tables.of_pairs(new, tok[each, at + 1])  # `at` is never the last column
            inner = np.flatnonzero(at)
            left = at[inner] - 1
            rank[inner, left] = tables.of_pairs(tok[inner, left], new[inner])
        used = result != SEP
        ids, ends = self._outer_table[result[used]].tolist(), np.cumsum(used.sum(axis=1)).tolist()
        return [ids[start:end] for start, end in pairwise([0, *ends])]

    def _encode_long(self, chunks):
        """Rank by rank, each at all positions where it occurs."""
        tokens, todo, tables, rank_of = LinkedTokens(chunks), _Agenda(), self._tables, self._rank.get
        todo.add(*tables.of_bytes(tokens.tok))
        while todo.ranks:
            rank, where = todo.pop()
            p, q, new = self._merges[rank]
            where = tokens.occurrences(where, p, q)
            if not len(where):
                continue
            done, before, left, right = tokens.merge(where, p, q, new)
            if isinstance(done, list):
                todo.add(done, [rank_of((new, x), NO_RANK) for x in right])
                todo.add(before, [rank_of((x, new), NO_RANK) for x in left])
            else:
                todo.add(*tables.of_neighbours(tables.after, new, done, right))
                todo.add(*tables.of_neighbours(tables.before, new, before, left))
        tokens.compact()
        borders = np.flatnonzero(tokens.tok == SEP).tolist()
        ids = self._outer_table[tokens.tok].tolist()
        return [ids[start + 1 : end] for start, end in pairwise(borders)]


class _Agenda:
    """Which positions to look at for which rank, lowest rank first."""

    def __init__(self):
        self.ranks = []  # heap
        self.where = {}  # rank -> ascending positions

    def add(self, where, ranks):
        """Add ascending positions, each with the rank of its pair: two arrays, or two lists with NO_RANK among them."""
        found = {}
        if isinstance(where, list):
            for i, rank in zip(where, ranks):
                if rank != NO_RANK:
                    found.setdefault(rank, []).append(i)
        elif len(where):
            order = ranks.argsort(kind="stable")
            ranks, where = ranks[order], where[order]
            ends = np.flatnonzero(ranks[1:] != ranks[:-1]) + 1
            found = {int(ranks[start]): where[start:end] for start, end in pairwise([0, *ends.tolist(), len(where)])}
        for rank, positions in found.items():
            if rank in self.where:  # a pair of two equal tokens, or two merges make the same token
                self.where[rank] = np.union1d(self.where[rank], positions)
            else:
                self.where[rank] = positions
                heapq.heappush(self.ranks, rank)

    def pop(self):
        rank = heapq.heappop(self.ranks)
        return rank, self.where.pop(rank)


class _RankTables:
    """Ranks of many pairs at once."""

    def __init__(self, merges, n_ids):
        p, q, self.made = np.array(merges, np.int64).reshape(-1, 3).T
        self._n_ids = n_ids
        self.after, self.before = self._sorted(p, q), self._sorted(q, p)
        self._bytes = np.full((257, 257), NO_RANK, np.int32)  # row and column 256, which is also -1, for SEP
        of_bytes = np.flatnonzero((p < 256) & (q < 256))
        self._bytes[p[of_bytes], q[of_bytes]] = of_bytes
        self._scratch = np.full(n_ids + 1, NO_RANK, np.int32)  # the last entry, which is also -1, for SEP

    def _sorted(self, token, neighbour):
        """Merges sorted by token -> token * n_ids + neighbour of each, the rank of each, where each token starts."""
        keys = token * self._n_ids + neighbour
        order = np.argsort(keys)
        keys = np.append(keys[order], 2**62)  # above all keys
        starts = keys.searchsorted(np.arange(self._n_ids + 1) * self._n_ids).tolist()
        return keys, np.append(order, NO_RANK).astype(np.int32), starts

    def rows(self, chunks):
        """Chunks of at most ROW_WIDTH bytes -> their tokens and the ranks of their pairs, a row for each chunk."""
        data = b"".join([chunk.ljust(ROW_WIDTH, b"\0") for chunk in chunks])
        tok = np.frombuffer(data, np.uint8).reshape(len(chunks), ROW_WIDTH).astype(np.int32)
        tok[np.arange(ROW_WIDTH) >= np.fromiter(map(len, chunks), np.int64, len(chunks))[:, None]] = SEP
        rank = np.full_like(tok, NO_RANK)
        rank[:, :-1] = self._bytes[tok[:, :-1], tok[:, 1:]]
        return tok, rank

    def of_pairs(self, left, right):
        """Ranks of pairs (left[i], right[i]); right may be SEP."""
        keys, ranks, _ = self.after
        wanted = left * np.int64(self._n_ids) + right
        at = keys.searchsorted(wanted)
        return np.where((keys[at] == wanted) & (right != SEP), ranks[at], NO_RANK)

    def of_bytes(self, tok):
        """Positions whose token and the next one are in the merges, and their ranks; tok holds bytes and SEP."""
        ranks = self._bytes[tok[:-1], tok[1:]]
        where = np.flatnonzero(ranks != NO_RANK)
        return where, ranks[where]

    def of_neighbours(self, table, token, where, neighbours):
        """The same for one token, at the positions `where`, with its neighbours (table: self.after, self.before)."""
        keys, ranks, starts = table
        pairs = slice(starts[token], starts[token + 1])
        if pairs.start == pairs.stop:
            return where[:0], where[:0]
        partners = keys[pairs] - token * self._n_ids
        self._scratch[partners] = ranks[pairs]
        found = self._scratch[neighbours]
        self._scratch[partners] = NO_RANK
        hits = np.flatnonzero(found != NO_RANK)
        return where[hits], found[hits]
