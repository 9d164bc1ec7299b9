"""What a run will need, before it starts: memory, hours, disk (`--plan`)."""

import os
import time
from dataclasses import replace

import torch

from common import UsageError, free_memory, pick_device, synchronize
from data.shards import read_meta
from gpt2.cross_entropy import CHUNK_LOGITS
from gpt2.distributed import autocast, pick_dtype
from gpt2.model import GPT, meta_model
from gpt2.optimizers import make_optimizers


def memory_estimate(model, cfg, device_type):
    """(bytes that do not depend on the micro-batch, bytes a sequence of it) of a training step, an upper bound.

    Weights, gradients (which accumulate, or are DDP's buckets) and AdamW's two moments are float32: 16 bytes a
    parameter. In 16 bits, backward needs some 36 bytes a token, channel and block (Korthikanti et al. 2022, without the
    attention matrix, which flash attention never holds) and autocast a copy of the weights; in float32 64 bytes.
    Logits exist a chunk at a time, with their exponentials in float32, beside the gradient of wte.
    """
    c, narrow = model.config, cfg.dtype != "float32"
    params, channels = sum(p.numel() for p in model.parameters()), c.block_size * c.n_embd
    logits = CHUNK_LOGITS[device_type] * (6 if narrow else 4) + 4 * c.padded_vocab_size * c.n_embd
    blocks = 36 * c.n_layer + 14 if narrow else 64 * c.n_layer + 12
    copies = cfg.cautious_decay + (cfg.average_last > 0)  # of the weights
    return (4 * copies + (18 if narrow else 16)) * params + logits, blocks * channels


def fitting_micro_batch(cfg, model, world_size, memory, device_type):
    """The most sequences, up to 64, that divide a process's share of a step and fit into 9/10 of `memory`; 0: none."""
    fixed, per_sequence = memory_estimate(model, cfg, device_type)
    share, fits = cfg.total_batch_size // cfg.block_size // world_size, (0.9 * memory - fixed) // per_sequence
    return max((b for b in range(1, int(min(fits, share, 64)) + 1) if share % b == 0), default=0)


def compile_problem(device):
    """Why torch.compile does not work here, in a few words, or None.

    It needs a C++ compiler or Triton with a C compiler, and Python's headers: one line is compiled as a test.
    """
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
    except Exception as e:  # torch raises several kinds, by platform and version
        return " ".join(str(e).split())[:160]
    return None


def measure_speed(model, cfg, device, rows):
    """Tokens/s of one process on this device: forward, backward and update of `rows` sequences, the faster of two."""
    optimizers = make_optimizers(model.to(device), cfg)
    fast = torch.compile(model, dynamic=False) if cfg.compile else model
    idx = torch.randint(model.config.vocab_size, (rows, cfg.block_size + 1), device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with autocast(device, cfg.dtype):
            _, loss = fast(idx[:, :-1], idx[:, 1:], return_logits=False)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        synchronize(device.type)
        seconds.append(time.perf_counter() - start)
    return rows * cfg.block_size / min(seconds[1:])  # the first one warms up


def print_plan(cfg):
    """Print what the run will need. Nothing is started and nothing is written."""
    device, world_size = pick_device(cfg.device), int(os.environ.get("WORLD_SIZE", 1))
    if os.environ.get("RANK", "0") != "0":
        return
    try:
        vocab_size = read_meta(cfg.data_dir)["vocab_size"]
        data = f"{cfg.data_dir}: vocabulary of {vocab_size:,}"
    except UsageError as e:
        vocab_size, data = 50257, f"not prepared ({e}); assuming GPT-2's vocabulary of 50,257"
    cfg = replace(cfg, dtype=pick_dtype(cfg.dtype, device))
    model, free = meta_model(cfg, vocab_size), free_memory(device)
    best = fitting_micro_batch(cfg, model, world_size, free, device.type)
    cards = {gb: fitting_micro_batch(cfg, model, world_size, gb * 1e9, "cuda") for gb in (16, 24, 40, 80)}
    cfg = replace(cfg, micro_batch_size=cfg.micro_batch_size or best or 1)
    fixed, per_sequence = memory_estimate(model, cfg, device.type)
    if cfg.exact_reduction:  # sums of gradients that wait for the rest of their tree, or are exchanged
        fixed += 4 * sum(p.numel() for p in model.parameters()) * cfg.grad_accum_steps(world_size).bit_length()
    tokens = cfg.max_steps * cfg.total_batch_size
    checkpoint = 12 * sum(p.numel() for p in model.parameters())
    lines = {
        "data": data,
        "parameters": f"{model.num_params():,} ({cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide)",
        "tokens": f"{tokens:,} in {cfg.max_steps:,} steps of {cfg.total_batch_size:,}: {world_size} process(es) x "
        f"{cfg.grad_accum_steps(world_size)} x {cfg.micro_batch_size} sequences of {cfg.block_size}",
        "compute": f"{tokens * model.flops_per_token():.3g} FLOP",
        "memory": f"{_gb(fixed)} and {_gb(per_sequence)} a sequence: about "
        f"{_gb(fixed + cfg.micro_batch_size * per_sequence)} a process at --micro-batch-size {cfg.micro_batch_size}",
        "fits here": f"at most --micro-batch-size {best} ({_gb(free)} free on {device.type})",
        "fits GPUs": ", ".join(f"{gb} GB: {rows or 'no'}" for gb, rows in cards.items()),
        "disk": f"{cfg.keep_checkpoints} checkpoints of {_gb(checkpoint)}: {_gb(cfg.keep_checkpoints * checkpoint)}",
    }
    for name, text in lines.items():
        print(f"{name:<11} {text}", flush=True)
    if not best:
        return print(f"{'time':<11} unknown: it does not fit")
    rows = min(best, cfg.micro_batch_size)
    if device.type != "cuda":  # seconds, not minutes
        rows = max(1, min(rows, int(2e12 / model.flops_per_token() / cfg.block_size)))
    cfg = replace(cfg, compile=cfg.compile and not compile_problem(device))
    speed = measure_speed(GPT(model.config), cfg, device, rows) * world_size
    evaluations = (cfg.val_every, cfg.val_tokens), (cfg.hellaswag_every, cfg.hellaswag_limit * 200)  # 200 an item
    evaluated = sum((cfg.max_steps // every + 1) * n for every, n in evaluations if every)
    hours = (tokens + evaluated / 3) / speed / 3600  # a forward pass is a third of a step
    how = f"{world_size} x {device.type}, {cfg.dtype}, {'compiled' if cfg.compile else 'eager'}"
    print(f"{'time':<11} {hours:,.1f} h with evaluations, at {speed:,.0f} tokens/s (measured here: {how})")


def _gb(n):
    return f"{n / 2**30:,.2f} GB" if n >= 2**29 else f"{n / 2**20:,.2f} MB"
