"""One group of a sweep: adapters on one base, so many at a time; a place that gets free takes the next configuration.

`sweep.py` makes the groups and calls `Group(sweep, configs, log).train()`. Every adapter has a run directory of its own
and is judged by itself: it ends at its last step, or diverges, or is stopped by `patience` or `halving`; its best
weights are kept, and the others do not notice. A checkpoint after every held-out loss holds all that the next step
depends on, so a group that was killed at any moment goes on and ends as if nothing had happened.
"""

import json
import math
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from common import atomic_open, file_sha256, pick_device
from lora.train_lora import NOT_LEARNED, mirrors, task_metric
from runlog import RunLog, read_run

# What may differ between adapters of one group; all else decides which group an adapter is in.
ADAPTER_FIELDS = ("r", "lora_alpha", "lora_dropout", "lr", "use_rslora", "bias", "init_lora_weights", "lr_scheduler")
ADAPTER_FIELDS += ("warmup_steps", "weight_decay", "max_grad_norm", "max_steps", "epochs", "seed")
SMOOTHING, WARM = 0.95, 20  # of the loss that tells divergence: its decay, and steps before it is judged
KEPT = 2  # checkpoints


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
        shown = {k: v for k, v in asdict(cfg).items() if k not in NOT_LEARNED}
        log = RunLog(cfg.run_dir, "lora", shown, resume=state is not None, **mirrors(cfg))
        self.log = self.stack.enter_context(log)

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
        from lora.generate import block_size, load_base, load_tokenizer
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
        """Optimizer steps of an adapter: as set, or as many as its epochs take."""
        return cfg.max_steps or math.ceil(cfg.epochs * math.ceil(len(self.data.train) / cfg.batch_size))

    def eval_steps(self, cfg):
        """Steps at which an adapter's held-out loss is taken."""
        last = self.max_steps(cfg)
        every = cfg.eval_every or max(last // 10, 1)
        return {*range(0, last, every), last, *(self.rung_steps(cfg) if self.sweep.halving else ())}

    def rung_steps(self, cfg):
        """Steps at which halving compares: the rungs are shares of all steps."""
        return [max(1, round(float(part) * self.max_steps(cfg))) for part in self.sweep.rungs.split(",")]

    def adapter_config(self, cfg):
        """What the engine needs to know of one configuration."""
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
        state = load_newest(self.log.ckpt_dir, self.log.print)
        if state is not None:
            self.queue, self.rungs, self.trained = state["queue"], state["rungs"], state["trained"]
            members = [self.configs[i] for i in state["members"]]
            if not members:  # killed after the last adapter's end
                return
            self.engine = self.build(members)
            self.engine.load_state_dict(state["engine"])
            self.slots = [Slot(cfg, saved) for cfg, saved in zip(members, state["slots"])]
            for slot, theta in zip(self.slots, state["best_theta"]):
                slot.best_theta = theta if theta is None else theta.to(self.engine.theta)
            self.log.print(f"resuming at step {max(self.engine.steps)} with {len(self.slots)} adapters")
            return
        plan = self.plan()
        k = self.sweep.adapters_at_once or plan.at_once(len(self.queue))
        self.log.print(f"{len(self.configs)} adapters, {k} at a time | {plan} | {json.dumps(self.data.report)}")
        self.trained = 0
        first, self.queue = self.queue[:k], self.queue[k:]
        self.engine = self.build([self.configs[i] for i in first])
        self.slots = [Slot(self.configs[i]) for i in first]
        with self.engine.evaluating(0) as model:  # B is zero still: this is the base
            self.log.metric(0, "task", **task_metric(model, self.tokenizer, self.data, self.first.metric_rows))
        self.evaluate(range(len(self.slots)))
        self.save()

    def save(self):
        """Write the checkpoint: everything that the next step depends on."""
        state = {
            "queue": self.queue, "rungs": self.rungs, "trained": self.trained, "engine": self.engine.state_dict(),
            "members": [self.configs.index(slot.cfg) for slot in self.slots],
            "slots": [slot.state for slot in self.slots], "best_theta": [slot.best_theta for slot in self.slots],
        }  # fmt: skip
        save_checkpoint(self.log.ckpt_dir, self.trained, state)

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
# checkpoints


def save_checkpoint(folder, step, state):
    """Write folder/step_000500.pt whole, its sha256 beside it, and drop all but the newest two.

    Plain tensors and containers, so that `torch.load(…, weights_only=True)` reads it.
    """
    import torch

    path = Path(folder) / f"step_{step:06d}.pt"
    with atomic_open(path, "wb") as f:
        torch.save(state, f)
        f.flush()
        with atomic_open(sum_of(path)) as s:  # comes first: a checkpoint without its sum does not count
            s.write(f"{file_sha256(f.name)}  {path.name}\n")
    for old in checkpoints(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
        sum_of(old).unlink(missing_ok=True)


def load_newest(folder, warn):
    """The newest checkpoint whose sha256 is right -> its state, or None; those passed over are named through `warn`."""
    import torch

    for path in reversed(checkpoints(folder)):
        sums = sum_of(path).read_text(encoding="utf-8").split() if sum_of(path).exists() else []
        if sums[:1] == [file_sha256(path)]:
            return torch.load(path, weights_only=True, map_location="cpu")
        warn(f"warning: {path.name} is passed over: its sha256 is missing or does not match")
    return None


def checkpoints(folder):
    """The checkpoints in a folder, oldest first."""
    return sorted(Path(folder).glob("step_*.pt"), key=lambda path: int(path.stem.removeprefix("step_")))


def sum_of(path):
    return path.with_name(f"{path.name}.sha256")
