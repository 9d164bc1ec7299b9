"""Hash tables in numpy: all chunks of a text, or many pairs of ids, are looked up at once.

The key of a chunk of up to 7 bytes is one 64-bit word, read from the text in place, with the length in its last byte;
for up to LONGEST bytes it is three such words. Keys are hashed to the rows of a table with open addressing and linear
probing. Longer chunks are rare and kept in a dict.
"""

import numpy as np

from common import UsageError

NO_RANK = 2**31 - 1  # of a pair that is not merged
EMPTY = np.uint64(2**64 - 1)  # row of PairRanks: the number of no pair
LONGEST = 23  # bytes of a chunk in the table
PADDING = 24  # bytes after the last chunk, so that three words can be read at any position
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # odd, random bits
# The bits of each word that belong to a chunk of each length: (3, LONGEST + 1)
BITS = np.array([[(1 << 8 * min(max(n - 8 * k, 0), 8)) - 1 for n in range(LONGEST + 1)] for k in range(3)], np.uint64)


class ChunkTable:
    """Maps chunks to integers."""

    def __init__(self):
        self.tables, self.long = (Table(1), Table(3)), {}

    def __len__(self):
        return sum(table.used for table in self.tables) + len(self.long)

    def values(self, data, starts, make):
        """The values of the chunks that start at `starts` in `data`, as Splitter.split returns them -> (n,) int64.

        make: called with the starts and the lengths of those that are not in the table, in order of first appearance
            -> their values.
        """
        lengths, values = np.diff(starts, append=len(data) - PADDING), np.empty(len(starts), np.int64)
        is_short, words = lengths < 8, np.ndarray(len(data) - 7, np.dtype("<u8"), data, strides=(1,)).copy()
        groups = np.flatnonzero(is_short), np.flatnonzero(~is_short & (lengths <= LONGEST))
        found = []  # words: the one at each byte
        for table, at in zip(self.tables, groups):
            rows = table.insert(_key(words, starts.take(at), lengths.take(at), table.n_words))
            found.append((*rows, at))
        long = np.flatnonzero(lengths > LONGEST)
        names = [data[i : i + n].tobytes() for i, n in zip(starts[long].tolist(), lengths[long].tolist())]
        unknown = {name: i for name, i in zip(reversed(names), reversed(long.tolist())) if name not in self.long}
        new = [at[first] for _, first, _, _, at in found] + [np.array([*unknown.values()], np.int64)]
        if any(map(len, new)):
            order = np.sort(np.concatenate(new))
            values[order] = make(starts[order], lengths[order])
            for table, (slots, first, _, _, at) in zip(self.tables, found):
                table.rows[slots[first], -1] = values[at[first]]
            self.long |= {name: int(values[i]) for name, i in unknown.items()}
        for table, (slots, _, rows, fresh, at) in zip(self.tables, found):
            rows[fresh] = table.rows.take(slots[fresh], axis=0)
            values[at] = rows[:, -1].view(np.int64)
        values[long] = [self.long[name] for name in names]
        return values


class Table:
    """Rows of a key (n_words words) and a value; the last word of the key is 0 in an empty row."""

    def __init__(self, n_words):
        self.n_words, self.used = n_words, 0
        self.rows = np.zeros((1 << 14, n_words + 1), np.uint64)

    def insert(self, words):
        """Keys, a list of n_words arrays (n,) -> (the row of each, the indices of new keys: of equal ones the first).

        The value of a new key is its index in `words`; the caller replaces it.
        """
        slots, found = self.find(words)
        todo = fresh = np.flatnonzero(found[:, -2] == 0)
        first = [slots[:0]]
        while len(todo):
            back = todo[::-1]  # the first of equal keys is written last, and stays
            self.rows[slots[back]] = np.stack([*(w[back] for w in words), back.view(np.uint64)], axis=1)
            rows = self.rows.take(slots[todo], axis=0)
            first.append(todo[rows[:, -1].view(np.int64) == todo])
            self.used += len(first[-1])
            todo = todo[_differ(rows, [w[todo] for w in words])]  # another key has taken its row
            if 2 * self.used > len(self.rows):
                self._grow()
                slots, _ = self.find(words)
            slots[todo], _ = self.find([w[todo] for w in words])
        return slots, np.concatenate(first), found, fresh

    def find(self, words):
        """Keys, as for `insert` -> (where the row of each key is, or would be inserted; the rows themselves)."""
        shift = np.uint64(65 - len(self.rows).bit_length())
        mixed = [w * m for w, m in zip(words, MIX)]
        slots = ((mixed[0] if len(mixed) == 1 else mixed[0] + mixed[1] + mixed[2]) >> shift).view(np.int64)
        rows = self.rows.take(slots, axis=0)
        todo = np.flatnonzero(_differ(rows, words))
        while len(todo):
            slots[todo] = (slots[todo] + 1) & (len(self.rows) - 1)
            rows[todo] = self.rows.take(slots[todo], axis=0)
            todo = todo[_differ(rows[todo], [w[todo] for w in words])]
        return slots, rows

    def _grow(self):
        old = self.rows[self.rows[:, -2] != 0]
        self.rows, self.used = np.zeros((4 * len(self.rows), self.n_words + 1), np.uint64), 0
        slots = self.insert([old[:, k].copy() for k in range(self.n_words)])[0]
        self.rows[slots, -1] = old[:, -1]


def _differ(rows, words):
    """Whether the rows hold other keys."""
    differ = rows[:, 0] != words[0]
    for k in range(1, len(words)):
        differ |= rows[:, k] != words[k]
    return differ & (rows[:, -2] != 0)


def _key(words, starts, lengths, n_words):
    """The key of each chunk: a list of n_words arrays (n,). words: the one at each byte."""
    key = [words.take(starts + 8 * k) & BITS[k].take(lengths) for k in range(n_words)]
    key[-1] |= lengths.view(np.uint64) << np.uint64(56)
    return key


class PairRanks:
    """The rank of each pair of ids that is merged.

    A pair is in one of two rows (cuckoo hashing, Pagh and Rodler 2001), so that many are looked up without a loop.
    """

    def __init__(self, left, right, n_ids):
        """left, right: the pairs in order of rank. n_ids: all ids are smaller."""
        self.n_ids, self.bits = np.int64(n_ids), np.uint64(len(left).bit_length())
        if int(self.bits) + 2 * n_ids.bit_length() > 64:
            raise UsageError(f"{n_ids:,} tokens are more than fit: a pair and its rank share one 64-bit word")
        self.mask = (np.uint64(1) << self.bits) - np.uint64(1)
        pairs, size = self._numbers(left, right), 2 << len(left).bit_length()
        while not self._place(pairs, size):
            size *= 2

    def __call__(self, left, right):
        """Ranks of the pairs (left[i], right[i]), NO_RANK for a pair of no merge; an id may be -1, one side an int."""
        pairs = self._numbers(left, right)
        row, other = (self.rows.take(slots) for slots in self._slots(pairs))
        row = np.where(row >> self.bits == pairs, row, other)
        return np.where(row >> self.bits == pairs, (row & self.mask).view(np.int64), NO_RANK)

    def _place(self, pairs, size):
        """Fill a table of `size` rows -> whether all pairs have one."""
        self.shift = np.uint64(65 - size.bit_length())
        rows, slots = np.full(size, -1), np.stack(self._slots(pairs))
        todo, turn = np.arange(len(pairs)), np.zeros(len(pairs), np.int64)  # turn: which of its two rows
        for _ in range(100):
            at = slots[turn[todo], todo]
            evicted = np.unique(rows[at])
            rows[at] = todo  # of several, the last one
            todo = np.concatenate([todo[rows[at] != todo], evicted[evicted >= 0]])
            turn[todo] ^= 1
        used = np.flatnonzero(rows >= 0)
        self.rows = np.full(size, EMPTY)
        self.rows[used] = pairs[rows[used]] << self.bits | rows[used].view(np.uint64)
        return not len(todo)

    def _numbers(self, left, right):
        """A number for each pair; a pair with an id of -1 has that of no other."""
        return (left * (self.n_ids + 1) + right + 1).view(np.uint64)

    def _slots(self, pairs):
        return [(pairs * m >> self.shift).view(np.int64) for m in MIX[:2]]
