"""A live curve in the terminal, in plain characters, so that it works over ssh and on a Windows console."""

import os
import sys
import time

from runlog.run import read_run
from runlog.tables import draw

RECENT = 50  # train rows from which the speed is taken


def watch(run_dir, every=5.0, once=False):
    """Draw the run again and again until it ends (or Ctrl-C)."""
    clear = "\x1b[H\x1b[J" if sys.stdout.isatty() and os.name != "nt" else ""
    while True:
        run = read_run(run_dir)
        print(clear + "\n".join(frame(run)), flush=True)
        if once or run.status != "running":
            return
        time.sleep(every)


def frame(run):
    """One look at a run -> lines."""
    train, val = run.curve("train"), run.curve("val")
    lines = [f"{run.run_dir.as_posix()}: {run.kind}, {run.status}", progress(run), ""]
    if train[0] or val[0]:
        lines += draw([(".", *train), ("o", *val)])
        lines.append(" " * 10 + "loss by step   . train   o validation")
    else:
        lines.append("no loss is recorded" + (" yet" if run.status == "running" else " in this run; its figures: show"))
    return lines


def progress(run):
    """ "step 120/300 | train 5.01 | val 5.22 | 5,286 tokens/s | ETA 0:01:10 | last written 3 s ago" """
    parts = [f"step {run.step if run.step is not None else '-'}/{run.max_steps or '?'}"]
    for kind in ("train", "val"):
        if losses := run.curve(kind)[1]:
            parts.append(f"{kind} {losses[-1]:.4f}")
    rows = run.rows("train")
    if rows and rows[-1].get("tok_per_sec"):
        parts.append(f"{rows[-1]['tok_per_sec']:,.0f} tokens/s")
    if run.status == "running":
        left = eta(run)
        parts.append("ETA " + (hms(left) if left is not None else "not known"))
    if (silence := run.silence()) is not None:
        parts.append(f"last written {hms(silence)} ago")
    return " | ".join(parts)


def eta(run):
    """Seconds that are left, at the pace of the last train rows (evaluations in between included), or None."""
    rows = [row for row in run.rows("train")[-RECENT:] if row.get("time") is not None]
    if len(rows) < 2 or rows[-1]["time"] <= rows[0]["time"]:
        return None
    seconds = rows[-1]["time"] - rows[0]["time"]
    if run.max_steps:
        return seconds / (rows[-1]["step"] - rows[0]["step"]) * max(0, run.max_steps - rows[-1]["step"] - 1)
    epochs = run.settings.get("epochs")
    if epochs and rows[-1].get("epoch") and rows[-1]["epoch"] > rows[0]["epoch"]:
        return seconds / (rows[-1]["epoch"] - rows[0]["epoch"]) * max(0.0, epochs - rows[-1]["epoch"])
    return None


def hms(seconds):
    """hms(3671) -> "1:01:11" """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
