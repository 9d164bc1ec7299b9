"""A grid of LoRA configurations -> one run each, all adapters of a group trained at once.

    python lora/sweep.py lora/sweeps/quickstart.json               four adapters on `make quickstart`'s model, a minute
    python lora/sweep.py lora/sweeps/imdb.json --base smollm2 --data-file imdb_review_3000.csv.gz --seeds 0 1 2
    torchrun --nproc-per-node 8 lora/sweep.py GRID.json            one group of adapters a GPU
    python lora/sweep.py GRID.json --shard 3/16                    fourth of sixteen jobs on a shared folder

A grid file names the task and holds `settings` (fields of train_lora's TrainConfig, the same for all), `grid` (lists,
all combinations), `configs` (single ones) and `seeds`. In a group (`--engine concurrent`) adapters share the base's
forward and backward pass. One that diverges (a loss that is not finite, or whose smoothed value exceeds
`--divergence-factor` times its best) is stopped, its best weights kept, and its place given to the next configuration;
so are those that `--patience` or `--halving` stops. Configurations beyond the engine (DoRA, initialisations that change
the base, bias "all") train one after another with the Trainer. Killed at any moment and started again with the same
command, a sweep goes on from its last checkpoint and ends as if nothing had happened.

Leaves in the run directory: adapters/NAME/ (a run directory each: metrics, samples, result, ckpt/adapter in PEFT's
format), table.md (held-out losses with confidence intervals over seeds, and what each hyper-parameter does), loss.png
(all curves), lora_experiments_TASK.log and result.json.
"""

import itertools
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import filelock
import tyro

from common import UsageError, cli, read_json, write_json
from lora.concurrent_trainer import ADAPTER_FIELDS, Group
from lora.generate import quiet_libraries
from lora.sweep_report import summarize
from lora.train_lora import TrainConfig, check, fingerprint
from lora.train_lora import run as train_with_trainer
from runlog import RunLog

SHORT = {"lora_alpha": "a", "lora_dropout": "d", "seed": "s", "use_rslora": "rs", "max_steps": "steps"}


@dataclass
class SweepConfig:
    grid: tyro.conf.Positional[str]  # JSON file: task, settings, grid, configs, seeds
    run_dir: str = ""  # where the records and adapters go; empty: runs/lora-NAME, as the grid file is called
    base: str = ""  # hub name or Hugging Face folder; empty: as the file says
    data_file: str = ""  # local rows instead of the hub's; empty: as the file says
    engine: str = "auto"  # concurrent, trainer, or auto: concurrent wherever it can
    adapters_at_once: int = 0  # adapters in one batch; 0: as many as memory allows
    shard: str = ""  # "i/n", i from 0: this is one of n jobs on the same run directory
    divergence_factor: float = 1.5  # stop an adapter whose smoothed loss exceeds its best by this factor; 0: only NaN
    halving: bool = False  # stop the worse half, by held-out loss, at every rung
    rungs: str = "0.125,0.25,0.5"  # fractions of an adapter's steps at which `halving` decides
    sample_tokens: int = 40  # tokens of the sample at every held-out loss; 0: none
    max_steps: int = 0  # optimizer steps of every adapter; 0: as the file says
    seeds: tuple[int, ...] = ()  # every configuration once with each; none: as the file says
    set: tuple[str, ...] = ()  # NAME=VALUE over the file's settings, for example max_length=128 eval_rows=50
    device: str = "auto"  # auto, cuda, mps or cpu
    tensorboard: bool = False  # write every adapter's figures to its run directory's tensorboard/, too
    wandb: bool = False  # send every adapter's figures to Weights & Biases, too
    plan: bool = False  # print the groups and the memory estimate, and stop
    overwrite: bool = False  # replace a sweep with other settings instead of refusing


# ---------------------------------------------------------------------------------------------------------------------
# the grid


def read_grid(cfg):
    """The grid file with the flags over it -> [TrainConfig], one an adapter, its run_dir named after what it varies."""
    grid = read_json(cfg.grid)
    known = {"task", "base", "data_file", "settings", "grid", "configs", "seeds", "about"}
    if not isinstance(grid, dict) or set(grid) - known:
        raise UsageError(f"{cfg.grid} should be an object with {', '.join(sorted(known))}")
    points = [dict(zip(grid.get("grid", {}), values)) for values in itertools.product(*grid.get("grid", {}).values())]
    points = (points if grid.get("grid") else []) + grid.get("configs", []) or [{}]
    seeds = cfg.seeds or grid.get("seeds", [0])
    common = {"task": "pydocs", "device": cfg.device, **grid.get("settings", {}), **assignments(cfg.set)}
    common |= {name: grid[name] for name in ("task", "base", "data_file") if name in grid}
    flags = ("base", "data_file", "max_steps", "tensorboard", "wandb")
    common |= {name: value for name in flags if (value := getattr(cfg, name))}
    if not common.get("base"):
        raise UsageError(f"{cfg.grid} names no base; give one with --base")
    types = {field.name: field.type for field in fields(TrainConfig)}
    allowed = set(types) - {"run_dir", "overwrite", "show_batch"}
    configs, names = [], set()
    for number, (point, seed) in enumerate(itertools.product(points, seeds)):
        values = common | point | {"seed": point.get("seed", seed)}
        if set(values) - allowed:
            raise UsageError(f"{cfg.grid}: unknown setting {', '.join(sorted(set(values) - allowed))}")
        for key, value in values.items():
            if type(value) is not types[key] and not (types[key] is float and type(value) is int):
                raise UsageError(f"{cfg.grid}: {key} should be {types[key].__name__}, not {value!r}")
        varied = {**point, **({"seed": seed} if len(seeds) > 1 else {})}
        name = "_".join([f"{number:03d}"] + [f"{SHORT.get(k, k)}{v}".replace("/", "-") for k, v in varied.items()])
        names.add(json.dumps(values, sort_keys=True))
        configs.append(TrainConfig(run_dir=str(Path(cfg.run_dir) / "adapters" / name), **values))
    if len(names) < len(configs):
        raise UsageError(f"{cfg.grid} lists the same configuration twice")
    for one in configs:
        check(one)
    return configs


def assignments(texts):
    """("max_length=128", "mode=faithful") -> {"max_length": 128, "mode": "faithful"}"""
    values = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"--set {text} should be NAME=VALUE")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:  # a word
            values[name] = value
    return values


def fits_engine(cfg):
    """Whether the engine of many adapters can train this configuration."""
    return (
        not cfg.use_dora and cfg.init_lora_weights in ("default", "gaussian") and cfg.bias in ("none", "lora_only")
        and cfg.grad_accum_steps == 1
    )  # fmt: skip


def make_groups(configs, engine, n):
    """Cut the configurations into groups that can train together -> [(engine, [index, …])], at least n if possible."""
    alike = {}
    for i, cfg in enumerate(configs):
        if engine == "concurrent" and not fits_engine(cfg):
            raise UsageError(f"{Path(cfg.run_dir).name} is beyond the concurrent engine; use --engine auto or trainer")
        kind = "concurrent" if engine != "trainer" and fits_engine(cfg) else "trainer"
        rest = {k: v for k, v in asdict(cfg).items() if k not in ADAPTER_FIELDS and k != "run_dir"}
        alike.setdefault((kind, json.dumps(rest, sort_keys=True)), []).append(i)
    groups = []
    for (kind, _), members in alike.items():
        size = math.ceil(len(members) / n)
        groups += [(kind, members[at : at + size]) for at in range(0, len(members), size)]
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# the whole sweep


def worker(cfg):
    """(index, number) of this process among all that work on the sweep: from --shard and from torchrun."""
    index, number = 0, 1
    if cfg.shard:
        try:
            index, number = (int(part) for part in cfg.shard.split("/"))
        except ValueError:
            index, number = -1, 0
        if not 0 <= index < number:
            raise UsageError(f"--shard {cfg.shard} should be i/n with i from 0 to n - 1")
    world = int(os.environ.get("WORLD_SIZE", 1))
    return index * world + int(os.environ.get("RANK", 0)), number * world


def take_own_device():
    """Under torchrun each process takes its GPU and then works by itself: no process group, nothing to wait for."""
    local = os.environ.get("LOCAL_RANK")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if local is not None:
        visible = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[int(local)] if visible else local


def agree(cfg, configs, n):
    """Write sweep.json, or read the one that another worker or an earlier start wrote -> groups.

    It holds the settings and the cut into groups, so that all workers, now and later, mean the same.
    """
    path = Path(cfg.run_dir) / "sweep.json"
    rows = [
        {k: v for k, v in asdict(c).items() if k not in ("run_dir", "device", "tensorboard", "wandb")} for c in configs
    ]
    names = ("engine", "adapters_at_once", "divergence_factor", "halving", "rungs", "sample_tokens")
    inputs = [fingerprint(c) for c in {(c.base, c.data_file): c for c in configs}.values()]
    wanted = {
        "configs": rows,
        "settings": {k: getattr(cfg, k) for k in names},
        "inputs": inputs if len(inputs) > 1 else inputs[0],
    }
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(Path(cfg.run_dir) / "sweep.lock"):
        if path.exists():
            had = read_json(path)
            changed = [k for k in wanted if had.get(k) != json.loads(json.dumps(wanted[k]))]
            if not changed:
                return had["groups"]
            if not cfg.overwrite:
                raise UsageError(
                    f"{cfg.run_dir} holds a sweep with other {' and '.join(changed)}; "
                    "choose another --run-dir, or --overwrite to replace it"
                )
            for old in ("adapters", "groups"):
                shutil.rmtree(Path(cfg.run_dir) / old, ignore_errors=True)
            path.unlink()
        groups = make_groups(configs, cfg.engine, n)
        with RunLog(cfg.run_dir, "lora_sweep", {**wanted, "groups": groups}):
            write_json(path, {**wanted, "groups": groups})
        return groups


def work_through(cfg, configs, groups, index, n):
    """Take groups that nobody works on, this worker's own first, until all are done or taken."""
    order = sorted(range(len(groups)), key=lambda g: (g % n != index, g))
    for g in order:
        folder = Path(cfg.run_dir) / "groups" / f"{g:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_suffix(".lock"))
        try:
            held = lock.acquire(timeout=0)  # the system drops it when the process dies, so its group is free again
        except filelock.Timeout:
            print(f"group {g} is being trained by another process")
            continue
        with held:
            if is_done(folder):
                continue
            kind, members = groups[g]
            with RunLog(folder, f"lora_group_{kind}", {"members": members}, resume=True) as log:
                run_group(cfg, kind, [configs[i] for i in members], log)
                log.finish("success")


def is_done(folder):
    return (folder / "result.json").exists() and read_json(folder / "result.json")["status"] == "success"


def run_group(cfg, kind, configs, log):
    """Train a group's configurations: together by the engine, or one after another by the Trainer."""
    if kind == "concurrent":
        Group(cfg, configs, log).train()
        return
    for one in configs:  # the base is loaded anew for each: PEFT changes it in place
        result = train_with_trainer(one)
        log.print(f"{Path(one.run_dir).name}: {result['status']}, held-out loss {result['held_out_loss']}")


def run_sweep(cfg):
    """Do this worker's part of a sweep, and the summary if it is the last one to finish."""
    if cfg.engine not in ("auto", "concurrent", "trainer"):
        raise UsageError(f"unknown engine {cfg.engine}; choose auto, concurrent or trainer")
    configs = read_grid(cfg)
    index, n = worker(cfg)
    if cfg.plan:
        return show_plan(cfg, configs, n)
    groups = agree(cfg, configs, n)
    take_own_device()
    work_through(cfg, configs, groups, index, n)
    folder = Path(cfg.run_dir)
    left = [g for g in range(len(groups)) if not is_done(folder / "groups" / f"{g:03d}")]
    if left:
        return print(f"{len(left)} of {len(groups)} groups are still being trained elsewhere")
    with filelock.FileLock(folder / "sweep.lock"):
        if is_done(folder):
            return print(f"{folder} is already done: {(folder / 'table.md').as_posix()}")
        summarize(folder, configs)


def show_plan(cfg, configs, n):
    """Print which adapters train together, and what memory one takes."""
    for g, (kind, members) in enumerate(make_groups(configs, cfg.engine, n)):
        print(f"group {g} ({kind}): " + ", ".join(Path(configs[i].run_dir).name for i in members))
        if kind == "concurrent":
            plan = Group(cfg, [configs[i] for i in members], None).plan()
            print(f"  {plan}\n  {cfg.adapters_at_once or plan.at_once(len(members))} adapters at a time")


def main():
    cfg = tyro.cli(SweepConfig)
    cfg.run_dir = cfg.run_dir or f"runs/lora-{Path(cfg.grid).stem}"
    quiet_libraries()
    run_sweep(cfg)


if __name__ == "__main__":
    cli(main)
