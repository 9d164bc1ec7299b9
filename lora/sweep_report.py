"""Summary of a finished sweep: tables of held-out losses, contrasts and verdicts, curves, and a readable log.

`sweep.py` calls `summarize` when the last adapter is done; everything is read back from the adapters' run directories.
"""

import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from scipy.stats import t

from common import atomic_open
from lora.train_lora import NO_EFFECT, mean_train_loss, write_experiment
from runlog import RunLog, read_run
from runlog.judge import judge_all, verified

FIRST = ("lr", "r", "lora_alpha", "lora_dropout")  # columns of the table, before all others that vary


def summarize(folder, configs, judged=False):
    """Write table.md, loss.png, lora_experiments_TASK.log and result.json of a sweep; if `judged` with verdicts."""
    folder, (frame, names), rows = Path(folder), adapter_frame(configs), []
    runs = [*frame["run"]]
    best = frame.loc[frame["loss"].idxmin(), "run"]
    trained, full = (sum(run.result[name] for run in runs) for name in ("step", "max_steps"))
    table = held_out_table(frame, names)
    if judged:  # contrasts would compare means over different seeds
        baseline, verdicts = judge_configs(frame, names)
        table += f"\n{verdicts_table(verdicts, names)}\nbaseline: {label(baseline, names)}\n"
        rows = [{"name": label(values, names), **asdict(verdict)} for values, verdict in verdicts.items()]
    else:
        table += f"\n{contrasts_table(frame, names)}"
    with RunLog(folder, "lora_sweep", read_run(folder).settings, resume=True) as log:
        log.print(table)
        with atomic_open(folder / "table.md") as f:
            f.write(table)
        with atomic_open(folder / "loss.png", "wb") as f:
            draw_curves(frame, names).savefig(f, format="png")
        (folder / f"lora_experiments_{configs[0].task}.log").unlink(missing_ok=True)
        for cfg, run in zip(configs, runs):
            text = (run.rows("sample") or [run.result])[-1].get("text", "")
            result = {**run.result, "train_loss": mean_train_loss(run), "text": text}
            write_experiment(folder, cfg, result, run.metrics[-1]["time"])
        log.finish(
            "success", adapters=len(runs), steps_trained=trained, steps_full=full, step_share=trained / full,
            rows=rows, best=best.name, best_held_out_loss=best.result["held_out_loss"],
            diverged=[run.name for run in runs if run.result["status"] == "diverged"],
        )  # fmt: skip
        log.print(f"best: {best.name}, held-out loss {frame['loss'].min():.4f}")
        log.print(
            f"{trained:,} of {full:,} adapter steps were trained ({trained / full:.0%}); curves and table: {folder}"
        )


def adapter_frame(configs):
    """A row an adapter: its settings, held-out `loss` (infinite if none was finite), `run` -> (DataFrame, names).

    names: the settings that vary within the sweep, seeds aside; the task, which is the same for all, if none does.
    """
    frame = pd.DataFrame([asdict(cfg) for cfg in configs])
    names = [*FIRST, *(name for name in frame if name not in (*FIRST, *NO_EFFECT, "seed", "device"))]
    runs = [read_run(cfg.run_dir) for cfg in configs]
    losses = [run.result["held_out_loss"] for run in runs]
    frame["loss"], frame["run"] = [math.inf if loss is None else loss for loss in losses], runs
    return frame, [name for name in names if frame[name].nunique() > 1] or ["task"]


def held_out_table(frame, names):
    """Markdown: a line for each configuration, best first, its held-out loss as mean ± 95 % interval over seeds."""
    rows = []
    for values, same in frame.groupby(names, sort=False):
        loss, half = same["loss"].mean(), t.ppf(0.975, len(same) - 1) * same["loss"].sem()
        scores = pd.DataFrame([run.result.get("after") or {} for run in same["run"]]).mean()
        last = [run.curve("val")[1][-1:] for run in same["run"]]
        rows.append({
            "order": loss, **dict(zip(names, values)),
            "held-out loss": f"{loss:.4f}" + (f" ± {half:.4f}" if half < math.inf else ""),
            "seeds": len(same), "best step": " ".join(str(run.result["best_step"]) for run in same["run"]),
            "last loss": " ".join(f"{value[0]:.4f}" if value else "-" for value in last),
            "ended": ", ".join(sorted({f"{r.result.get('stopped') or r.status} at {r.step}" for r in same["run"]})),
            "task": " ".join(f"{name} {score:.3f}" for name, score in scores.items()) or "-",
        })  # fmt: skip
    return markdown(rows)


def contrasts_table(frame, names):
    """Markdown: the effect of one setting where all others are the same, the widest range of held-out loss first.

    Means over all configurations with a value would mix in their other settings, unless the grid is complete.
    """
    rows = []
    means = frame.groupby([*names, "task"], as_index=False)["loss"].mean()  # over seeds
    for name in names:
        others = [other for other in names if other != name]
        for values, same in means.groupby(others or "task"):
            spread = same["loss"].max() - best if (best := same["loss"].min()) < math.inf else 0.0
            if len(same) > 1:
                rows.append({
                    "order": -spread, "what differs": name,
                    "all else": ", ".join(f"{k} {v}" for k, v in zip(others, values)) or "-",
                    "held-out loss": ", ".join(f"{v}: {loss:.4f}" for v, loss in zip(same[name], same["loss"])),
                    "range": f"{spread:.4f}",
                })  # fmt: skip
    return markdown(rows)


def judge_configs(frame, names):
    """Is a configuration better or worse than the baseline, the first that did not always diverge? By `runlog.judge`.

    -> (values of the baseline, {values of another: Verdict}); where all diverged, (None, {}). The better are verified.
    """
    runs = {values: [*same["run"]] for values, same in frame.groupby(names, sort=False)}
    finished = [values for values, own in runs.items() if any(run.status != "diverged" for run in own)]
    if not finished:
        return None, {}
    baseline = runs.pop(finished[0])
    verdicts = judge_all(baseline, runs.values(), metric="held_out_loss")
    verdicts = [verified(verdict, [*baseline, *own]) for verdict, own in zip(verdicts, runs.values())]
    return finished[0], dict(zip(runs, verdicts))


def verdicts_table(verdicts, names):
    """Markdown: a line for each Verdict of `judge_configs`."""
    rows = []
    for place, (values, v) in enumerate(verdicts.items()):
        spread = f"{v.low:+.4f} … {v.high:+.4f}" if v.low is not None else "unbounded"
        rows.append({
            "order": place, **dict(zip(names, values)), "verdict": v.verdict,
            "difference": "-" if v.difference is None else f"{v.difference:+.4f}", "interval": spread,
            "pairs": v.n, "noise": "-" if v.noise is None else f"{v.noise:.4f}", "more seeds": v.more or "-",
        })  # fmt: skip
    return markdown(rows)


def label(values, names):
    """A configuration as text."""
    return ", ".join(f"{name} {value}" for name, value in zip(names, values or ()))


def markdown(rows):
    """Rows, dicts of the same keys, sorted by "order", which is not shown -> a Markdown table; of no rows, ""."""
    rows = sorted(rows, key=lambda row: row.pop("order"))
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)] if rows else []
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_curves(frame, names):
    """A figure with a line an adapter, seeds in one colour: left the training loss, right the held-out loss."""
    fig = Figure(figsize=(10, 4.4), dpi=130, layout="constrained")
    left, right = fig.subplots(1, 2, sharey=True)
    for i, (values, same) in enumerate(frame.groupby(names, sort=False)):
        style = {"color": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]}
        diverged = sum(run.result["status"] == "diverged" for run in same["run"])
        name = label(values, names) + (f" (diverged: {diverged} of {len(same)})" if diverged else "")
        for run in same["run"]:
            steps, losses = run.curve("train")
            smooth = pd.Series(losses, dtype=float).ewm(alpha=0.1, adjust=False).mean()
            left.plot(steps, smooth, lw=1.2, **style)
            right.plot(*run.curve("val"), lw=1.4, marker="o", ms=2.5, label=name, **style)
            name = None  # one entry for all seeds
    for ax in (left, right):
        ax.grid(alpha=0.25)
        ax.margins(y=0)
    right.set(xlabel="step", title="held out")
    if before := [loss for run in frame["run"] for loss in run.curve("val")[1][:1]]:  # none where no loss was finite
        right.set_ylim(top=1.1 * max(before))  # a diverging curve leaves the axes
    left.set(xlabel="step", title="training, smoothed", ylabel="loss (nats per target token)")
    fig.legend(loc="outside right upper", fontsize=7, frameon=False)
    return fig
