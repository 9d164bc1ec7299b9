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
read it back through `read_run` (run.py), which also reads the compact records in records/ that `export_record` makes.
`python -m runlog` lists, shows, compares and verifies runs (__main__.py, compare_runs.py, verify.py).
"""

from runlog.record import RunLog
from runlog.run import TIMING_FIELDS, Run, comparable_metrics, read_run

__all__ = ["TIMING_FIELDS", "Run", "RunLog", "comparable_metrics", "read_run"]
