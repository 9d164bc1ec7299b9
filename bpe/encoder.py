"""Apply merges to bytes: vectorised, with the same result as `bpe/reference.py` (lowest rank first, left to right).

Chunks seen before come from a cache: a hash table maps a chunk to a range in a pool of ids, and the ids of a text are
one gather from that pool. Chinese, Japanese, Thai and others write whole clauses without a space; such chunks are cut
further, between two characters that no token joins, so that most pieces are in the cache. New chunks are merged
together, in one flat array of linked tokens:

    many short chunks   in rounds: each merges the best pair of every chunk
    all others          rank by rank in ascending order, each rank at all its positions

The second is linear in the length of the text, whether it is "a" * 10**6 or a book without spaces: a merge creates only
pairs that contain its new token, so a position is visited again only when a neighbour changes.
"""

import heapq
from functools import partial
from itertools import pairwise

import numpy as np

from bpe.chunk_table import NO_RANK, PADDING, ChunkTable, PairRanks
from bpe.pretokenizer import BLOCK, PADDED_END
from bpe.trainer import DEAD, SEP, LinkedTokens, flat

MANY = 48  # chunks; with fewer, a round of numpy calls costs more than it saves
LONG = 64  # mean bytes of a chunk up to which chunks are merged in rounds, and the maximum number of rounds
MAX_CHUNKS = 1 << 19  # in the cache: a table of 32 MB
MAX_POOL = 1 << 22  # ids in the cache
MAX_SHORT = 1 << 16  # chunks in the cache of short texts


class Encoder:
    """Merges prepared for encoding.

    merges: {(int, int): int} in order of rank. byte_ids: the token id of each of the 256 bytes; a byte whose id is
        negative is dropped from the text. vocab: {int: bytes}, all tokens. whole: {bytes: id}, chunks that become one
        token regardless of the merges.

    Internal ids are dense: 0..255 for the bytes, 256 + k for the k-th new token; `_outer` maps them to the caller's.
    """

    def __init__(self, merges, byte_ids, vocab, whole):
        inner = {token: b for b, token in enumerate(byte_ids)}
        for token in merges.values():
            inner.setdefault(token, len(inner))  # two merges may make the same token
        self._missing = np.array([token < 0 for token in byte_ids])
        self._outer_ids = [*inner]
        self._outer = np.array([*inner, SEP], np.int32)  # SEP is -1: it picks the last entry
        self._merges = [(inner[p], inner[q], inner[token]) for (p, q), token in merges.items()]
        self._rank = {(p, q): rank for rank, (p, q, _) in enumerate(self._merges)}
        p, q, self._made = np.array(self._merges, np.int64).reshape(-1, 3).T.copy()
        first_use, order = np.full(len(inner), NO_RANK), np.arange(len(p))
        for part in (p, q):
            np.minimum.at(first_use, part, order)
        self._early = set(np.flatnonzero(first_use[self._made] < order).tolist())  # whose tokens lower ranks use
        self._pair_ranks, ids = PairRanks(p, q, len(inner)), np.arange(SEP, 256)
        self._byte_pair_ranks = self._pair_ranks(np.repeat(ids, 257), np.tile(ids, 257))  # the first that are needed
        self._whole, self._crossed = whole, _crossed(vocab.values(), self._missing)
        # A call takes a cache from this list and puts it back when it is done: threads never share one, no lock is held
        # when a process forks, and a cache that an interrupt left half-filled is never used again.
        self._idle = []
        self._short = {}  # chunk of a short text -> list of its ids

    def encode(self, splitter, texts):
        """Splitter and list of str -> (ids of all texts (n,) int32, how many of them each text has (len(texts),))."""
        try:
            cache = self._idle.pop()
        except IndexError:
            cache = _Cache()
        ids, lengths = [self._outer[:0]], np.zeros(len(texts), np.int64)
        for block in splitter.blocks(texts, BLOCK):
            data, starts = splitter.split([piece for _, piece in block])
            starts, is_part = self._cut(data, starts)
            places = cache.table.values(data, starts, partial(self._add, cache, data))
            tokens = np.flatnonzero(places < 0)  # see _add
            token, merged = ~places[tokens] >> 32 << 32 | 1, ~places[tokens] + (1 << 32) - 1
            places[tokens] = np.where(is_part[tokens], merged, token)
            count = places & 0xFFFFFFFF
            ends = count.cumsum()
            at = np.repeat((places >> 32) - (ends - count), count)
            at += np.arange(len(at))
            ids.append(cache.pool.take(at))
            borders = starts.searchsorted(np.flatnonzero(data == 0xFF))  # the last chunk of each piece
            np.add.at(lengths, [number for number, _ in block], np.diff(ends[borders], prepend=0))
            if len(cache.table) > MAX_CHUNKS or cache.used > MAX_POOL:
                cache = _Cache()
        self._idle.append(cache)
        return np.concatenate(ids), lengths

    def encode_short(self, splitter, text):
        """The same for one text of a few lines that `STABLE` matches -> list of ids, without the overhead of numpy."""
        if len(self._short) > MAX_SHORT:
            self._short = {}  # a new dict: other threads may still read the old one
        chunks, known = splitter.findall(text), self._short
        for chunk in chunks:
            if chunk not in known:
                known[chunk] = self._merge_one(chunk.encode("utf-8"))
        return [token for chunk in chunks for token in known[chunk]]

    def _merge_one(self, data):
        """Bytes of one chunk -> list of ids."""
        if data in self._whole:
            return [self._whole[data]]
        if len(data) > LONG:  # quadratic below
            return self.merge(*flat([data]))[0].tolist()
        rank_of = self._rank.get
        tokens = merge_few(
            [b for b in data if not self._missing[b]],
            lambda p, q: rank_of((p, q), NO_RANK),
            lambda p, q: self._merges[rank_of((p, q))][2],
        )
        return [self._outer_ids[token] for token in tokens]

    def _add(self, cache, data, starts, lengths):
        """Merge the new chunks that start in `data` -> their values in the cache.

        A chunk of `_whole` has the value ~v: its first id in the pool is its token, the others what the merges make of
        it where it is a part of a chunk.
        """
        order = np.argsort(-lengths)  # longest first, so that _merge_by_rounds has less to do with every round
        starts, lengths = starts[order], lengths[order]
        at = np.repeat(starts - (lengths.cumsum() - lengths), lengths)
        at += np.arange(len(at))
        ids, counts = self.merge(data.take(at), lengths)
        is_token = np.zeros(len(starts), bool)
        if self._whole:
            names = (data[i : i + n].tobytes() for i, n in zip(starts.tolist(), lengths.tolist()))
            tokens = np.array([self._whole.get(name, SEP) for name in names], np.int32)
            is_token = tokens != SEP
            ids = np.insert(ids, (counts.cumsum() - counts)[is_token], tokens[is_token])
        places = cache.add(ids, counts + is_token)
        values = np.empty(len(starts), np.int64)
        values[order] = np.where(is_token, ~places, places)
        return values

    def _cut(self, data, starts):
        """Starts of chunks, as Splitter.split returns them -> (starts of pieces, mask of those that are not whole)."""
        used = data[: len(data) - PADDING]
        at, is_part = np.flatnonzero(used >= 0xE0), np.zeros(len(starts), bool)
        if not len(at):
            return starts, is_part
        window = np.ndarray(len(used), np.dtype("<u4"), data, strides=(1,)).take(at - 2, mode="clip")
        between = (window & 0xC0E0C0C0) == 0x80E08080  # two characters of at least three bytes
        at = at[between & ~self._crossed.take(_place(window))]
        if len(at):
            mark = np.zeros(len(used), np.uint8)
            mark[at] = 1
            mark[starts] = 2
            starts = np.flatnonzero(mark)
            is_part = mark[starts] == 1
            is_part[:-1] |= is_part[1:]
        return starts, is_part

    def merge(self, data, lengths):
        """Bytes of chunks concatenated, how many each has -> (their ids concatenated, how many each has)."""
        if self._missing.any():
            kept, of = ~self._missing[data], np.repeat(np.arange(len(lengths)), lengths)
            data, lengths = data[kept], np.bincount(of[kept], minlength=len(lengths))
        tokens = LinkedTokens(data, lengths)
        are_short = len(lengths) >= MANY and len(data) <= LONG * len(lengths)
        if not (are_short and self._merge_by_rounds(tokens)):
            self._merge_by_rank(tokens)
        tokens.compact()
        borders = np.flatnonzero(tokens.tok == SEP)
        return self._outer[tokens.tok[tokens.tok != SEP]], np.diff(borders) - 1

    def _merge_by_rounds(self, tokens):
        """Up to LONG rounds, each of which merges the best pair of every chunk -> whether no chunk has one any more."""
        tok, next_, prev = tokens.tok, tokens.next, tokens.prev
        begins = np.flatnonzero(tok == SEP)  # each chunk from the SEP before it
        lengths = np.diff(begins) - 1
        rank = np.append(self._byte_pair_ranks.take((tok[:-1] - SEP) * 257 + tok[1:] - SEP), NO_RANK)
        bits = len(tok).bit_length()
        key = rank << bits | np.arange(len(tok))  # the minimum has the lowest rank and is the leftmost of that rank
        for done in range(LONG):
            unfinished = np.flatnonzero(lengths - done > 1)  # the others have merged all their bytes
            if not len(unfinished):
                return True
            n = unfinished[-1] + 1
            best = np.minimum.reduceat(key[: begins[n]], begins[:n])
            best = best[best < NO_RANK << bits]
            if not len(best):
                return True
            at = best & ((1 << bits) - 1)
            gone = next_[at]
            after, before, new = next_[gone], prev[at], self._made[best >> bits]
            tok[at], tok[gone] = new, DEAD
            next_[at], prev[after] = after, at
            key[gone] = NO_RANK << bits
            changed = np.append(at, before)
            key[changed] = self._pair_ranks(tok[changed], tok[next_[changed]]) << bits | changed
        return False

    def _merge_by_rank(self, tokens):
        """Rank by rank, each at all its positions, or at the leftmost if its token is part of a merge of lower rank."""
        tokens.compact()
        todo, rank_of = _Agenda(), self._rank.get
        todo.add(np.arange(len(tokens.tok) - 1), self._pair_ranks(tokens.tok[:-1], tokens.tok[1:]))
        while todo.ranks:
            rank = heapq.heappop(todo.ranks)
            p, q, new = self._merges[rank]
            where = todo.where.pop(rank)
            if rank in self._early and len(where) > 1:
                where, todo.where[rank] = where[:1], where[1:]
                heapq.heappush(todo.ranks, rank)
            where = tokens.occurrences(where, p, q)
            if not len(where):
                continue
            done, before, left, right = tokens.merge(where, p, q, new)
            if isinstance(done, list):
                todo.add(done, [rank_of((new, x), NO_RANK) for x in right])
                todo.add(before, [rank_of((x, new), NO_RANK) for x in left])
            else:
                todo.add(done, self._pair_ranks(new, right))
                todo.add(before, self._pair_ranks(left, new))


class _Cache:
    """A ChunkTable whose values are ranges in a pool of ids: place << 32 | length."""

    def __init__(self):
        self.pool, self.used, self.table = np.zeros(0, np.int32), 0, ChunkTable()
        # the byte 0xFF, which ends each text and is in none, has no ids
        self.table.values(np.frombuffer(PADDED_END, np.uint8), np.zeros(1, np.int64), lambda *_: 0)

    def add(self, ids, lengths):
        """Ids of new chunks concatenated, and how many each has -> their values."""
        if self.used + len(ids) > len(self.pool):
            self.pool = np.append(self.pool, np.empty(self.used + len(ids), np.int32))
        self.pool[self.used : self.used + len(ids)] = ids
        places = self.used + np.cumsum(lengths) - lengths
        self.used += len(ids)
        return places << 32 | lengths


class _Agenda:
    """The positions at which each rank may occur, as a priority queue of ranks."""

    def __init__(self):
        self.ranks = []  # heap
        self.where = {}  # rank -> ascending positions

    def add(self, where, ranks):
        """Add ascending positions, each with the rank of its pair or NO_RANK: two arrays, or two lists."""
        found = {}
        if isinstance(where, list):
            for i, rank in zip(where, ranks):
                if rank != NO_RANK:
                    found.setdefault(rank, []).append(i)
        elif len(order := np.flatnonzero(ranks != NO_RANK)):
            order = order[ranks[order].argsort(kind="stable")]
            ranks, where = ranks[order], where[order]
            ends = np.flatnonzero(ranks[1:] != ranks[:-1]) + 1
            found = {int(ranks[start]): where[start:end] for start, end in pairwise([0, *ends.tolist(), len(where)])}
        for rank, positions in found.items():
            if rank in self.where:  # a pair of two equal tokens, or two merges make the same token
                self.where[rank] = np.union1d(self.where[rank], positions)
            else:
                self.where[rank] = positions
                heapq.heappush(self.ranks, rank)


def merge_few(tokens, rank_of, join):
    """Merge a list of tokens in place, in plain Python and in quadratic time -> the list.

    rank_of: two neighbours -> their rank, NO_RANK if they are not merged. join: two neighbours -> the token they make.
    """
    ranks = [rank_of(p, q) for p, q in pairwise(tokens)]
    while ranks and (best := min(ranks)) < NO_RANK:
        i = ranks.index(best)
        tokens[i] = join(tokens[i], tokens.pop(i + 1))
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank_of(tokens[i - 1], tokens[i])
        if i < len(ranks):
            ranks[i] = rank_of(tokens[i], tokens[i + 1])
    return tokens


def _crossed(tokens, missing):
    """Which borders between characters, given by the two bytes on each side, may lie inside a token -> mask by _place.

    All of them if a byte that such characters contain is missing: dropping it from the text makes new neighbours.
    """
    crossed = np.full(1 << 20, missing[0x80:0xC0].any() or missing[0xE0:0xF5].any())
    data = np.frombuffer(b"\0\0".join(tokens).join([b"\0\0", b"\0\0"]), np.uint8)
    windows = data.take(np.flatnonzero(data >= 0xE0)[:, None] + np.arange(-2, 2))
    windows = windows[windows[:, 1] & 0xC0 == 0x80]
    for k in (0, 3):  # outside the token: any of the 64 continuation bytes
        is_open = windows[:, k] & 0xC0 != 0x80
        more = windows[is_open].repeat(64, axis=0)
        more[:, k] = np.resize(np.arange(0x80, 0xC0), len(more))
        windows = np.concatenate([windows[~is_open], more])
    crossed[_place(windows.view("<u4")[:, 0])] = True
    return crossed


def _place(windows):
    """Hash of four bytes (uint32) to 20 bits; a collision can only make the cuts fewer."""
    return windows * np.uint32(0x9E3779B1) >> np.uint32(12)
