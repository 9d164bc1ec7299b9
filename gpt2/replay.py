"""Compute parts of a recorded GPT-2 run again: `python -m runlog verify RUN` calls this.

From fresh weights and from every kept checkpoint a few steps are replayed by the trainer itself, with the recorded
settings, and their rows are held to the recorded ones. On the same kind of machine they have to agree to the last bit
where training repeats: eager on a CPU with as many threads, elsewhere with --deterministic. Otherwise to a tolerance.
"""

import gzip
import json
import re
import tempfile
from dataclasses import fields, replace
from pathlib import Path

from common import UsageError
from data.shards import verify as verify_shards
from gpt2 import checkpoint, hellaswag
from gpt2.config import TrainConfig
from gpt2.distributed import Ranks, threads
from gpt2.train_gpt2 import Trainer, all_settings, resolve
from runlog import TIMING_FIELDS, RunLog, read_metrics
from runlog.verify import compare_figures, locate_input

# Relative, for a few steps from the same state. Other threads, ranks or kernels round sums in another order; Muon's
# orthogonalization spreads that, and 16-bit matmuls start from larger roundings.
TOLERANCE = {"float32": 1e-4, "muon": 2e-3, "16 bit": 2e-2}


def replay_run(run, report, *, steps, whole, data):
    """Check data, tokenizer and checkpoints of a run, and replay steps of it."""
    if run.kind == "hellaswag":
        return prove_hellaswag(run, report)
    cfg = config_of(run, locate_input(run.settings["data_dir"], data))
    meta = verify_shards(cfg.data_dir)
    if not check_identity(run, report, cfg, meta):
        return
    kept = usable_checkpoints(run, report)
    report.reasons += training_reasons(run, cfg)
    last = run.result.get("step") or run.step or 0
    starts = [(0, None)] if whole or not changed_on_resume(run) else []
    if not whole:
        starts += [(at, path) for at, path in kept.items() if at <= last]
    elif changed_on_resume(run):
        raise UsageError("its settings were changed on a resume, so it cannot be replayed from its start")
    compared = set()
    with threads(run.env.get("threads")):
        for at, path in starts:
            stop = last if whole else min(at + steps, last)
            compared |= replay(run, report, cfg, meta, at, stop, path)
    left = sum(row["kind"] in ("train", "val") for row in run.metrics) - len(compared)
    if left:
        report.open(f"{left:,} rows were not computed again: only their sum speaks for them (--whole replays all)")


def config_of(run, data_dir):
    """The recorded settings as a TrainConfig that only trains and validates."""
    known = {f.name for f in fields(TrainConfig)}
    cfg = TrainConfig(**{k: v for k, v in run.settings.items() if k in known})
    off = {"tensorboard": False, "wandb": False} if {"tensorboard", "wandb"} <= known else {}
    return replace(cfg, data_dir=str(data_dir), sample_every=0, hellaswag_every=0, stop_after_minutes=0.0, **off)


def check_identity(run, report, cfg, meta):
    """Are shards and tokenizer those that the run read? -> whether they are."""
    now, failed = all_settings(cfg, meta), report.failed
    for name, what in (("shards_sha256", "the shards"), ("tokenizer_sha256", "the tokenizer of the shards")):
        if run.settings.get(name) == now[name]:
            report.ok(f"{what} in {cfg.data_dir}: as the run read them, every sum is right")
        else:
            report.fail(f"{what} in {cfg.data_dir}: not as the run read them, {name} is another")
    own = run.run_dir / "tokenizer.model"
    if own.exists() and checkpoint.Tokenizer.load(own).sha256 != run.settings.get("tokenizer_sha256"):
        report.fail(f"{own} is not the tokenizer of the run")
    return report.failed == failed


def usable_checkpoints(run, report):
    """{step: path} of the checkpoints that verify."""
    kept = {}
    for path in checkpoint.sorted_checkpoints(run.run_dir / "ckpt"):
        if problem := checkpoint.problem(path):
            report.fail(f"{path.name}: {problem}")
        else:
            kept[checkpoint.step_of(path)] = path
    if not kept and not run.settings.get("eval_only"):
        report.open("no checkpoint is kept: the weights that the run ended with are not proved")
    return kept


def training_reasons(run, cfg):
    """Why training may not repeat to the last bit, even on the same machine and code."""
    reasons = []
    on_gpu = bool(run.env.get("gpus")) and cfg.device != "cpu"
    if cfg.compile and not cfg.deterministic:
        reasons.append("compiled kernels repeat to the last bit only with --deterministic")
    elif on_gpu and not cfg.deterministic:
        reasons.append("a GPU repeats to the last bit only with --deterministic")
    if resumed := re.findall(r"^resumed at step (\d+)", log_of(run), re.M):
        reasons.append(f"up to step {resumed[-1]} an earlier start computed, whose machine is not recorded")
    return reasons


def changed_on_resume(run):
    """Whether settings were changed under way (--allow-config-change): its steps then had several."""
    return "changed on resume:" in log_of(run)


def log_of(run):
    path = run.run_dir / "log.txt"
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


# ---------------------------------------------------------------------------------------------------------------------
# the replay


class Silent(RunLog):
    """A record for the replay alone: rows, and nothing on the terminal."""

    def print(self, text=""):
        pass

    def plot(self, **kwargs):
        pass


class Replay(Trainer):
    """The trainer, from one state up to one step, without writing checkpoints."""

    def __init__(self, *args, start, until):
        self.start, self.until = start, until
        super().__init__(*args)
        asked = self.stop.reason  # between the steps; a person may still have reasons of their own
        self.stop.reason = lambda: asked() or ("replayed" if self.step >= self.until else None)

    def resume(self):
        if self.start is not None:
            self.load(checkpoint.load(self.start))

    def save(self):
        self.flush()


def replay(run, report, cfg, meta, at, until, path):
    """Train from step `at` to `until` and compare the rows -> {(step, kind)} that were compared."""
    what = f"step {at} to {until}, from " + (path.name if path else "the start")
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(cfg, run_dir=folder)
        ranks = Ranks(cfg.device)
        with Silent(folder, "gpt2", all_settings(cfg, meta)) as log:
            trainer = Replay(resolve(cfg, ranks.device), meta, ranks, log, start=path, until=until)
            trainer.evaluate() if cfg.eval_only else trainer.run()
            if trainer.stop.why:
                raise KeyboardInterrupt
            log.finish("success")
        again = {(row["step"], row["kind"]): row for row in read_metrics(folder)}
    recorded, computed = {}, {}
    for row in run.metrics:
        key = (row["step"], row["kind"])
        if key in again:
            for name in row.keys() - TIMING_FIELDS - {"step", "kind"}:
                recorded[f"{key[1]} {name} of step {key[0]}"] = row[name]
                computed[f"{key[1]} {name} of step {key[0]}"] = again[key].get(name)
    if not recorded:
        report.open(f"{what}: no row of these steps is recorded")
        return set()
    tolerance = TOLERANCE["16 bit" if cfg.dtype in ("bfloat16", "float16") else "muon" if cfg.optimizer == "muon"
                          else "float32"]  # fmt: skip
    compare_figures(report, what, recorded, computed, tolerance)
    return {(row["step"], row["kind"]) for row in run.metrics} & again.keys()


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag


def prove_hellaswag(run, report):
    """The accuracies follow from the items' log-probabilities, which are kept."""
    path = next(iter(sorted(Path(run.run_dir).glob("hellaswag.jsonl*"))), None)
    if path is None:
        raise UsageError("the items' log-probabilities are not kept: the accuracies are not computed again")
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    figures = hellaswag.figures(hellaswag.counts(rows))
    compare_figures(report, f"accuracies of {len(rows):,} items from {path.name}",
          {k: run.result.get(k) for k in figures}, figures, 0.0)  # fmt: skip
    report.open("the log-probabilities themselves were not computed again: gpt2/hellaswag.py does that")
