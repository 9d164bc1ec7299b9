"""The harness of all benchmarks: contestants alternate, each in its own process; medians, rows, a table, a picture.

They alternate because the speed of a computer drifts. They have processes of their own because peak memory, caches and
torch's settings belong to a process, and because one that runs out of memory then fails alone.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pandas
from matplotlib.figure import Figure
from tqdm import tqdm

from common import ROOT, UsageError, atomic_open, peak_memory_mb, read_json, synchronize
from runlog import RunLog

# Fields of the rows that the table shows.
COLUMNS = "seconds tok_per_sec mb_per_sec items_per_sec mfu micro_batch_size peak_mb estimate_mb spread last_loss"
COLUMNS += " val_loss seconds_to_loss tokens_to_loss seconds_per_step agree"
COLUMNS += " n_vocab bytes_per_token ratio ratio_to failed"


@dataclass(kw_only=True)
class BenchConfig:
    """Settings of every benchmark."""

    run_dir: Path | None = None  # run directory to write: table, picture, result.json; none: runs/NAME_OF_BENCHMARK
    overwrite: bool = False  # replace a finished benchmark in the run directory
    rounds: int = 5  # turns of each contestant, in alternation; the median counts
    slow_seconds: float = 5.0  # a contestant slower than this has a single turn
    limit_seconds: float = 600.0  # a turn that takes longer than this is stopped


@dataclass
class Contestant:
    """What is measured, in a fresh interpreter: make(*args) sets up, warms up and returns `turn`; turn() -> facts.

    facts: "seconds", optionally "peak_mb", and other fields of the row. The process starts with the first turn.
    """

    make: Callable
    args: tuple = ()
    pool: ProcessPoolExecutor | None = field(default=None, init=False)

    def turn(self, limit_seconds):
        """Take one turn -> facts, or {"failed": why}; the first turn also sets up."""
        try:
            if self.pool is None:
                self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
                self.pid = self.pool.submit(os.getpid).result()
            return self.pool.submit(_turn, self.make, self.args).result(limit_seconds)
        except UsageError:
            raise
        except TimeoutError:
            os.kill(self.pid, signal.SIGTERM)
            return {"failed": f"stopped after {limit_seconds:.0f} s"}
        except Exception as e:
            trace = traceback.format_exc().replace(f"{ROOT}{os.sep}", "")  # records are portable
            return {"failed": f"{type(e).__name__}: {e}".splitlines()[0], "traceback": trace}

    def close(self):
        """End the process and free its memory; the next turn starts another one."""
        if self.pool:
            self.pool.shutdown()
        self.pool = None


_ready = None  # the `turn` of this process's contestant


def _turn(make, args):
    global _ready
    _ready = _ready or make(*args)
    return _ready()


def take_turns(contestants, cfg, log, name, *, keep=False):
    """Give each contestant cfg.rounds turns, in alternation -> {label: facts}; each turn is a row of metrics.jsonl.

    contestants: {label: Contestant}. Numbers are medians over the turns, with their count "turns" and the "spread" of
    the seconds, (max - min) / median; other facts are those of the first turn. A contestant that fails or takes longer
    than cfg.limit_seconds has {"failed": why} instead. UsageError if all fail.
    keep: keep processes alive between turns; otherwise each turn has a fresh one.
    """
    turns, labels = {label: [] for label in contestants}, list(contestants)
    try:
        for k in range(cfg.rounds):
            order = labels[k % len(labels) :] + labels[: k % len(labels)]  # rotate who begins
            for label in tqdm(order, desc=f"{name}, round {k + 1}", leave=False, disable=None):
                if turns[label] and medians(turns[label]).get("seconds", float("inf")) > cfg.slow_seconds:
                    continue
                facts = contestants[label].turn(cfg.limit_seconds)
                if keep and "failed" in facts:  # the others may hold the memory that it needs: retry alone
                    for contestant in contestants.values():
                        contestant.close()
                    facts = contestants[label].turn(cfg.limit_seconds)
                figures = {key: facts[key] for key in ("seconds", "peak_mb", "failed", "traceback") if key in facts}
                log.metric(k, f"{name}/{label}", **figures)
                turns[label].append(facts)
                if "failed" in facts:
                    log.print(f"{name}: {label} failed: {facts['failed']}")
                if "failed" in facts or not keep:
                    contestants[label].close()
    finally:
        for contestant in contestants.values():
            contestant.close()
    facts = {label: medians(done) for label, done in turns.items()}
    if all("failed" in f for f in facts.values()):
        raise UsageError("no contestant could be measured; the lines above say why")
    return facts


def medians(turns):
    """The facts of several turns of one contestant as one: see `take_turns`."""
    if "failed" in turns[-1]:
        return {"failed": turns[-1]["failed"]}
    seconds = [turn["seconds"] for turn in turns]
    facts = turns[0] | pandas.DataFrame(turns).select_dtypes("number").median().to_dict()
    return facts | {"turns": len(turns), "spread": (max(seconds) - min(seconds)) / facts["seconds"]}


@contextmanager
def measured(device="cpu"):
    """Measure a block -> a dict that gets "seconds" and "peak_mb", the peak memory beyond what was held before.

    Only Linux can reset the peak of resident memory; elsewhere it is the peak since the process started.
    """
    synchronize(device)
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError, AttributeError):  # /proc is read-only, or the C library has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system, or the peak would not show its reuse
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    facts, before, started = {}, peak_memory_mb(device), time.perf_counter()
    yield facts
    synchronize(device)
    facts["seconds"] = time.perf_counter() - started
    facts["peak_mb"] = None if before is None else peak_memory_mb(device) - before


def timed(work, key, device="cpu"):
    """A `turn` that measures work(); its return value becomes the fact `key`."""

    def turn():
        with measured(device) as facts:
            facts[key] = work()
        return facts

    return turn


def open_log(cfg, name, **options):
    """The RunLog of a benchmark; UsageError without a round, or where it would replace a finished one unasked."""
    if getattr(cfg, "rounds", 1) < 1:
        raise UsageError(f"--rounds {cfg.rounds} measures nothing; it must be at least 1")
    folder = cfg.run_dir or ROOT / "runs" / name
    done = (folder / "result.json").exists() and read_json(folder / "result.json")["status"] == "success"
    if (folder / "record.json").exists() or (done and not cfg.overwrite):
        raise UsageError(f"{folder} holds a finished benchmark; choose another --run-dir, or replace it by --overwrite")
    return RunLog(folder, name, cfg, **options)


def row(name, who, facts, other, ratio_to, *, speedup=False, **more):
    """A row of result.json. ratio: the seconds over those of the facts `other`; speedup: its inverse."""
    ratio = facts["seconds"] / other["seconds"] if "seconds" in facts and "seconds" in other else None
    ratio = 1 / ratio if ratio and speedup else ratio
    figures = {k: v for k, v in facts.items() if not isinstance(v, list | dict)}
    return {"name": name, "who": who, **figures, **more, "ratio": ratio, "ratio_to": ratio_to}


def finish(log, rows, key, **more):
    """Write the rows as a table, as a bar chart of the figure `key`, and to result.json."""
    labels = [f"{r['name']}: {r.get('lever') or r.get('kernel') or r['who']}" for r in rows]
    frame = pandas.DataFrame(rows, index=labels)
    table = frame.reindex(columns=COLUMNS.split()).dropna(axis="columns", how="all")
    log.print(table.to_string(float_format="{:,.4g}".format, na_rep="-"))
    done = frame[frame[key].notna()][::-1]  # the first one on top
    fig = Figure(figsize=(8, 0.9 + 0.36 * len(done)), dpi=130, layout="constrained")
    colors = ["#D55E00" if who.startswith("ours") else "#8FB8D8" for who in done["who"]]
    log_x = bool(done[key].max() > 50 * done[key].min())
    ax = done[key].plot.barh(ax=fig.subplots(), color=colors, logx=log_x, xlabel=key)
    ax.bar_label(ax.containers[0], fmt="%.4g", padding=3, fontsize=8)
    with atomic_open(log.run_dir / "bench.png", "wb") as f:
        fig.savefig(f, format="png")
    log.finish("success", rows=rows, **more)
