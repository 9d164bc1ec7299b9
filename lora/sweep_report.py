"""What a finished sweep says: table, main effects, curves, the log for people, and what halving would have saved.

`sweep.py` calls `summarize` when the last adapter is done; everything is read back from the adapters' run directories.
"""

import math
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

from common import atomic_open, read_json
from lora.train_lora import NOT_LEARNED, TrainConfig, hyper_parameters, write_experiment
from runlog import RunLog, read_run

# Student's t, two-sided 95 %, by degrees of freedom; beyond, the normal's 1.96.
T95 = (None, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
VARIED = ("lr", "r", "lora_alpha", "lora_dropout", "use_rslora", "bias", "init_lora_weights", "use_dora")
VARIED += ("lr_scheduler", "warmup_steps", "weight_decay", "batch_size", "target_modules", "epochs", "max_steps")
VARIED += tuple(f.name for f in fields(TrainConfig) if f.name not in {*VARIED, *NOT_LEARNED, "seed", "device"})
SHORT = {"lora_alpha": "α", "lora_dropout": "dropout"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444", "#882255", "#999933", "#117733")


def summarize(folder, configs):
    """Write table.md, loss.png, lora_experiments_TASK.log and result.json of the sweep in `folder`."""
    runs = [read_run(cfg.run_dir) for cfg in configs]
    sweep = read_json(Path(folder) / "sweep.json")
    best = min(range(len(runs)), key=lambda i: final_loss(runs[i]))
    trained = sum(run.result["step"] for run in runs)
    full = sum(run.result["max_steps"] for run in runs)
    numbers = {"adapters": len(runs), "steps_trained": trained, "steps_full": full, "step_share": trained / full}
    numbers |= {"best": runs[best].run_dir.name, "best_held_out_loss": runs[best].result["held_out_loss"]}
    numbers["diverged"] = [run.run_dir.name for run in runs if run.result["status"] == "diverged"]
    if all(run.result.get("stopped") in ("end", "diverged") for run in runs):
        rungs = [float(part) for part in sweep["settings"]["rungs"].split(",")]
        numbers["halving_replayed"] = replay_halving(runs, rungs)
    tables = held_out_table(configs, runs), contrasts_table(configs, runs), effects_table(configs, runs)
    table = "\n".join(filter(None, tables))
    with RunLog(folder, "lora_sweep", sweep, resume=True) as log:
        log.print(table)
        with atomic_open(Path(folder) / "table.md") as f:
            f.write(table)
        plot_curves(folder, runs)
        write_log(folder, configs, runs)
        log.finish("success", **numbers)
        log.print(f"best: {numbers['best']}, held-out loss {numbers['best_held_out_loss']:.4f}")
        log.print(f"{trained:,} of {full:,} adapter steps were trained ({trained / full:.0%})")
        if "halving_replayed" in numbers:
            log.print(
                "halving would have trained {step_share:.0%}, regret {regret:.4f}".format(**numbers["halving_replayed"])
            )
        log.print(f"curves in {Path(folder) / 'loss.png'}, table in {Path(folder) / 'table.md'}")


def read_sweep(folder):
    """The adapters of a sweep that were begun, finished or not -> (their settings, their runs)."""
    runs = [read_run(file.parent) for file in sorted((Path(folder) / "adapters").glob("*/config.json"))]
    return [SimpleNamespace(**run.settings) for run in runs], runs


def final_loss(run):
    """The best held-out loss of an adapter, so far if it is still in training; infinite when it never had one."""
    if "held_out_loss" in run.result:
        loss = run.result["held_out_loss"]
        return math.inf if loss is None else loss
    return min((loss for loss in run.curve("val")[1] if math.isfinite(loss)), default=math.inf)


def interval(values):
    """Half the width of the 95 % confidence interval of the mean; None of a single value.

    interval([1.0, 3.0]) -> 12.71
    """
    if len(values) < 2:
        return None
    t = T95[len(values) - 1] if len(values) <= len(T95) else 1.96
    return t * stdev(values) / math.sqrt(len(values))


def varied(configs):
    """Names of the settings that differ within the sweep, seeds aside."""
    return [name for name in VARIED if len({getattr(cfg, name, None) for cfg in configs}) > 1]


def by_configuration(configs, runs):
    """{values of the settings that vary: runs that differ by their seed alone}, in the order of the sweep."""
    names, groups = varied(configs), {}
    for cfg, run in zip(configs, runs):
        groups.setdefault(tuple(getattr(cfg, name, None) for name in names), []).append(run)
    return groups


def held_out_table(configs, runs):
    """Markdown: a line for each configuration, best first, its held-out loss as mean ± 95 % interval over seeds."""
    names, rows = varied(configs), []
    for values, same in by_configuration(configs, runs).items():
        losses = [final_loss(run) for run in same]
        half = interval(losses) if all(map(math.isfinite, losses)) else None
        loss = f"{mean(losses):.4f}" + (f" ± {half:.4f}" if half is not None else "")
        ends = ", ".join(sorted({ending(run) for run in same}))
        steps = " ".join(str(run.result.get("best_step", "-")) for run in same)
        last = " ".join(f"{run.curve('val')[1][-1]:.4f}" if run.curve("val")[1] else "-" for run in same)
        measured = [run.result["after"] for run in same if run.result.get("after")]
        metric = {k: mean(after[k] for after in measured) for k in (measured[0] if measured else ())}
        shown = " ".join(f"{k} {v:.3f}" for k, v in metric.items()) or "-"
        rows.append((mean(losses), [*map(str, values), loss, str(len(same)), steps, last, ends, shown]))
    head = [*names, "held-out loss", "seeds", "best step", "last loss", "ended", "task"]
    return markdown(head, [row for _, row in sorted(rows, key=lambda row: row[0])])


def ending(run):
    step = run.result.get("step", run.metrics[-1]["step"] if run.metrics else 0)
    return f"{run.result.get('stopped') or run.status} at {step}"


def effects_table(configs, runs):
    """Markdown: the mean held-out loss at each value of each hyper-parameter, over all that the others took."""
    rows = []
    for name in varied(configs):
        values = sorted({getattr(cfg, name) for cfg in configs}, key=lambda v: (str(type(v)), v))
        means = {}
        for value in values:
            losses = [final_loss(run) for cfg, run in zip(configs, runs) if getattr(cfg, name) == value]
            means[value] = mean(losses)
        spread = max(means.values()) - min(means.values())
        rows.append((spread, [name, ", ".join(f"{v}: {m:.4f}" for v, m in means.items()), f"{spread:.4f}"]))
    head = ["hyper-parameter", "mean held-out loss, whatever the others were", "range"]
    return markdown(head, [row for _, row in sorted(rows, reverse=True)])


def contrasts(configs, runs, loss=final_loss):
    """What one hyper-parameter does where all others are the same -> {name: [({others}, {value: mean of loss(run)})]}.

    The means of `effects_table` mix in what the others took beside each value; in a sweep that varies one thing at a
    time, as the original's does, these comparisons are the fair ones. Values of a mean that is infinite stay in.
    """
    names, found = varied(configs), {}
    losses = {values: mean(map(loss, same)) for values, same in by_configuration(configs, runs).items()}
    for i, name in enumerate(names):
        groups = {}
        for values, value in losses.items():
            groups.setdefault(values[:i] + values[i + 1 :], {})[values[i]] = value
        others = names[:i] + names[i + 1 :]
        found[name] = [(dict(zip(others, rest)), dict(sorted(g.items()))) for rest, g in groups.items() if len(g) > 1]
    return found


def contrasts_table(configs, runs):
    """Markdown: `contrasts`, the widest first; empty where no two configurations differ in one setting alone."""
    rows = []
    for name, groups in contrasts(configs, runs).items():
        for others, losses in groups:
            spread = max(losses.values()) - min(losses.values())
            beside = ", ".join(f"{k} {v}" for k, v in others.items()) or "-"
            means = ", ".join(f"{v}: {loss:.4f}" for v, loss in losses.items())
            rows.append((spread, [name, beside, means, f"{spread:.4f}"]))
    rows.sort(key=lambda row: row[0], reverse=True)
    return markdown(["what differs", "all else", "held-out loss", "range"], [row for _, row in rows]) if rows else ""


def markdown(head, rows):
    """Head and rows, lists of strings -> a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot_curves(folder, runs):
    """loss.png: training losses, smoothed, and held-out losses of all adapters in one figure."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 4.4), dpi=130, layout="constrained")
    draw_curves(fig, [SimpleNamespace(**run.settings) for run in runs], runs)
    with atomic_open(Path(folder) / "loss.png", "wb") as f:
        fig.savefig(f, format="png")


def draw_curves(fig, configs, runs):
    """Draw a line a configuration, the mean over its seeds: left the training loss, right the held-out loss."""
    left, right = fig.subplots(1, 2, sharey=True)
    names, trained, before, shown = varied(configs), [], [], []  # shown: losses that must lie inside the frame
    for i, (values, same) in enumerate(by_configuration(configs, runs).items()):
        style = {"color": COLORS[i % len(COLORS)], "ls": ("-", "--", ":")[i // len(COLORS) % 3]}
        steps, losses = mean_curve(same, "train")
        smooth = smoothed(losses)
        left.plot(steps, smooth, lw=1.2, **style)
        trained += [smooth] if smooth else []
        label = ", ".join(f"{SHORT.get(name, name)} {value:g}" if isinstance(value, int | float) else str(value)
                          for name, value in zip(names, values)) or same[0].name  # fmt: skip
        diverged = sum(run.result.get("status") == "diverged" for run in same)
        steps, losses = mean_curve(same, "val")
        label += f" (diverged: {diverged} of {len(same)})" if diverged else ""
        right.plot(steps, losses, lw=1.4, marker="o", ms=2.5, label=label, **style)
        before += losses[:1]
        shown += [losses[0], min(losses)] if losses else []
    if before:
        right.axhline(before[0], color="black", ls="--", lw=1, label="before training")
        best = min(trained, key=min, default=before)
        shown = [loss for loss in (*shown, best[0], min(best)) if math.isfinite(loss)]  # a blow-up leaves the frame
        low, high = min(shown), max(shown)
        margin = high - low
        right.set(ylim=(low - 0.1 * margin - 0.02, high + 0.3 * margin + 0.02))
    left.set(xlabel="step", ylabel="loss (nats per learned token)", title="training, smoothed")
    right.set(xlabel="step", title="held out")
    for ax in (left, right):
        ax.grid(alpha=0.25)
    if runs:
        fig.legend(loc="outside right upper", fontsize=7, frameon=False)


def mean_curve(runs, kind):
    """Steps that all runs have, and their mean loss there; a run that diverged counts as far as it came."""
    curves = [dict(zip(*run.curve(kind))) for run in runs]
    steps = sorted(set().union(*curves))
    ended = [max(curve, default=-1) for curve in curves]
    whole = [step for step in steps if all(step in curve or step > end for curve, end in zip(curves, ended))]
    return whole, [mean(curve[step] for curve in curves if step in curve) for step in whole]


def smoothed(losses, decay=0.9):
    """Exponential moving average that starts at the first loss."""
    out = []
    for loss in losses:
        out.append(loss if not out else decay * out[-1] + (1 - decay) * loss)
    return out


def write_log(folder, configs, runs):
    """lora_experiments_TASK.log anew, one entry an adapter."""
    task = configs[0].task
    (Path(folder) / f"lora_experiments_{task}.log").unlink(missing_ok=True)
    for cfg, run in zip(configs, runs):
        samples = run.rows("sample")
        text = samples[-1]["text"] if samples else run.result.get("text") or ""
        numbers = {k: v for k, v in run.result.items() if k not in ("text", "prompt", "kind")}
        losses = run.curve("train")[1]
        numbers["train_loss"] = mean(losses) if losses else None
        write_experiment(folder, task, hyper_parameters(cfg), text, numbers, run.metrics[-1]["time"])


def replay_halving(runs, rungs):
    """What halving would have done on a full sweep -> {"step_share", "regret", "chosen"}.

    At each rung (a fraction of the steps) the better half by the last held-out loss goes on. regret: how much worse
    the adapter that it ends with is than the best of all.
    """
    alive, steps = list(runs), 0
    stopped_at = {}
    for rung in sorted(rungs):
        reached = {id(run): loss_at(run, rung * run.result["max_steps"]) for run in alive}
        alive.sort(key=lambda run: reached[id(run)])
        for run in alive[(len(alive) + 1) // 2 :]:
            stopped_at[id(run)] = min(rung * run.result["max_steps"], run.result["step"])
        alive = alive[: (len(alive) + 1) // 2]
    steps = sum(stopped_at.get(id(run), run.result["step"]) for run in runs)
    chosen = min(alive, key=final_loss)
    regret = final_loss(chosen) - min(map(final_loss, runs))
    share = steps / sum(run.result["step"] for run in runs)
    return {"step_share": share, "regret": regret, "chosen": chosen.run_dir.name}


def loss_at(run, step):
    """The last held-out loss up to a step; infinite for an adapter that had diverged by then."""
    if run.result["status"] == "diverged" and run.result["step"] <= step:
        return math.inf
    seen = [row["loss"] for row in run.rows("val") if row["step"] <= step and row["loss"] is not None]
    return seen[-1] if seen else math.inf
