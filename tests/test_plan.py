"""gpt2/plan.py: the estimate of a step's memory against an accounting of its fake tensors, and the micro-batch."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.bench_gpt2 import counted_memory
from gpt2 import train_gpt2
from gpt2.config import PRESETS, TrainConfig
from gpt2.model import meta_model
from gpt2.plan import fitting_micro_batch, memory_estimate

CPU, GB = torch.device("cpu"), 10**9


def estimated(cfg, rows, device="cuda"):
    fixed, per_sequence = memory_estimate(meta_model(cfg, 50257), cfg, device)
    return fixed + rows * per_sequence


@pytest.mark.parametrize("dtype, n_embd, n_layer, rows", [("bfloat16", 768, 2, 16), ("float32", 1024, 3, 12)])
def test_the_estimate_is_what_fake_tensors_take(dtype, n_embd, n_layer, rows):
    """Accumulated gradients, autocast's copies of the weights and the chunks of logits included."""
    cfg = TrainConfig(n_embd=n_embd, n_layer=n_layer, n_head=16, dtype=dtype)
    assert counted_memory(cfg, rows) == pytest.approx(estimated(cfg, rows), rel=0.1)


def test_the_estimate_counts_what_a_parameter_takes():
    """Weights, accumulated gradients, moments, autocast's copy: with one short sequence nearly all of the memory."""
    cfg = TrainConfig(n_embd=1280, n_layer=8, n_head=16, block_size=256, total_batch_size=256, dtype="bfloat16")
    assert counted_memory(cfg, 1, "cpu") == pytest.approx(estimated(cfg, 1, "cpu"), rel=0.1)


@pytest.mark.core
def test_the_micro_batch_is_sized_to_the_card_and_divides_the_step():
    for name, sizes in {"gpt2-124M": (16, 32, 64, 64), "gpt2-1558M": (0, 0, 2, 8)}.items():
        cfg = replace(PRESETS[name], dtype="bfloat16")
        model = meta_model(cfg, 50257)
        assert sizes == tuple(fitting_micro_batch(cfg, model, 8, gb * GB, "cuda") for gb in (16, 24, 40, 80))
    odd = TrainConfig(total_batch_size=18 * 1024, dtype="bfloat16")
    assert fitting_micro_batch(odd, meta_model(odd, 50257), 2, 80 * GB, "cuda") == 9
    assert fitting_micro_batch(odd, meta_model(odd, 50257), 2, 6 * GB, "cuda") == 9 // 3


@pytest.mark.core
def test_all_ranks_take_the_micro_batch_of_the_one_with_least_memory(monkeypatch):
    monkeypatch.setattr(train_gpt2, "free_memory", lambda device: 80 * GB)
    ranks = SimpleNamespace(device=CPU, world_size=8, gather=lambda value: [value, 16 * GB])
    cfg = train_gpt2.resolve(replace(PRESETS["gpt2-124M"], dtype="bfloat16"), ranks, {"vocab_size": 50257})
    assert cfg.micro_batch_size in (16, 32) and cfg.grad_accum_steps(8) * cfg.micro_batch_size == 64
    given = train_gpt2.resolve(replace(cfg, micro_batch_size=4), ranks, {"vocab_size": 50257})
    assert given.micro_batch_size == 4
