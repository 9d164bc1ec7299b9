"""Reading runs back: a run directory (finished, being written, or left by a kill) or a compact record of one."""

import hashlib
import json
import re
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from common import UsageError, atomic_open, is_locked, read_json, read_jsonl

# Fields that differ between two identical runs.
TIMING_FIELDS = {"time", "seconds", "ms", "eta_s", "tok_per_sec", "samples_per_sec", "items_per_sec", "mb_per_sec"}
TIMING_FIELDS |= {"mfu", "peak_mb"}
AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training", "flops": "training FLOPs"}
SAMPLE = re.compile(r"^--- step (\d+)\n", re.M)  # the line above each sample
FRESH = 60.0  # seconds since its last line for which a run counts as running although no lock is seen


@dataclass
class Run:
    """A run as it stands on disk, finished or not. `metrics` holds one row per (step, kind), by step.

    metrics_sha256: checksum over the whole lines of metrics.jsonl, to be compared with the one in result.json.
    """

    run_dir: Path
    kind: str
    settings: dict
    config: dict
    env: dict
    result: dict
    metrics: list = field(repr=False)
    metrics_sha256: str = field(repr=False)

    @property
    def name(self):
        return self.run_dir.resolve().name

    def rows(self, kind):
        """The rows of one kind, by step."""
        return [row for row in self.metrics if row["kind"] == kind]

    def curve(self, kind, y="loss", x="step"):
        """Two lists (xs, ys) of the rows of one kind that have y. x: one of AXES; UsageError where it is not recorded.

        tokens are those seen before the row's step, flops those of the model's passes over them. seconds are those of
        the steps where they are timed (evaluations and pauses left out), else the clock since the first row.
        """
        rows = [row for row in self.rows(kind) if row.get(y) is not None]
        xs, ys = [row["step"] for row in rows], [row[y] for row in rows]
        if x in ("tokens", "flops"):
            per_token = 1 if x == "tokens" else self.settings.get("flops_per_token")
            if self.tokens is None or per_token is None:
                raise UsageError(f"{self.run_dir} ({self.kind}) does not record its {x}; compare by step or seconds")
            xs = [step * self.settings["total_batch_size"] * per_token for step in xs]
        elif x == "seconds":
            timed = {row["step"]: row["ms"] / 1e3 for row in self.rows("train") if row.get("ms") is not None}
            steps, spent = [*timed], [0.0, *accumulate(timed.values())]
            if timed:
                xs = [spent[bisect_left(steps, step)] for step in xs]
            else:
                xs = [row["time"] - self.metrics[0]["time"] for row in rows]
        return xs, ys

    @property
    def status(self):
        """That of result.json; "stale" for a run that says running although no process holds it any more."""
        status = self.result.get("status", "?")
        quiet = time.time() - (self.written or 0.0) > FRESH
        return "stale" if status == "running" and quiet and not is_locked(self.run_dir / "run.lock") else status

    @property
    def written(self):
        """When the run last wrote, in seconds since 1970: as its rows say, else its config (a copy's is younger)."""
        times = [row["time"] for row in self.metrics if row.get("time")]
        file = self.run_dir / "config.json"
        return max(times) if times else file.stat().st_mtime if file.exists() else None

    @property
    def step(self):
        """The step that the run has come to, or None."""
        known = [self.result.get("step"), *(row["step"] for row in self.metrics[-1:])]
        return max((step for step in known if step is not None), default=None)

    @property
    def max_steps(self):
        """The step at which the run would end, or None where it has not said."""
        return self.result.get("max_steps") or self.settings.get("max_steps") or None

    @property
    def tokens(self):
        """Training tokens so far, or None."""
        per_step = self.settings.get("total_batch_size") if self.kind == "gpt2" else None
        return None if per_step is None or self.step is None else self.step * per_step

    @property
    def hours(self):
        """Hours of training: its timed steps, over all starts, or the last start if that took longer; or None."""
        steps = sum(row["ms"] for row in self.rows("train") if row.get("ms") is not None) / 1e3
        return max(steps, self.result.get("seconds") or 0.0) / 3600 or None

    def read_text(self, name):
        """The text of a file of the run; empty where there is none."""
        path = self.run_dir / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def log_lines(self):
        """The lines of log.txt that are not blank, without a record's samples."""
        return [line for line in SAMPLE.split(self.read_text("log.txt"))[0].splitlines() if line.strip()]

    def samples(self):
        """[(step, text)] in the order in which they were written; a record has them at the end of log.txt."""
        text = self.read_text("samples.txt") or self.read_text("log.txt")
        parts = SAMPLE.split(text)[1:]
        return [(int(step), text.removesuffix("\n")) for step, text in zip(parts[::2], parts[1::2])]

    def adapters(self):
        """The adapters of a sweep, each a Run, by name: from adapters/*/ or, in a record, from adapters.jsonl."""
        table = self.run_dir / "adapters.jsonl"
        if not table.exists():
            return [read_run(path.parent) for path in sorted((self.run_dir / "adapters").glob("*/config.json"))]
        runs = []
        for _, row in read_jsonl(table):
            lines = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in row["metrics"])  # as RunLog wrote them
            folder = self.run_dir / "adapters" / row["name"]
            runs.append(_make_run(folder, row["config"], row["env"], row["result"], lines.encode()))
        return runs


def read_run(run_dir):
    """Read a run directory or a record -> Run. A run that is being written, or was killed while writing, reads too."""
    run_dir = Path(run_dir)
    if (run_dir / "record.json").exists():
        record = read_json(run_dir / "record.json")
        config, env, result = (record.get(name) for name in ("config", "env", "result"))
    elif (run_dir / "config.json").exists():
        config = read_json(run_dir / "config.json")
        env, result = (read_json(p) if p.exists() else {} for p in (run_dir / "env.json", run_dir / "result.json"))
    else:
        raise UsageError(f"{run_dir} is not a run directory: it has no config.json or record.json")
    if not all(isinstance(part, dict) for part in (config, env, result)) or not {"kind", "settings"} <= config.keys():
        raise UsageError(f"{run_dir} is not a run directory: its config has no kind and settings, or a file is damaged")
    metrics = run_dir / "metrics.jsonl"
    return _make_run(run_dir, config, env, result, metrics.read_bytes() if metrics.exists() else b"")


def _make_run(run_dir, config, env, result, metrics):
    """metrics: the bytes of metrics.jsonl; what a kill left of the last line is ignored. (CRLF becomes LF.)"""
    lines, rows = metrics.replace(b"\r\n", b"\n").split(b"\n")[:-1], {}
    for i, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            rows[row["step"], row["kind"]] = row
        except (ValueError, KeyError, TypeError):  # a whole line, so no kill explains it
            raise UsageError(f"{run_dir}/metrics.jsonl, line {i} is not a metrics row; it is damaged") from None
    digest = hashlib.sha256(b"".join(line + b"\n" for line in lines)).hexdigest()
    rows = sorted(rows.values(), key=lambda row: row["step"])
    return Run(run_dir, config["kind"], config["settings"], config, env, result, rows, digest)


def find_runs(folder):
    """The run directories and records under a folder, itself included, by name."""
    found = [p.parent for p in Path(folder).rglob("config.json") if (p.parent / "env.json").exists()]
    return sorted(found + [p.parent for p in Path(folder).rglob("record.json")])


def comparable_metrics(run_dir):
    """What "identical runs" compares: the metrics rows without the fields of time and memory."""
    return untimed(read_run(run_dir).metrics)


def untimed(rows):
    """Rows of metrics.jsonl without the fields that differ between two identical runs."""
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows]


def draw_curves(out, curves, reference=None, xlabel="step", ylabel="loss (nats per token)", title=""):
    """Draw curves {label: (xs, ys)} with their last values, and reference values {label: y} as dashed lines."""
    from matplotlib.figure import Figure  # no pyplot: no backend is chosen, no global state touched

    fig = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    ax = fig.subplots()
    for label, (xs, ys) in curves.items():
        if len(xs):
            ax.plot(xs, ys, lw=1.2, marker="o" if len(xs) <= 50 else "", ms=3.5, label=f"{label} (last {ys[-1]:.3f})")
    for i, (label, value) in enumerate((reference or {}).items()):
        ax.axhline(value, color="#444444", ls=("--", ":", "-.")[i % 3], lw=1, label=f"{label} {value:.2f}")
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.grid(alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=9 if len(curves) <= 10 else 6)
    with atomic_open(out, "wb") as f:
        fig.savefig(f, format="png")
