"""`python -m runlog`: look at run directories. Reads every kind of run, finished, still being written, moved or killed.

    python -m runlog ls --kind gpt2 --sort best          runs, one a line
    python -m runlog show RUN                            settings, figures, files
    python -m runlog compare RUN RUN … --x tokens        what differs, the curves, where they end; compare.png
    python -m runlog watch RUN                           a live curve in the terminal
    python -m runlog csv RUN … --out all.csv             every row of metrics.jsonl, for other programs
    python -m runlog export RUN --out records/NAME       a compact record: settings, rows, log, picture
    python -m runlog why RUN                             how it ended, and the last lines that matter
    python -m runlog verify RUN                          the run's own proof: sums, and a few steps computed again

A run is a folder, or the name of one in runs/.
"""

import argparse
import csv
import fnmatch
import json
import sys
import time
from pathlib import Path

from common import ROOT, UsageError, atomic_open
from runlog import compare_runs as side_by_side
from runlog.record import export_record
from runlog.run import AXES, find_runs, read_run
from runlog.tables import shown, table
from runlog.verify import verify
from runlog.watch import watch
from runlog.why import why

COLUMNS = ("run", "kind", "status", "step", "val loss", "best", "tokens", "hours", "commit", "written")


def locate(name):
    """A folder, or the name of a run in runs/ -> its path."""
    for path in (Path(name), ROOT / "runs" / name):
        if (path / "config.json").exists():
            return path
    raise UsageError(f"{name} is not a run directory: it has no config.json (`python -m runlog ls` lists them)")


# ---------------------------------------------------------------------------------------------------------------------
# ls


def summary(run, folder):
    """The cells of one run, by column."""
    losses = run.curve("val")[1]
    written = run.written
    name = run.run_dir.relative_to(folder).as_posix()
    return {
        "run": run.name if name == "." else name, "kind": run.kind, "status": run.status, "step": run.step,
        "val loss": losses[-1] if losses else None, "best": min(losses, default=None), "tokens": run.tokens,
        "hours": None if run.hours is None else round(run.hours, 2 if run.hours >= 0.1 else 4),
        "commit": (run.config.get("git_commit") or "-")[:9] + ("*" if run.config.get("git_dirty") else ""),
        "written": None if written is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(written)),
    }  # fmt: skip


def wanted(run, folder, args):
    """Whether a run passes the filters of `ls`."""
    name = run.run_dir.relative_to(folder).as_posix()
    if args.kind and run.kind not in args.kind:
        return False
    if args.status and run.status not in args.status:
        return False
    if args.match and not any(fnmatch.fnmatch(name, f"*{pattern}*") for pattern in args.match):
        return False
    for condition in args.where or ():
        key, equals, value = condition.partition("=")
        if not equals:
            raise UsageError(f"--where {condition} is not SETTING=VALUE")
        if str(run.settings.get(key)) != value:
            return False
    return True


def list_runs(args):
    """A line for each run in a folder; those that cannot be read are named below."""
    folder = Path(args.folder)
    found = find_runs(folder)
    if not found:
        raise UsageError(f"{folder} holds no run directory")
    rows, unreadable = [], []
    for run_dir in found:
        try:
            run = read_run(run_dir)
        except UsageError as e:
            unreadable.append(str(e))
            continue
        if wanted(run, folder, args):
            rows.append(summary(run, folder))
    key = {"loss": "val loss", "name": "run"}.get(args.sort, args.sort)
    known = sorted((r for r in rows if r[key] is not None), key=lambda r: r[key], reverse=args.reverse)
    rows = known + [r for r in rows if r[key] is None]
    print(table(COLUMNS, [[row[name] for name in COLUMNS] for row in rows]))
    if any(row["status"] == "stale" for row in rows):
        print("stale: says running, but no process holds it (`why` tells more)")
    if any(row["commit"].endswith("*") for row in rows):
        print("*: with changes that were not committed")
    for reason in unreadable:
        print(f"unreadable: {reason}")


# ---------------------------------------------------------------------------------------------------------------------
# show, csv


def show(run):
    """Everything about one run on a screen or two."""
    print(f"{run.run_dir.as_posix()}: {run.kind}, {run.status}")
    print(f"command   {' '.join(run.config.get('argv') or ['?'])}")
    dirty = {True: ", with changes not committed", None: ", not known whether it was clean"}
    print(f"code      {run.config.get('git_commit') or 'not known'}{dirty.get(run.config.get('git_dirty'), '')}")
    machine = [f"{k} {v}" for k, v in run.env.items() if v not in (None, [])]
    print(f"machine   {', '.join(machine)}")
    print(f"files     {', '.join(sorted(p.name for p in run.run_dir.iterdir()))}")
    kept = sorted(p.name for p in (run.run_dir / "ckpt").glob("*") if p.suffix != ".sha256")
    print(f"kept      {', '.join(kept) or 'no checkpoints'}\n")
    settings = [[k, v if isinstance(v, str) else json.dumps(v)] for k, v in run.settings.items()]
    print(table(["setting", "value"], settings))
    figures = [[k, v if isinstance(v, int | float) else _short(v)] for k, v in run.result.items() if k != "rows"]
    print(f"\n{table(['result', 'value'], figures)}")
    rows = [row for row in run.result.get("rows") or () if isinstance(row, dict)]
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        print(f"\n{table(names, [[_plain_cell(row.get(name)) for name in names] for row in rows])}")
    for kind in dict.fromkeys(row["kind"] for row in run.metrics):
        row = {k: v for k, v in run.rows(kind)[-1].items() if k not in ("kind", "time")}
        print(f"\nlast of {len(run.rows(kind))} {kind} rows: " + ", ".join(f"{k} {_short(v)}" for k, v in row.items()))


def _plain_cell(value):
    return value if isinstance(value, int | float | None) else _short(value)


def _short(value, limit=100):
    text = shown(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def write_csv(runs, out):
    """Every row of the runs' metrics.jsonl as CSV, a column for each field: to a file, or to the terminal."""
    fields = list(dict.fromkeys(name for run in runs for row in run.metrics for name in row))
    names = [n for n in ("step", "kind") if n in fields] + [n for n in fields if n not in ("step", "kind")]

    def write(file):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", *names])
        for run in runs:
            for row in run.metrics:
                cells = (row.get(name) for name in names)
                cells = (json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for v in cells)
                writer.writerow([run.name, *("" if v is None else v for v in cells)])

    if out is None:
        return write(sys.stdout)
    with atomic_open(out) as f:
        write(f)
    print(f"{sum(len(run.metrics) for run in runs):,} rows of {len(runs)} run(s): {Path(out).as_posix()}")


# ---------------------------------------------------------------------------------------------------------------------
# command line


def parse(argv=None):
    """The command line -> Namespace."""
    summary_line, _, about = __doc__.partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m runlog", description=summary_line, epilog=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, about, runs=None):
        sub = commands.add_parser(name, help=about, description=about)
        if runs:
            sub.add_argument("run", nargs=runs, help="a run directory, or the name of one in runs/")
        return sub

    ls = command("ls", "list the runs in a folder")
    ls.add_argument("folder", nargs="?", default=str(ROOT / "runs"), help="folder of run directories")
    ls.add_argument("--sort", default="run", choices=["name", *COLUMNS, "loss"], help="column to sort by")
    ls.add_argument("--reverse", action="store_true", help="largest first")
    ls.add_argument("--kind", action="append", help="only runs of this kind (may be given again)")
    ls.add_argument("--status", action="append", help="only runs with this status (may be given again)")
    ls.add_argument("--match", action="append", help="only runs whose name holds this; * and ? are wildcards")
    ls.add_argument("--where", action="append", metavar="SETTING=VALUE", help="only runs with this setting")
    command("show", "settings, figures and files of one run", "+")
    comparing = command("compare", "settings that differ, curves on one axis, final differences", "+")
    comparing.add_argument("--x", default="step", choices=list(AXES), help="the common axis")
    comparing.add_argument("--kind", help="kind of row: val, train, …; val where there is any")
    comparing.add_argument("--y", default="loss", help="field of the rows")
    comparing.add_argument("--out", default=str(ROOT / "runs" / "compare.png"), help="the picture")
    watching = command("watch", "a live curve in the terminal, until the run ends", 1)
    watching.add_argument("--every", type=float, default=5.0, help="seconds between two looks")
    watching.add_argument("--once", action="store_true", help="look once")
    csv_ = command("csv", "every row of metrics.jsonl as CSV", "+")
    csv_.add_argument("--out", help="file to write; the terminal if none is named")
    exporting = command("export", "write a compact record of a run: at most four files", 1)
    exporting.add_argument("--out", required=True, help="folder of the record, e.g. records/NAME")
    exporting.add_argument("--keep", metavar="FILE", help="one more file of the run to keep, e.g. hellaswag.jsonl.gz")
    command("why", "how a run ended, and the last lines that matter", "+")
    proof = command("verify", "sums, and a few steps computed again; exit status 1 if that contradicts the record", "+")
    proof.add_argument("--steps", type=int, default=5, help="steps to replay from the start and each kept checkpoint")
    proof.add_argument("--whole", action="store_true", help="replay the whole run")
    proof.add_argument("--data", help="where the corpus, text or rows lie now, if not where the record says")
    return parser.parse_args(argv)


def main():
    """The command that follows `python -m runlog`; a failed verify exits with 1."""
    if hasattr(sys.stdout, "reconfigure"):  # a sample may hold what a Windows console cannot spell
        sys.stdout.reconfigure(errors="replace")
    args = parse()
    if args.command == "ls":
        return list_runs(args)
    folders = [locate(name) for name in args.run]
    if args.command == "watch":
        return watch(folders[0], every=args.every, once=args.once)
    if args.command == "verify":
        good = [verify(folder, args.steps, args.whole, args.data) for folder in folders]
        return None if all(good) else sys.exit(1)
    if args.command == "export":
        return print(export_record(folders[0], args.out, args.keep).as_posix())
    if args.command == "why":
        return print("\n\n".join(why(folder) for folder in folders))
    runs = [read_run(folder) for folder in folders]
    if args.command == "show":
        for run in runs:
            show(run)
    elif args.command == "compare":
        side_by_side.compare(runs, args.x, args.kind, args.y, args.out)
    elif args.command == "csv":
        write_csv(runs, args.out)
