"""The loader is a function of seed and step; ranks and micro-batches only share out its rows."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common import UsageError
from data.shards import write_meta, write_shard
from gpt2.loader import Loader, micro_batch_rows, micro_batches

T = 8


@pytest.fixture
def counting(tmp_path):
    """Three train shards whose tokens count 0, 1, 2, … so that a row tells where it comes from; one val shard."""
    shards, start = [], 0
    for split, i, n in [("val", 0, 50), ("train", 1, 100), ("train", 2, 33), ("train", 3, 5)]:
        name = f"c_{split}_{i:06d}.bin"
        write_shard(tmp_path / name, np.arange(start, start + n))
        shards.append({"file": name, "split": split, "documents": 1, "tokens": n, "bytes": n, "sha256": ""})
        start += n
    write_meta(
        tmp_path, name="c", source={}, tokenizer={"name": "", "sha256": ""}, vocab_size=500, eot=0, shards=shards
    )
    return tmp_path


def rows(batch):
    return [tuple(row) for row in batch[0].tolist()]


@pytest.mark.core
def test_targets_are_the_next_tokens_of_one_shard(counting):
    loader = Loader(counting, "train", T, rows_per_step=16)
    assert loader.n_sequences == (100 - 1) // T + (33 - 1) // T  # the last shard is too short for one
    idx, targets = loader.batch(0)
    assert idx.shape == targets.shape == (16, T) and idx.dtype == torch.int64
    assert torch.equal(targets, idx + 1)


@pytest.mark.core
def test_an_epoch_holds_every_sequence_once_and_the_next_another_order(counting):
    """karpathy/build-nanogpt#52: data in the order of the files gives a loss that rises and falls with them."""
    loader = Loader(counting, "train", T, rows_per_step=4, seed=7)
    stream = list(itertools.chain.from_iterable(rows(loader.batch(step)) for step in range(8)))
    assert len(set(stream[:16])) == 16 == loader.n_sequences
    assert set(stream[16:]) == set(stream[:16]) and stream[16:] != stream[:16]
    assert stream[:16] != sorted(stream[:16])


def test_a_step_may_cross_epochs_and_steps_may_come_in_any_order(counting):
    loader = Loader(counting, "train", T, rows_per_step=5, seed=7)
    forwards = [rows(loader.batch(step)) for step in range(10)]
    fresh = Loader(counting, "train", T, rows_per_step=5, seed=7)
    assert [rows(fresh.batch(step)) for step in reversed(range(10))] == forwards[::-1]
    assert forwards[0] != rows(Loader(counting, "train", T, rows_per_step=5, seed=8).batch(0))


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 8), (1, 2), (2, 4), (4, 1)])
def test_rows_are_disjoint_across_ranks_and_independent_of_the_micro_batch(counting, world_size, micro_batch_size):
    """karpathy/build-nanogpt#105, #109, #23: ranks drift apart at shard ends. The step's rows come from two shards."""
    loader = Loader(counting, "train", T, rows_per_step=8)
    accum = 8 // (world_size * micro_batch_size)
    seen = []
    for micro_step in range(accum):
        for rank in range(world_size):
            seen += rows(loader.batch(3, micro_batch_rows(micro_step, rank, accum, micro_batch_size)))
    assert len(set(seen)) == 8 and set(seen) == set(rows(loader.batch(3)))
    assert len({row[0] < 150 for row in seen}) == 2


@pytest.mark.parametrize("start", [0, 5])
def test_micro_batches_are_the_loaders_rows_from_any_step_on(counting, start):
    loader = Loader(counting, "train", T, rows_per_step=8)
    ranks = SimpleNamespace(rank=1, world_size=2, device=torch.device("cpu"))
    batches = micro_batches(loader, ranks, 2, 2, start)
    for step in range(start, start + 3):
        for micro_step in range(2):
            for got, expected in zip(next(batches), loader.batch(step, micro_batch_rows(micro_step, 1, 2, 2))):
                assert torch.equal(got, expected)


def test_rows_in_order_fill_the_last_batch_with_masked_targets(counting):
    loader = Loader(counting, "val", T)
    assert loader.n_sequences == 6
    idx, targets = loader.in_order(first=3, count=4)
    assert idx[:, 0].tolist() == [24, 32, 40, 40]  # sequences 3, 4, 5 and no 6
    assert torch.equal(targets[:3], idx[:3] + 1) and (targets[3] == -1).all()


def test_a_corpus_too_small_for_one_sequence_is_refused(counting):
    with pytest.raises(UsageError, match="no sequence of 64 tokens"):
        Loader(counting, "val", 64)
    with pytest.raises(UsageError, match=r"no meta\.json"):
        Loader(counting / "nowhere", "val", 8)


def test_aligned_sequences_begin_with_the_document_that_their_first_token_is_in(tmp_path):
    """Documents of 1 to 30 tokens, each opened by 0; the slow way to say it: step back from each place of the grid."""
    rng = np.random.default_rng(0)
    ids = np.concatenate([[0, *rng.integers(1, 500, rng.integers(30))] for _ in range(60)])
    write_shard(tmp_path / "c_train_000001.bin", ids)
    shards = [{"file": "c_train_000001.bin", "split": "train", "documents": 60, "tokens": len(ids), "bytes": 1}]
    write_meta(tmp_path, name="c", source={}, tokenizer={}, vocab_size=500, eot=0, shards=shards)
    loader, moved = Loader(tmp_path, "train", T, eot=0), 0
    for i in range(loader.n_sequences):
        at = next((at for at in range(i * T, max(-1, i * T - T), -1) if ids[at] == 0), i * T)
        assert loader.sequence(i).tolist() == ids[at : at + T + 1].tolist()
        moved += at < i * T
    assert moved > loader.n_sequences // 3
    plain = Loader(tmp_path, "train", T)
    assert [plain.sequence(i).tolist() for i in range(9)] == [ids[i * T : i * T + T + 1].tolist() for i in range(9)]
