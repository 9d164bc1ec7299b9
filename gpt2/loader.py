"""The data loader is a function: `batch(step)` depends on the seed and the step alone.

Each shard is cut into sequences of T tokens; a seeded permutation of all sequences, a new one each epoch, is split
into steps. Rank and micro-batch only decide who computes which rows. So a resumed run needs no loader state, and
neither the number of processes nor the micro-batch size changes what is learned.
"""

from functools import lru_cache
from itertools import count

import numpy as np
import torch

from common import UsageError
from data.shards import open_split


class Loader:
    """Sequences of `block_size` tokens from the shards of one split.

    rows_per_step: sequences that one optimizer step consumes, over all ranks. meta: the folder's manifest, if checked.
    eot: the id that opens documents, to begin a sequence with the one that its first token is in, if that begins less
    than block_size tokens before: fewer are read without their context, some twice, others never.
    """

    def __init__(self, data_dir, split, block_size, rows_per_step=1, seed=0, meta=None, eot=None):
        self.shards = open_split(data_dir, split, meta)  # memory-mapped uint16, (tokens,) each
        self.block_size, self.rows_per_step, self.seed, self.eot = block_size, rows_per_step, seed, eot
        # Sequence i of a shard is tokens [i T, i T + T], its last token being the last target, hence the -1.
        per_shard = [max(0, (len(shard) - 1) // block_size) for shard in self.shards]
        self.first = np.concatenate([[0], np.cumsum(per_shard)])  # sequence number at which each shard begins
        self.n_sequences = int(self.first[-1])
        if self.n_sequences < 1:
            raise UsageError(
                f"the {split} shards in {data_dir} hold no sequence of {block_size} tokens; lower --block-size"
            )
        self.permutation = lru_cache(2)(self._permutation)  # a step touches two epochs at the most

    def sequence(self, i):
        """Tokens i T … i T + T of the corpus: (T + 1,) uint16, inputs and targets overlapping by T - 1."""
        number, T = int(np.searchsorted(self.first, i, side="right")) - 1, self.block_size
        shard, at = self.shards[number], (i - int(self.first[number])) * T
        if self.eot is not None and len(begins := np.flatnonzero(shard[max(0, at - T + 1) : at + 1] == self.eot)):
            at = max(0, at - T + 1) + int(begins[-1])
        return shard[at : at + T + 1]

    def _permutation(self, epoch):
        shuffled = np.arange(self.n_sequences, dtype=np.uint32 if self.n_sequences < 2**32 else np.uint64)
        np.random.default_rng([self.seed, epoch]).shuffle(shuffled)
        return shuffled

    def batch(self, step, rows=None):
        """Rows of the step's batch -> (idx, targets), each (len(rows), T) int64. rows: a range; None: all of them."""
        rows = range(self.rows_per_step) if rows is None else rows
        # Where the rows stand in the endless shuffled stream: (epoch, place in its permutation).
        places = [divmod(step * self.rows_per_step + row, self.n_sequences) for row in rows]
        return _stack([self.sequence(int(self.permutation(epoch)[place])) for epoch, place in places])

    def in_order(self, first, count, n=None):
        """`count` sequences from `first` on as they stand in the shards; targets are -1 from sequence n on.

        The fixed rows fill the last batch of an evaluation, so that every batch has one shape.
        """
        n = self.n_sequences if n is None else n
        picks = range(first, first + count)
        idx, targets = _stack([self.sequence(min(i, n - 1)) for i in picks])
        targets[[i >= n for i in picks]] = -1
        return idx, targets


def _stack(sequences):
    tokens = torch.from_numpy(np.stack(sequences).astype(np.int64))  # (rows, T + 1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def micro_batch_rows(micro_step, rank, grad_accum_steps, micro_batch_size):
    """The rows of a step's batch that `rank` computes in `micro_step`: each rank has one block of consecutive rows."""
    start = (rank * grad_accum_steps + micro_step) * micro_batch_size
    return range(start, start + micro_batch_size)


def micro_batches(loader, ranks, micro_batch_size, grad_accum_steps, step):
    """Yield a rank's (idx, targets) from `step` on, on its device; pinned, so that the copy waits for no GPU."""
    for i in count(step * grad_accum_steps):
        step, micro_step = divmod(i, grad_accum_steps)
        rows = micro_batch_rows(micro_step, ranks.rank, grad_accum_steps, micro_batch_size)
        tensors = loader.batch(step, rows)  # (micro_batch_size, T) each
        tensors = [t.pin_memory() for t in tensors] if ranks.device.type == "cuda" else tensors
        yield [t.to(ranks.device, non_blocking=True) for t in tensors]
