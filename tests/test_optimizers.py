"""The schedule, the groups, Muon against torch's own, NorMuon against its paper."""

import math
import os
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
import torch

from common import UsageError
from gpt2 import optimizers as optimizers_module
from gpt2.config import GPTConfig, TrainConfig
from gpt2.model import GPT
from gpt2.optimizers import Muon, lr_at, make_optimizers, orthogonalise, set_lr


def tiny():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=8))


@pytest.mark.core
def test_warmup_is_linear_and_the_cosine_ends_at_a_tenth():
    lr = [lr_at(step, 1.0, 10, 110) for step in range(111)]
    assert lr[0] == pytest.approx(0.1) and lr[9] == 1.0 == lr[10]
    assert all(a > b for a, b in pairwise(lr[10:]))
    assert lr[60] == pytest.approx(0.55) and lr[110] == pytest.approx(0.1)
    assert lr_at(0, 1.0, 0, 10) == 1.0 and lr_at(500, 1.0, 10, 110) == pytest.approx(0.1)


@pytest.mark.core
@pytest.mark.parametrize("decay, share", [("linear", 1.0), ("wsd", 0.25)])
def test_linear_and_late_decay_are_those_of_transformers(decay, share):
    from transformers import get_wsd_schedule

    cfg = TrainConfig(lr_decay=decay, cooldown_share=0.25, max_lr=1.0, warmup_steps=10, max_steps=110)
    ours, theirs = make_optimizers(tiny(), cfg), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_wsd_schedule(theirs, 10, int(100 * share), num_training_steps=110, decay_type="linear")
    for step in range(111):
        if step >= 10:  # in the warm-up theirs begins at 0
            assert set_lr(ours, step, cfg) == pytest.approx(theirs.param_groups[0]["lr"])
        theirs.step()
        schedule.step()
    assert set_lr(ours, 9, cfg) == 1.0 and set_lr(ours, 110, cfg) == 0.0


def test_a_cooldown_is_a_share():
    for share in (0.0, 1.5):
        with pytest.raises(UsageError, match=f"--cooldown-share {share} should be"):
            TrainConfig(cooldown_share=share)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
def test_every_parameter_is_in_one_group_and_decay_is_for_matrices(optimizer):
    model = tiny()
    optimizers = make_optimizers(model, replace(TrainConfig(), optimizer=optimizer))
    groups = [group for o in optimizers for group in o.param_groups]
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    for group in groups:
        assert all((p.dim() >= 2) == (group["weight_decay"] > 0) for p in group["params"])
    if optimizer != "adamw":
        hidden = {id(p) for name, p in model.named_parameters() if ".h." in name and p.dim() == 2}
        assert {id(p) for p in optimizers[1].param_groups[0]["params"]} == hidden


def test_each_group_follows_the_schedule_from_its_own_peak():
    cfg = replace(TrainConfig(), optimizer="muon", max_lr=1e-3, muon_lr=1e-2, warmup_steps=10)
    optimizers = make_optimizers(tiny(), cfg)
    assert set_lr(optimizers, 4, cfg) == pytest.approx(5e-4)
    assert optimizers[1].param_groups[0]["lr"] == pytest.approx(5e-3)


@pytest.mark.core
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "normuon"])
def test_cautious_decay_takes_away_where_the_update_does(optimizer):
    """The update is that of a twin without decay, as it follows from the gradients alone."""
    cfg = TrainConfig(optimizer=optimizer, cautious_decay=True, weight_decay=0.5, max_lr=0.01, warmup_steps=0)
    models = tiny(), tiny()
    ours, twins = make_optimizers(models[0], cfg), make_optimizers(models[1], replace(cfg, weight_decay=0.0))
    ours[0].load_state_dict(ours[0].state_dict())  # as a resume does, which replaces the groups
    expected = [p.detach().double() for p in models[0].parameters()]
    for _ in range(4):
        old = [p.detach().double() for p in models[1].parameters()]
        for p, q in zip(*(model.parameters() for model in models)):
            p.grad = q.grad = torch.randn_like(p)
        for o in (*ours, *twins):
            o.step()
        for i, (q, before) in enumerate(zip(models[1].parameters(), old)):
            x, update = expected[i], before - q.detach().double()
            expected[i] = x - update - 0.01 * 0.5 * (q.dim() > 1) * (update * x >= 0) * x
    for p, x, q in zip(models[0].parameters(), expected, models[1].parameters()):
        torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=1e-6)
        assert p.dim() == 1 or (p - q).abs().max() > 1e-4


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    x = torch.randn(3, *shape)
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.3 and values.max() < 1.3
    one_by_one = torch.cat([orthogonalise(m[None]) for m in x])
    torch.testing.assert_close(orthogonalise(x), one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.core
def test_muon_follows_torchs_own():
    """Ten steps from the same weights. torch's iterates in bfloat16, good for some three digits of the way gone."""
    torch.manual_seed(0)
    start = [torch.randn(s) for s in [(8, 24), (24, 8), (8, 24)]]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a = Muon(ours, lr=0.01, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", nesterov=True)
    for _ in range(10):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        a.step()
        b.step()
    for p, q, s in zip(ours, theirs, start):
        assert (p - q).norm() < 0.02 * (q - s).norm()


def naive_normuon(w, grads, lr, decay):
    """Li et al. 2025, algorithm 1, with Nesterov momentum, of one matrix in float64, row by row -> the last weight."""
    w, momentum, v = w.double(), 0.0, [0.0] * len(w)
    for grad in grads:
        momentum = 0.95 * momentum + 0.05 * grad.double()
        x = 0.05 * grad.double() + 0.95 * momentum
        x /= x.norm()
        for _ in range(5):
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        v = [0.95 * mean + 0.05 * row.dot(row) / len(row) for mean, row in zip(v, x)]
        step = torch.stack([row / mean.sqrt() for mean, row in zip(v, x)])
        step *= 0.2 * math.sqrt(max(w.shape)) * x.norm() / step.norm()
        w = w - lr * decay * w - lr * step
    return w


@pytest.mark.core
def test_normuon_follows_its_paper():
    torch.manual_seed(0)
    start = [torch.randn(s) for s in [(8, 24), (24, 8), (8, 24)]]
    scales = [torch.logspace(-2, 0, len(p))[:, None] for p in start]  # neurons of unlike gradients
    grads = [[scale * torch.randn_like(p) for p, scale in zip(start, scales)] for _ in range(6)]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = [Muon(params, lr=0.01, weight_decay=0.1, even_rows=True) for _ in range(2)]
    for i, step in enumerate(grads):
        for p, grad in zip(params, step):
            p.grad = grad.clone()
        optimizers[i > 2].step()
        optimizers[1].load_state_dict(optimizers[i > 2].state_dict())  # as a resume does
    for p, w, *own in zip(params, start, *grads):
        torch.testing.assert_close(p.detach().double(), naive_normuon(w, own, 0.01, 0.1), rtol=0, atol=1e-6)


def muon_steps(rank, world_size, store, out, optimizer):
    """Three steps of Muon on one of `world_size` gloo ranks; rank 0 saves the weights, and its number of matrices."""
    computed, compute = [], orthogonalise
    optimizers_module.orthogonalise = lambda x: computed.append(len(x)) or compute(x)
    if world_size > 1:
        shared = torch.distributed.FileStore(store, world_size)
        timeout = timedelta(seconds=60)
        torch.distributed.init_process_group("gloo", store=shared, rank=rank, world_size=world_size, timeout=timeout)
    torch.set_num_threads(1)
    model = tiny()
    optimizers = make_optimizers(model, replace(TrainConfig(), optimizer=optimizer))
    idx = torch.arange(16).view(2, 8)
    for _ in range(3):
        model(idx, idx)[1].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if rank == 0:
        torch.save(model.state_dict(), out)
        out.with_suffix(".txt").write_text(str(sum(computed)), encoding="utf-8")
    optimizers_module.orthogonalise = compute
    if world_size > 1:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("optimizer", ["muon", "normuon"])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")
def test_muon_sharded_over_ranks_gives_the_weights_of_one_rank(tmp_path, optimizer):
    """Two matrices of a shape over 2 and 3 ranks: an even share, and a rank with nothing but filling."""
    muon_steps(0, 1, None, tmp_path / "1.pt", optimizer)
    alone = torch.load(tmp_path / "1.pt")
    for world_size in (2, 3):
        args = (world_size, str(tmp_path / f"store{world_size}"), tmp_path / f"{world_size}.pt", optimizer)
        torch.multiprocessing.start_processes(muon_steps, args, nprocs=world_size, start_method="fork")
        sharded = torch.load(tmp_path / f"{world_size}.pt")
        for name, weight in alone.items():
            torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-6)
    counts = [int((tmp_path / f"{n}.txt").read_text(encoding="utf-8")) for n in (1, 2, 3)]
    assert counts == [3 * 8, 3 * 4, 3 * 4]  # of a step 2 of each of 4 shapes, or a share of 1
