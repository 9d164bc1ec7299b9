"""The engine of all benchmarks: contestants take turns in processes of their own; medians, rows, a table, a picture.

Turns, because a computer's speed drifts: who runs first and who last would otherwise decide. Processes, because peak
memory, caches and torch's settings belong to a process, and because whoever runs out of memory then fails alone.
"""

import ctypes
import math
import multiprocessing
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import pandas
from matplotlib.figure import Figure
from tqdm import tqdm

from common import UsageError, atomic_open, peak_memory_mb, read_json, synchronize
from runlog import RunLog

COLUMNS = ["seconds", "tok_per_sec", "mb_per_sec", "items_per_sec", "mfu", "peak_mb", "spread", "last_loss", "val_loss"]
COLUMNS += ["n_vocab", "bytes_per_token", "ratio", "ratio_to", "failed"]  # of the table: fields of the rows


@dataclass(kw_only=True)
class BenchConfig:
    """Settings of every benchmark."""

    run_dir: Path  # run directory to write: table, picture, result.json
    overwrite: bool = False  # replace a finished benchmark in the run directory
    rounds: int = 3  # turns of each contestant, in alternation; the median counts
    slow_seconds: float = 30.0  # who needs longer than this has a single turn
    limit_seconds: float = 600.0  # who needs longer than this for a turn is stopped


@dataclass
class Contestant:
    """One that is measured: make(*args) sets up, warms up and returns `turn`; turn() -> facts.

    facts: "seconds", one figure or a list of samples; "peak_mb"; and what else is worth a field of the row.
    """

    make: Callable
    args: tuple = ()
    env: dict = field(default_factory=dict)  # environment variables of its process


# ---------------------------------------------------------------------------------------------------------------------
# turns


class OwnProcess:
    """A contestant in a fresh interpreter, which takes a turn when told to."""

    def __init__(self, contestant):
        self.job = _turn, contestant.make, contestant.args
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        with patch.dict(os.environ, contestant.env):
            self.pid = self.pool.submit(os.getpid).result()

    def turn(self, limit_seconds):
        """Take one turn -> facts, or {"failed": why}; the first one sets up before."""
        try:
            return self.pool.submit(*self.job).result(limit_seconds)
        except UsageError:
            raise
        except TimeoutError:
            os.kill(self.pid, signal.SIGTERM)
            return {"failed": f"stopped after {limit_seconds:.0f} s"}
        except Exception as e:
            return {"failed": f"{type(e).__name__}: {e}".splitlines()[0], "traceback": traceback.format_exc()}

    def close(self):
        """End the process, and give back what it holds."""
        self.pool.shutdown()


_ready = None  # the `turn` of this process's contestant


def _turn(make, args):
    global _ready
    _ready = _ready or make(*args)
    return _ready()


def take_turns(contestants, cfg, log, name, *, keep=False):
    """Let everyone take cfg.rounds turns, in alternation -> {label: facts}; each turn is a row of metrics.jsonl.

    contestants: {label: Contestant}. Numbers are medians over the turns, "seconds" over all samples, with their count
    "turns" and their "spread", (max - min) / median; other facts are those of the first turn. Whoever fails or needs
    longer than cfg.limit_seconds has {"failed": why} instead. UsageError if that is everyone.
    keep: processes live on between turns, unless that leaves the device too little free memory for the others
    ("free_mb" in the facts); without it each turn has a fresh process.
    """
    turns, failed, alive, labels = {label: [] for label in contestants}, {}, {}, list(contestants)

    def one_turn(label):
        alive[label] = alive.get(label) or OwnProcess(contestants[label])
        facts = alive[label].turn(cfg.limit_seconds)
        peak = max((turn["peak_mb"] or 0 for done in turns.values() for turn in done), default=0)
        if not keep or "failed" in facts or facts.get("free_mb", math.inf) < 1.2 * peak:
            alive.pop(label).close()
        return facts

    try:
        for k in range(cfg.rounds):
            order = labels[k % len(labels) :] + labels[: k % len(labels)]  # another one begins every round
            for label in tqdm(order, desc=f"{name}, round {k + 1}", leave=False, disable=None):
                if label in failed or (turns[label] and medians(turns[label])["seconds"] > cfg.slow_seconds):
                    continue
                facts = one_turn(label)
                if "failed" in facts and alive:  # perhaps for want of the memory that the others hold: once more, alone
                    while alive:
                        alive.popitem()[1].close()
                    facts = one_turn(label)
                figures = {key: facts[key] for key in ("seconds", "peak_mb", "failed", "traceback") if key in facts}
                log.metric(k, f"{name}/{label}", **figures)
                if "failed" in facts:
                    log.print(f"{name}: {label} failed: {facts['failed']}")
                    failed[label] = {"failed": facts["failed"]}
                else:
                    turns[label].append(facts)
    finally:
        for process in alive.values():
            process.close()
    if len(failed) == len(contestants):
        raise UsageError("no contestant could be measured; the lines above say why")
    return {label: failed.get(label) or medians(turns[label]) for label in contestants}


def medians(turns):
    """The facts of several turns of one contestant as one: see `take_turns`."""
    facts, seconds = dict(turns[0]), []
    for turn in turns:
        seconds += turn["seconds"] if isinstance(turn["seconds"], list) else [turn["seconds"]]
    for key, value in facts.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            facts[key] = statistics.median(turn[key] for turn in turns)
    median = statistics.median(seconds)
    return facts | {"seconds": median, "turns": len(seconds), "spread": (max(seconds) - min(seconds)) / median}


# ---------------------------------------------------------------------------------------------------------------------
# time and memory of a piece of work


@contextmanager
def measured(device="cpu"):
    """Measure a block -> a dict that gets "seconds", and "peak_mb", what it took beyond what was held before."""
    facts, before = {}, peak_memory(device, reset=True)
    synchronize(device)
    started = time.perf_counter()
    yield facts
    synchronize(device)
    facts["seconds"] = time.perf_counter() - started
    facts["peak_mb"] = None if before is None else peak_memory(device) - before


def peak_memory(device="cpu", reset=False):
    """The most MB that this process has held since the last reset: of the GPU, or resident; None where unknown.

    Before a reset freed memory goes back to the system, so that it does not hide what comes. Only Linux can reset
    resident memory; elsewhere the peak since the start of the process counts.
    """
    if device == "cuda":
        import torch

        if reset:
            torch.cuda.reset_peak_memory_stats()
        return peak_memory_mb("cuda")
    try:
        if reset:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return int(Path("/proc/self/status").read_text(encoding="ascii").split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, AttributeError, TypeError):  # no such file, function or library elsewhere
        return peak_memory_mb()


# ---------------------------------------------------------------------------------------------------------------------
# rows, table, picture


def open_log(cfg, kind, **options):
    """The RunLog of a benchmark; UsageError where a finished one would be replaced without --overwrite."""
    folder = Path(cfg.run_dir)
    done = (folder / "result.json").exists() and read_json(folder / "result.json")["status"] == "success"
    if (folder / "record.json").exists() or (done and not cfg.overwrite):
        raise UsageError(f"{folder} holds a finished benchmark; choose another --run-dir, or replace it by --overwrite")
    return RunLog(folder, kind, cfg, **options)


def row(name, who, facts, other, ratio_to, *, speedup=False, **more):
    """A row of result.json. ratio: the seconds over those of the facts `other`; speedup: the other way round."""
    ratio = facts["seconds"] / other["seconds"] if "seconds" in facts and "seconds" in other else None
    ratio = 1 / ratio if ratio and speedup else ratio
    figures = {k: v for k, v in facts.items() if not isinstance(v, list)}
    return {"name": name, "who": who, **figures, **more, "ratio": ratio, "ratio_to": ratio_to}


def finish(log, rows, key, **more):
    """The rows as a table, as bars of their figure `key`, and in result.json."""
    labels = [f"{r['name']}: {r.get('lever') or r.get('kernel') or r['who']}" for r in rows]
    frame = pandas.DataFrame(rows, index=labels).reindex(columns=COLUMNS).dropna(axis="columns", how="all")
    log.print(frame.to_string(float_format="{:,.4g}".format, na_rep="-"))
    done = [(label, r) for label, r in zip(labels, rows) if r.get(key)][::-1]  # the first one on top
    fig = Figure(figsize=(8, 0.9 + 0.36 * len(done)), dpi=130, layout="constrained")
    ax, values = fig.subplots(), [r[key] for _, r in done]
    colors = ["#D55E00" if r["who"].startswith("ours") and r.get("kept", True) else "#8FB8D8" for _, r in done]
    bars = ax.barh(range(len(done)), values, color=colors, tick_label=[label for label, _ in done])
    ax.bar_label(bars, fmt="%.4g", padding=3, fontsize=8)
    ax.set(xlabel=key, xscale="log" if max(values) > 50 * min(values) else "linear")
    with atomic_open(log.run_dir / "bench.png", "wb") as f:
        fig.savefig(f, format="png")
    log.finish("success", rows=rows, **more)
