"""`python -m runlog`: inspect runs of every kind: finished, being written, moved, killed, or a record of one.

    python -m runlog ls                                  the runs in runs/, one per line
    python -m runlog show RUN                            settings, figures, files; how it ended, and why
    python -m runlog compare RUN RUN … --x tokens        what differs, the curves, where they end; compare.png
    python -m runlog judge --baseline RUN … --candidate RUN …        better, worse, no difference or undecided
    python -m runlog verify RUN                          checksums, and a few steps computed again
    python -m runlog export RUN --out records/NAME       a compact record: settings, rows, log, picture

A run is a folder, or the name of one in runs/ or records/.
"""

import argparse
import json
import shlex
import sys
import time
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path

import pandas as pd

from common import ROOT, UsageError, cli
from common.checkpoints import problem, sorted_checkpoints
from runlog.compare_runs import compare, number, table
from runlog.judge import describe, judge
from runlog.record import export_record
from runlog.run import AXES, find_runs, read_run
from runlog.verify import verify

COLUMNS = ("run", "kind", "status", "step", "val loss", "best", "tokens", "hours", "commit", "written")


def find_named(name):
    """A folder, or the name of one in runs/ or records/ -> [Run].

    SWEEP/adapters/PATTERN names the adapters of a sweep that fit, in its record, too.
    """
    path = Path(name)
    for folder in (path, ROOT / "runs" / path, ROOT / "records" / path):
        if any((folder / file).exists() for file in ("config.json", "record.json")):
            return [read_run(folder)]
    if path.parent.name != "adapters":
        raise UsageError(f"{name} is not a run directory (`python -m runlog ls` lists them)")
    found = [run for run in find_named(path.parent.parent)[0].adapters() if fnmatch(run.name, path.name)]
    if not found:
        raise UsageError(f"no adapter of {path.parent.parent} is called {path.name}")
    return found


def list_runs(folder, sort):
    """A line for each run in a folder, * behind a commit with changes; those that cannot be read are named below."""
    rows, notes = [], []
    for run_dir in find_runs(folder):
        try:
            run = read_run(run_dir)
        except UsageError as e:
            notes.append(f"unreadable: {e}")
            continue
        name = run.name if run_dir == folder else run_dir.relative_to(folder).as_posix()
        losses = run.curve("val")[1] or [None]
        commit = (run.config.get("git_commit") or "-")[:9] + "*" * bool(run.config.get("git_dirty"))
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)) if run.written else None
        rows.append(
            [name, run.kind, run.status, run.step, losses[-1], min(losses), run.tokens, run.hours, commit, written]
        )
        if run.status == "stale":
            notes.append(f"{name} is stale: nothing says how it ended, and no process holds it")
    if rows:
        frame = pd.DataFrame(rows, columns=COLUMNS, dtype=object).sort_values(sort, kind="stable")
        print(table(frame.fillna("-"), index=False))
    elif not notes:
        print(f"no runs in {folder.name}/ yet; records of the report: python -m runlog ls records")
    for note in notes:
        print(note)


def show(run):
    """Everything about one run on a screen or two."""
    dirty = {True: ", with changes not committed", None: ", not known whether it was clean"}
    print(f"{run.run_dir.as_posix()}: {run.kind}, {run.status}, step {run.step or '-'} of {run.max_steps or '-'}")
    print(f"command   {shlex.join(run.config.get('argv') or ['?'])}")
    print(f"code      {run.config.get('git_commit') or 'not known'}{dirty.get(run.config.get('git_dirty'), '')}")
    print(f"hardware  {', '.join(f'{k} {v}' for k, v in run.env.items() if v not in (None, []))}")
    print(f"files     {', '.join(sorted(path.name for path in run.run_dir.glob('*'))) or '-'}")
    for title, values in (("setting", run.settings), ("result", run.result)):
        print(f"\n{title}", *(f"  {k:<24} {_text(v)}" for k, v in values.items() if k != "rows"), sep="\n")
    if rows := [row for row in run.result.get("rows") or () if isinstance(row, dict)]:
        print(f"\n{table(pd.DataFrame(rows, dtype=object).fillna('-').map(_text), index=False)}")
    for kind in dict.fromkeys(row["kind"] for row in run.metrics):
        row = {k: v for k, v in run.rows(kind)[-1].items() if k not in ("kind", "time")}
        print(f"\nlast of {len(run.rows(kind))} {kind} rows: " + ", ".join(f"{k} {_text(v)}" for k, v in row.items()))
    print("\n" + "\n".join(ending(run)))


def _text(value):
    text = number(value) if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    text = " ".join(text.split())
    return text if len(text) <= 100 else f"{text[:99]}…"


def ending(run):
    """How a run ended, what explains it, and what to do -> lines."""
    lines, log = [], run.log_lines()
    if run.status == "stale":
        lines.append("killed: no process holds it, and nothing was recorded (SIGKILL, out of memory, power)")
    for row in run.metrics:  # what is not finite is recorded as null
        if None in (row.get("loss", 0), row.get("grad_norm", 0)):
            lines.append(f"the first loss or gradient norm that is not finite is at step {row['step']}")
            break
    for path in sorted_checkpoints(run.run_dir / "ckpt"):
        lines.append(f"checkpoint {path.name}: {problem(path) or 'whole'}")
    if run.status in ("preempted", "stale"):
        lines.append(f"the same command resumes it: python {shlex.join(run.config.get('argv') or ['?'])}")
    starts = [i for i, line in enumerate(log) if line.startswith("Traceback")] if run.status == "failed" else []
    return [*lines, "the end of log.txt:", *(f"  {line}" for line in log[starts[-1] if starts else -8 :])]


def parse(argv=None):
    """The command line -> Namespace."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m runlog", description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, about, runs="+"):
        sub = commands.add_parser(name, help=about, description=about)
        if runs:
            sub.add_argument("run", nargs=runs, help="a run directory, or the name of one in runs/ or records/")
        return sub.add_argument

    add = command("ls", "list the runs in a folder", runs=None)
    add("folder", nargs="?", default="runs", help="folder of run directories or records")
    add("--sort", default="run", choices=COLUMNS, help="column to sort by")
    command("show", "settings, figures, files, and how it ended")
    add = command("compare", "settings that differ, curves on one axis, final values")
    add("--x", default="step", choices=list(AXES), help="the common axis")
    add("--kind", help="kind of row: val, train, …; val where there is any")
    add("--y", default="loss", help="field of the rows")
    add("--out", default=str(ROOT / "runs" / "compare.png"), help="the picture")
    add = command("judge", "is a candidate better than a baseline, over their seeds?", runs=None)
    add("--baseline", nargs="+", required=True, metavar="RUN", help="runs of the baseline, one a seed")
    add("--candidate", nargs="+", required=True, metavar="RUN", help="runs of the candidate; equal seeds are paired")
    add("--metric", default="", help="field of rows or result.json; val loss, or bits per byte if tokenizers differ")
    add("--at", default="step", choices=list(AXES), help="compare at equal steps, tokens, seconds or FLOPs")
    add("--alpha", type=float, default=0.05, help="error rate, over all looks")
    add("--delta", type=float, help="differences below this count as none; left out: the baseline's spread over seeds")
    add("--fixed", action="store_true", help="the number of seeds was decided before looking: Student's t interval")
    add("--json", action="store_true", help="one JSON object instead of text")
    add = command("verify", "checksums, and a few steps computed again; exit status 1 if the record is wrong")
    add("--steps", type=int, default=5, help="steps to replay from the start and each kept checkpoint")
    add("--whole", action="store_true", help="replay the whole run")
    add("--data", help="where the corpus, text or rows lie now, if not where the record says")
    add = command("export", "write a compact record of a run: at most four files", runs=1)
    add("--out", required=True, help="folder of the record, e.g. records/NAME")
    return parser.parse_args(argv)


def main():
    """The command that follows `python -m runlog`; a failed verify exits with 1."""
    args = parse()
    if args.command == "ls":
        folder = Path(args.folder) if Path(args.folder).is_dir() else ROOT / args.folder
        if not folder.is_dir() and args.folder != "runs":  # which a fresh clone has not yet
            raise UsageError(f"{args.folder} is not a folder")
        return list_runs(folder, args.sort)
    if args.command == "judge":
        options = {"metric": args.metric, "at": args.at, "alpha": args.alpha, "delta": args.delta, "fixed": args.fixed}
        sides = [[run for name in names for run in find_named(name)] for names in (args.baseline, args.candidate)]
        verdict = judge(*sides, **options)
        return print(json.dumps(asdict(verdict), ensure_ascii=False) if args.json else describe(verdict))
    runs = [run for name in args.run for run in find_named(name)]
    if args.command == "export":
        export_record(runs[0].run_dir, args.out)
    elif args.command == "compare":
        compare(runs, args.x, args.kind, args.y, args.out)
    elif args.command == "show":
        for run in runs:
            show(run)
    elif [run for run in runs if not verify(run, args.steps, args.whole, args.data)]:
        sys.exit(1)


if __name__ == "__main__":
    cli(main)
