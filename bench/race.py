"""Races that bench/bench_gpt2.py starts: to the lowest validation loss in so many seconds, ours against nanoGPT's loop.

Everybody has the same shards, shape and tokens a step, and the seconds count from the start of the process: imports,
compiling, warming up, the last validation. Each finds its number of steps by timing a few first, so that its learning
rate has come down when the time is over.
"""

import contextlib
import io
import math
import multiprocessing
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from bench.baselines import Size, karpathy_module
from common import ROOT
from data.shards import open_split, read_meta
from gpt2.config import PRESETS
from gpt2.loader import Loader
from runlog import read_run

SPARE = 0.06  # part of the time that is kept for a machine that gets slower
TRIAL_STEPS = 12


# ---------------------------------------------------------------------------------------------------------------------
# ours: the trainer as people start it


def race_ours(race, flags):
    """gpt2/train_gpt2.py quickstart with `flags`, twice: a few steps to learn its speed, then the race -> figures."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        _train(race, Path(folder) / "trial", TRIAL_STEPS, flags)
        whole = time.perf_counter() - started
        ms = sorted(row["ms"] for row in read_run(Path(folder) / "trial").rows("train"))
        step = ms[len(ms) // 2] / 1e3
        steps = int((race.seconds * (1 - SPARE) - (whole - TRIAL_STEPS * step)) / step)
        started = time.perf_counter()
        _train(race, Path(folder) / "race", max(TRIAL_STEPS, steps), flags)
        seconds = time.perf_counter() - started
        result = read_run(Path(folder) / "race").result
    return {"val_loss": result["val_loss"], "steps": result["step"], "tokens": result["tokens"], "seconds": seconds}


def _train(race, run_dir, steps, flags):
    command = [sys.executable, str(ROOT / "gpt2" / "train_gpt2.py"), "quickstart", "--max-steps", str(steps), *flags]
    command += ["--data-dir", race.data_dir, "--run-dir", str(run_dir), "--sample-every", "0"]
    command += ["--val-every", str(steps)]  # at the end, and once before the first step
    command += ["--checkpoint-every", "0", "--val-tokens", str(race.val_tokens), "--log-every", "3"]
    warmup = max(1, min(PRESETS["quickstart"].warmup_steps, steps // 4))
    command += ["--warmup-steps", str(warmup), "--device", race.device]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT: its model, its batches, its step


def race_nanogpt(race, lr):
    """nanoGPT's loop in a process of its own -> figures."""
    started = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        figures = pool.submit(_nanogpt_loop, race, lr, time.time()).result()
    return {**figures, "seconds": time.perf_counter() - started}


def _nanogpt_loop(race, lr, started):
    """train.py of nanoGPT: random places of the text, warmup and cosine to a tenth, AdamW, clipping at 1.

    Eager float32, as its README advises for CPUs; warmup and beta2 as in its config for small models on Shakespeare,
    dropout off, since no token is seen often.
    """
    preset = PRESETS["quickstart"]
    T, B = preset.block_size, preset.total_batch_size // preset.block_size
    torch.manual_seed(race.seed)
    np_rng = np.random.default_rng(race.seed)
    module = karpathy_module(race.nanogpt)
    vocab_size = read_meta(race.data_dir)["vocab_size"]
    size = Size(-(-vocab_size // 64) * 64, preset.n_layer, preset.n_head, preset.n_embd, T, B)
    shape = {k: getattr(size, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**shape)).to(race.device)
        optimizer = model.configure_optimizers(0.1, lr, (0.9, 0.99), race.device)
    train = np.concatenate([np.asarray(shard) for shard in open_split(race.data_dir, "train")])

    def get_batch():
        rows = np.stack([train[i : i + T + 1] for i in np_rng.integers(len(train) - T - 1, size=B)]).astype(np.int64)
        rows = torch.from_numpy(rows).to(race.device)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    warmup, iters, i, clock = 100, math.inf, 0, time.perf_counter()
    x, y = get_batch()
    while i < iters:
        if i == TRIAL_STEPS:  # from here on the speed is known
            step = (time.perf_counter() - clock) / (TRIAL_STEPS - 2)
            left = race.seconds * (1 - SPARE) - (time.time() - started) - step / 3 * race.val_tokens / size.tokens
            iters = i + max(1, int(left / step))
            warmup = min(warmup, iters // 4)
        if i == 2:
            clock = time.perf_counter()
        rate = lr * (i + 1) / (warmup + 1)
        if i >= warmup:
            rate = lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (i - warmup) / max(1, iters - warmup))))
        for group in optimizer.param_groups:
            group["lr"] = rate
        _, loss = model(x, y)
        x, y = get_batch()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        i += 1
    return {"val_loss": _validate(model, race, T, B), "steps": i, "tokens": i * size.tokens}


@torch.no_grad()
def _validate(model, race, T, B):
    """The loss over the same fixed tokens that gpt2/train_gpt2.py takes."""
    model.eval()
    loader = Loader(race.data_dir, "val", T)
    n = min(loader.n_sequences, race.val_tokens // T)
    nats = tokens = 0
    for first in range(0, n, B):
        idx, targets = (t.to(race.device) for t in loader.in_order(first, B, n=n))
        known = int((targets >= 0).sum())
        nats, tokens = nats + model(idx, targets)[1].item() * known, tokens + known
    return nats / tokens


# ---------------------------------------------------------------------------------------------------------------------
# rows


def entrants(race):
    """{name: function -> figures}."""
    flags = ["--cpu-memory-settings"] if race.cpu_memory_settings else []
    adamw = ["--optimizer", "adamw", "--max-lr", str(race.adamw_lr)]
    muon = ["--optimizer", "muon", "--max-lr", str(race.muon_adamw_lr), "--muon-lr", str(race.muon_lr)]
    found = {
        "ours AdamW": lambda: race_ours(race, [*adamw, *flags]),
        "ours Muon": lambda: race_ours(race, [*muon, *flags]),
    }
    if race.nanogpt:
        found |= {f"nanoGPT lr {lr:g}": lambda lr=lr: race_nanogpt(race, lr) for lr in race.nanogpt_lr}
    return found


def rows_of(figures):
    """{who: figures} -> rows; the difference is to the best of nanoGPT's."""
    theirs = [f["val_loss"] for who, f in figures.items() if who.startswith("nanoGPT")]
    rows = []
    for who, f in figures.items():
        ahead = min(theirs) - f["val_loss"] if theirs else None
        ratio = f["val_loss"] / min(theirs) if theirs else None
        rows.append({
            "name": "race", "who": who, **f, "tok_per_sec": f["tokens"] / f["seconds"], "nats_ahead": ahead,
            "ratio": ratio, "ratio_to": "validation loss of nanoGPT's best",
        })  # fmt: skip
    return rows
