"""Train a grid of LoRA configurations, or a search over them: one run directory per adapter, many in one batch.

    python lora/sweep.py lora/sweeps/quickstart.json               four adapters on `make quickstart`'s model, a minute
    python lora/sweep.py lora/sweeps/imdb.json --base smollm2 --data-file imdb_review_3000.csv.gz --seeds 0 1 2
    torchrun --nproc-per-node 8 lora/sweep.py GRID.json            one group of adapters a GPU
    python lora/sweep.py GRID.json --shard 3/16                    fourth of sixteen jobs on a shared folder
    python lora/sweep.py GRID.json --judge --minutes 60            which configurations are better than the first one?

A grid file is JSON with the fields of `Grid`; its settings are those of train_lora's TrainConfig. With `trials` it is a
search (search.py): at random, or with `"search": "tpe"` in rounds of `--adapters-at-once` (0: eight) configurations.

With `--judge` each round trains the first configuration, the baseline, and those still undecided with one more seed,
until runlog/judge.py has decided on all of them, at an error rate of 0.05 over all rounds and configurations.

The adapters of a group share the base's forward and backward pass; one with larger batches than others takes more
passes a step. One that diverges (a loss that is not finite, or whose smoothed value exceeds `--divergence-factor` times
its best), or that `patience` or `--halving` stops, keeps its best weights, and the next configuration takes its slot.
What the engine does not support (`unsupported` in multi_lora.py) is trained by the Trainer, one adapter after another.
Killed at any moment, the same command resumes with the same results.

Leaves in the run directory: adapters/NAME/ (a run directory each), table.md (held-out losses with confidence intervals
over seeds, and the effect of each setting or the verdicts), loss.png, lora_experiments_TASK.log and result.json.
"""

import itertools
import json
import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import filelock
import tyro

from common import UsageError, cli, is_locked, parse_shard, read_json, validate
from lora.base import RANGES, quiet_libraries
from lora.concurrent_trainer import VARIABLE, Group
from lora.multi_lora import unsupported
from lora.search import SEARCHES, check_space, next_points
from lora.sweep_report import adapter_frame, judge_configs, summarize
from lora.train_lora import NO_EFFECT, TrainConfig, check, fingerprint, run_state
from lora.train_lora import run as train_with_trainer
from runlog import RunLog, read_run

SHORT = {"lora_alpha": "a", "lora_dropout": "d", "seed": "s", "use_rslora": "rs", "max_steps": "steps"}
SETTINGS = {field.name for field in fields(TrainConfig)} - {
    "run_dir",
    "overwrite",
    "extend",
    "show_batch",
}  # of a grid file
INPUTS = {"task", "base", "data_file"}  # named once in a grid file, for all configurations
DECISIVE = ("engine", "adapters_at_once", "divergence_factor", "halving", "judge", "sample_tokens")


@dataclass
class SweepConfig:
    grid: tyro.conf.Positional[str]  # JSON file: task, settings, grid, configs, seeds, trials, search
    run_dir: str = ""  # where the records and adapters go; empty: runs/lora-NAME, as the grid file is called
    base: str = ""  # hub name or Hugging Face folder; empty: as the file says
    data_file: str = ""  # local rows instead of the hub's; empty: as the file says
    engine: Literal["auto", "trainer"] = "auto"  # auto: adapters share the base where the engine supports them
    adapters_at_once: int = 0  # adapters in one batch; 0: as many as memory allows
    packing: bool = False  # an adapter's batch as one row, without padding, attention only within its rows
    shard: str = ""  # "i/n", i from 0: this is one of n jobs on the same run directory
    divergence_factor: float = 1.5  # stop an adapter whose smoothed loss exceeds its best by this factor; 0: only NaN
    halving: bool = False  # stop the worse half, by held-out loss, after an eighth, a quarter and half of the steps
    judge: bool = False  # a verdict on each configuration against the first, from as many of the seeds as it takes
    minutes: float = 0.0  # start no further round of --judge or a TPE search after so many minutes; 0: no limit
    sample_tokens: int = 40  # tokens of the sample at every held-out loss; 0: none
    max_steps: int = 0  # optimizer steps of every adapter; 0: as the file says
    seeds: tuple[int, ...] = ()  # every configuration with each, at most with --judge; none: as the file says
    set: tuple[str, ...] = ()  # NAME=VALUE over the file's settings, for example max_length=128 eval_rows=50
    device: str = "auto"  # auto, cuda, mps or cpu
    tensorboard: bool = False  # write every adapter's figures to its run directory's tensorboard/, too
    wandb: bool = False  # send every adapter's figures to Weights & Biases, too
    overwrite: bool = False  # replace a sweep with other settings instead of refusing


@dataclass
class Grid:
    """A grid file; `read_grid` adds the flags to its settings, and all combinations of its lists to its configs."""

    about: str = ""  # for people
    task: str = ""  # as base and data_file, a setting that all configurations share
    base: str = ""
    data_file: str = ""
    settings: dict = field(default_factory=dict)  # {setting: value} that all configurations share
    grid: dict = field(default_factory=dict)  # {setting: values}; in a search ranges, too
    configs: list = field(default_factory=list)  # single configurations, {setting: value}
    seeds: list = field(default_factory=list)  # each configuration is trained with each; none: 0, with --judge 0 to 7
    search: Literal[SEARCHES] = "random"
    trials: int = 0  # configurations that a search tries; 0: no search, but all combinations


def read_grid(cfg):
    """The grid file with the flags over it -> Grid; UsageError for what is wrong in either."""
    validate(cfg, RANGES)
    content, known = read_json(cfg.grid, object_pairs_hook=unique_keys), {field.name for field in fields(Grid)}
    if not isinstance(content, dict) or set(content) - known:
        raise UsageError(f"{cfg.grid} should be an object with {', '.join(sorted(known))}")
    grid, over = Grid(**content), assignments(cfg.set)
    validate(grid, RANGES, f"{cfg.grid}: ")
    grid.settings = {"device": cfg.device} | grid.settings | over
    grid.seeds = list(cfg.seeds) or grid.seeds or list(range(8 if cfg.judge else 1))
    for source, names in (grid, INPUTS), (cfg, ("base", "data_file", "max_steps", "packing", "tensorboard", "wandb")):
        grid.settings |= {name: getattr(source, name) for name in names if getattr(source, name)}
    if not grid.settings.get("base"):
        raise UsageError(f"{cfg.grid} names no base; give one with --base")
    if not all(isinstance(point, dict) for point in grid.configs):
        raise UsageError(f"{cfg.grid}: configs should be a list of objects")
    wrong = set().union(grid.grid, *grid.configs) - (SETTINGS - INPUTS)
    if wrong := wrong | (set(grid.settings) - SETTINGS) | (set(over) & set(grid.grid)):
        raise UsageError(f"{', '.join(sorted(wrong))}: an unknown setting, or one with --set that the grid varies")
    check(TrainConfig(run_dir="", **grid.settings))
    check_space(grid.grid, grid.trials, lambda point: check(TrainConfig(run_dir="", **grid.settings | point)))
    if "search" in content or grid.trials:
        if not (grid.grid and grid.trials) or grid.configs:
            raise UsageError(f"{cfg.grid}: a search needs grid and trials, and no configs")
        if grid.search == "random":
            grid.configs = next_points("random", grid.grid, [], [], grid.trials)
    else:
        points = [dict(zip(grid.grid, values)) for values in itertools.product(*grid.grid.values())]
        grid.configs = (points if grid.grid else []) + grid.configs or [{}]
    if cfg.judge and (cfg.halving or grid.search == "tpe" or len(grid.configs) < 2):
        raise UsageError("--judge compares whole runs of two configurations or more; leave out --halving and TPE")
    return grid


def make_configs(cfg, grid):
    """[TrainConfig] of a Grid, one an adapter, its run_dir named after its number and what it varies."""
    pairs, configs = [(point, seed) for point in grid.configs for seed in grid.seeds], []
    if cfg.judge:  # round by round, so that a number does not depend on how many seeds there may be
        pairs.sort(key=lambda pair: grid.seeds.index(pair[1]))
    for point, seed in pairs:
        varied = point | ({"seed": seed} if len(grid.seeds) > 1 or cfg.judge else {})
        name = [f"{len(configs):03d}"] + [f"{SHORT.get(k, k)}{v}".replace("/", "-") for k, v in varied.items()]
        folder = Path(cfg.run_dir) / "adapters" / "_".join(name)
        configs.append(TrainConfig(run_dir=str(folder), **grid.settings | {"seed": seed} | point))
        check(configs[-1])
    if len({repr(replace(one, run_dir="")) for one in configs}) < len(configs):
        raise UsageError(f"{cfg.grid} lists the same configuration twice")
    return configs


def next_round(cfg, grid, configs):
    """What to train after `configs` -> [TrainConfig]: all, or what TPE or the judge asks for; nothing at the end."""
    if grid.search == "tpe":
        losses = [read_run(one.run_dir).result["held_out_loss"] for one in configs]
        losses, n = [math.inf if loss is None else loss for loss in losses], len(grid.seeds)
        means = [sum(losses[at : at + n]) / n for at in range(0, len(losses), n)]  # over the seeds of a configuration
        size = min(grid.trials - len(grid.configs), cfg.adapters_at_once or 8)
        grid.configs += next_points("tpe", grid.grid, grid.configs, means, size)
    every = make_configs(cfg, grid)
    if not cfg.judge:
        return every[len(configs) :]
    seeds = len({one.seed for one in configs}) + 1
    new = [one for one in every[: seeds * len(grid.configs)] if one not in configs]
    if not configs:
        return new
    frame, names = adapter_frame(configs)
    baseline, verdicts = judge_configs(frame, names)
    again = {values for values, v in verdicts.items() if v.verdict == "undecided" and not v.contradicted}
    print(f"{len(again)} of {len(verdicts)} configurations are undecided after {seeds - 1} of {len(grid.seeds)} seeds")
    return [one for one in new if again and tuple(getattr(one, name) for name in names) in {baseline, *again}]


def unique_keys(pairs):
    """For json.load: an object as a dict; a duplicate key is refused, as one of its values would be lost."""
    if len(dict(pairs)) < len(pairs):
        raise UsageError(f"the grid file has a key twice in one object: {', '.join(key for key, _ in pairs)}")
    return dict(pairs)


def assignments(texts):
    """("max_length=128", "mode=faithful") -> {"max_length": 128, "mode": "faithful"}"""
    values = dict(text.partition("=")[::2] for text in texts)
    for name, value in values.items():
        with suppress(json.JSONDecodeError):  # a word
            values[name] = json.loads(value)
    return values


def make_groups(configs, engine, n):
    """Cut the configurations into groups that can train together -> [(engine, [index, …])], at least n if possible."""
    alike = {}
    for i, cfg in enumerate(configs):
        kind = "trainer" if engine == "trainer" or unsupported(cfg) else "concurrent"
        same = {"batch_size"} if cfg.packing else set()  # packed, a dropout mask depends on it
        rest = {k: v for k, v in asdict(cfg).items() if k not in VARIABLE - same}
        alike.setdefault((kind, repr(rest)), []).append(i)
    groups = []
    for (kind, _), members in alike.items():
        size = math.ceil(len(members) / n)
        groups += [(kind, members[at : at + size]) for at in range(0, len(members), size)]
    return groups


def take_place(cfg):
    """(index, number) of this process among all workers, from --shard and torchrun, which only assigns the GPUs."""
    part, parts = parse_shard(cfg.shard or "0/1")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    torchrun = {name: os.environ.pop(name) for name in names if name in os.environ}
    if local := torchrun.get("LOCAL_RANK"):
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local)] if visible else local
    rank, world = int(torchrun.get("RANK", 0)), int(torchrun.get("WORLD_SIZE", 1))
    return part * world + rank, parts * world


def agree(cfg, grid, folder, configs, n):
    """The groups that all workers share: the first one writes them to config.json; other settings are refused."""
    search = {"space": grid.grid, "trials": grid.trials} if grid.search == "tpe" else {}
    wanted = {
        "configs": [{k: v for k, v in asdict(c).items() if k not in (*NO_EFFECT, "device")} for c in configs],
        "settings": {name: getattr(cfg, name) for name in DECISIVE},
        "inputs": fingerprint(configs[0]) | ({"optuna": version("optuna")} if search else {}),
        "search": search,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "sweep.lock"):
        if run_state(folder, wanted, cfg.overwrite) == "new":
            if cfg.overwrite and any(is_locked(lock) for lock in folder.rglob("run.lock")):
                raise UsageError(f"{folder} is being trained by another process; stop it before --overwrite")
            for old in ("adapters", "groups", "rounds") if cfg.overwrite else ():
                shutil.rmtree(folder / old, ignore_errors=True)
            with RunLog(folder, "lora_sweep", {**wanted, "groups": make_groups(configs, cfg.engine, n)}):
                pass
        return read_run(folder).settings["groups"]


def work_through(cfg, folder, configs, groups, index, n):
    """Take groups that nobody works on, this worker's own first, until all are done or taken -> those not done."""
    folders = [folder / "groups" / f"{g:03d}" for g in range(len(groups))]
    for g in sorted(range(len(groups)), key=lambda g: (g % n != index, g)):
        folders[g].mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folders[g].with_suffix(".lock"))
        try:
            with lock.acquire(timeout=0):  # the system drops it when the process dies, so its group is free again
                if not is_done(folders[g]):
                    train_group(cfg, *groups[g], configs, folders[g])
        except filelock.Timeout:
            print(f"group {g} is being trained by another process")
    return [folder for folder in folders if not is_done(folder)]


def is_done(folder):
    return (folder / "result.json").exists() and read_json(folder / "result.json")["status"] == "success"


def train_group(cfg, kind, members, configs, folder):
    """Train a group's configurations: together, or one after another by the Trainer."""
    with RunLog(folder, f"lora_group_{kind}", {"members": members}, resume=True) as log:
        if kind == "concurrent":
            Group(cfg, [configs[i] for i in members], log).train()
        else:
            for i in members:  # the base is loaded anew for each: PEFT changes it in place
                train_with_trainer(configs[i])
        log.finish("success")


def run_sweep(cfg):
    """Do this worker's part of a sweep, and the summary if it is the last one to finish."""
    grid = read_grid(cfg)
    index, n = take_place(cfg)
    folder, configs, started = Path(cfg.run_dir), [], time.monotonic()
    while new := next_round(cfg, grid, configs):
        if configs and 0 < 60 * cfg.minutes < time.monotonic() - started:
            print(f"stopped after {cfg.minutes:g} minutes; the same command with another --minutes resumes")
            break
        where = folder / "rounds" / f"{len(configs):03d}" if configs else folder
        groups = agree(cfg, grid, where, new, n)
        while left := work_through(cfg, where, new, groups, index, n):
            print(f"{len(left)} of {len(groups)} groups are still being trained elsewhere")
            if not cfg.judge and grid.search != "tpe":
                return
            with filelock.FileLock(left[0].with_suffix(".lock")):  # the next round needs its results
                pass
        configs += new
    with filelock.FileLock(folder / "sweep.lock"):
        if is_done(folder) and read_run(folder).result["adapters"] >= len(configs):
            return print(f"{folder} is already done: {(folder / 'table.md').as_posix()}")
        summarize(folder, configs, cfg.judge)


def main():
    cfg = tyro.cli(SweepConfig)
    cfg.run_dir = cfg.run_dir or f"runs/lora-{Path(cfg.grid).stem}"
    quiet_libraries()
    run_sweep(cfg)


if __name__ == "__main__":
    cli(main)
