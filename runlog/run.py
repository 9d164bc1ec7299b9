"""Reading runs back: a run directory (finished, being written, or left by a kill) or a compact record of one."""

import hashlib
import json
import re
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import filelock

from common import UsageError, atomic_open, read_json, read_jsonl

# Fields that differ between two runs that learned the same thing: "identical runs" leaves them out.
TIMING_FIELDS = {"time", "seconds", "ms", "eta_s", "tok_per_sec", "samples_per_sec", "items_per_sec", "mb_per_sec"}
TIMING_FIELDS |= {"mfu", "peak_mb"}
AXES = {"step": "step", "tokens": "tokens", "seconds": "seconds of training", "flops": "FLOP"}
SAMPLE = re.compile(r"^--- step (\d+)\n", re.M)  # the line above each sample
FRESH = 60.0  # seconds after its last line for which a run counts as running although nobody seems to hold its lock


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
        """Two lists (xs, ys) of the rows of one kind that have both. x: a field, or one of AXES."""
        value = self.axis(x)
        pairs = [(value(r), r[y]) for r in self.rows(kind) if r.get(y) is not None]
        pairs = [(a, b) for a, b in pairs if a is not None]
        return [a for a, _ in pairs], [b for _, b in pairs]

    def axis(self, x):
        """row -> its place on the axis, or None. UsageError where the run does not record what the axis needs.

        tokens and FLOP are those spent before the row's step; FLOP are 6 N + 12 n_layer n_embd T a token. seconds are
        those of the steps where they are timed (evaluations and pauses left out), else the clock since the first row.
        """
        if x in ("tokens", "flops"):
            per_step = self.settings.get("total_batch_size")
            if self.kind != "gpt2" or not per_step:
                raise UsageError(f"{self.run_dir} ({self.kind}) does not record its {x}; compare by step or seconds")
            return lambda row: row["step"] * per_step * (self.flops_per_token() if x == "flops" else 1)
        if x == "seconds":
            timed = [(row["step"], row["ms"] / 1e3) for row in self.rows("train") if row.get("ms") is not None]
            if not timed:
                start = next((row["time"] for row in self.metrics if row.get("time")), None)
                return lambda row: None if start is None or row.get("time") is None else row["time"] - start
            steps, spent = [step for step, _ in timed], [0.0, *accumulate(seconds for _, seconds in timed)]
            return lambda row: spent[bisect_left(steps, row["step"])]
        return lambda row: row.get(x)

    def flops_per_token(self):
        """6 N + 12 n_layer n_embd T, N being all parameters (the convention in which MFU is stated)."""
        n = self.result.get("parameters")
        if n is None:
            raise UsageError(f"{self.run_dir} has not recorded its parameters yet; compare by step, tokens or seconds")
        s = self.settings
        return 6 * n + 12 * s["n_layer"] * s["n_embd"] * s["block_size"]

    @property
    def status(self):
        """That of result.json; "stale" for a run that says running although no process holds it any more."""
        status = self.result.get("status", "?")
        if status == "running" and not is_locked(self.run_dir) and not (self.silence() or 0) < FRESH:
            return "stale"
        return status

    def silence(self):
        """Seconds since the run last wrote to its metrics or log, or None."""
        files = [self.run_dir / name for name in ("metrics.jsonl", "log.txt")]
        written = [file.stat().st_mtime for file in files if file.exists()]
        return max(0.0, time.time() - max(written)) if written else None

    @property
    def written(self):
        """When the run last wrote, in seconds since 1970: as its rows say, else its files (a copy's are younger)."""
        times = [row["time"] for row in self.metrics if row.get("time")]
        silence = self.silence()
        return max(times) if times else None if silence is None else time.time() - silence

    def samples(self):
        """[(step, text)] in the order in which they were written; a record has them at the end of log.txt."""
        text = self.read_text("samples.txt") or self.read_text("log.txt")
        parts = SAMPLE.split(text)[1:]
        return [(int(step), text.removesuffix("\n")) for step, text in zip(parts[::2], parts[1::2])]

    def log_lines(self):
        """The lines of log.txt that are not blank, without a record's samples."""
        return [line for line in SAMPLE.split(self.read_text("log.txt"))[0].splitlines() if line.strip()]

    def read_text(self, name):
        """The text of a file of the run; empty where there is none."""
        path = self.run_dir / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

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
    if not isinstance(config, dict) or not {"kind", "settings"} <= config.keys():
        raise UsageError(f"{run_dir} is not a run directory: its config has no kind and settings")
    return _make_run(run_dir, config, env, result, _metrics_bytes(run_dir))


def _make_run(run_dir, config, env, result, metrics):
    rows = parse_metrics(metrics, run_dir / "metrics.jsonl")
    return Run(run_dir, config["kind"], config["settings"], config, env, result, rows, _sha256_of_lines(metrics))


def find_runs(folder):
    """The run directories and records under a folder, itself included, by name."""
    found = [p.parent for p in Path(folder).rglob("config.json") if (p.parent / "env.json").exists()]
    return sorted(found + [p.parent for p in Path(folder).rglob("record.json")])


def is_locked(run_dir):
    """Whether a process holds the run: on this machine, or on another one if the file system shares locks."""
    path = Path(run_dir) / "run.lock"
    if not path.exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0, fallback_to_soft=False):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a read-only copy, or a file system without locks
        return False


def read_metrics(run_dir):
    """Rows of metrics.jsonl, the last one per (step, kind), sorted by step; a torn last line is passed over."""
    return parse_metrics(_metrics_bytes(run_dir), Path(run_dir) / "metrics.jsonl")


def _metrics_bytes(run_dir):
    path = Path(run_dir) / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


def parse_metrics(data, path):
    """The bytes of a metrics.jsonl -> its rows as `read_metrics` gives them; UsageError names the path."""
    rows, lines = {}, data.decode(errors="replace").split("\n")
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows[row["step"], row["kind"]] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                if i < len(lines):  # a whole line, so no kill explains it
                    raise UsageError(f"{path}, line {i} is not a metrics row; the file was damaged") from None
    return sorted(rows.values(), key=lambda r: r["step"])


def learned(run_dir):
    """What "identical runs" compares: the metrics rows without the fields of time and memory."""
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in read_metrics(run_dir)]


def metrics_sha256(run_dir):
    """Checksum over the whole lines of metrics.jsonl: changing a digit changes it. (CRLF counts as LF.)"""
    return _sha256_of_lines(_metrics_bytes(run_dir))


def _sha256_of_lines(data):
    data = data.replace(b"\r\n", b"\n")
    return hashlib.sha256(data[: data.rfind(b"\n") + 1]).hexdigest()


def plot_loss(run_dir, reference=None, ylabel="loss (nats per token)"):
    """Draw the train and val curves of `run_dir` into its loss.png.

    reference: {label: loss}, drawn as dashed horizontal lines.
    """
    from matplotlib.figure import Figure  # no pyplot: no backend is chosen, no global state touched

    run = read_run(run_dir)
    fig = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    ax = fig.subplots()
    xs, ys = run.curve("train")
    if xs:
        ax.plot(xs, ys, color="#0072B2", lw=1, alpha=0.75, label="train")
    xs, ys = run.curve("val")
    if xs:
        ax.plot(xs, ys, color="#D55E00", lw=1.8, marker="o", ms=3.5, label=f"validation (last {ys[-1]:.3f})")
    for (label, value), color in zip((reference or {}).items(), ("#444444", "#009E73", "#CC79A7")):
        ax.axhline(value, color=color, ls="--", lw=1, label=f"{label} {value:.2f}")
    ax.set(xlabel="step", ylabel=ylabel, title=run.run_dir.resolve().name)
    ax.grid(alpha=0.25)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False)
    with atomic_open(run.run_dir / "loss.png", "wb") as f:
        fig.savefig(f, format="png")
