"""What a run will need, before it is started: parameters, memory, the micro-batch that fits, hours, disk (`--plan`)."""

import os
import time
from dataclasses import replace

import torch

from data.shards import read_meta
from gpt2.config import GPTConfig
from gpt2.distributed import pick_device
from gpt2.model import GPT
from gpt2.optimizers import make_optimizers
from runlog import UserError

# Dense peaks in FLOP/s of the matmul units, from the makers' data sheets, by a part of the name that torch reports.
BF16_PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device, dtype):
    """Peak FLOP/s of a GPU in bfloat16 or float16, or None where it is not known: no MFU is better than a wrong one."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in BF16_PEAKS.items() if part in name), None)


def free_memory(device):
    """Bytes that a process may still take on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def memory_estimate(model, cfg):
    """(bytes that do not depend on the micro-batch, bytes a sequence of it) of a training step.

    Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter. Of a block's activations, backward
    needs some 34 bytes a token and channel in 16 bits (Korthikanti et al. 2022, without the attention matrix, which
    flash attention never holds), twice that in 32 bits; logits exist a chunk at a time.
    """
    params = sum(p.numel() for p in model.parameters())
    wide = 2 if cfg.dtype in ("float32", "auto") else 1
    return 16 * params, 34 * wide * cfg.n_layer * cfg.block_size * cfg.n_embd


def largest_micro_batch(cfg, fixed, per_sequence, memory):
    """The largest micro-batch that divides the step and fits into nine tenths of `memory`, or 0."""
    sequences = cfg.total_batch_size // cfg.block_size
    fits = int((0.9 * memory - fixed) // per_sequence)
    return max((b for b in range(1, min(fits, sequences) + 1) if sequences % b == 0), default=0)


def measure_speed(model, cfg, device):
    """Tokens/s of one process on this device: forward, backward and update of one sequence, the median of three."""
    model = model.to(device)
    optimizers = make_optimizers(model, cfg)
    idx = torch.randint(model.config.vocab_size, (1, cfg.block_size + 1), device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        _, loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return cfg.block_size / sorted(seconds[1:])[1]  # the first one warms up


def print_plan(cfg):
    """Print what the run will need. Nothing is started and nothing is written."""
    device = pick_device(cfg.device)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    try:
        vocab_size = read_meta(cfg.data_dir)["vocab_size"]
        data = f"{cfg.data_dir}: vocabulary of {vocab_size:,}"
    except UserError as e:
        vocab_size, data = 50257, f"not there yet ({e}); assuming GPT-2's vocabulary of 50,257"
    shape = {k: getattr(cfg, k) for k in ("block_size", "n_layer", "n_head", "n_embd")}
    model = GPT(GPTConfig(vocab_size=vocab_size, **shape))
    fixed, per_sequence = memory_estimate(model, cfg)
    tokens = cfg.max_steps * cfg.total_batch_size
    checkpoint = 12 * sum(p.numel() for p in model.parameters())

    lines = {
        "data": data,
        "parameters": f"{model.num_params():,} ({cfg.n_layer} layers, {cfg.n_head} heads, {cfg.n_embd} wide)",
        "tokens": f"{tokens:,} in {cfg.max_steps:,} steps of {cfg.total_batch_size:,}",
        "compute": f"{tokens * model.flops_per_token():.3g} FLOP",
        "memory": f"{_gb(fixed)} and {_gb(per_sequence)} a sequence: about "
        f"{_gb(fixed + cfg.micro_batch_size * per_sequence)} a process at --micro-batch-size {cfg.micro_batch_size}",
    }
    memory = free_memory(device)
    if memory is not None:
        best = largest_micro_batch(cfg, fixed, per_sequence, memory)
        lines["fits here"] = f"--micro-batch-size {best}" if best else "no micro-batch does"
        lines["fits here"] += f" ({_gb(memory)} free on {device.type})"
    speed, how = cfg.plan_tok_per_sec, "assumed"
    if not speed:
        speed, how = (
            measure_speed(model, replace(cfg, dtype="float32"), device) * world_size,
            "measured here, eager float32",
        )
    lines["time"] = f"{tokens / speed / 3600:,.1f} h at {speed:,.0f} tokens/s ({how})"
    lines["disk"] = f"{cfg.keep_checkpoints} checkpoints of {_gb(checkpoint)}: {_gb(cfg.keep_checkpoints * checkpoint)}"
    for name, text in lines.items():
        print(f"{name:<11} {text}")


def _gb(n):
    return f"{n / 2**30:,.2f} GB"
