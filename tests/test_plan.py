"""gpt2/plan.py: the estimate of a step's memory against an accounting of its fake tensors, and the micro-batch.

The estimates of all presets as a table: `python -m pytest -m slow -s tests/test_plan.py`.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from gpt2 import cross_entropy, train_gpt2
from gpt2.config import PRESETS, GPTConfig, TrainConfig
from gpt2.distributed import autocast
from gpt2.model import GPT
from gpt2.optimizers import make_optimizers
from gpt2.plan import fitting_micro_batch, memory_estimate

CPU, GB = torch.device("cpu"), 10**9


def shapes_alone(cfg):
    with torch.device("meta"):
        return GPT(GPTConfig(**cfg.shape))


def counted(cfg, rows):
    """Peak bytes of two steps of two micro-batches each: fake tensors on the CPU, whose attention is flash, too."""
    with FakeTensorMode():
        model = GPT(GPTConfig(**cfg.shape))
        optimizers, tracker = make_optimizers(model, cfg), MemTracker()
        tracker.track_external(model, *optimizers)
        with tracker:
            for _ in range(2):
                for _ in range(2):
                    tracker.reset_mod_stats()
                    idx = torch.zeros(rows, cfg.block_size, dtype=torch.long)
                    with autocast(CPU, cfg.dtype):
                        loss = model(idx, idx, return_logits=False)[1]
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"]


def estimated(cfg, rows, device="cuda"):
    fixed, per_sequence = memory_estimate(shapes_alone(cfg), cfg, device)
    return fixed + rows * per_sequence


@pytest.fixture
def chunks_of_a_gpu(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", cross_entropy.CHUNK_LOGITS["cuda"])


@pytest.mark.parametrize("dtype, n_embd, n_layer, rows", [("bfloat16", 768, 2, 16), ("float32", 1024, 3, 12)])
def test_the_estimate_is_what_fake_tensors_take(chunks_of_a_gpu, dtype, n_embd, n_layer, rows):
    """Accumulated gradients, autocast's copies of the weights and the chunks of logits included."""
    cfg = TrainConfig(n_embd=n_embd, n_layer=n_layer, n_head=16, dtype=dtype)
    assert counted(cfg, rows) == pytest.approx(estimated(cfg, rows), rel=0.1)


def test_the_estimate_counts_what_a_parameter_takes():
    """Weights, accumulated gradients, moments, autocast's copy: with one short sequence nearly all of the memory."""
    cfg = TrainConfig(n_embd=1280, n_layer=8, n_head=16, block_size=256, total_batch_size=256, dtype="bfloat16")
    assert counted(cfg, 1) == pytest.approx(estimated(cfg, 1, "cpu"), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("gpt2")])
def test_the_estimate_of_a_preset_is_what_fake_tensors_take(chunks_of_a_gpu, name):
    cfg = replace(PRESETS[name], dtype="bfloat16")
    rows = fitting_micro_batch(cfg, shapes_alone(cfg), 8, 80 * GB, "cuda")
    ours, theirs = estimated(cfg, rows), counted(cfg, rows)
    print(f"\n{name:<11} {rows:>3} sequences | fake tensors {theirs / GB:5.1f} GB | estimate {ours / GB:5.1f} GB")
    assert theirs == pytest.approx(ours, rel=0.05)


@pytest.mark.core
def test_the_micro_batch_is_sized_to_the_card_and_divides_the_step():
    for name, sizes in {"gpt2-124M": (16, 32, 64, 64), "gpt2-1558M": (0, 0, 2, 8)}.items():
        cfg = replace(PRESETS[name], dtype="bfloat16")
        model = shapes_alone(cfg)
        assert sizes == tuple(fitting_micro_batch(cfg, model, 8, gb * GB, "cuda") for gb in (16, 24, 40, 80))
    odd = TrainConfig(total_batch_size=18 * 1024, dtype="bfloat16")
    assert fitting_micro_batch(odd, shapes_alone(odd), 2, 80 * GB, "cuda") == 9
    assert fitting_micro_batch(odd, shapes_alone(odd), 2, 6 * GB, "cuda") == 9 // 3


@pytest.mark.core
def test_all_ranks_take_the_micro_batch_of_the_one_with_least_memory(monkeypatch):
    monkeypatch.setattr(train_gpt2, "free_memory", lambda device: 80 * GB)
    ranks = SimpleNamespace(device=CPU, world_size=8, gather=lambda value: [value, 16 * GB])
    cfg = train_gpt2.resolve(replace(PRESETS["gpt2-124M"], dtype="bfloat16"), ranks, {"vocab_size": 50257})
    assert cfg.micro_batch_size in (16, 32) and cfg.grad_accum_steps(8) * cfg.micro_batch_size == 64
    given = train_gpt2.resolve(replace(cfg, micro_batch_size=4), ranks, {"vocab_size": 50257})
    assert given.micro_batch_size == 4
