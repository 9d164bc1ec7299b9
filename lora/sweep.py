"""A grid of LoRA configurations, or a search -> one run each, all adapters of a group trained at once.

    python lora/sweep.py lora/sweeps/quickstart.json               four adapters on `make quickstart`'s model, a minute
    python lora/sweep.py lora/sweeps/imdb.json --base smollm2 --data-file imdb_review_3000.csv.gz --seeds 0 1 2
    torchrun --nproc-per-node 8 lora/sweep.py GRID.json            one group of adapters a GPU
    python lora/sweep.py GRID.json --shard 3/16                    fourth of sixteen jobs on a shared folder
    python lora/sweep.py GRID.json --seeds 0 1 2 3 --judge         which configurations differ from the first one?

A grid file names the task and holds `settings` (fields of train_lora's TrainConfig, the same for all), `grid` (lists,
all combinations), `configs` (single ones) and `seeds`. With `trials`, a number, it is a search: `grid` may hold ranges
(search.py), and so many of its points are trained, drawn at random, or with `"search": "tpe"` proposed by Optuna, in
rounds of `--adapters-at-once` (0: eight), from the held-out losses of the rounds before. In a group (`--engine
concurrent`) adapters share the base's forward and backward pass. One that diverges (a loss that is not finite, or whose
smoothed value exceeds `--divergence-factor` times its best) is stopped, its best weights kept, and its place given to
the next configuration; so are those that `--patience` or `--halving` stops. Configurations beyond the engine (DoRA,
initialisations that change the base, bias "all") train one after another with the Trainer. Killed at any moment and
started again with the same command, a sweep resumes from its last checkpoint and gives the same results.

Leaves in the run directory: adapters/NAME/ (a run directory each: metrics, samples, result, ckpt/adapter in PEFT's
format), table.md (held-out losses with confidence intervals over seeds, and what each hyper-parameter does with all
else equal), loss.png (all curves), lora_experiments_TASK.log and result.json.
"""

import itertools
import json
import math
import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import filelock
import tyro

from common import UsageError, cli, read_json
from lora.base import quiet_libraries, validate
from lora.concurrent_trainer import VARIABLE, Group
from lora.multi_lora import unsupported
from lora.search import SEARCHES, check_space, next_points
from lora.sweep_report import summarize
from lora.train_lora import NO_EFFECT, TrainConfig, check, fingerprint, run_state
from lora.train_lora import run as train_with_trainer
from runlog import RunLog, read_run
from runlog.run import is_locked

SHORT = {"lora_alpha": "a", "lora_dropout": "d", "seed": "s", "use_rslora": "rs", "max_steps": "steps"}
SETTINGS = {field.name for field in fields(TrainConfig)} - {"run_dir", "overwrite", "show_batch"}  # of a grid file
INPUTS = {"task", "base", "data_file"}  # named once in a grid file, for all configurations
DECISIVE = ("engine", "adapters_at_once", "packing", "divergence_factor", "halving", "rungs", "sample_tokens")


@dataclass
class SweepConfig:
    grid: tyro.conf.Positional[str]  # JSON file: task, settings, grid, configs, seeds, trials, search
    run_dir: str = ""  # where the records and adapters go; empty: runs/lora-NAME, as the grid file is called
    base: str = ""  # hub name or Hugging Face folder; empty: as the file says
    data_file: str = ""  # local rows instead of the hub's; empty: as the file says
    engine: Literal["auto", "concurrent", "trainer"] = "auto"  # auto: concurrent where it can
    adapters_at_once: int = 0  # adapters in one batch; 0: as many as memory allows
    packing: bool = False  # adapters at once: a batch as one row each, no padding, attention only within its rows
    shard: str = ""  # "i/n", i from 0: this is one of n jobs on the same run directory
    divergence_factor: float = 1.5  # stop an adapter whose smoothed loss exceeds its best by this factor; 0: only NaN
    halving: bool = False  # stop the worse half, by held-out loss, at every rung
    rungs: str = "0.125,0.25,0.5"  # fractions of an adapter's steps at which `halving` decides
    judge: bool = False  # is each configuration better or worse than the first one? a verdict over the seeds
    sample_tokens: int = 40  # tokens of the sample at every held-out loss; 0: none
    max_steps: int = 0  # optimizer steps of every adapter; 0: as the file says
    seeds: tuple[int, ...] = ()  # every configuration once with each; none: as the file says
    set: tuple[str, ...] = ()  # NAME=VALUE over the file's settings, for example max_length=128 eval_rows=50
    device: str = "auto"  # auto, cuda, mps or cpu
    tensorboard: bool = False  # write every adapter's figures to its run directory's tensorboard/, too
    wandb: bool = False  # send every adapter's figures to Weights & Biases, too
    overwrite: bool = False  # replace a sweep with other settings instead of refusing


@dataclass
class Grid:
    """A grid file with the flags over it."""

    shared: dict  # settings of all configurations
    seeds: list  # each point is trained with each
    points: list  # what a configuration sets besides, {setting: value}; of a search those proposed so far
    search: dict  # {"kind": one of SEARCHES, "space": lists and ranges, "trials": points it will have}; else empty


def read_grid(cfg):
    """The grid file with the flags over it -> Grid; UsageError for what is wrong in either."""
    validate(cfg)
    if cfg.judge and cfg.halving:
        raise UsageError("--judge compares whole runs; leave out --halving")
    if not all(re.fullmatch(r"\s*0?\.\d*[1-9]\d*\s*", rung) for rung in cfg.rungs.split(",")):
        raise UsageError(f"--rungs {cfg.rungs} should be fractions between 0 and 1, separated by commas")
    grid = read_json(cfg.grid, object_pairs_hook=unique_keys)
    known = {*INPUTS, "settings", "grid", "configs", "seeds", "search", "trials", "about"}
    if not isinstance(grid, dict) or set(grid) - known:
        raise UsageError(f"{cfg.grid} should be an object with {', '.join(sorted(known))}")
    axes, single, seeds = grid.get("grid", {}), grid.get("configs", []), list(cfg.seeds) or grid.get("seeds", [0])
    search, trials = grid.get("search", "random" if "trials" in grid else ""), grid.get("trials", 0)
    lists = axes.items() if isinstance(axes, dict) and not search else ()
    kinds = {"settings": (dict, grid.get("settings", {})), "grid": (dict, axes), "configs": (list, single)}
    kinds |= {name: (list, values or None) for name, values in [("seeds", seeds), *lists]}
    for name, (kind, value) in kinds.items():
        if not isinstance(value, kind):
            raise UsageError(f"{cfg.grid}: {name} should be {'an object' if kind is dict else 'a list of values'}")
    shared = {"device": cfg.device, **grid.get("settings", {}), **assignments(cfg.set)}
    shared |= {name: grid[name] for name in INPUTS & set(grid)}
    flags = ("base", "data_file", "max_steps", "tensorboard", "wandb")
    shared |= {name: getattr(cfg, name) for name in flags if getattr(cfg, name)}
    if not shared.get("base"):
        raise UsageError(f"{cfg.grid} names no base; give one with --base")
    if wrong := (set(shared) - SETTINGS) | (set(assignments(cfg.set)) & set(axes)):
        raise UsageError(f"{', '.join(sorted(wrong))}: an unknown setting, or one with --set that the grid varies")
    check(TrainConfig(run_dir="", **shared))
    if wrong := set().union(axes, *single) - (SETTINGS - INPUTS):
        raise UsageError(f"{cfg.grid}: unknown setting {', '.join(sorted(wrong))} of a configuration")
    if search:
        if search not in SEARCHES or type(trials) is not int or trials < 1 or not axes or single:
            raise UsageError(f"{cfg.grid}: a search ({' or '.join(SEARCHES)}) needs grid and trials, and no configs")
        check_space(axes, trials, lambda point: check(TrainConfig(run_dir="", **shared | point)))
        return Grid(shared, seeds, [], {"kind": search, "space": axes, "trials": trials})
    points = [dict(zip(axes, values)) for values in itertools.product(*axes.values())] if axes else []
    return Grid(shared, seeds, points + single or [{}], {})


def make_configs(cfg, grid):
    """[TrainConfig] of a Grid, one an adapter, its run_dir named after its number and what it varies."""
    configs = []
    for point, seed in itertools.product(grid.points, grid.seeds):
        varied = point | ({"seed": seed} if len(grid.seeds) > 1 else {})
        name = [f"{len(configs):03d}"] + [f"{SHORT.get(k, k)}{v}".replace("/", "-") for k, v in varied.items()]
        folder = Path(cfg.run_dir) / "adapters" / "_".join(name)
        configs.append(TrainConfig(run_dir=str(folder), **grid.shared | {"seed": seed} | point))
        check(configs[-1])
    if len({repr(replace(one, run_dir="")) for one in configs}) < len(configs):
        raise UsageError(f"{cfg.grid} lists the same configuration twice")
    return configs


def add_round(cfg, grid):
    """Give a search its next points: all of a random one; of TPE a round, from the results of those before."""
    results = [read_run(one.run_dir).result["held_out_loss"] for one in make_configs(cfg, grid)]
    losses = [math.inf if loss is None else loss for loss in results]
    n, kind, size = len(grid.seeds), grid.search["kind"], grid.search["trials"] - len(grid.points)
    means = [sum(losses[at : at + n]) / n for at in range(0, len(losses), n)]  # over the seeds of a point
    size = min(size, cfg.adapters_at_once or 8) if kind == "tpe" else size
    grid.points += next_points(kind, grid.search["space"], grid.points, means, size)


def unique_keys(pairs):
    """For json.load: an object as a dict; a key given twice is refused, for one of the two would be lost."""
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
        concurrent = cfg.grad_accum_steps == 1 and not unsupported(cfg)
        if engine == "concurrent" and not concurrent:
            raise UsageError(f"{Path(cfg.run_dir).name} is beyond the concurrent engine; use --engine auto or trainer")
        kind = "concurrent" if concurrent and engine != "trainer" else "trainer"
        rest = {k: v for k, v in asdict(cfg).items() if k not in VARIABLE}
        alike.setdefault((kind, repr(rest)), []).append(i)
    groups = []
    for (kind, _), members in alike.items():
        size = math.ceil(len(members) / n)
        groups += [(kind, members[at : at + size]) for at in range(0, len(members), size)]
    return groups


def take_place(cfg):
    """(index, number) of this process among all that work on the sweep, from --shard and from torchrun.

    Under torchrun each process takes its GPU and then works by itself: no process group, nothing to wait for.
    """
    if not (match := re.fullmatch(r"(\d+)/(\d+)", cfg.shard or "0/1")) or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {cfg.shard} should be i/n with i from 0 to n - 1")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    torchrun = {name: os.environ.pop(name) for name in names if name in os.environ}
    if local := torchrun.get("LOCAL_RANK"):
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local)] if visible else local
    rank, world = int(torchrun.get("RANK", 0)), int(torchrun.get("WORLD_SIZE", 1))
    return int(match[1]) * world + rank, int(match[2]) * world


def agree(cfg, grid, folder, configs, n):
    """The cut into groups that all workers of the sweep, now and later, work on -> groups.

    The first one writes it into the folder's config.json, beside the settings; a sweep with other settings is refused.
    """
    more = {"optuna": version("optuna")} if grid.search.get("kind") == "tpe" else {}
    wanted = {
        "configs": [{k: v for k, v in asdict(c).items() if k not in (*NO_EFFECT, "device")} for c in configs],
        "settings": {name: getattr(cfg, name) for name in DECISIVE},
        "inputs": fingerprint(configs[0]) | more,
        "search": grid.search,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / "sweep.lock"):
        if run_state(folder, wanted, cfg.overwrite) == "new":
            if cfg.overwrite and any(is_locked(lock.parent) for lock in folder.rglob("run.lock")):
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
                    train_group(cfg, groups[g], configs, folders[g])
        except filelock.Timeout:
            print(f"group {g} is being trained by another process")
    return [folder for folder in folders if not is_done(folder)]


def is_done(folder):
    return (folder / "result.json").exists() and read_json(folder / "result.json")["status"] == "success"


def train_group(cfg, group, configs, folder):
    """Train a group's configurations: all at once, or one after another by the Trainer."""
    kind, members = group
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
    folder, configs, trials = Path(cfg.run_dir), [], grid.search.get("trials", 0)
    while not configs or len(grid.points) < trials:  # once, but for TPE's rounds
        where, done = folder / "rounds" / f"{len(grid.points):03d}" if configs else folder, len(configs)
        if grid.search:
            add_round(cfg, grid)
        configs = make_configs(cfg, grid)
        groups = agree(cfg, grid, where, configs[done:], n)
        while left := work_through(cfg, where, configs[done:], groups, index, n):
            print(f"{len(left)} of {len(groups)} groups are still being trained elsewhere")
            if len(grid.points) >= trials:
                return
            with filelock.FileLock(left[0].with_suffix(".lock")):  # the next round needs its results
                pass
    with filelock.FileLock(folder / "sweep.lock"):
        if is_done(folder) and not cfg.judge:
            return print(f"{folder} is already done: {(folder / 'table.md').as_posix()}")
        summarize(folder, configs, cfg.judge)


def main():
    cfg = tyro.cli(SweepConfig)
    cfg.run_dir = cfg.run_dir or f"runs/lora-{Path(cfg.grid).stem}"
    quiet_libraries()
    run_sweep(cfg)


if __name__ == "__main__":
    cli(main)
