"""A hash table in numpy: a whole text's chunks are looked up together.

A chunk of up to LONGEST bytes is three 64-bit words, read where it lies in the text, with its length in the last byte.
The words are hashed to a row of the table (open addressing: if the row belongs to another chunk, the next one). Longer
chunks are rare and live in a dict.
"""

import numpy as np

LONGEST = 23  # bytes of a chunk in the table
PADDING = 24  # bytes that must follow the last chunk, so that three words can be read from anywhere
NEW, LONG = -1, -2  # instead of a value: just inserted; too long, so look into the dict
MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)  # odd, random bits
# For each length the bits of each word that belong to the chunk: (3, LONGEST + 1)
BITS = np.array([[(1 << 8 * min(max(n - 8 * k, 0), 8)) - 1 for n in range(LONGEST + 1)] for k in range(3)], np.uint64)


class ChunkTable:
    """chunk -> a number of at least 0."""

    def __init__(self):
        self.rows = np.zeros((1 << 10, 4), np.uint64)  # three words and the value; the third word 0: empty
        self.used = 0
        self.long = {}

    def copy(self):
        other = ChunkTable()
        other.rows, other.used, other.long = self.rows.copy(), self.used, self.long.copy()
        return other

    def values(self, data, starts, make):
        """The values of the chunks that start at `starts` in `data`, as Splitter.split returns them -> (n,) int64.

        make: called with the list of those that are not in the table, in order of first appearance -> their values.
        """
        lengths = np.diff(starts, append=len(data) - PADDING)
        slots = self._locate(_words(data, starts, lengths))
        values = self.rows.take(slots, axis=0)[:, 3].view(np.int64)
        new = np.flatnonzero(values == NEW)
        # of equal ones the first, which is written last
        self.rows[slots[new[::-1]], 3] = new[::-1]
        new = new[self.rows[slots[new], 3] == new]
        self.used += len(new)
        is_long = lengths[new] > LONGEST
        self.rows[slots[new[is_long]], 3] = np.uint64(2**64 + LONG)
        new = new[~is_long]
        long = np.flatnonzero(lengths > LONGEST)
        names = [data[i : i + n].tobytes() for i, n in zip(starts[long].tolist(), lengths[long].tolist())]
        unknown = {name: i for name, i in zip(reversed(names), reversed(long.tolist())) if name not in self.long}
        if len(new) or unknown:
            order = np.sort(np.append(new, np.array([*unknown.values()], np.int64)))
            chunks = [data[i : i + n].tobytes() for i, n in zip(starts[order].tolist(), lengths[order].tolist())]
            made = make(chunks)
            short = lengths[order] <= LONGEST
            self.rows[slots[order[short]], 3] = made[short]
            self.long.update((chunks[k], int(made[k])) for k in np.flatnonzero(~short).tolist())
            values = self.rows.take(slots, axis=0)[:, 3].view(np.int64)
        values[long] = [self.long[name] for name in names]
        return values

    def _locate(self, words):
        """The rows of chunks, given as a list of three (n,) words; one that is not there gets a row, of value NEW."""
        self._grow(len(words[0]))
        last = np.int64(len(self.rows) - 1)
        shift = np.uint64(65 - len(self.rows).bit_length())
        slot = ((words[0] * MIX[0] + words[1] * MIX[1] + words[2] * MIX[2]) >> shift).astype(np.int64)
        slots, todo = slot, slice(None)
        while True:
            rows = self.rows.take(slot, axis=0)
            free = np.flatnonzero(rows[:, 2] == 0)
            if len(free):
                new = np.uint64(2**64 + NEW)
                self.rows[slot[free]] = np.stack([*(w[free] for w in words), np.full(len(free), new)], axis=1)
                rows = self.rows.take(slot, axis=0)  # of two chunks that took the same row the last one has it
            taken = (rows[:, 0] != words[0]) | (rows[:, 1] != words[1]) | (rows[:, 2] != words[2])
            again = np.flatnonzero(taken)
            if not len(again):
                return slots
            todo = again if isinstance(todo, slice) else todo[again]
            slot, words = (slot[again] + 1) & last, [w[again] for w in words]
            slots[todo] = slot

    def _grow(self, n):
        """Room for n more chunks with half of the rows left empty."""
        if 2 * (self.used + n) > len(self.rows):
            old = self.rows[self.rows[:, 2] != 0]
            self.rows = np.zeros((1 << (2 * (self.used + n)).bit_length(), 4), np.uint64)
            slots = self._locate([old[:, k].copy() for k in range(3)]) if len(old) else []
            self.rows[slots, 3] = old[:, 3]


def _words(data, starts, lengths):
    """The three words of each chunk, as a list; of a longer one those of its first bytes, and a length above all."""
    at = np.ndarray(len(data) - 7, np.dtype("<u8"), data, strides=(1,))  # the word at each byte
    words = [at.take(starts + 8 * k) & BITS[k].take(lengths, mode="clip") for k in range(3)]
    words[2] |= np.minimum(lengths, LONGEST + 1).astype(np.uint64) << np.uint64(56)
    return words
