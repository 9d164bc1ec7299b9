"""Reading a run directory back: finished, still being written, or left by a kill."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from runlog.record import UserError, atomic_open, read_json

# Fields that differ between two runs that learned the same thing: "identical runs" leaves them out.
MACHINE_FIELDS = {"time", "seconds", "ms", "eta_s", "tok_per_sec", "samples_per_sec", "items_per_sec", "mb_per_sec"}
MACHINE_FIELDS |= {"mfu", "peak_mb"}


@dataclass
class Run:
    """A run directory as it stands on disk, finished or not. `metrics` holds one row per (step, kind), by step."""

    run_dir: Path
    kind: str
    settings: dict
    config: dict
    env: dict
    result: dict
    metrics: list = field(repr=False)

    def rows(self, kind):
        """The rows of one kind, by step."""
        return [row for row in self.metrics if row["kind"] == kind]

    def curve(self, kind, y="loss", x="step"):
        """Two lists (xs, ys) of the rows of one kind that have both fields."""
        rows = [r for r in self.rows(kind) if r.get(x) is not None and r.get(y) is not None]
        return [r[x] for r in rows], [r[y] for r in rows]


def read_run(run_dir):
    """Read a run directory -> Run. A run that is still being written, or was killed while writing, reads too."""
    run_dir = Path(run_dir)
    if not (run_dir / "config.json").exists():
        raise UserError(f"{run_dir} is not a run directory: it has no config.json")
    config = read_json(run_dir / "config.json")
    env, result = (read_json(p) if p.exists() else {} for p in (run_dir / "env.json", run_dir / "result.json"))
    return Run(run_dir, config["kind"], config["settings"], config, env, result, read_metrics(run_dir))


def read_metrics(run_dir):
    """Rows of metrics.jsonl, the last one per (step, kind), sorted by step; a torn last line is passed over."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        return []
    rows, lines = {}, path.read_text(encoding="utf-8", errors="replace").split("\n")
    for i, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows[row["step"], row["kind"]] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                if i < len(lines):  # a whole line, so no kill explains it
                    raise UserError(f"{path}, line {i} is not a metrics row; the file was damaged") from None
    return sorted(rows.values(), key=lambda r: r["step"])


def learned(run_dir):
    """What "identical runs" compares: the metrics rows without the fields of time and memory."""
    return [{k: v for k, v in row.items() if k not in MACHINE_FIELDS} for row in read_metrics(run_dir)]


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
