"""Runs side by side: which settings differ, the curves on one axis, and where they end.

Runs that differ by the seed alone make a group, which is told by its mean, standard deviation and n.
"""

import re
from bisect import bisect_left
from pathlib import Path
from statistics import median

from common import UsageError, atomic_open
from runlog.run import AXES
from runlog.tables import deviation, spread, table

# Settings that say where a run lies and how it was started, not what it did.
ASIDE = {"run_dir", "out", "overwrite", "plan", "plan_tok_per_sec", "stop_after_minutes", "allow_config_change"}
ASIDE |= {"tensorboard", "wandb", "verbose", "show_batch", "html"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#882255", "#999933", "#117733")
MANY = 4
COLUMNS = 8  # places on the axis at which the table of curves is read


class Group:
    """Runs that differ by the seed alone (a single run is a group of one)."""

    def __init__(self, runs):
        self.runs, self.label = runs, _label(runs)
        self.seeds = [run.settings.get("seed") for run in runs]
        self._curves = {}

    def curves(self, kind, y, x):
        """A run's (xs, ys), for each that has any."""
        if (kind, y, x) not in self._curves:
            found = [run.curve(kind, y, x) for run in self.runs]
            self._curves[kind, y, x] = [(xs, ys) for xs, ys in found if xs]
        return self._curves[kind, y, x]

    def finals(self, kind, y):
        """The last value of each run of the group."""
        return [ys[-1] for _, ys in self.curves(kind, y, "step")]

    def at(self, kind, y, x, place):
        """The mean of the curves at a place on the axis, between two rows on the straight line; None beyond them."""
        values = [interpolate(xs, ys, place) for xs, ys in self.curves(kind, y, x)]
        return None if not values or None in values else sum(values) / len(values)


def _label(runs):
    if len(runs) == 1:
        return runs[0].name
    stems = {re.sub(r"[-_.]?(seed|s)?[-_.]?\d+$", "", run.name) for run in runs}  # adamw-seed1, adamw-seed2 -> adamw
    return stems.pop() if len(stems) == 1 else f"{runs[0].name} and {len(runs) - 1} more"


def interpolate(xs, ys, place):
    """interpolate([0, 10], [4.0, 3.0], 5) -> 3.5; None outside of xs."""
    i = bisect_left(xs, place)
    if i == len(xs) or place < xs[0]:
        return None
    if xs[i] == place or i == 0:
        return ys[i]
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (place - xs[i - 1]) / (xs[i] - xs[i - 1])


def group(runs):
    """Runs -> [Group], in the order of their first members."""
    groups = {}
    for run in runs:
        same = {k: v for k, v in run.settings.items() if k not in ASIDE | {"seed"}}
        groups.setdefault((run.kind, repr(sorted(same.items()))), []).append(run)
    return [Group(members) for members in groups.values()]


def differences(runs):
    """What is not the same in all runs -> {name: [value of each]}: settings, code, machine."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in ASIDE)
    facts = {name: [run.settings.get(name) for run in runs] for name in names}
    facts["kind"] = [run.kind for run in runs]
    facts["git_commit"] = [(run.config.get("git_commit") or "-")[:9] for run in runs]
    facts["git_dirty"] = [run.config.get("git_dirty") for run in runs]
    for name in ("torch", "cpu", "gpus", "threads", "world_size"):
        facts[name] = [run.env.get(name) for run in runs]
    return {name: values for name, values in facts.items() if any(value != values[0] for value in values)}


# ---------------------------------------------------------------------------------------------------------------------
# the tables


def settings_table(runs):
    """A line for each setting that differs, a column for each run; of many runs the other way round."""
    facts = {name: list(map(_text, values)) for name, values in differences(runs).items()}
    if not facts:
        return "the settings are the same"
    if len(runs) > MANY:
        return table(["run", *facts], [[run.name, *values] for run, values in zip(runs, zip(*facts.values()))])
    return table(["differs", *(run.name for run in runs)], [[name, *values] for name, values in facts.items()])


def _text(value):
    text = "-" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:20]}…{text[-16:]}"


def curve_table(groups, kind, y, x):
    """A line for each group: its mean curve at a few places on the axis."""
    longest = max((xs for g in groups for xs, _ in g.curves(kind, y, x)), key=lambda xs: xs[-1])
    if x == "seconds":  # no two runs were read at the same second
        places = [longest[-1] * (i + 1) / COLUMNS for i in range(COLUMNS)]
    else:
        picks = {round(i * (len(longest) - 1) / (COLUMNS - 1)) for i in range(COLUMNS)}
        places = [longest[i] for i in sorted(picks)]
    head = [f"{kind} {y} at {AXES[x]}", *map(_place, places)]
    return table(head, [[g.label, *(g.at(kind, y, x, place) for place in places)] for g in groups])


def _place(value):
    return f"{value:.3g}" if value >= 1e9 or (value < 100 and value != int(value)) else f"{value:,.0f}"


def final_table(groups, kind, y):
    """Where each group ended: mean ± standard deviation over its n runs; a run's speed is the median of its rows."""
    rows = []
    for g in groups:
        curves = g.curves(kind, y, "step")
        speeds = [[row["tok_per_sec"] for row in run.rows("train") if row.get("tok_per_sec")] for run in g.runs]
        rows.append([
            g.label, len(g.runs), spread([ys[-1] for _, ys in curves]), spread([min(ys) for _, ys in curves]),
            max((run.step or 0 for run in g.runs), default=None), max(run.tokens or 0 for run in g.runs) or None,
            spread([run.hours for run in g.runs if run.hours]), spread([round(median(s)) for s in speeds if s]),
            ", ".join(sorted({run.status for run in g.runs})),
        ])  # fmt: skip
    return table(["run", "n", f"last {kind} {y}", "best", "step", "tokens", "hours", "tokens/s", "status"], rows)


def difference_table(groups, kind, y):
    """Each group's final value against the first group's.

    Where both hold the same seeds a seed is compared with itself, and the deviation is that of these differences;
    elsewhere it is that of a difference of two independent runs.
    """
    first, rows = groups[0], []
    for g in groups[1:]:
        ours, theirs = g.finals(kind, y), first.finals(kind, y)
        if not ours or not theirs:
            continue
        paired = len(ours) == len(theirs) == len(g.runs) == len(first.runs) and sorted(map(str, g.seeds)) == sorted(
            map(str, first.seeds)
        )
        if paired:
            by_seed = dict(zip(first.seeds, theirs))
            deltas = [value - by_seed[seed] for seed, value in zip(g.seeds, ours)]
            mean, sd = sum(deltas) / len(deltas), deviation(deltas) if len(deltas) > 1 else None
            n, better = str(len(deltas)), f"{sum(d < 0 for d in deltas)} of {len(deltas)} seeds"
        else:
            mean = sum(ours) / len(ours) - sum(theirs) / len(theirs)
            sd = None
            if min(len(ours), len(theirs)) > 1:
                sd = (deviation(ours) ** 2 + deviation(theirs) ** 2) ** 0.5
            n, better = f"{len(ours)} and {len(theirs)}", "not paired"
        rows.append([g.label, first.label, f"{mean:+.4f}", sd, n, better])
    head = ["run", "against", f"difference of last {kind} {y}", "standard deviation", "n", "lower in"]
    return table(head, rows) if rows else None


def reached_table(groups, kind, y, x):
    """How far each group had to go for the value with which the worst one ends."""
    finals = [g.finals(kind, y) for g in groups]
    goal = max(sum(values) / len(values) for values in finals if values)
    rows = []
    for g in groups:
        curves = g.curves(kind, y, x)
        grid = sorted({place for xs, _ in curves for place in xs})
        before = None
        for place in grid:
            value = g.at(kind, y, x, place)
            if value is not None and value <= goal + 1e-12:
                if before and before[1] > value:  # between two rows: on the straight line
                    place = before[0] + (place - before[0]) * (before[1] - goal) / (before[1] - value)
                rows.append([g.label, place])
                break
            before = (place, value) if value is not None else before
    most = max((place for _, place in rows), default=0)
    rows = [[name, _place(place), f"{place / most:.2f}" if most else "-"] for name, place in rows]
    return table([f"{kind} {y} {goal:.4f} reached", AXES[x], "share"], rows)


def numbers_table(runs):
    """Runs without curves: the figures of result.json, or of its `rows`, that are not the same in all."""
    found = [_numbers(run.result) for run in runs]
    names = list(dict.fromkeys(name for numbers in found for name in numbers))
    rows = [[name, *(numbers.get(name) for numbers in found)] for name in names]
    rows = [row for row in rows if any(value != row[1] for value in row[2:])]
    return table(["figure", *(run.name for run in runs)], rows) if rows else "the figures are the same"


def _numbers(result):
    """{"train/ours seconds": 0.12, …}: the numbers of a result, those in rows under the row's name and who."""
    numbers = {k: v for k, v in result.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    for row in result.get("rows") or ():
        if isinstance(row, dict):
            names = [str(v) for k, v in row.items() if k in ("name", "who", "text_name", "type")]
            for k, v in row.items():
                if isinstance(v, int | float) and not isinstance(v, bool):
                    numbers[f"{'/'.join(names)} {k}"] = v
    return numbers


# ---------------------------------------------------------------------------------------------------------------------
# the picture, and all of it


def draw(groups, kind, y, x, out):
    """The curves of all groups in one picture: each run thin, a group's mean thick."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(8, 4.8), dpi=130, layout="constrained")
    ax = fig.subplots()
    for i, g in enumerate(groups):
        style = {"color": COLORS[i % len(COLORS)], "ls": ("-", "--", ":")[i // len(COLORS) % 3]}
        curves = g.curves(kind, y, x)
        if len(curves) > 1:
            for xs, ys in curves:
                ax.plot(xs, ys, lw=0.7, alpha=0.45, **style)
        grid = sorted({place for xs, _ in curves for place in xs})
        mean = [(place, g.at(kind, y, x, place)) for place in grid] if len(grid) <= 2000 else list(zip(*curves[0]))
        mean = [(place, value) for place, value in mean if value is not None]
        label = g.label + (f" (n = {len(curves)})" if len(curves) > 1 else "")
        ax.plot(*zip(*mean), lw=1.8 if kind == "val" else 1.0, label=label, **style)
    names = {"val": "validation", "train": "training"}
    ax.set(xlabel=AXES[x], ylabel=f"{names.get(kind, kind)} {y}" + (" (nats per token)" if y == "loss" else ""))
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, fontsize=8 if len(groups) <= 10 else 5.5)
    with atomic_open(out, "wb") as f:
        fig.savefig(f, format="png")


def choose_kind(runs, kind, y):
    """The kind of row to compare by: the one asked for, else val, else train; runs without it are named."""
    having = {k: [run for run in runs if run.curve(k, y)[0]] for k in ([kind] if kind else ["val", "train"])}
    best = max(having, key=lambda k: len(having[k]))
    if kind and not having[best]:
        raise UsageError(f"none of these runs has rows of kind {kind} with the field {y}")
    return best, having[best]


def compare(runs, x="step", kind=None, y="loss", out=None):
    """Print the tables, and draw the picture if the runs have curves."""
    if len(runs) < 2:
        raise UsageError("name at least two runs to compare")
    print(settings_table(runs))
    if {"shards_sha256", "tokenizer_sha256"} & differences(runs).keys() and y == "loss":
        print("\nother shards or tokenizers: losses a token are not comparable (--y bits_per_byte: of the same text)")
    kind, having = choose_kind(runs, kind, y)
    if len(having) < len(runs):
        missing = ", ".join(run.name for run in runs if run not in having)
        print(f"\nwithout a curve of {y}: {missing}")
    if not having:
        print(f"\n{numbers_table(runs)}")
        return
    groups = group(having)
    print(f"\n{curve_table(groups, kind, y, x)}\n\n{final_table(groups, kind, y)}")
    for more in (difference_table(groups, kind, y), reached_table(groups, kind, y, x) if len(groups) > 1 else None):
        if more:
            print(f"\n{more}")
    draw(groups, kind, y, x, Path(out))
    print(f"\nby {AXES[x]}: {Path(out).as_posix()}")
