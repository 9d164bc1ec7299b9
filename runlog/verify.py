"""Verify a run: does its record agree with what its code, data and weights compute?

Every run is checked for its checksums and for figures that its files state twice. What can be computed again is up to
`replay_run(run, report, *, steps, whole, data)` of the package that made the run, imported here only when needed.
"""

import functools
import importlib
import math
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from common import ROOT, UsageError, plain
from runlog.record import environment, git

REPLAYS = {"gpt2": "gpt2.replay", "hellaswag": "gpt2.replay", "bpe": "bpe.train_bpe", "lora": "lora.train_lora"}
PACKAGES = ("bpe", "data", "gpt2", "lora")  # code that affects what is learned


@dataclass
class Report:
    """Results of the checks, printed as they come."""

    failed: int = 0  # checks that contradict the record
    unproved: int = 0  # checks that could not be made
    reasons: list = field(default_factory=list)  # why a replay here may differ in the last bits

    def ok(self, text):
        print(f"ok        {text}", flush=True)

    def fail(self, text):
        self.failed += 1
        print(f"FAIL      {text}", flush=True)

    def open(self, text):
        self.unproved += 1
        print(f"unproved  {text}", flush=True)


def verify(run, steps=5, whole=False, data=None):
    """Check a Run and print the results -> whether nothing failed.

    steps: optimizer steps to replay from the start and from each kept checkpoint. whole: replay all of them.
    data: path of the corpus, text or rows, if not as recorded.
    """
    report = Report(reasons=[*code_reasons(run), *hardware_reasons(run)])
    print(f"{run.run_dir.as_posix()}: {run.kind}, {run.status}")
    for text in contradictions(run):
        report.fail(text)
    if run.result.get("metrics_file_sha256") is None:
        report.open("no checksum of metrics.jsonl is recorded: a changed digit is found only if it is replayed")
    elif not report.failed:
        report.ok(f"the {len(run.metrics):,} rows of metrics.jsonl match the checksum and figures in result.json")
    if run.kind in REPLAYS:
        station = importlib.import_module(REPLAYS[run.kind])
        try:
            station.replay_run(run, report, steps=steps, whole=whole, data=data)
        except UsageError as e:
            report.open(str(e))
    elif run.kind == "lora_sweep":
        check_adapters(run, report, steps, whole, data)
    else:
        report.open(f"a run of kind {run.kind} is a measurement, which cannot be repeated exactly")
    if report.failed:
        print(f"          {report.failed} of the checks failed: this record is not what the run computed")
    else:
        unproved = f"; not proved: {report.unproved}" if report.unproved else ""
        print(f"          nothing contradicts the record{unproved}")
    return not report.failed


@functools.cache
def verify_by_replay(run_dir):
    """What `runlog verify`, in a process of its own, finds wrong with a run, or an empty string."""
    command = [sys.executable, "-m", "runlog", "verify", str(run_dir)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    wrong = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    return "" if done.returncode == 0 else (wrong or done.stderr.strip().splitlines() or ["no reason given"])[-1]


# --- checks for every kind


def contradictions(run):
    """Where result.json differs from the rows of metrics.jsonl -> list of texts."""
    last = run.rows("val")[-1] if run.rows("val") else {}
    by_rows = {"val_loss": last.get("loss"), "bits_per_byte": last.get("bits_per_byte")}
    by_rows["metrics_file_sha256"] = run.metrics_sha256
    if run.settings.get("total_batch_size") and run.result.get("step") is not None:
        by_rows["tokens"] = run.result["step"] * run.settings["total_batch_size"]
    return [
        f"result.json says {name} {run.result[name]!r}, its rows and settings say {value!r}"
        for name, value in by_rows.items()
        if None not in (value, run.result.get(name)) and value != run.result[name]
    ]


def check_adapters(run, report, steps, whole, data):
    """A sweep is verified adapter by adapter, each a run of its own."""
    adapters = run.adapters()
    losses = {adapter.name: adapter.result.get("held_out_loss") for adapter in adapters}
    best, stated = run.result.get("best"), run.result.get("best_held_out_loss")
    if best is not None and losses.get(best) != stated:
        report.fail(f"result.json says held-out loss {stated} of {best}, its own record {losses.get(best)}")
    for adapter in adapters:
        print()
        report.failed += not verify(adapter, steps, whole, data)
    print()


def code_reasons(run):
    """Differences between the code here and that of the run -> list of texts."""
    commit = run.config.get("git_commit") or "?"
    if run.config.get("git_dirty") is not False:
        return ["the run's code was not committed" if run.config.get("git_dirty") else "the run's code is not known"]
    changed = git("diff", "--name-only", commit, "--", *(f"{name}/*.py" for name in PACKAGES), seconds=30)
    if changed is None:
        return [f"the run's commit {commit[:9]} is not in this repository"]
    return [f"{len(changed.split())} code files have changed since commit {commit[:9]}"] if changed else []


def hardware_reasons(run):
    """Differences in hardware and libraries -> list of texts."""
    if run.env.get("torch"):
        importlib.import_module("torch")  # `environment` reports it once it is imported
    here = environment()
    names = ("cpu", "gpus", "torch", "cuda", "numpy")
    changed = [name for name in names if run.env.get(name) not in (None, [], here.get(name))]
    reasons = [f"{name} {run.env[name]} then, {here.get(name)} here" for name in changed]
    world_size = run.env.get("world_size", 1)
    return reasons + ([f"{world_size} processes then, one here"] if world_size != 1 else [])


# --- for replay_run


def locate_input(recorded, replacement=None):
    """A recorded path -> its path here, relative to the working directory or the repository; UsageError if missing."""
    if replacement is not None:
        if not Path(replacement).exists():
            raise UsageError(f"{replacement} does not exist")
        return Path(replacement)
    for path in (Path(recorded), ROOT / recorded):
        if path.exists():
            return path
    raise UsageError(f"{recorded} does not exist here, so nothing was computed again (give its path with --data)")


def compare_figures(report, what, recorded, again, tolerance):
    """Compare figures that were computed again with the recorded ones, {name: value} both.

    They have to be the same to the last bit, unless the report has reasons why they may not be: then to a relative
    `tolerance`, which is printed together with the reasons. A figure that is not finite is recorded as null.
    """
    bad, worst = [], 0.0
    for name, value in recorded.items():
        value, other = plain(value), plain(again.get(name))
        if value == other:
            continue
        both = isinstance(value, int | float) and isinstance(other, int | float)
        off = abs(value - other) / max(abs(value), abs(other)) if both else math.inf
        worst = max(worst, off)
        if not report.reasons or off > tolerance:
            bad.append(f"{name} {value!r} recorded, {other!r} computed")
    reasons = "; ".join(report.reasons)
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        report.fail(f"{what}: {bad[0]}{more}" + (f", more than {tolerance:g} apart" if reasons else ""))
    elif worst == 0.0:
        report.ok(f"{what}: {len(recorded)} figures, the same to the last bit")
    else:
        report.ok(f"{what}: {len(recorded)} figures, the same to {worst:.1e} (up to {tolerance:g} allowed: {reasons})")
