"""Runs compared: which settings differ, the curves on one axis, where they end and when they reach the same value.

Runs that differ by the seed alone make a group, reported by its mean, standard deviation and n.
"""

import re

import numpy as np
import pandas as pd

from common import UsageError
from runlog.run import AXES, draw_curves

# Settings that say where a run lies and how it was started, not what it did.
ASIDE = {"run_dir", "out", "overwrite", "plan", "plan_tok_per_sec", "stop_after_minutes", "allow_config_change"}
ASIDE |= {"tensorboard", "wandb", "verbose", "show_batch"}
PLACES = 8  # on the axis, at which the table of curves is read


def compare(runs, x="step", kind=None, y="loss", out=None):
    """Print the tables, and draw the picture if the runs have curves."""
    if len(runs) < 2:
        raise UsageError("name at least two runs to compare")
    facts = differences(runs)
    print(table(facts if len(runs) > 4 else facts.T) if len(facts.columns) else "the settings are the same")
    if {"shards_sha256", "tokenizer_sha256"} & {*facts.columns} and y == "loss":
        print("\nother shards or tokenizers: losses per token are not comparable (--y bits_per_byte: of the same text)")
    kinds = [kind] if kind else ["val", "train"]
    having = {k: [run for run in runs if run.curve(k, y)[0]] for k in kinds}
    kind = max(having, key=lambda k: len(having[k]))
    if not having[kind] and len(kinds) == 1:
        raise UsageError(f"none of these runs has rows of kind {kind} with the field {y}")
    if missing := [run.name for run in runs if run not in having[kind]]:
        print(f"\nwithout a curve of {kind} {y}: {', '.join(missing)}")
    if not having[kind]:
        return print(f"\n{numbers_table(runs)}")

    groups = group(having[kind])
    curves = {label: [run.curve(kind, y, x) for run in members] for label, members in groups.items()}
    means = {label: mean_curve(members) for label, members in curves.items()}
    print(f"\n{curve_table(means, f'{kind} {y} by {AXES[x]}')}\n\n{final_table(groups, curves)}")
    goal = max(ys[-1] for _, ys in means.values())
    places = pd.Series({label: crossing(*mean, goal) for label, mean in means.items()})
    reached = pd.DataFrame({f"{kind} {y} {goal:.4f} reached at {AXES[x]}": places, "share": places / places.max()})
    print(f"\n{table(reached)}\n\n{out}")
    draw_curves(out, means, xlabel=AXES[x], ylabel=f"{kind} {y}")


def differences(runs):
    """What is not the same in all runs: settings, code, hardware -> table with a row for each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ASIDE)
    facts = {name: [run.settings.get(name) for run in runs] for name in names}
    facts |= {name: [run.config.get(name) for run in runs] for name in ("kind", "git_commit", "git_dirty")}
    facts |= {name: [run.env.get(name) for run in runs] for name in ("torch", "cpu", "gpus", "threads", "world_size")}
    facts = {name: [_short(v) for v in values] for name, values in facts.items() if any(v != values[0] for v in values)}
    return pd.DataFrame(facts, index=[run.name for run in runs])


def _short(value):
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-16:]}"


def group(runs):
    """Runs -> {label: [Run]}: those that differ by the seed alone together, in the order of their first members."""
    groups = {}
    for run in runs:
        same = {k: v for k, v in run.settings.items() if k not in ASIDE | {"seed"}}
        groups.setdefault((run.kind, repr(sorted(same.items()))), []).append(run)
    labelled = {}
    for members in groups.values():
        stems = {re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", run.name) for run in members}  # adamw-seed1 -> adamw
        label = members[0].name if len(members) == 1 or len(stems) > 1 else stems.pop()
        labelled[members[0].run_dir.as_posix() if label in labelled else label] = members
    return labelled


def mean_curve(curves):
    """Curves (xs, ys) -> the mean one, over the part of the axis that all of them have, on straight lines between."""
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    return grid, np.mean([np.interp(grid, xs, ys) for xs, ys in curves], axis=0)


def crossing(xs, ys, goal):
    """Where a curve first falls to a value, on the straight line between two points; NaN if it never does.

    crossing([0, 10], [4.0, 3.0], 3.5) -> 5.0
    """
    below = np.flatnonzero(np.asarray(ys) <= goal + 1e-12)
    if not len(below):
        return float("nan")
    i = below[0]
    return float(xs[0] if i == 0 else np.interp(goal, [ys[i], ys[i - 1]], [xs[i], xs[i - 1]]))


# ---------------------------------------------------------------------------------------------------------------------
# tables


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


def curve_table(means, title):
    """Each group's mean curve at a few places of the longest."""
    grid = max((xs for xs, _ in means.values()), key=lambda xs: xs[-1])
    places = grid[np.unique(np.linspace(0, len(grid) - 1, PLACES).round().astype(int))]
    rows = {label: np.interp(places, *mean, left=np.nan, right=np.nan) for label, mean in means.items()}
    columns = [number(float(place)).removesuffix(".0000") for place in places]
    return table(pd.DataFrame(rows, index=columns).T.rename_axis(title))


def final_table(groups, curves):
    """Where each group ended, over its n runs, and how far that is from the first; speeds are medians of rows."""
    rows, first = [], None
    for label, runs in groups.items():
        last = [ys[-1] for _, ys in curves[label]]
        first = np.mean(last) if first is None else first
        speeds = [row["tok_per_sec"] for run in runs for row in run.rows("train") if row.get("tok_per_sec")]
        rows.append({
            "run": label, "n": len(runs), "last": spread(last), "best": spread([min(ys) for _, ys in curves[label]]),
            "difference": f"{np.mean(last) - first:+.4f}", "step": max(run.step or 0 for run in runs),
            "tokens": max(run.tokens or 0 for run in runs), "hours": spread([run.hours for run in runs if run.hours]),
            "tokens/s": np.median(speeds) if speeds else None, "status": ", ".join(sorted({r.status for r in runs})),
        })  # fmt: skip
    return table(pd.DataFrame(rows), index=False)


def numbers_table(runs):
    """Runs without curves: the figures of result.json, or of its `rows`, that are not the same in all."""
    figures = {}
    for run in runs:
        found = dict(run.result)
        for row in run.result.get("rows") or ():
            name = "/".join(str(row[k]) for k in ("name", "who", "text_name", "type") if k in row)
            found |= {f"{name} {k}": v for k, v in row.items()}
        figures[run.run_dir.as_posix()] = {k: v for k, v in found.items() if type(v) in (int, float)}
    frame = pd.DataFrame(figures)
    return table(frame[frame.nunique(axis=1, dropna=False) > 1])
