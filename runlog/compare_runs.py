"""Compare runs: settings that differ, curves on one axis, final values.

Runs that differ only in the seed form a group, whose final values are reported as mean and standard deviation.
"""

import numpy as np
import pandas as pd

from common import UsageError
from runlog.run import AXES, draw_curves

# Settings that do not change what a run computes.
IGNORED = {"run_dir", "out", "overwrite", "plan", "plan_tok_per_sec", "stop_after_minutes", "allow_config_change"}
IGNORED |= {"tensorboard", "wandb", "verbose", "show_batch"}


def compare(runs, x="step", kind=None, y="loss", out=None):
    """Print the tables, and draw the curves if there are any."""
    if len(runs) < 2:
        raise UsageError("name at least two runs to compare")
    facts = differences(runs)
    print(table(facts if len(runs) > 4 else facts.T) if len(facts.columns) else "the settings are the same")
    if {"shards_sha256", "tokenizer_sha256"} & {*facts.columns} and y == "loss":
        print("\nother shards or tokenizers: losses per token are not comparable (--y bits_per_byte: of the same text)")
    choice = [kind] if kind else ["val", "train"]
    kind = max(choice, key=lambda k: sum(bool(run.curve(k, y)[0]) for run in runs))
    having = [run for run in runs if run.curve(kind, y)[0]]
    if not having and len(choice) == 1:
        raise UsageError(f"none of these runs has rows of kind {kind} with the field {y}")
    if missing := [run.name for run in runs if run not in having]:
        print(f"\nwithout a curve of {kind} {y}: {', '.join(missing)}")
    if having:
        unique = len({run.name for run in having}) == len(having)
        curves = {run.name if unique else run.run_dir.as_posix(): run.curve(kind, y, x) for run in having}
        print(f"\n{curve_table(curves, f'{kind} {y} by {AXES[x]}')}\n\n{final_table(having, kind, y)}\n\n{out}")
        draw_curves(out, curves, xlabel=AXES[x], ylabel=f"{kind} {y}")


def differences(runs):
    """Settings, code and hardware that differ -> DataFrame with a row for each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in IGNORED)
    facts = {name: [run.settings.get(name) for run in runs] for name in names}
    facts |= {name: [run.config.get(name) for run in runs] for name in ("kind", "git_commit", "git_dirty")}
    facts |= {name: [run.env.get(name) for run in runs] for name in ("torch", "cpu", "gpus", "threads", "world_size")}
    facts = {name: [_short(v) for v in values] for name, values in facts.items() if any(v != values[0] for v in values)}
    return pd.DataFrame(facts, index=[run.name for run in runs])


def _short(value):
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-16:]}"


def group(runs):
    """Runs -> [[Run]]: grouped where only the seed differs, in the order of first members."""
    groups = {}
    for run in runs:
        same = {k: v for k, v in run.settings.items() if k not in IGNORED | {"seed"}}
        groups.setdefault((run.kind, repr(sorted(same.items()))), []).append(run)
    return list(groups.values())


# --- tables


def table(frame, **kwargs):
    """A DataFrame as text."""
    return frame.to_string(na_rep="-", float_format=number, **kwargs)


def number(value):
    """A float in four decimals, or four digits where it is large or tiny: 4.4433, 12,346, 1.2e-05."""
    if 1e3 <= abs(value) < 1e9:
        return f"{value:,.0f}"
    return f"{value:.4f}" if value == 0 or 1e-4 <= abs(value) < 1e3 else f"{value:.4g}"


def spread(values):
    """Mean ± standard deviation of a sample, or the one value."""
    if len(values) < 2:
        return number(values[0]) if values else "-"
    return f"{number(np.mean(values))} ± {number(np.std(values, ddof=1))}"


def curve_table(curves, title):
    """Each curve (xs, ys) at eight points of the longest one, linearly interpolated."""
    grid = np.array(max((xs for xs, _ in curves.values()), key=lambda xs: xs[-1]))
    places = grid[np.unique(np.linspace(0, len(grid) - 1, 8).round().astype(int))]
    rows = {label: np.interp(places, *curve, left=np.nan, right=np.nan) for label, curve in curves.items()}
    columns = [number(float(place)).removesuffix(".0000") for place in places]
    return table(pd.DataFrame(rows, index=columns).T.rename_axis(title))


def final_table(runs, kind, y):
    """Final values of each group, named after its first run, and the difference to the first; median speeds."""
    rows, first = [], None
    for members in group(runs):
        curves = [run.curve(kind, y)[1] for run in members]
        last = [ys[-1] for ys in curves]
        first = np.mean(last) if first is None else first
        speeds = [row["tok_per_sec"] for run in members for row in run.rows("train") if row.get("tok_per_sec")]
        rows.append({
            "run": members[0].name, "seeds": len(members),
            "last": spread(last), "best": spread([min(ys) for ys in curves]),
            "difference": f"{np.mean(last) - first:+.4f}", "step": max(run.step or 0 for run in members),
            "hours": spread([run.hours for run in members if run.hours]),
            "tokens/s": np.median(speeds) if speeds else None,
        })  # fmt: skip
    return table(pd.DataFrame(rows), index=False)
