"""A grid of LoRA configurations -> one run each, all adapters of a group trained at once.

    python lora/sweep.py lora/sweeps/quickstart.json --base runs/quickstart/hf --run-dir runs/lora_sweep
    python lora/sweep.py lora/sweeps/imdb.json --data-file imdb_review_3000.csv.gz --run-dir runs/lora_imdb
    torchrun --nproc-per-node 8 lora/sweep.py GRID.json --run-dir DIR        one group of adapters a GPU
    python lora/sweep.py GRID.json --run-dir DIR --shard 3/16                fourth of sixteen jobs on a shared folder

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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import filelock
import tyro

from lora.generate import quiet_libraries
from lora.sweep_report import summarize
from lora.train_lora import TrainConfig, check, fingerprint
from lora.train_lora import run as train_with_trainer
from runlog import RunLog, UserError, atomic_open, cli, read_json, read_run, write_json

# What may differ between adapters of one group; all else decides which group an adapter is in.
ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "lr", "use_rslora", "bias", "init_lora_weights", "lr_scheduler")
ADAPTER_FIELDS += ("warmup_steps", "weight_decay", "max_grad_norm", "max_steps", "epochs", "seed")
SHORT = {"lora_alpha": "a", "lora_dropout": "d", "seed": "s", "use_rslora": "rs", "max_steps": "steps"}
SMOOTHING, WARM = 0.95, 20  # of the loss that tells divergence: its decay, and steps before it is judged


@dataclass
class SweepConfig:
    grid: tyro.conf.Positional[str]  # JSON file: task, settings, grid, configs, seeds
    run_dir: str  # where the records and adapters go
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
    device: str = "auto"  # auto, cuda, mps or cpu
    plan: bool = False  # print the groups and the memory estimate, and stop
    overwrite: bool = False  # replace a sweep with other settings instead of refusing


# ---------------------------------------------------------------------------------------------------------------------
# the grid


def read_grid(cfg):
    """The grid file with the flags over it -> [TrainConfig], one an adapter, its run_dir named after what it varies."""
    grid = read_json(cfg.grid)
    known = {"task", "base", "data_file", "settings", "grid", "configs", "seeds", "about"}
    if not isinstance(grid, dict) or set(grid) - known:
        raise UserError(f"{cfg.grid} should be an object with {', '.join(sorted(known))}")
    points = [dict(zip(grid.get("grid", {}), values)) for values in itertools.product(*grid.get("grid", {}).values())]
    points = (points if grid.get("grid") else []) + grid.get("configs", []) or [{}]
    seeds = grid.get("seeds", [0])
    common = {"task": grid.get("task", "pydocs"), "base": cfg.base or grid.get("base", "")}
    common |= {
        "data_file": cfg.data_file or grid.get("data_file", ""),
        "device": cfg.device,
        **grid.get("settings", {}),
    }
    if not common["base"]:
        raise UserError(f"{cfg.grid} names no base; give one with --base")
    if cfg.max_steps:
        common["max_steps"] = cfg.max_steps
    allowed = {field.name for field in fields(TrainConfig)} - {"run_dir", "overwrite", "show_batch"}
    configs, names = [], set()
    for number, (point, seed) in enumerate(itertools.product(points, seeds)):
        values = common | point | {"seed": point.get("seed", seed)}
        if set(values) - allowed:
            raise UserError(f"{cfg.grid}: unknown setting {', '.join(sorted(set(values) - allowed))}")
        varied = {**point, **({"seed": seed} if len(seeds) > 1 else {})}
        name = "_".join([f"{number:03d}"] + [f"{SHORT.get(k, k)}{v}".replace("/", "-") for k, v in varied.items()])
        names.add(json.dumps(values, sort_keys=True))
        configs.append(TrainConfig(run_dir=str(Path(cfg.run_dir) / "adapters" / name), **values))
    if len(names) < len(configs):
        raise UserError(f"{cfg.grid} lists the same configuration twice")
    check(configs[0])
    return configs


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
            raise UserError(f"{Path(cfg.run_dir).name} is beyond the concurrent engine; use --engine auto or trainer")
        kind = "concurrent" if engine != "trainer" and fits_engine(cfg) else "trainer"
        rest = {k: v for k, v in asdict(cfg).items() if k not in ADAPTER_FIELDS and k != "run_dir"}
        alike.setdefault((kind, json.dumps(rest, sort_keys=True)), []).append(i)
    groups = []
    for (kind, _), members in alike.items():
        size = math.ceil(len(members) / n)
        groups += [(kind, members[at : at + size]) for at in range(0, len(members), size)]
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# one group: adapters on one base


class Slot:
    """One adapter in training: its records, its smoothed loss, its best weights so far."""

    def __init__(self, cfg, state=None):
        self.cfg, self.name = cfg, Path(cfg.run_dir).name
        start = {"smooth": 0.0, "seen": 0, "best_smooth": None, "window": [], "best": None, "best_step": 0, "worse": 0}
        start["last"] = None
        self.state = state or start  # plain numbers and lists, so that a checkpoint can hold them
        self.best_theta = None  # (P,): the weights at the best held-out loss
        self.stack = ExitStack()
        shown = {k: v for k, v in asdict(cfg).items() if k not in ("run_dir", "overwrite", "show_batch")}
        self.log = self.stack.enter_context(RunLog(cfg.run_dir, "lora", shown, resume=state is not None))

    def diverges(self, loss, factor):
        """Take in a step's loss -> whether the smoothed loss is above `factor` times its best."""
        s = self.state
        s["seen"] += 1
        s["smooth"] = SMOOTHING * s["smooth"] + (1 - SMOOTHING) * loss
        value = s["smooth"] / (1 - SMOOTHING ** s["seen"])
        if s["seen"] < WARM:
            return False
        s["best_smooth"] = min(s["best_smooth"] or value, value)
        return bool(factor) and value > factor * s["best_smooth"]


class Group:
    """Trains a list of configurations on one base, `at_once` at a time; a freed slot takes the next."""

    def __init__(self, sweep, configs, log):
        from lora.generate import block_size, load_base, load_tokenizer, pick_device
        from lora.tasks import default_prompt, load_task, pad_id

        self.sweep, self.configs, self.log, self.first = sweep, configs, log, configs[0]
        first = self.first
        self.tokenizer = load_tokenizer(first.base)
        self.model = load_base(first.base, first.dtype, pick_device(sweep.device), first.load_in_4bit)
        self.data = load_task(
            first.task, self.tokenizer, block_size(self.model.config), data_file=first.data_file, mode=first.mode,
            max_length=first.max_length, held_out=first.held_out, max_rows=first.max_rows,
        )  # fmt: skip
        self.pad, self.prompt = pad_id(self.tokenizer), first.prompt or default_prompt(first.task, self.data)
        self.held_out = self.data.held_out[: first.eval_rows or None]
        self.rungs = {}  # rung -> held-out losses of those that reached it
        self.slots, self.queue = [], list(range(len(configs)))

    def max_steps(self, cfg):
        return cfg.max_steps or math.ceil(cfg.epochs * math.ceil(len(self.data.train) / cfg.batch_size))

    def eval_steps(self, cfg):
        """Steps at which an adapter's held-out loss is taken."""
        last = self.max_steps(cfg)
        every = cfg.eval_every or max(last // 10, 1)
        return {*range(0, last, every), last, *(self.rung_steps(cfg) if self.sweep.halving else ())}

    def rung_steps(self, cfg):
        return [max(1, round(float(part) * self.max_steps(cfg))) for part in self.sweep.rungs.split(",")]

    def adapter_config(self, cfg):
        from lora.multi_lora import AdapterConfig

        values = {name: getattr(cfg, name) for name in ADAPTER_FIELDS if name != "epochs"}
        return AdapterConfig(**values | {"max_steps": self.max_steps(cfg)})

    def plan(self):
        """Measure what an adapter takes -> MemoryPlan."""
        from lora.multi_lora import plan_memory
        from lora.tasks import collate

        longest = sorted(self.data.train, key=lambda row: -len(row["input_ids"]))[: self.first.batch_size]
        adapters = [self.adapter_config(cfg) for cfg in self.configs]
        names, spare = self.first.target_modules, self.first.gradient_checkpointing
        return plan_memory(self.model, adapters, collate(longest, self.pad), names, spare)

    def build(self, configs):
        """The engine with these configurations in its slots, with room for all others of the group."""
        from lora.multi_lora import MultiLora

        return MultiLora(
            self.model, [self.adapter_config(c) for c in configs], self.first.target_modules,
            max(c.r for c in self.configs), any(c.bias == "lora_only" for c in self.configs),
            self.first.gradient_checkpointing,
        )  # fmt: skip

    # -- start and checkpoint

    def start(self):
        """Fill the slots, from the checkpoint if there is one."""
        import torch

        path = self.log.ckpt_dir / "state.pt"
        if path.exists():
            state = torch.load(path, weights_only=True, map_location="cpu")
            self.queue, self.rungs, self.trained = state["queue"], state["rungs"], state["trained"]
            members = [self.configs[i] for i in state["members"]]
            self.engine = self.build(members)
            self.engine.load_state_dict(state["engine"])
            self.slots = [Slot(cfg, saved) for cfg, saved in zip(members, state["slots"])]
            for slot, theta in zip(self.slots, state["best_theta"]):
                slot.best_theta = theta if theta is None else theta.to(self.engine.theta)
            self.log.print(f"resuming at step {max(self.engine.steps)} with {len(self.slots)} adapters")
            return
        plan = self.plan()
        k = self.sweep.adapters_at_once or plan.at_once(len(self.queue))
        self.log.print(f"{len(self.configs)} adapters, {k} at a time | {plan}")
        self.trained = 0
        first, self.queue = self.queue[:k], self.queue[k:]
        self.engine = self.build([self.configs[i] for i in first])
        self.slots = [Slot(self.configs[i]) for i in first]
        self.evaluate(range(len(self.slots)))
        self.save()

    def save(self):
        """Write the checkpoint: everything that the next step depends on."""
        import torch

        state = {
            "queue": self.queue, "rungs": self.rungs, "trained": self.trained, "engine": self.engine.state_dict(),
            "members": [self.configs.index(slot.cfg) for slot in self.slots],
            "slots": [slot.state for slot in self.slots], "best_theta": [slot.best_theta for slot in self.slots],
        }  # fmt: skip
        with atomic_open(self.log.ckpt_dir / "state.pt", "wb") as f:
            torch.save(state, f)

    # -- the loop

    def train(self):
        """Train until no configuration is left."""
        from tqdm import tqdm

        self.start()
        total = sum(self.max_steps(cfg) for cfg in self.configs)
        with ExitStack() as logs, tqdm(total=total, initial=self.trained, unit="step", disable=None) as bar:
            logs.callback(lambda: [slot.stack.close() for slot in self.slots])
            while self.slots:
                losses, norms, fine = self.engine.step(self.engine.forward(self.batch()))
                self.trained += len(self.slots)
                bar.update(len(self.slots))
                gone = self.record(losses, norms, fine)
                due = [i for i, slot in enumerate(self.slots) if self.is_due(i, slot)]
                if due or gone:
                    gone = self.evaluate({*due, *gone}) | gone
                    bar.set_postfix_str(self.best_so_far())
                    self.retire(gone)
                    self.save()

    def is_due(self, i, slot):
        return self.engine.steps[i] in self.eval_steps(slot.cfg)

    def batch(self):
        """Each slot's rows of its own step -> {"input_ids", "labels"}, (k, b, T); a short last batch is filled up."""
        from lora.tasks import IGNORE, batch_rows, collate

        b, rows = self.first.batch_size, []
        for slot, step in zip(self.slots, self.engine.steps):
            own = [self.data.train[i] for i in batch_rows(len(self.data.train), b, step, slot.cfg.seed)]
            rows += own + [{"input_ids": [self.pad], "labels": [IGNORE]}] * (b - len(own))
        return {name: x.view(len(self.slots), b, -1) for name, x in collate(rows, self.pad).items()}

    def record(self, losses, norms, fine):
        """Log the step -> {slot: why it has to stop}: those that diverge, and those at their end."""
        gone = {}
        for i, slot in enumerate(self.slots):
            step = self.engine.steps[i] + (not fine[i])  # a step that failed was not counted
            if not fine[i]:
                slot.log.print(f"step {step}: loss {losses[i]} or gradient norm {norms[i]} is not finite")
                gone[i] = "diverged"
                continue
            slot.state["window"].append(losses[i])
            if slot.diverges(losses[i], self.sweep.divergence_factor):
                slot.log.print(f"step {step}: smoothed loss above {self.sweep.divergence_factor} times its best")
                gone[i] = "diverged"
            elif step == self.max_steps(slot.cfg):
                gone[i] = "end"
            if step % slot.cfg.log_every == 0 or i in gone:
                window = slot.state["window"]
                lr = self.engine.configs[i].lr_at(step - 1)
                slot.log.metric(step, "train", loss=sum(window) / len(window), lr=lr, grad_norm=norms[i])
                slot.state["window"] = []
        return gone

    def evaluate(self, slots):
        """Held-out loss and a sample of these slots; keep the best weights -> {slot: why it has to stop}."""
        from lora.generate import generate_rows
        from lora.tasks import prompt_ids

        losses, gone = self.engine.held_out(self.held_out, self.pad), {}
        texts = [None] * len(self.slots)
        if self.sweep.sample_tokens:
            ids = prompt_ids(self.tokenizer, self.prompt)
            with self.engine.evaluating() as model:
                texts = generate_rows(
                    model, self.tokenizer, ids, len(self.slots), stop_ids=self.data.stop_ids,
                    max_new_tokens=self.sweep.sample_tokens,
                )  # fmt: skip
        for i in sorted(slots):
            slot, step, loss = self.slots[i], self.engine.steps[i], losses[i]
            slot.state["last"] = loss
            slot.log.metric(step, "val", loss=loss, perplexity=math.exp(min(loss, 700)))
            if texts[i] is not None:
                slot.log.metric(step, "sample", text=self.prompt + texts[i])
            if math.isfinite(loss) and (slot.state["best"] is None or loss < slot.state["best"]):
                slot.state |= {"best": loss, "best_step": step, "worse": 0}
                slot.best_theta = self.engine.theta[i].clone()
            else:
                slot.state["worse"] += 1
            if slot.cfg.patience and slot.state["worse"] >= slot.cfg.patience:
                gone[i] = "patience"
        return gone | (self.halve(slots, losses) if self.sweep.halving else {})

    def halve(self, slots, losses):
        """At a rung, stop those in the worse half of all that have come this far -> {slot: "halving"}."""
        arrived = []
        for i in sorted(slots):
            for part, step in zip(self.sweep.rungs.split(","), self.rung_steps(self.slots[i].cfg)):
                if step == self.engine.steps[i]:
                    value = losses[i] if math.isfinite(losses[i]) else math.inf
                    self.rungs.setdefault(part, []).append(value)
                    arrived.append((i, part, value))
        return {i: "halving" for i, part, value in arrived if value > median_below(self.rungs[part])}

    def best_so_far(self):
        done = [slot for slot in self.slots if slot.state["best"] is not None]
        best = min(done, key=lambda slot: slot.state["best"], default=None)
        return f"best {best.state['best']:.3f} {best.name}" if best else ""

    def retire(self, gone):
        """Finish these slots, keeping their best weights, and give their places to the next configurations."""
        for i, why in gone.items():
            self.finish(i, why)
            if self.queue:
                cfg = self.configs[self.queue.pop(0)]
                self.engine.replace(i, self.adapter_config(cfg))
                self.slots[i] = Slot(cfg)
                self.evaluate([i])
            else:
                self.slots[i] = None
        stay = [i for i, slot in enumerate(self.slots) if slot is not None]
        if len(stay) < len(self.slots):
            self.slots = [self.slots[i] for i in stay]
            if stay:
                self.engine.keep(stay)

    def finish(self, i, why):
        """Save slot i's best adapter and its result."""
        from lora.train_lora import task_metric

        slot, step = self.slots[i], self.engine.steps[i]
        if slot.best_theta is not None:
            self.engine.theta[i] = slot.best_theta
        with self.engine.evaluating(i) as model:
            numbers = task_metric(model, self.tokenizer, self.data, slot.cfg.metric_rows)
        self.engine.save(i, slot.log.ckpt_dir / "adapter")
        best = slot.state["best"]
        slot.log.finish(
            "diverged" if why == "diverged" else "success", stopped=why, step=step, max_steps=self.max_steps(slot.cfg),
            best_step=slot.state["best_step"], held_out_loss=best, last_held_out_loss=slot.state["last"],
            perplexity=None if best is None else math.exp(min(best, 700)), after=numbers,
        )  # fmt: skip
        write_samples(slot.log)
        slot.log.plot()
        slot.stack.close()
        shown = f"{best:.4f} at step {slot.state['best_step']}" if best is not None else "none"
        self.log.print(f"{slot.name}: {why} at step {step}, best held-out loss {shown}")


def median_below(values):
    """The largest value of the better half: of [1, 2, 3, 4] -> 2, of [1] -> 1, of [1, 2, 3] -> 2"""
    return sorted(values)[(len(values) + 1) // 2 - 1]


def write_samples(log):
    """samples.txt from the rows of metrics.jsonl, so that a resumed run holds each sample once."""
    rows = read_run(log.run_dir).rows("sample")
    with atomic_open(log.run_dir / "samples.txt") as f:
        f.writelines(f"--- step {row['step']}\n{row['text']}\n" for row in rows)


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
            raise UserError(f"--shard {cfg.shard} should be i/n with i from 0 to n - 1")
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
    rows = [{k: v for k, v in asdict(c).items() if k not in ("run_dir", "device")} for c in configs]
    names = ("engine", "adapters_at_once", "divergence_factor", "halving", "rungs", "sample_tokens")
    wanted = {
        "configs": rows,
        "settings": {k: getattr(cfg, k) for k in names},
        "inputs": fingerprint(configs[0]),
    }
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(Path(cfg.run_dir) / "sweep.lock"):
        if path.exists():
            had = read_json(path)
            changed = [k for k in wanted if had.get(k) != json.loads(json.dumps(wanted[k]))]
            if not changed:
                return had["groups"]
            if not cfg.overwrite:
                raise UserError(
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
    if kind == "concurrent":
        Group(cfg, configs, log).train()
        return
    for one in configs:  # the base is loaded anew for each: PEFT changes it in place
        result = train_with_trainer(one)
        log.print(f"{Path(one.run_dir).name}: {result['status']}, held-out loss {result['held_out_loss']}")


def run_sweep(cfg):
    """Do this worker's part of a sweep, and the summary if it is the last one to finish."""
    if cfg.engine not in ("auto", "concurrent", "trainer"):
        raise UserError(f"unknown engine {cfg.engine}; choose auto, concurrent or trainer")
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
    quiet_libraries()
    run_sweep(cfg)


if __name__ == "__main__":
    cli(main)
