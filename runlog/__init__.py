"""Run directories: the only code that knows what lies in runs/NAME/.

    runs/NAME/config.json    every setting, argv, git commit and whether the tree was dirty
              env.json       python, torch, GPU, threads, world size
              metrics.jsonl  append-only rows {"step", "kind": train|val|…, …}; the last row for a (step, kind) wins
              log.txt        what the terminal showed
              samples.txt    generated text, by step
              loss.png       the curves
              result.json    status (running, success, preempted, diverged, failed) and final numbers
              ckpt/          checkpoints or adapters

All scripts write this layout through `RunLog` (record.py) and read it back through `read_run` (run.py), which also
reads the compact records in records/. `python -m runlog` lists, shows, compares, judges and verifies runs.
"""

from runlog.record import RunLog
from runlog.run import TIMING_FIELDS, Run, comparable_metrics, read_run

__all__ = ["TIMING_FIELDS", "Run", "RunLog", "comparable_metrics", "read_run"]
