"""`python -m runlog`: look at run directories."""

import argparse
from pathlib import Path

from runlog.reading import read_run
from runlog.manners import ROOT, UserError


def list_runs(folder):
    """Print one line per run directory under `folder`: name, kind, status, last step, last validation loss, commit."""
    runs = [read_run(p.parent) for p in sorted(Path(folder).rglob("config.json")) if (p.parent / "env.json").exists()]
    if not runs:
        raise UserError(f"{folder} holds no run directory")
    print(f"{'run':<36} {'kind':<10} {'status':<10} {'step':>8} {'val loss':>9}  commit")
    for run in runs:
        step = run.metrics[-1]["step"] if run.metrics else "-"
        val = run.curve("val")[1]
        name = run.run_dir.relative_to(folder).as_posix()
        last = f"{val[-1]:.4f}" if val else "-"
        status = run.result.get("status", "?")
        print(f"{name:<36} {run.kind:<10} {status:<10} {step:>8} {last:>9}  {(run.config['git_commit'] or '-')[:9]}")


def main():
    parser = argparse.ArgumentParser(prog="python -m runlog", description="Look at run directories.")
    commands = parser.add_subparsers(dest="command", required=True)
    ls = commands.add_parser("ls", help="list the runs in a folder")
    ls.add_argument("folder", nargs="?", default=str(ROOT / "runs"), help="folder of run directories")
    args = parser.parse_args()
    list_runs(Path(args.folder))
