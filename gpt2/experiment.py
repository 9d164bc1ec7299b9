"""Is a change to the trainer's settings better? Train baseline and candidates, seed by seed, until the judge decides.

    python gpt2/experiment.py quickstart --change "--muon-lr 1e-2"
    python gpt2/experiment.py "quickstart --max-steps 100" --change "--warmup-steps 0" --change "--optimizer adamw"
    python gpt2/experiment.py gpt2-124M --change "--optimizer muon" --nproc-per-node 8 --max-seeds 4

BASE is a preset of train_gpt2.py, with flags if you like; every --change adds flags to it. Each round trains the
baseline and the candidates that are still undecided with one more seed, and runlog/judge.py looks at all runs so far.
The error rate --alpha covers all looks and all candidates (Holm). Before a candidate counts as better, its runs and the
baseline's are verified by replay. Killed, the same command resumes; finished runs are used again, whichever experiment
in this run directory made them.

Leaves in the run directory: a run directory for each arm and seed, result.json (`rows`: one verdict a change),
verdicts.png, log.txt. The exit status answers a script: 0, a change is better; 1, none is; 3, undecided. --json prints
the rows, too.
"""

import contextlib
import json
import os
import queue
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import tqdm

from common import ROOT, UsageError, cli, is_locked, portable
from gpt2 import train_gpt2
from runlog import Run, RunLog, read_run
from runlog.judge import describe, draw_verdicts, judge_all, verified


@dataclass
class ExperimentConfig:
    base: tyro.conf.Positional[str]  # a preset of train_gpt2.py, with flags in the same quotes
    change: tyro.conf.UseAppendAction[tuple[str, ...]]  # flags of one candidate; repeat for more candidates
    run_dir: str = str(ROOT / "runs/experiment")  # the runs, the verdicts, the picture
    metric: str = ""  # field of the rows that decides; empty: validation loss, or bits per byte if tokenizers differ
    at: Literal["step", "tokens", "seconds", "flops"] = "step"  # what is equal where the curves are compared
    alpha: float = 0.05  # probability that any verdict of this experiment is false, over all looks and candidates
    delta: float | None = None  # differences below this count as none; none: the baseline's spread over seeds
    max_seeds: int = 8  # seeds for each arm, at most: 1, 2, 3, …
    minutes: float = 0.0  # start no further round after so many minutes; 0: no limit
    jobs: int = 1  # runs at a time, each with its own GPU, or its share of the CPU's threads
    nproc_per_node: int = 1  # processes of each run, under torchrun if more than one
    json: bool = False  # print the rows of result.json on stdout, and nothing else


@dataclass
class Arm:
    """The baseline, or a candidate: flags over BASE, and its runs."""

    name: str  # also of its run directories
    flags: list
    seed_offset: int = 0  # added to every seed: the same settings from other weights and in another order of the data
    env: dict = field(default_factory=dict)  # environment variables of its runs
    runs: dict[int, Run] = field(default_factory=dict)  # round -> run
    verdict: object = None  # the newest Verdict of a candidate


def arms_of(cfg):
    """[baseline, candidates…], each named after its flags; the flags are parsed, so that a bad one stops no round."""
    if not 0 < cfg.alpha < 1 or cfg.max_seeds < 1 or cfg.jobs < 1:
        raise UsageError("--alpha must lie between 0 and 1; --max-seeds and --jobs must be at least 1")
    if not cfg.change:
        raise UsageError('name at least one candidate: --change "--max-lr 1e-3"')
    names = [re.sub(r"[^\w.+-]+", "_", change.strip(" -"))[:60] or "no-change" for change in cfg.change]
    if len({*names, "baseline"}) <= len(names):
        raise UsageError("two changes are the same, or would have the same name as a folder")
    for change in ("", *cfg.change):
        train_gpt2.parse([*shlex.split(cfg.base), *shlex.split(change)])
    return [Arm("baseline", []), *(Arm(name, shlex.split(change)) for name, change in zip(names, cfg.change))]


class Runner:
    """Trains arms, `cfg.jobs` at a time, each run in a process of its own."""

    def __init__(self, cfg, say):
        self.cfg, self.say, self.slots = cfg, say, queue.Queue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        for job in range(cfg.jobs):
            share = gpus[job * cfg.nproc_per_node : (job + 1) * cfg.nproc_per_node]
            if gpus and len(share) < cfg.nproc_per_node:
                raise UsageError(f"{cfg.jobs} jobs of {cfg.nproc_per_node} process(es) need more GPUs than {len(gpus)}")
            threads = max(1, (os.cpu_count() or 1) // cfg.jobs // cfg.nproc_per_node)
            self.slots.put({"CUDA_VISIBLE_DEVICES": ",".join(share)} if gpus else {"OMP_NUM_THREADS": str(threads)})

    def round(self, todo, bar):
        """Train [(arm, round)], where no finished run lies, and put the runs into the arms."""
        with ThreadPoolExecutor(self.cfg.jobs) as pool:
            for (arm, number), run in zip(todo, pool.map(lambda work: self.train(*work), todo)):
                arm.runs[number] = run
                loss = run.result.get("val_loss")
                self.say(f"{run.name:<40} {run.status}" + (f", val loss {loss:.4f}" if loss is not None else ""))
                bar.update()

    def train(self, arm, number):
        """One run: the finished one, or what train_gpt2.py makes or resumes -> Run."""
        cfg, seed = self.cfg, number + arm.seed_offset
        run_dir = Path(cfg.run_dir) / f"{arm.name}-seed{seed}"
        flags = [*shlex.split(cfg.base), *arm.flags, "--seed", str(seed), "--run-dir", str(run_dir)]
        while is_locked(run_dir / "run.lock"):  # a killed experiment's trainer goes on to its end
            time.sleep(0.5)
        run = read_run(run_dir) if (run_dir / "config.json").exists() else None
        if run and run.status in ("success", "diverged") and run.config["argv"][1:] == flags:
            return run
        command = [sys.executable]
        if cfg.nproc_per_node > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cfg.nproc_per_node)]
        slot = self.slots.get()
        try:
            command += [str(ROOT / "gpt2/train_gpt2.py"), *flags]
            done = subprocess.run(command, env={**os.environ, **slot, **arm.env}, capture_output=True, text=True)
        finally:
            self.slots.put(slot)
        if done.returncode:
            last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1].removeprefix("error: ")
            raise UsageError(f"{run_dir.name}: {last}")
        run = read_run(run_dir)
        if run.status not in ("success", "diverged"):
            raise UsageError(f"{portable(run_dir)} was stopped ({run.status}); the same command resumes")
        return run


def look(cfg, baseline, candidates):
    """Judge all candidates on what has been trained, at Holm's levels; verify the runs of those that are better."""
    sides = [*baseline.runs.values()], [[*arm.runs.values()] for arm in candidates]
    verdicts = judge_all(*sides, cfg.alpha, metric=cfg.metric, at=cfg.at, delta=cfg.delta)
    for arm, verdict in zip(candidates, verdicts):
        if not (arm.verdict and arm.verdict.contradicted):  # which stays as it is
            arm.verdict = verified(verdict, [*baseline.runs.values(), *arm.runs.values()])


def experiment(cfg, log, arms):
    """Rounds of one seed each, until every candidate is decided, or seeds or time run out."""
    baseline, *candidates = arms
    started, runner = time.monotonic(), Runner(cfg, log.print)
    undecided = candidates
    with tqdm(total=len(arms) * cfg.max_seeds, unit="run", desc="at most", dynamic_ncols=True) as bar:
        for number in range(1, cfg.max_seeds + 1):
            if cfg.minutes and time.monotonic() - started > 60 * cfg.minutes:
                log.print(f"stopped after {cfg.minutes:g} minutes; the same command resumes with another --minutes")
                break
            todo = [(arm, i) for i in range(1, number + 1) for arm in [baseline, *undecided] if i not in arm.runs]
            runner.round(todo, bar)
            look(cfg, baseline, candidates)
            for arm in candidates:
                v = arm.verdict
                log.metric(number, arm.name, verdict=v.verdict, difference=v.difference, low=v.low, high=v.high, p=v.p)
            undecided = [a for a in candidates if a.verdict.verdict == "undecided" and not a.verdict.contradicted]
            if not undecided:
                break


def parse(argv):
    """The command line -> ExperimentConfig; a change begins with dashes, so it is passed as --change=FLAGS."""
    joined = "\0".join(argv).replace("--change\0", "--change=").split("\0")
    return tyro.cli(ExperimentConfig, args=joined, description=__doc__)


def main():
    """Run the experiment, show and record the verdicts, and answer by the exit status."""
    cfg = parse(sys.argv[1:])
    arms = arms_of(cfg)
    away = contextlib.redirect_stdout(sys.stderr if cfg.json else sys.stdout)
    with away, RunLog(cfg.run_dir, "experiment", cfg, resume=True) as log:
        experiment(cfg, log, arms)
        verdicts = {arm.name: arm.verdict for arm in arms[1:] if arm.verdict}
        for name, verdict in verdicts.items():
            log.print(f"\n{name}\n{describe(verdict)}")
        rows = [{"name": name, **asdict(verdict)} for name, verdict in verdicts.items()]
        if verdicts:
            draw_verdicts(log.run_dir / "verdicts.png", verdicts, title=cfg.base.split(" --")[0])
        log.finish("success", rows=rows)
    if cfg.json:
        print(json.dumps(rows, ensure_ascii=False))
    found = {verdict.verdict for verdict in verdicts.values()}
    sys.exit(0 if "better" in found else 3 if "undecided" in found or not found else 1)


if __name__ == "__main__":
    cli(main)
