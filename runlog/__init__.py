"""Run directories: the only code that knows what lies in runs/NAME/.

    runs/NAME/config.json    every setting, argv, git commit and whether the tree was dirty
              env.json       python, torch, GPU, threads, world size
              metrics.jsonl  append-only rows {"step", "kind": train|val|…, …}; the last row for a (step, kind) wins
              log.txt        what the terminal showed
              samples.txt    generated text, by step
              loss.png       the curves
              result.json    status (running, success, preempted, diverged, failed) and final numbers
              ckpt/          checkpoints or adapters

BPE, GPT-2, LoRA and the benchmarks all write this layout through `RunLog` (record.py); notebooks, reports and tests
read it back through `read_run` (reading.py); `python -m runlog` lists, shows, compares, watches, explains and verifies
runs (commands.py, and a file for each that is long). manners.py holds what every script shares.
"""

import sys

if sys.argv[0] == "-m":  # python -m runlog, outside of .venv: go on inside
    import runlog.venv  # noqa: F401

from runlog.manners import (
    ROOT,
    UserError,
    atomic_open,
    cli,
    file_sha256,
    from_hub,
    open_text,
    peak_memory_mb,
    pick_device,
    portable,
    read_json,
    write_json,
)
from runlog.reading import MACHINE_FIELDS, Run, learned, plot_loss, read_metrics, read_run
from runlog.record import STATUSES, RunLog, environment, provenance

__all__ = [
    "MACHINE_FIELDS",
    "ROOT",
    "STATUSES",
    "Run",
    "RunLog",
    "UserError",
    "atomic_open",
    "cli",
    "environment",
    "file_sha256",
    "from_hub",
    "learned",
    "open_text",
    "peak_memory_mb",
    "pick_device",
    "plot_loss",
    "portable",
    "provenance",
    "read_json",
    "read_metrics",
    "read_run",
    "write_json",
]
