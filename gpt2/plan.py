"""What this hardware can do, and what a run will need of it before it starts: memory, hours, disk (`--plan`)."""

import os
import re
import sys
import time

import torch

from common import UsageError, free_memory, pick_device, synchronize
from data.shards import read_meta
from gpt2.config import GPTConfig
from gpt2.distributed import autocast, pick_dtype
from gpt2.model import GPT
from gpt2.optimizers import make_optimizers

# ---------------------------------------------------------------------------------------------------------------------
# the hardware

# Dense peaks in FLOP/s of the matmul units in 16 bits, from the makers' data sheets, by words of the name that torch
# reports ("NVIDIA H100 80GB HBM3"); the first that fits counts.
PEAKS = {
    "GB200": 2500e12, "B200": 2250e12, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12,
    "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12, "A10": 125e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12,
}  # fmt: skip

# glibc returns large freed buffers to the system at once, and each comes back as a page fault per 4 kB: up to a third
# of a step on a CPU. Kept and backed by huge pages they cost nothing, and the matmuls miss fewer translations.
CPU_MEMORY_SETTINGS = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296:"
    "glibc.malloc.hugetlb=1"
}


def peak_flops(device, dtype):
    """Peak FLOP/s of a GPU in bfloat16 or float16, or None where it is not known: no MFU is better than a wrong one."""
    if device.type != "cuda" or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)  # "Laptop" in it: the same number on the box, another chip inside
    return next((p for words, p in PEAKS.items() if re.search(rf"\b{words}\b", name) and "Laptop" not in name), None)


def can_keep_memory():
    """Whether CPU_MEMORY_SETTINGS have an effect here: the C library is glibc."""
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


def restart_with_memory_settings():
    """Restart this program once with CPU_MEMORY_SETTINGS, which the C library reads only at the start."""
    if can_keep_memory() and any(os.environ.get(k) != v for k, v in CPU_MEMORY_SETTINGS.items()):
        os.environ.update(CPU_MEMORY_SETTINGS)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def advice(device):
    """A setting that would make a run on a CPU faster and is not set, as the end of a log line."""
    unset = device.type == "cpu" and can_keep_memory() and "GLIBC_TUNABLES" not in os.environ
    return " | fewer page faults: --cpu-memory-settings" if unset else ""


# ---------------------------------------------------------------------------------------------------------------------
# the plan


def memory_estimate(model, cfg, device):
    """(bytes that do not depend on the micro-batch, bytes a sequence of it) of a training step.

    Weights, gradients and AdamW's two moments are float32: 16 bytes a parameter. Of a block's activations, backward
    needs some 34 bytes a token and channel in 16 bits (Korthikanti et al. 2022, without the attention matrix, which
    flash attention never holds), twice that in 32 bits. Logits exist a chunk at a time.
    """
    params = sum(p.numel() for p in model.parameters())
    wide = 2 if pick_dtype(cfg.dtype, device) == "float32" else 1
    logits = 2**31 if device.type == "cuda" else 2**26
    return 16 * params + logits, 34 * wide * cfg.n_layer * cfg.block_size * cfg.n_embd


def largest_micro_batch(cfg, world_size, fixed, per_sequence, memory):
    """The largest micro-batch that divides a process's share of a step and fits into 9/10 of `memory`, or 0."""
    sequences = cfg.total_batch_size // cfg.block_size // world_size
    fits = int((0.9 * memory - fixed) // per_sequence)
    return max((b for b in range(1, min(fits, sequences) + 1) if sequences % b == 0), default=0)


def measure_speed(model, cfg, device, rows):
    """Tokens/s of one process on this device: forward, backward and update of `rows` sequences, the faster of two."""
    model, dtype = model.to(device), pick_dtype(cfg.dtype, device)
    optimizers = make_optimizers(model, cfg)
    idx = torch.randint(model.config.vocab_size, (rows, cfg.block_size + 1), device=device)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        with autocast(device, dtype):
            _, loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)
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
    config = GPTConfig(vocab_size=vocab_size, **cfg.shape)
    with torch.device("meta"):  # shapes alone, so that a plan of the largest model fits anywhere
        model = GPT(config)
    fixed, per_sequence = memory_estimate(model, cfg, device)
    memory = free_memory(device)
    best = largest_micro_batch(cfg, world_size, fixed, per_sequence, memory)
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
        "fits here": f"at most --micro-batch-size {best} ({_gb(memory)} free on {device.type})",
        "disk": f"{cfg.keep_checkpoints} checkpoints of {_gb(checkpoint)}: {_gb(cfg.keep_checkpoints * checkpoint)}",
    }
    for name, text in lines.items():
        print(f"{name:<11} {text}", flush=True)
    speed, how = cfg.plan_tok_per_sec, "assumed"
    if not speed and best:
        model, rows = GPT(config), min(best, cfg.micro_batch_size)
        if device.type != "cuda":  # seconds, not minutes
            rows = max(1, min(rows, int(2e12 / model.flops_per_token() / cfg.block_size)))
        speed = measure_speed(model, cfg, device, rows) * world_size
        how = f"measured here: {world_size} x {device.type}, {pick_dtype(cfg.dtype, device)}, eager"
    hours = f"{tokens / speed / 3600:,.1f} h at {speed:,.0f} tokens/s ({how})" if speed else "unknown: it does not fit"
    print(f"{'time':<11} {hours}")


def _gb(n):
    return f"{n / 2**30:,.2f} GB" if n >= 2**29 else f"{n / 2**20:,.2f} MB"
