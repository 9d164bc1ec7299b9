"""Replay parts of a recorded GPT-2 run: `python -m runlog verify RUN` calls this.

The trainer itself replays a few steps from fresh weights and from every kept checkpoint, with the recorded settings,
and their rows are compared. On the same hardware they must agree to the last bit where training repeats: eager on a CPU
with as many threads, elsewhere with --deterministic. Otherwise to a tolerance.
"""

import re
import tempfile
from dataclasses import fields

import torch

from common import UsageError, plain, read_jsonl
from common.checkpoints import problem, sorted_checkpoints, step_of
from data.shards import verify as verify_shards
from gpt2 import checkpoint, hellaswag
from gpt2.config import TrainConfig
from gpt2.distributed import Ranks
from gpt2.train_gpt2 import Trainer, all_settings, resolve
from runlog import TIMING_FIELDS, RunLog
from runlog.verify import compare_figures, locate_input

# Relative, for a few steps from the same state. Other threads, ranks or kernels round sums in another order; Muon's
# orthogonalization amplifies that, and 16-bit matmuls start from larger roundings.
TOLERANCE = {"float32": 1e-4, "muon": 2e-3, "16 bit": 2e-2}


def replay_run(run, report, *, steps, whole, data):
    """Check data, tokenizer and checkpoints of a run, and replay steps of it."""
    if run.kind == "hellaswag":
        return replay_hellaswag(run, report)
    data_dir, failed = str(locate_input(run.settings["data_dir"], data)), report.failed
    meta = verify_shards(data_dir)
    recorded = {f.name: run.settings[f.name] for f in fields(TrainConfig) if f.name in run.settings}
    off = dict.fromkeys(("sample_every", "hellaswag_every", "checkpoint_every", "stop_after_minutes"), 0)
    cfg = TrainConfig(**{**recorded, **off, "data_dir": data_dir, "tensorboard": False, "wandb": False})
    now = all_settings(cfg, meta)
    for name, what in (("shards_sha256", "the shards"), ("tokenizer_sha256", "the tokenizer of the shards")):
        if run.settings.get(name) == now[name]:
            report.ok(f"{what} in {data_dir}: as the run read them, checksums match")
        else:
            report.fail(f"{what} in {data_dir}: not as the run read them, {name} is another")
    own = run.run_dir / "tokenizer.model"
    if own.exists() and checkpoint.Tokenizer.load(own).sha256 != run.settings.get("tokenizer_sha256"):
        report.fail(f"{own} is not the tokenizer of the run")
    if report.failed > failed:
        return

    log = run.read_text("log.txt")
    changed = "changed on resume:" in log  # by --allow-config-change: its steps then had several settings
    if whole and changed:
        raise UsageError("its settings were changed on a resume, so it cannot be replayed from its start")
    if (cfg.compile or (run.env.get("gpus") and cfg.device != "cpu")) and not cfg.deterministic:
        report.reasons.append("compiled kernels, and GPUs, repeat to the last bit only with --deterministic")
    if resumed := re.findall(r"^resumed at step (\d+)", log, re.M):
        report.reasons.append(f"up to step {resumed[-1]} an earlier start computed, whose hardware is not recorded")
    last = run.step or 0
    starts = [] if changed else [(0, None)]
    problems = {path: problem(path) for path in sorted_checkpoints(run.run_dir / "ckpt")}
    for path, why in problems.items():
        if why:
            report.fail(f"{path.name}: {why}")
        elif step_of(path) <= last and not whole:
            starts.append((step_of(path), path))
    if all(problems.values()) and not cfg.eval_only:
        report.open("no checkpoint is kept: the weights that the run ended with are not proved")
    torch.set_num_threads(run.env.get("threads") or torch.get_num_threads())  # another number sums in another order
    compared = set()
    for at, path in starts:
        compared |= replay(run, report, cfg, meta, at, last if whole else min(at + steps, last), path)
    if left := sum(row["kind"] in ("train", "val") for row in run.metrics) - len(compared):
        report.open(f"{left:,} rows were not computed again: only their checksum covers them (--whole replays all)")


def replay(run, report, cfg, meta, at, until, path):
    """Train from step `at` to `until` and compare the rows -> {(step, kind)} that were compared."""
    kept = {}  # (step, kind) -> row
    with tempfile.TemporaryDirectory() as folder:
        ranks, log = Ranks(cfg.device), RunLog(folder, "gpt2", {}, enabled=False)
        log.metric = lambda step, kind, **row: kept.update({(step, kind): plain(row)})
        trainer = Trainer(resolve(cfg, ranks, meta), meta, ranks, log, path and checkpoint.load(path))
        if trainer.run(until)["status"] != "success":
            raise KeyboardInterrupt
    what = f"step {at} to {until}, from " + (path.name if path else "the start")
    rows = {(row["step"], row["kind"]): row for row in run.metrics if (row["step"], row["kind"]) in kept}
    recorded, computed = {}, {}
    for (step, kind), row in rows.items():
        for name in row.keys() - TIMING_FIELDS - {"step", "kind"}:
            recorded[f"{kind} {name} of step {step}"] = row[name]
            computed[f"{kind} {name} of step {step}"] = kept[step, kind].get(name)
    if recorded:
        precision = "16 bit" if cfg.dtype != "float32" else "muon" if cfg.optimizer != "adamw" else "float32"
        compare_figures(report, what, recorded, computed, TOLERANCE[precision])
    else:
        report.open(f"{what}: no row of these steps is recorded")
    return set(rows)


def replay_hellaswag(run, report):
    """The accuracies follow from the items' log-probabilities, which are kept."""
    path = min(run.run_dir.glob("hellaswag.jsonl*"), default=None)
    if path is None:
        raise UsageError("the items' log-probabilities are not kept: the accuracies are not computed again")
    rows = [row for _, row in read_jsonl(path)]
    figures = hellaswag.figures(rows)
    recorded = {name: run.result.get(name) for name in figures}
    compare_figures(report, f"accuracies of {len(rows):,} items from {path.name}", recorded, figures, 1e-6)
    report.open("the log-probabilities themselves were not computed again: gpt2/hellaswag.py does that")
