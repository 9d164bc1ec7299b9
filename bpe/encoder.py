"""Apply merges to bytes, fast, and exactly as `bpe/reference.py` does: lowest rank first, from the left.

A chunk that was seen before is looked up: a table maps it to a range of a pool of ids, and the ids of a text are one
gather from that pool. Chinese, Japanese, Thai and others write whole clauses without a space; these chunks are cut
further, between two characters that no token joins, into pieces of which few are new. New ones are merged together, in
one flat array of linked tokens:

    many chunks that are short   each round merges the best pair of every chunk
    others                       the ranks that occur are merged in ascending order, each at all its positions

The second one is linear in the length, for "a" * 10**6 and a book without spaces alike: a merge can only bring about
pairs that hold its new token, so a place is looked at when a neighbour changes and never again.
"""

import heapq
from functools import partial
from itertools import pairwise

import numpy as np

from bpe.chunk_table import PADDING, ChunkTable, Table
from bpe.pretokenizer import PADDED_END
from bpe.trainer import DEAD, SEP, LinkedTokens, flat

NO_RANK = 2**31 - 1
MANY = 48  # chunks; below it, a round of numpy calls costs more than it saves
LONG = 64  # bytes; chunks that are longer are merged rank by rank: they would need many rounds
MAX_CHUNKS = 1 << 19  # remembered at a time: 32 MB of table
MAX_POOL = 1 << 22  # ids of theirs
MAX_SHORT = 1 << 16  # the same, of short texts


class Encoder:
    """Merges prepared for encoding.

    merges: {(int, int): int} in order of rank. byte_ids: the token id of each of the 256 bytes; text loses a byte whose
        id is negative. vocab: {int: bytes}, all tokens. whole: {bytes: id}, the chunks that become one token, whatever
        the merges say.

    Inside, ids are dense: 0..255 for the bytes, 256 + k for the k-th new token; `_outer` maps back to the caller's.
    """

    def __init__(self, merges, byte_ids, vocab, whole):
        inner = {token: b for b, token in enumerate(byte_ids)}
        for token in merges.values():
            inner.setdefault(token, len(inner))  # two merges may make the same token
        self._missing = np.array([token < 0 for token in byte_ids])
        self._outer = np.array([*inner, SEP], np.int32)  # SEP is -1: it picks the last entry
        self._merges = [(inner[p], inner[q], inner[token]) for (p, q), token in merges.items()]
        self._rank = {(p, q): rank for rank, (p, q, _) in enumerate(self._merges)}
        self._tables = _RankTables(self._merges, len(inner))
        self._vocab, self._whole, self._crossed = vocab, whole, None
        # A call takes a cache out, and puts it back when it is done: threads never share one, no lock is held when a
        # process forks, and one that an interrupt left half-filled is simply lost.
        self._idle = []
        self._short = {}  # chunk of a short text -> list of its ids

    def encode(self, splitter, texts):
        """Splitter and list of str -> (ids of all texts (n,) int32, how many of them each text has (len(texts),))."""
        try:
            cache = self._idle.pop()
        except IndexError:
            cache = _Cache()
        ids, lengths = [self._outer[:0]], np.zeros(len(texts), np.int64)
        for block in splitter.blocks(texts):
            data, starts = splitter.split([piece for _, piece in block])
            starts, is_part = self._cut(data, starts)
            places = cache.table.values(data, starts, partial(self._add, cache, data))
            cache.choose(places, is_part)
            count = places & 0xFFFFFFFF
            ends = count.cumsum()
            at = np.repeat((places >> 32) - (ends - count), count)
            at += np.arange(len(at))
            ids.append(cache.pool.take(at))
            total = np.append(0, ends[data.take(starts) == 0xFF])  # up to the end of each piece
            np.add.at(lengths, [number for number, _ in block], np.diff(total))
            if len(cache.table) > MAX_CHUNKS or cache.used > MAX_POOL:
                cache = _Cache()
        self._idle.append(cache)
        return np.concatenate(ids), lengths

    def encode_short(self, splitter, text):
        """The same for one ASCII text of a few lines -> list of ids; there numpy's calls cost more than the work."""
        chunks, known = splitter.findall(text), self._short
        if new := [chunk for chunk in dict.fromkeys(chunks) if chunk not in known]:
            if len(known) > MAX_SHORT:
                known = self._short = {}  # begun anew: another thread still reads the old one
                new = list(dict.fromkeys(chunks))
            encoded = [chunk.encode("ascii") for chunk in new]
            ids, lengths = self._merged(*flat(encoded))
            for chunk, data, part in zip(new, encoded, np.split(ids, lengths.cumsum()[:-1])):
                known[chunk] = [self._whole[data]] if data in self._whole else part.tolist()
        return [token for chunk in chunks for token in known[chunk]]

    def _add(self, cache, data, starts, lengths):
        """Merge the new chunks that start in `data` -> their values in the cache."""
        at = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
        at += np.arange(len(at))
        ids, counts = self._merged(data.take(at), lengths)
        places = cache.add(ids, counts)
        if self._whole:
            names = (data[i : i + n].tobytes() for i, n in zip(starts.tolist(), lengths.tolist()))
            tokens = np.array([self._whole.get(name, SEP) for name in names], np.int32)
            merged = np.append(ids, SEP).take(counts.cumsum() - counts)  # the first id of each
            at = np.flatnonzero((tokens != SEP) & ((counts != 1) | (merged != tokens)))
            choices = np.stack([cache.add(tokens[at], np.ones(len(at), np.int64)), places[at]], axis=1)
            places[at] = ~(len(cache.choices) + np.arange(len(at)))
            cache.choices = np.append(cache.choices, choices, axis=0)
        return places

    def _cut(self, data, starts):
        """Starts of chunks, as Splitter.split returns them -> (starts of pieces, which are but part of a chunk)."""
        if self._crossed is None:  # made here: who only decodes does not wait for it
            self._crossed = _crossed(self._vocab.values(), self._missing)
        used = data[: len(data) - PADDING]
        at = np.flatnonzero(used >= 0xE0)
        window = np.ndarray(len(used), np.dtype("<u4"), data, strides=(1,)).take(at - 2, mode="clip")
        between = (window & 0xC0E0C0C0) == 0x80E08080  # two characters of at least three bytes
        at = at[between & ~self._crossed.take(_place(window))]
        is_part = np.zeros(len(starts), bool)
        if len(at):
            mark = np.zeros(len(used), np.uint8)
            mark[at] = 1
            mark[starts] = 2
            starts = np.flatnonzero(mark)
            is_part = mark[starts] == 1
            is_part[:-1] |= is_part[1:]
        return starts, is_part

    def _merged(self, data, lengths):
        """Bytes of chunks one after another, how many each has -> (ids one after another, how many each has)."""
        if self._missing.any():
            kept, of = ~self._missing[data], np.repeat(np.arange(len(lengths)), lengths)
            data, lengths = data[kept], np.bincount(of[kept], minlength=len(lengths))
        short = lengths <= LONG
        if not short.any() or np.count_nonzero(short) < MANY:
            tokens = self._merge_by_rank(data, lengths)
        elif short.all():
            tokens = self._merge_by_rounds(data, lengths)
        else:
            inside, counts = np.repeat(short, lengths), np.empty(len(lengths), np.int64)
            parts = self._merged(data[inside], lengths[short]), self._merged(data[~inside], lengths[~short])
            counts[short], counts[~short] = parts[0][1], parts[1][1]
            ids, from_short = np.empty(counts.sum(), np.int32), np.repeat(short, counts)
            ids[from_short], ids[~from_short] = parts[0][0], parts[1][0]
            return ids, counts
        tokens.compact()
        borders = np.flatnonzero(tokens.tok == SEP)
        return self._outer[tokens.tok[tokens.tok != SEP]], np.diff(borders) - 1

    def _merge_by_rounds(self, data, lengths):
        """The best pair of each chunk, again and again, until no chunk has one -> LinkedTokens."""
        tokens, tables = LinkedTokens(data, lengths), self._tables
        tok, next_, prev = tokens.tok, tokens.next, tokens.prev
        begins = np.flatnonzero(tok == SEP)[:-1]  # each chunk from the SEP before it
        rank = np.append(tables.of_pairs(tok[:-1], tok[1:]), NO_RANK)
        bits = len(tok).bit_length()
        key = rank << bits | np.arange(len(tok))  # least: the lowest rank, and of equals the first from the left
        while True:
            best = np.minimum.reduceat(key, begins)
            best = best[best < NO_RANK << bits]
            if not len(best):
                return tokens
            at = best & ((1 << bits) - 1)
            gone = next_[at]
            after, before, new = next_[gone], prev[at], tables.made[best >> bits]
            tok[at], tok[gone] = new, DEAD
            next_[at], prev[after] = after, at
            key[gone] = NO_RANK << bits
            changed = np.append(at, before)
            key[changed] = tables.of_pairs(tok[changed], tok[next_[changed]]) << bits | changed

    def _merge_by_rank(self, data, lengths):
        """Rank by rank, each at all positions where it occurs -> LinkedTokens."""
        tokens, todo, tables, rank_of = LinkedTokens(data, lengths), _Agenda(), self._tables, self._rank.get
        todo.add(*_ranked(np.arange(len(tokens.tok) - 1), tables.of_pairs(tokens.tok[:-1], tokens.tok[1:])))
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
                todo.add(*_ranked(done, tables.of_pairs(new, right)))
                todo.add(*_ranked(before, tables.of_pairs(left, new)))
        return tokens


class _Cache:
    """A ChunkTable whose values say where in a pool the ids of a chunk lie: place << 32 | how many."""

    def __init__(self):
        self.pool, self.used, self.table = np.zeros(0, np.int32), 0, ChunkTable()
        # Where a chunk is one token as a whole, but not as a part: both values. ~k stands for row k.
        self.choices = np.zeros((0, 2), np.int64)
        # no text holds 0xFF: it stands after each text, for no id
        self.table.values(np.frombuffer(PADDED_END, np.uint8), np.zeros(1, np.int64), lambda *_: 0)

    def choose(self, places, is_part):
        """Replace the values below 0 by those that they stand for."""
        at = np.flatnonzero(places < 0)
        places[at] = self.choices[~places[at], is_part[at].astype(np.int64)]

    def add(self, ids, lengths):
        """Ids of new chunks, one after another, and how many each has -> their values."""
        if self.used + len(ids) > len(self.pool):
            self.pool = np.append(self.pool, np.empty(self.used + len(ids), np.int32))
        self.pool[self.used : self.used + len(ids)] = ids
        places = self.used + np.cumsum(lengths) - lengths
        self.used += len(ids)
        return places << 32 | lengths


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


def _crossed(tokens, missing):
    """Which windows, two bytes to each side of a border between characters, may lie in a token -> mask by _place.

    All, if a byte is missing that could be in one: text that loses it brings others together.
    """
    crossed = np.full(1 << 22, missing[0x80:0xC0].any() or missing[0xE0:0xF5].any())
    data = np.frombuffer(b"\0\0".join([b"", *tokens, b""]), np.uint8)
    windows = data.take(np.flatnonzero(data >= 0xE0)[:, None] + np.arange(-2, 2))
    windows = windows[windows[:, 1] & 0xC0 == 0x80]
    for k in (0, 3):  # beyond the token there may be any of 64 bytes
        is_open = windows[:, k] & 0xC0 != 0x80
        more = windows[is_open].repeat(64, axis=0)
        more[:, k] = np.resize(np.arange(0x80, 0xC0), len(more))
        windows = np.concatenate([windows[~is_open], more])
    crossed[_place(windows.view("<u4")[:, 0])] = True
    return crossed


def _place(windows):
    """Four bytes as uint32 -> a number of 22 bits; two windows with the same one are cut in fewer places, at worst."""
    return windows * np.uint32(0x9E3779B1) >> np.uint32(10)


def _ranked(where, ranks):
    """Those positions that have a rank, and the ranks."""
    hits = np.flatnonzero(ranks != NO_RANK)
    return where[hits], ranks[hits]


class _RankTables:
    """Ranks of many pairs at once."""

    def __init__(self, merges, n_ids):
        p, q, self.made = np.array(merges, np.int64).reshape(-1, 3).T.copy()
        self._width, self._table = n_ids + 1, Table(1)
        slots, _ = self._table.insert(self._keys(p, q))
        self._table.rows[slots, -1] = NO_RANK - np.arange(len(p))  # an empty row has 0 there, which stands for NO_RANK

    def _keys(self, left, right):
        """A word for each pair. SEP, -1, is in no merge, and a pair with it shares its word with none."""
        return [(left * np.int64(self._width) + right + 1).view(np.uint64)]

    def of_pairs(self, left, right):
        """Ranks of pairs (left[i], right[i]); either may be SEP."""
        found = self._table.rows[self._table.find(self._keys(left, right)), -1]
        return NO_RANK - found.view(np.int64)
