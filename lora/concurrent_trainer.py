"""One group of a sweep: adapters on one base, a number of them at a time; a free slot takes the next configuration.

`sweep.py` calls `Group(sweep, configs, log).train()`. An adapter ends at its last step, or when it diverges, or when
`patience` or `halving` stops it. A checkpoint after every held-out loss holds the whole state: killed, a group resumes.
"""

import json
import math
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import median_low

import torch
from tqdm import tqdm

from common import UsageError, atomic_open, free_memory
from common.checkpoints import newest_checkpoint, save_checkpoint
from lora.base import AdapterConfig
from lora.generate import generate
from lora.multi_lora import MultiLora, memory_per_adapter
from lora.tasks import IGNORE, batch_rows, collate, mean_loss, pack, pad_id
from lora.train_lora import fingerprint, load, out_of_patience, perplexity, plan_steps, settings, task_metric
from runlog import RunLog, read_run

# What may differ between adapters of one group; all else decides which group an adapter is in.
VARIABLE = {"run_dir", "epochs", "batch_size", *(field.name for field in fields(AdapterConfig))}
RUNGS = (0.125, 0.25, 0.5)  # of successive halving, as fractions of an adapter's steps
SMOOTHING, WARM = 0.95, 20  # of the loss that tells divergence: its decay, and steps before it is judged


class Slot:
    """One adapter in training: its run directory, smoothed loss and best weights so far."""

    def __init__(self, cfg, inputs, state=None, best_theta=None):
        self.cfg, self.name = cfg, Path(cfg.run_dir).name
        start = {"smooth": 0.0, "seen": 0, "best_smooth": None, "window": [], "held_out": {}}  # held_out: step -> loss
        self.state = state or start  # plain numbers and containers, so that a checkpoint can hold them
        self.best_theta = best_theta  # (P,): the weights at the best held-out loss
        mirrors = {"tensorboard": cfg.tensorboard, "wandb": cfg.wandb}
        log = RunLog(cfg.run_dir, "lora", settings(cfg, inputs), resume=state is not None, **mirrors)
        self.log, self.close = log.__enter__(), partial(log.__exit__, None, None, None)

    def diverges(self, loss, factor):
        """Update the smoothed loss -> whether it exceeds `factor` times its best."""
        s = self.state
        s["seen"] += 1
        s["smooth"] = SMOOTHING * s["smooth"] + (1 - SMOOTHING) * loss
        value = s["smooth"] / (1 - SMOOTHING ** s["seen"])
        if s["seen"] < WARM:
            return False
        s["best_smooth"] = min(s["best_smooth"] or value, value)
        return bool(factor) and value > factor * s["best_smooth"]

    def held_out(self, step, loss, text, theta):
        """Record a held-out loss and a sample; keep the best weights -> whether patience has run out."""
        losses = self.state["held_out"]
        self.log.metric(step, "val", loss=loss, perplexity=perplexity(loss))
        if text is not None:
            self.log.metric(step, "sample", text=text)
        if loss < min(losses.values(), default=math.inf):
            self.best_theta = theta.clone()
        losses[step] = loss
        return out_of_patience(losses, self.cfg.patience)


class Group:
    """Trains a list of configurations on one base."""

    def __init__(self, sweep, configs, log):
        self.sweep, self.log, self.first = sweep, log, configs[0]
        self.tokenizer, self.model, self.data = load(self.first)
        plans = [plan_steps(cfg, len(self.data.train)) for cfg in configs]
        self.configs = [replace(cfg, max_steps=n, eval_every=every) for cfg, (n, every) in zip(configs, plans)]
        # All adapters have as many rows in a pass of the base; one of larger batches takes more passes a step.
        self.b = math.gcd(*(cfg.batch_size for cfg in configs))
        self.parts = [replace(c, grad_accum_steps=c.grad_accum_steps * c.batch_size // self.b) for c in self.configs]
        self.inputs, self.pad = fingerprint(self.first), pad_id(self.tokenizer)
        self.held_out = self.data.held_out[: self.first.eval_rows or None]
        self.rungs = {}  # rung -> held-out losses of those that reached it
        self.slots, self.queue, self.trained = [], list(range(len(configs))), 0

    def rung_steps(self, i):
        """{step: rung} at which halving compares slot i."""
        return {max(1, round(rung * self.slots[i].cfg.max_steps)): rung for rung in RUNGS if self.sweep.halving}

    def is_due(self, i):
        """Whether the held-out loss of slot i is taken at its step."""
        step, cfg = self.engine.steps[i], self.slots[i].cfg
        if self.engine.parts[i]:  # within a step
            return False
        return step % cfg.eval_every == 0 or step == cfg.max_steps or step in self.rung_steps(i)

    def build(self, members):
        """Put these configurations into the slots of an engine with room for all others of the group."""
        configs = [self.parts[i] for i in members]
        self.engine = MultiLora(self.model, configs, self.parts, self.first.gradient_checkpointing)
        if self.first.packing and not self.engine.packs:
            raise UsageError(f"{type(self.model).__name__} cannot keep packed rows apart; leave --packing out")

    def start(self):
        """Fill the slots, from the checkpoint if there is one."""
        if path := newest_checkpoint(self.log.ckpt_dir, self.log.print):
            return self.restore(torch.load(path, weights_only=True, map_location=self.model.device))
        longest = sorted(self.data.train, key=lambda row: -len(row["input_ids"]))[: self.b]
        batch = pack(longest, 1, self.pad) if self.first.packing else collate(longest, self.pad)
        needed = memory_per_adapter(self.model, self.parts, batch, self.first.gradient_checkpointing)
        fit = int(0.8 * free_memory(self.model.device) // needed)  # a fifth is left for what no estimate sees
        k = self.sweep.adapters_at_once or max(1, min(len(self.queue), fit))
        self.log.print(f"{len(self.configs)} adapters, {k} at a time, {needed / 2**20:,.1f} MB each, {fit} would fit")
        self.log.print(json.dumps(self.data.report))
        first, self.queue = self.queue[:k], self.queue[k:]
        self.build(first)
        self.slots = [Slot(self.configs[i], self.inputs) for i in first]
        with self.engine.alone(0) as model:  # B is zero still: this is the base
            self.log.metric(0, "task", **task_metric(model, self.tokenizer, self.data, self.first.metric_rows))
        self.evaluate(range(len(self.slots)))
        self.save()

    def save(self):
        """Write the checkpoint: everything that the next step depends on."""
        slots = [(self.configs.index(slot.cfg), slot.state, slot.best_theta) for slot in self.slots]
        state = {"queue": self.queue, "rungs": self.rungs, "trained": self.trained, "slots": slots}
        state |= {name: getattr(self.engine, name) for name in ("state", "steps", "parts", "pending")}
        save_checkpoint(self.log.ckpt_dir, self.trained, state)

    def restore(self, state):
        """The inverse of `save`."""
        self.queue, self.rungs, self.trained = state["queue"], state["rungs"], state["trained"]
        if state["slots"]:  # else killed after the last adapter's end
            self.build([number for number, _, _ in state["slots"]])
            self.engine.state.copy_(state["state"])
            self.engine.pending.copy_(state["pending"])
            self.engine.steps, self.engine.parts = state["steps"], state["parts"]
            self.slots = [Slot(self.configs[number], self.inputs, *saved) for number, *saved in state["slots"]]
            self.log.print(f"resuming at step {max(self.engine.steps)} with {len(self.slots)} adapters")

    def train(self):
        """Train until no configuration is left."""
        try:
            self.start()
            total = sum(cfg.max_steps for cfg in self.configs)
            with tqdm(total=total, initial=self.trained, unit="step", disable=None) as bar:
                while self.slots:
                    losses, norms, finite = self.engine.step(self.engine.forward(self.batch()))
                    bar.update(done := self.engine.parts.count(0))
                    self.trained += done
                    gone = self.record(losses, norms, finite)
                    due = {i for i in range(len(self.slots)) if self.is_due(i)}.union(gone)
                    if due:
                        self.retire(self.evaluate(due) | gone)
                        self.save()
        finally:
            for slot in filter(None, self.slots):
                slot.close()

    def batch(self):
        """Each slot's rows of its own step and part -> {"input_ids", "labels"}, (k, b, T); short ones are filled up."""
        b, rows, n = self.b, [], len(self.data.train)
        for cfg, step, part in zip(self.engine.configs, self.engine.steps, self.engine.parts):
            own = batch_rows(n, b * cfg.grad_accum_steps, step, cfg.seed)[part * b :][:b]
            own = [self.data.train[i] for i in own]
            rows += own + [{"input_ids": [self.pad], "labels": [IGNORE]}] * (b - len(own))
        if self.first.packing:
            return pack(rows, len(self.slots), self.pad)
        return {name: x.view(len(self.slots), b, -1) for name, x in collate(rows, self.pad).items()}

    def record(self, losses, norms, finite):
        """Log the step -> {slot: why it has to stop}: those that diverge, and those at their end."""
        gone = {}
        for i, slot in enumerate(self.slots):
            step = self.engine.steps[i] + (not finite[i])  # a failed step isn't counted
            if not finite[i]:
                slot.log.print(f"step {step}: loss {losses[i]} or gradient norm {norms[i]} is not finite")
                gone[i] = "diverged"
                continue
            if self.engine.parts[i]:  # its batch is not full yet
                continue
            window = slot.state["window"]
            window.append(losses[i])
            if slot.diverges(losses[i], self.sweep.divergence_factor):
                slot.log.print(f"step {step}: smoothed loss above {self.sweep.divergence_factor} times its best")
                gone[i] = "diverged"
            elif step == slot.cfg.max_steps:
                gone[i] = "end"
            if step % slot.cfg.log_every == 0 or i in gone:
                loss, lr = sum(window) / len(window), slot.cfg.lr_at(step - 1)
                slot.log.metric(step, "train", loss=loss, lr=lr, grad_norm=norms[i])
                window.clear()
        return gone

    def evaluate(self, due):
        """Held-out loss and a sample of these slots; keep the best weights -> {slot: why it has to stop}."""
        losses, texts, gone = mean_loss(self.engine.nll, self.held_out, self.pad), [None] * len(self.slots), {}
        if self.sweep.sample_tokens:
            options = {"stop_ids": self.data.stop_ids, "max_new_tokens": self.sweep.sample_tokens}
            texts = generate(self.model, self.tokenizer, self.data.prompt_ids, len(self.slots), **options)
            texts = [self.data.prompt + text for text in texts]
        for i in sorted(due):
            if self.slots[i].held_out(self.engine.steps[i], losses[i], texts[i], self.engine.theta[i]):
                gone[i] = "patience"
        arrived = {i: rung for i in sorted(due) if (rung := self.rung_steps(i).get(self.engine.steps[i]))}
        for i, rung in arrived.items():  # the worse half of all that have reached it stops
            self.rungs.setdefault(rung, []).append(losses[i])
        return gone | {i: "halving" for i, rung in arrived.items() if losses[i] > median_low(self.rungs[rung])}

    def retire(self, gone):
        """Finish these slots, keeping their best weights, and give their places to the next configurations."""
        for i, why in gone.items():
            self.finish(i, why)
            self.slots[i] = None
            if self.queue:
                number = self.queue.pop(0)
                self.engine.replace(i, self.parts[number])
                self.slots[i] = Slot(self.configs[number], self.inputs)
                self.evaluate([i])
        stay = [i for i, slot in enumerate(self.slots) if slot is not None]
        if stay and len(stay) < len(self.slots):
            self.engine.keep(stay)
        self.slots = [self.slots[i] for i in stay]

    def finish(self, i, why):
        """Save slot i's best adapter and its result."""
        slot, step, losses = self.slots[i], self.engine.steps[i], self.slots[i].state["held_out"]
        best_step = min(losses, key=losses.get)
        if slot.best_theta is not None:
            self.engine.theta[i] = slot.best_theta
        with self.engine.alone(i) as model:
            numbers = task_metric(model, self.tokenizer, self.data, slot.cfg.metric_rows)
        self.engine.save(i, slot.log.ckpt_dir / "adapter")
        slot.log.finish(
            "diverged" if why == "diverged" else "success", stopped=why, step=step,
            max_steps=slot.cfg.max_steps, best_step=best_step, held_out_loss=losses[best_step],
            last_held_out_loss=list(losses.values())[-1], perplexity=perplexity(losses[best_step]), after=numbers,
        )  # fmt: skip
        with atomic_open(slot.log.run_dir / "samples.txt") as f:  # from the rows: a resumed run holds each sample once
            for row in read_run(slot.log.run_dir).rows("sample"):
                f.write(f"--- step {row['step']}\n{row['text']}\n")
        slot.log.plot()
        slot.close()
        shown = f"best held-out loss {losses[best_step]:.4f} at step {best_step}"
        self.log.print(f"{slot.name}: {why} at step {step}, {shown}")
