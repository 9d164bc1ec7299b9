"""Apply merges to bytes, fast, and exactly as `bpe/reference.py` does: lowest rank first, from the left.

Three ways to the same ids:

    a short chunk           rescanned in plain Python until no pair of it is in the merges
    many short chunks       one row each of a table; each round merges the best pair of every row, in numpy
    long chunks             one flat array of linked tokens; the ranks that occur are merged in ascending order, each at
                            all its positions together

The last one is linear in the length, for "a" * 10**6 and a book without spaces alike: a merge can only bring about
pairs that hold its new token, so a place is looked at when a neighbour changes and never again.
"""

import heapq
from functools import cached_property
from itertools import pairwise

import numpy as np

from bpe.trainer import SEP, LinkedTokens

NO_RANK = 2**31 - 1
SHORT = 160  # bytes of one chunk; below it, setting up arrays costs more than it saves
MANY = 48  # chunks; the same
FEW_PARTNERS = 4  # comparing a few times is faster than looking up
ROW_WIDTHS = (16, 32)  # bytes; a table of longer rows would be mostly shifting


class Encoder:
    """Merges prepared for encoding.

    merges: {(int, int): int} in order of rank. byte_ids: the token id of each of the 256 bytes.

    Inside, ids are dense: 0..255 for the bytes, 256 + k for the k-th new token; `_outer` maps back to the caller's.
    """

    def __init__(self, merges, byte_ids):
        inner = {token: b for b, token in enumerate(byte_ids)}
        for token in merges.values():
            inner.setdefault(token, len(inner))  # two merges may make the same token
        self._outer = list(inner)
        self._merges = [(inner[p], inner[q], inner[token]) for (p, q), token in merges.items()]
        self._rank = {(p, q): rank for rank, (p, q, _) in enumerate(self._merges)}

    @cached_property
    def tables(self):
        return _RankTables(self._merges, len(self._outer))

    @cached_property
    def _outer_table(self):
        return np.array([*self._outer, SEP])  # SEP is -1: it picks the last entry

    def encode(self, data):
        """bytes of one chunk -> list of ids."""
        return self._encode_short(data) if len(data) < SHORT else self._encode_long([data])[0]

    def encode_all(self, chunks):
        """list of bytes -> list of lists of ids."""
        if len(chunks) < MANY:
            return [self.encode(chunk) for chunk in chunks]
        result = [None] * len(chunks)
        width_class = np.searchsorted(ROW_WIDTHS, np.fromiter(map(len, chunks), np.int64, len(chunks)))
        for k, width in enumerate((*ROW_WIDTHS, None)):
            which = np.flatnonzero(width_class == k).tolist()
            if not which:
                continue
            some = [chunks[k] for k in which]
            encoded = self._encode_long(some) if width is None else self._encode_rows(some, width)
            for k, ids in zip(which, encoded):
                result[k] = ids
        return result

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

    def _encode_rows(self, chunks, width):
        """The same with all chunks at once, one merge of each chunk per round."""
        tables, n_rows = self.tables, len(chunks)
        tok, rank = tables.rows(chunks, width)  # (n_rows, width) each; rank[i, j] is that of the pair at j and j + 1
        result = np.full((n_rows, width), SEP, np.int32)
        rows, column = np.arange(n_rows), np.arange(width)
        while len(rows):
            best = rank.argmin(axis=1)  # the first of equals, so from the left
            lowest = rank[np.arange(len(rows)), best]
            live = np.flatnonzero(lowest != NO_RANK)
            if len(live) < 0.8 * len(rows):  # continue with the rows that are not done
                result[rows] = tok
                rows, tok, rank, best, lowest = (a[live] for a in (rows, tok, rank, best, lowest))
                live = np.arange(len(rows))
            elif len(live) < len(rows):
                best[lowest == NO_RANK] = width
            # close the gap that the right half leaves, then look at the two pairs that the new token is part of
            beyond = column[:-1] > best[:, None]
            for table, filler in ((tok, SEP), (rank, NO_RANK)):
                np.copyto(table[:, :-1], table[:, 1:].copy(), where=beyond)
                table[live, -1] = filler
            at, new = best[live], tables.made[lowest[live]]
            tok[live, at] = new
            rank[live, at] = tables.of_pairs(new, tok[live, at + 1])  # `at` is never the last column
            inner = at > 0
            row, left = live[inner], at[inner] - 1
            rank[row, left] = tables.of_pairs(tok[row, left], new[inner])
        used = result != SEP
        ids, ends = self._outer_table[result[used]].tolist(), np.cumsum(used.sum(axis=1)).tolist()
        return [ids[start:end] for start, end in zip([0, *ends], ends)]

    def _encode_long(self, chunks):
        """Rank by rank, each at all positions where it occurs."""
        tokens = LinkedTokens(chunks)
        todo = _Agenda()
        where, ranks = self.tables.of_bytes(tokens.tok)
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
                self._find_many(todo, (new, "after"), done, right)
                self._find_many(todo, (new, "before"), before, left)
        tokens.compact()
        borders = np.flatnonzero(tokens.tok == SEP).tolist()
        ids = self._outer_table[tokens.tok].tolist()
        return [ids[borders[k] + 1 : borders[k + 1]] for k in range(len(chunks))]

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

    def _find_many(self, todo, key, where, neighbours):
        partners = self.tables.partners.get(key, ())
        if len(partners) <= FEW_PARTNERS:
            for x, rank in partners:
                hits = where[neighbours == x]
                if len(hits):
                    todo.add(rank, hits)
        else:
            ranks = self.tables.of_neighbours(key, neighbours)
            hits = np.flatnonzero(ranks != NO_RANK)
            todo.add_grouped(where[hits], ranks[hits])


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
        self.made = np.array([new for _, _, new in merges], np.int32)
        p, q = (np.array([merge[side] for merge in merges], np.int64) for side in (0, 1))
        self._n_ids = n_ids
        order = np.argsort(p * n_ids + q)
        self._keys = np.append((p * n_ids + q)[order], 2**62)  # the last entry catches what is above all keys
        self._ranks = np.append(order, NO_RANK).astype(np.int32)
        self._bytes = np.full((257, 257), NO_RANK, np.int32)  # row and column 256, which is also -1, for SEP
        of_bytes = np.flatnonzero((p < 256) & (q < 256))
        self._bytes[p[of_bytes], q[of_bytes]] = of_bytes
        self._scratch = np.full(n_ids + 1, NO_RANK, np.int32)  # the last entry, which is also -1, for SEP
        self._merges, self._arrays = merges, {}

    @cached_property
    def partners(self):
        """{(token, "after" or "before"): [(x, rank), …]}; (token, token) is among the "after" alone."""
        partners = {}
        for rank, (p, q, _) in enumerate(self._merges):
            partners.setdefault((p, "after"), []).append((q, rank))
            if p != q:
                partners.setdefault((q, "before"), []).append((p, rank))
        return partners

    def rows(self, chunks, width):
        """Chunks of at most `width` bytes -> their tokens and the ranks of their pairs, (len(chunks), width) each."""
        data = b"".join([chunk.ljust(width, b"\0") for chunk in chunks])
        tok = np.frombuffer(data, np.uint8).reshape(len(chunks), width).astype(np.int32)
        tok[np.arange(width) >= np.fromiter(map(len, chunks), np.int64, len(chunks))[:, None]] = SEP
        rank = np.full_like(tok, NO_RANK)
        rank[:, :-1] = self._bytes[tok[:, :-1], tok[:, 1:]]
        return tok, rank

    def of_pairs(self, left, right):
        """Ranks of pairs (left[i], right[i]); right may be SEP."""
        keys = left * np.int64(self._n_ids) + right
        at = self._keys.searchsorted(keys)
        return np.where((self._keys[at] == keys) & (right != SEP), self._ranks[at], NO_RANK)

    def of_bytes(self, tok):
        """Positions whose token and the next one are in the merges, and their ranks; tok holds bytes and SEP."""
        ranks = self._bytes[tok[:-1], tok[1:]]
        where = np.flatnonzero(ranks != NO_RANK)
        return where, ranks[where]

    def of_neighbours(self, key, neighbours):
        """Ranks of the pairs of one token with the tokens after it, or before it."""
        if key not in self._arrays:
            self._arrays[key] = np.array(self.partners[key]).T
        x, ranks = self._arrays[key]
        self._scratch[x] = ranks
        found = self._scratch[neighbours]
        self._scratch[x] = NO_RANK
        return found
