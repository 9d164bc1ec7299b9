"""How a run ended, and the last lines that matter."""

import math
import shlex
import shutil

from common import file_sha256
from runlog.run import is_locked, read_run
from runlog.tables import table
from runlog.watch import hms

LAST_LINES, LAST_ROWS = 8, 5
LOW_DISK = 1 << 30


def why(run_dir):
    """Text: the verdict in a line, then what led to it."""
    run = read_run(run_dir)
    parts = [f"{run.run_dir.as_posix()}: {verdict(run)}"]
    parts += [f"  {line}" for line in facts(run)]
    trace = traceback_of(run)
    if trace:
        parts += ["", "the traceback:", *(f"  {line}" for line in trace)]
    elif run.status not in ("success", "running") and run.rows("train"):
        parts += ["", "the last training rows:", last_rows(run)]
    lines = [line for line in log_lines(run) if line not in trace]
    if lines:
        parts += ["", "the last lines of log.txt:", *(f"  {line}" for line in lines[-LAST_LINES:])]
    return "\n".join(parts)


def verdict(run):
    """One line: how it ended."""
    at = f" at step {run.step}" + (f" of {run.max_steps}" if run.max_steps else "") if run.step is not None else ""
    reason = run.result.get("reason")
    status = run.result.get("status")
    if status == "running":
        if is_locked(run.run_dir):
            return f"it is running{at}; last written {hms(run.silence() or 0)} ago"
        return (
            f"it was cut off{at}: its record says running, but no process holds its lock; last written "
            f"{hms(run.silence() or 0)} ago"
        )
    told = {"success": "it finished", "preempted": "it was stopped, and saved", "diverged": "it diverged"}
    told |= {"failed": "it failed"}
    if status not in told:
        return f"it has no result.json{at}: killed before its start was recorded, or not copied whole"
    return told[status] + at + (f": {reason}" if reason else "")


def facts(run):
    """Lines that explain the verdict, or say what to do."""
    lines, status = [], run.status
    bad = first_nonfinite(run)
    if bad is not None:
        lines.append(f"the first loss or gradient that is no number stands at step {bad}")
    jump = norm_jump(run)
    if jump and status != "success":
        lines.append(f"the gradient's norm rose from {jump[0]:.3g} to {jump[1]:.3g} in the last {jump[2]} rows")
    if run.result.get("skipped_steps"):
        lines.append(f"{run.result['skipped_steps']} steps were left out because they were not finite")
    if torn(run):
        lines.append("the last line of metrics.jsonl was cut in the middle: a kill or a full disk, not an orderly end")
    cut_off = run.result.get("status") == "running" and not is_locked(run.run_dir)
    if cut_off:
        lines.append("nothing was recorded about it: SIGKILL, out of memory, power, or a machine that was taken away")
        lines.append("(locks of other machines may not be seen from here: if the last row is fresh, it may be well)")
    free = shutil.disk_usage(run.run_dir).free
    if free < LOW_DISK and status != "success":
        lines.append(f"its disk has {free / 2**20:,.0f} MB left: free some")
    if status in ("preempted", "stale", "failed", "diverged") or cut_off:
        lines += checkpoints(run)
    if (status in ("preempted", "stale") or cut_off) and run.config.get("argv"):
        lines.append(f"the same command goes on: python {shlex.join(run.config['argv'])}")
    return lines


def first_nonfinite(run):
    """The first step with a loss or gradient norm that is not finite (recorded as null), or None."""
    for row in run.metrics:
        for name in ("loss", "grad_norm"):
            if name in row and (row[name] is None or not math.isfinite(row[name])):
                return row["step"]
    return None


def norm_jump(run, rows=20, factor=5.0):
    """(first, last, rows) if the gradient's norm has grown by `factor` over the last rows, else None."""
    norms = [row["grad_norm"] for row in run.rows("train")[-rows:] if row.get("grad_norm") is not None]
    return (norms[0], norms[-1], len(norms)) if len(norms) > 1 and norms[-1] > factor * norms[0] > 0 else None


def torn(run):
    path = run.run_dir / "metrics.jsonl"
    if not path.exists() or is_locked(run.run_dir):
        return False
    data = path.read_bytes()
    return bool(data) and not data.endswith(b"\n")


def checkpoints(run):
    """What is kept, and whether it is whole."""
    kept = sorted((run.run_dir / "ckpt").glob("*.sha256"))
    lines = []
    for path in kept:
        file = path.with_name(path.name.removesuffix(".sha256"))
        if file.exists():
            good = path.read_text(encoding="utf-8").split()[:1] == [file_sha256(file)]
            lines.append(f"kept: {file.name}, " + ("whole" if good else "damaged: its sha256 does not match"))
    trainers = (run.run_dir / "ckpt").glob("checkpoint-*/trainer_state.json")  # transformers' Trainer writes it last
    lines += [f"kept: {path.parent.name}" for path in sorted(trainers)]
    return lines or ["no checkpoint is kept"]


def last_rows(run):
    rows = run.rows("train")[-LAST_ROWS:]
    names = [name for name in ("step", "loss", "grad_norm", "lr") if any(name in row for row in rows)]
    return table(names, [[row.get(name) for name in names] for row in rows])


def log_lines(run):
    path = run.run_dir / "log.txt"
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def traceback_of(run):
    """The lines of the last traceback in log.txt, if the run ended with it."""
    if run.result.get("status") != "failed":
        return []
    lines = log_lines(run)
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent call last)")]
    return lines[starts[-1] :] if starts else []
