"""Train a GPT-2: one process, or many under torchrun, with the same result.

    python gpt2/train_gpt2.py quickstart                                     # minutes on two cores
    python gpt2/train_gpt2.py gpt2-124M --plan                               # memory, hours, disk; starts nothing
    torchrun --standalone --nproc_per_node=8 gpt2/train_gpt2.py              # GPT-2 124M on FineWeb-Edu, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 gpt2/train_gpt2.py

Kill it at any moment: the same command resumes from the newest checkpoint and ends with the same weights. SIGTERM,
Ctrl-C, a file STOP in the run directory and --stop-after-minutes save first. What to expect of gpt2-124M: a validation
loss of about 3.3 nats after one epoch of 10B tokens (OpenAI's weights: 3.29).

No preset means gpt2-124M, and PRESET --help lists every setting with its unit. What a run directory holds: runlog/.
"""

import gc
import hashlib
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, fields, replace
from datetime import timedelta
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import tyro
from scipy.special import entr
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from bpe.tokenizer import Tokenizer
from common import UsageError, cli, free_memory, keep_freed_memory, peak_flops, peak_memory_mb, pick_device, portable
from common.checkpoints import newest_checkpoint, sorted_checkpoints
from data.shards import check_folder, unigram_counts
from gpt2 import checkpoint, hellaswag
from gpt2.config import DEFAULT_PRESET, FREE_ON_RESUME, PRESETS, GPTConfig, TrainConfig
from gpt2.distributed import Ranks, Stop, TreeSum, autocast, pick_dtype
from gpt2.loader import Loader, micro_batches
from gpt2.model import GPT, meta_model
from gpt2.optimizers import make_optimizers, set_lr
from gpt2.plan import compile_problem, fitting_micro_batch, print_plan
from gpt2.sample import generate
from runlog import RunLog, read_run

VAL_LINE = "loss {loss:.4f} | {bits_per_byte:.4f} bits per byte"
HELLASWAG_LINE = "acc_norm {acc_norm:.4f} ({acc_norm_low:.4f} … {acc_norm_high:.4f}) | acc {acc:.4f} | {items} items"


class Diverged(Exception):
    """A loss or gradient is not finite; the message names the step."""


# --- before the loop


def parse(argv):
    """Command line -> TrainConfig. The preset comes first; with none named it is GPT-2 124M."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = [DEFAULT_PRESET, *argv]
    about = "{p.n_layer} layers, {p.n_embd} wide; {p.max_steps:,} steps of {p.total_batch_size:,} tokens"
    presets = {name: (about.format(p=preset), preset) for name, preset in PRESETS.items()}
    return tyro.extras.overridable_config_cli(presets, args=argv, description=__doc__)


def resolve(cfg, ranks, meta):
    """Resolve --dtype auto and --micro-batch-size 0 for this device, and set torch's global flags."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it: what is left in float32 runs 8x faster
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cfg = replace(cfg, dtype=pick_dtype(cfg.dtype, ranks.device))
    if not cfg.micro_batch_size:
        shared_by = 1 if ranks.device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        free = min(ranks.gather(free_memory(ranks.device) / shared_by))
        rows = fitting_micro_batch(cfg, meta_model(cfg, meta["vocab_size"]), ranks.world_size, free, ranks.device.type)
        cfg = replace(cfg, micro_batch_size=max(1, rows))
    return cfg


def build_model(cfg, meta):
    """Random initial weights, or those of --init. Built on the CPU, so that a seed gives the same on every device."""
    torch.manual_seed(cfg.seed)
    if cfg.init == "random":
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **cfg.shape))
    model = checkpoint.load_weights(cfg.init, cfg.dropout)
    c = model.config = replace(model.config, low_precision_residual=cfg.low_precision_residual)
    if c.vocab_size != meta["vocab_size"]:
        sizes = f"{cfg.init} has a vocabulary of {c.vocab_size}, {cfg.data_dir} one of {meta['vocab_size']}"
        raise UsageError(f"{sizes}; prepare the data with the model's own tokenizer")
    if cfg.block_size > c.block_size:
        raise UsageError(f"{cfg.init} has a context of {c.block_size} tokens; lower --block-size {cfg.block_size}")
    if other := [k for k in ("n_layer", "n_head", "n_embd") if getattr(cfg, k) != getattr(c, k)]:
        flags = " ".join(f"--{k.replace('_', '-')} {getattr(c, k)}" for k in other)
        raise UsageError(f"{cfg.init} has another shape; add {flags}")
    return model


def compiled(model, cfg, ranks, say):
    """The model under torch.compile, or on all ranks the model itself where compiling fails on one of them."""
    if not cfg.compile:
        return model
    problems = ranks.gather(compile_problem(ranks.device))
    if failed := [f"rank {rank}: {why}" for rank, why in enumerate(problems) if why]:
        say(f"torch.compile does not work here ({failed[0]}): training runs eager, without --compile")
        return model
    return torch.compile(model, dynamic=False)


def all_settings(cfg, meta):
    """What config.json records: every setting, the identity of the data, and the FLOPs a token."""
    sums = "".join(shard["sha256"] for shard in meta["shards"])
    return {
        **{k: portable(v) for k, v in asdict(cfg).items()},
        **({"OMP_NUM_THREADS": torch.get_num_threads()} if cfg.exact_reduction else {}),
        "tokenizer_sha256": meta["tokenizer"]["sha256"],
        "shards_sha256": hashlib.sha256(sums.encode()).hexdigest(),
        "flops_per_token": meta_model(cfg, meta["vocab_size"]).flops_per_token(),
    }


def learned_settings(settings):
    """The settings that decide what is learned, or with --exact-reduction every bit: a resume may not change them."""
    free = {*FREE_ON_RESUME, "flops_per_token"}
    if settings.get("exact_reduction"):
        free -= {"micro_batch_size", "compile", "deterministic"}
    defaults = {field.name: field.default for field in fields(TrainConfig)}  # of settings newer than the record
    return {k: v for k, v in {**defaults, **settings}.items() if k not in free}


def find_start(cfg, settings, ranks):
    """What to do in this run directory -> ("finished" | "replace" | "run", checkpoint or None, lines for the log).

    "run" begins, or resumes from the checkpoint; "replace" drops another run's record first. Nothing is written before
    this is decided, so a refusal leaves the record as it was. Collective.
    """
    run_dir, start, newest, lines = Path(cfg.run_dir), "run", None, []
    kept = sorted_checkpoints(run_dir / "ckpt")
    if cfg.eval_only and kept:
        raise UsageError(f"{run_dir} is a training run; evaluate it with --init {run_dir} and another --run-dir")
    run = read_run(run_dir) if (run_dir / "config.json").exists() else None
    same = run and learned_settings(run.settings) == learned_settings(settings)
    if same and run.result.get("status") == "success" and (kept or cfg.eval_only):  # the weights are still there
        start = "finished"
    elif run and not same and (cfg.overwrite or not (kept or run.metrics)):
        start, lines = "replace", [f"{run_dir} was made with other settings or data: it is replaced"]
    elif ranks.main:  # hashes gigabytes, so it decides for the others
        newest = newest_checkpoint(run_dir / "ckpt", warn=lines.append)
    start, name = ranks.gather((start, newest and newest.name))[0]
    if name and not (run_dir / "ckpt" / name).exists():
        raise UsageError(f"{run_dir}/ckpt/{name} is missing on a node; all must share the file system of --run-dir")
    state = checkpoint.read(run_dir / "ckpt" / name) if name else None
    if state and "optimizers" not in state:
        raise UsageError(f"{run_dir} holds imported weights; name it by --init, with another --run-dir")
    if start == "run" and (state or run):
        changes = changed_settings(state["learned"] if state else run.settings, settings)
        if changes and not cfg.allow_config_change:
            raise UsageError(
                f"{run_dir} was started with other settings ({'; '.join(changes)}); "
                "use another --run-dir, or --allow-config-change to resume all the same"
            )
        lines += [f"changed on resume: {change}" for change in changes]
    return start, state, lines


def changed_settings(then, now):
    """The differences in settings that decide what is learned -> list of texts."""
    then, now = learned_settings(then), learned_settings(now)
    return [f"{k} {then[k]!r} -> {v!r}" for k, v in now.items() if k in then and then[k] != v]


# --- evaluation: every rank computes a fixed share, whatever the world size, and sums are exchanged


@torch.no_grad()
def evaluate_loss(model, loader, cfg, ranks, token_bytes, stop):
    """Loss over the first val_tokens of the val split -> {"loss", "bits_per_byte", "tokens"}, or None if stopped.

    Batches of micro_batch_size sequences go to the ranks in turn, and their float32 losses are added in float64: the
    result does not depend on the number of processes. token_bytes: (vocab_size,) UTF-8 bytes of each id. stop: asked
    between batches. Collective.
    """
    n = min(loader.n_sequences, max(1, cfg.val_tokens // cfg.block_size))
    per_batch = cfg.micro_batch_size * ranks.world_size
    nats, tokens, text_bytes = 0.0, 0, 0
    model.eval()
    for first in range(0, n, per_batch):
        if stop.here():
            break
        idx, targets = loader.in_order(first + ranks.rank * cfg.micro_batch_size, cfg.micro_batch_size, n)  # (B, T)
        known = targets[targets >= 0]
        tokens, text_bytes = tokens + known.numel(), text_bytes + int(token_bytes[known].sum())
        with autocast(ranks.device, cfg.dtype):
            _, loss = model(idx.to(ranks.device), targets.to(ranks.device), return_logits=False, reduction="sum")
        nats += loss.item()
    if stop.reason():  # evaluated again, whole, when the run resumes from this step; so is HellaSwag
        return None
    nats, tokens, text_bytes = ranks.sum([nats, tokens, text_bytes])
    return {"loss": nats / tokens, "bits_per_byte": nats / math.log(2) / max(1, text_bytes), "tokens": int(tokens)}


def evaluate_hellaswag(model, items, cfg, ranks, stop):
    """HellaSwag's accuracies -> `hellaswag.figures` and the seconds it took, or None if stopped. Collective."""
    start, logits_of = time.perf_counter(), partial(hellaswag.gpt_logits, model.eval())
    rows = hellaswag.evaluate(logits_of, items, ranks.device, ranks.rank, ranks.world_size, cfg.dtype, stop.here)
    if stop.reason():
        return None
    return {**hellaswag.figures(list(chain.from_iterable(ranks.gather(rows)))), "seconds": time.perf_counter() - start}


# --- the loop


class Trainer:
    """One training run: `__init__` builds it, `run` is the loop. state: the checkpoint to resume from, or None."""

    def __init__(self, cfg, meta, ranks, log, state=None):
        self.cfg, self.ranks, self.device, self.log, self.say = cfg, ranks, ranks.device, log, log.print
        self.stop = Stop(ranks, log.run_dir, cfg.stop_after_minutes)  # from here on signals are handled between steps
        self.tokenizer = Tokenizer.load(Path(cfg.data_dir) / "tokenizer.model")
        if self.tokenizer.sha256 != meta["tokenizer"]["sha256"]:
            raise UsageError(f"{cfg.data_dir}/tokenizer.model did not make these shards; run data/prepare.py again")
        if ranks.main:
            shutil.copyfile(Path(cfg.data_dir) / "tokenizer.model", log.run_dir / "tokenizer.model")
        self.token_bytes = torch.tensor(self.tokenizer.byte_lengths())

        self.grad_accum_steps = cfg.grad_accum_steps(ranks.world_size)
        T = cfg.block_size
        eot = meta["eot"] if cfg.align_documents else None
        self.train_loader = Loader(cfg.data_dir, "train", T, cfg.total_batch_size // T, cfg.seed, meta, eot)
        self.val_loader = Loader(cfg.data_dir, "val", T, meta=meta)
        counts = unigram_counts(cfg.data_dir, meta)  # (vocab_size,)
        self.unigram_entropy = float(entr(counts / counts.sum()).sum())  # nats: the loss of token frequencies alone
        self.reference = {"unigram entropy": self.unigram_entropy}  # lines in the picture
        if meta["name"].startswith("fineweb-edu") and meta["tokenizer"]["name"] == "gpt2":
            self.reference["GPT-2 124M (OpenAI)"] = 3.2924  # its validation loss on the same tokens
        self.hellaswag_items = self.load_hellaswag() if cfg.hellaswag_every else None

        # The raw model serves odd shapes (samples) and checkpoints, whose names so stay free of prefixes; `model` may
        # be compiled; `step_model` adds the exchange of gradients between processes.
        self.raw_model = build_model(cfg, meta).to(self.device)
        torch.manual_seed(cfg.seed + ranks.rank)  # dropout: every rank has other rows, and other masks
        self.model = self.step_model = compiled(self.raw_model, cfg, ranks, self.say)
        self.tree = TreeSum(ranks) if cfg.exact_reduction else None
        if ranks.world_size > 1 and not self.tree:
            self.step_model = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        self.optimizers = make_optimizers(self.raw_model, cfg)
        self.average = AveragedModel(self.raw_model) if cfg.average_last else None
        # float16 gradients underflow unless the loss is scaled up; with other types the scaler does nothing.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.dtype == "float16")
        self.peak = peak_flops(self.device, cfg.dtype)  # of one process's device, or None

        self.learned = learned_settings(all_settings(cfg, meta))
        self.step, self.skipped, self.saved_at = 0, 0, 0
        self.writer = checkpoint.Writer(done=lambda path: self.say(f"  saved {path.name}"))
        self.pending = []  # (step, loss, grad_norm, lr) whose tensors have not been read yet
        self.last = {"val": {}, "hellaswag": {}}  # the newest figures of each evaluation
        if state:
            self.load(state)
        tokens = sum(len(shard) for shard in self.train_loader.shards)
        self.say(
            f"{self.raw_model.num_params():,} parameters | {cfg.dtype} on {self.device.type} x {ranks.world_size} | "
            f"{tokens:,} training tokens | a step is {cfg.total_batch_size:,} tokens: {ranks.world_size} process(es) x "
            f"{self.grad_accum_steps} x {cfg.micro_batch_size} sequences of {cfg.block_size} | "
            f"{torch.get_num_threads()} threads"
        )
        self.say(f"unigram entropy {self.unigram_entropy:.4f} nats: the loss of predicting token frequencies alone")

    def load_hellaswag(self):
        """The items, which rank 0 reads for all; None where it has no file and no hub: training continues without."""
        cfg, items = self.cfg, None
        try:
            if self.ranks.main:
                items = hellaswag.load_items(cfg.hellaswag_file, cfg.hellaswag_limit, fix="--hellaswag-file FILE")
        except UsageError as e:
            if cfg.hellaswag_file or cfg.eval_only:
                raise
            self.say(f"HellaSwag is not scored: {e}")
        items, encode = self.ranks.gather(items)[0], self.tokenizer.to_tiktoken().encode_ordinary_batch
        return items and hellaswag.Encoded(items, encode, cfg.block_size)

    def load(self, state):
        """Continue from a checkpoint."""
        self.raw_model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            # Without the settings, which --allow-config-change may have changed.
            optimizer.load_state_dict({**optimizer.state_dict(), "state": saved["state"]})
        self.scaler.load_state_dict(state["scaler"])
        if self.average and state.get("average"):
            self.average.load_state_dict(state["average"])
        self.step, self.saved_at, self.skipped = state["step"], state["step"], state["skipped"]
        if self.ranks.rank < len(state["rng"]):  # more processes than before: the new ones keep their fresh state
            checkpoint.set_rng_state(state["rng"][self.ranks.rank], self.device)
        self.say(f"resumed at step {self.step}")

    def save(self):
        """Write a checkpoint of this step on a thread, unless there is one already. Collective."""
        self.flush()  # raises Diverged, before a good checkpoint is replaced, if a loss was not finite
        rng = self.ranks.gather(checkpoint.rng_state(self.device))
        if self.ranks.main and self.step != self.saved_at:
            state = {"scaler": self.scaler.state_dict(), "skipped": self.skipped, "rng": rng, "learned": self.learned}
            state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
            state |= checkpoint.model_state(self.raw_model)
            state["average"] = self.average and self.average.state_dict()
            self.writer.save(self.log.ckpt_dir, self.step, state, self.cfg.keep_checkpoints)
        self.saved_at = self.step

    def run(self, until=None):
        """Train until max_steps (or `until`) or a reason to stop -> the fields of result.json."""
        cfg, ranks = self.cfg, self.ranks
        last_step = 0 if cfg.eval_only else cfg.max_steps if until is None else until
        start_step, started_at = self.step, time.perf_counter()
        batches = micro_batches(self.train_loader, ranks, cfg.micro_batch_size, self.grad_accum_steps, self.step)
        bar = tqdm(total=cfg.max_steps, initial=self.step, unit="step", disable=None if ranks.main else True)
        while True:
            # --- between steps. The checkpoint comes first: after a kill the rest is repeated, with the same result.
            if self.due(cfg.checkpoint_every) and self.step > 0:
                self.save()
            if self.due(cfg.val_every):
                val = evaluate_loss(self.model, self.val_loader, cfg, ranks, self.token_bytes, self.stop)
                self.report("val", val, VAL_LINE)
            if self.hellaswag_items and self.due(cfg.hellaswag_every) and (self.step > 0 or cfg.eval_only):
                acc = evaluate_hellaswag(self.raw_model, self.hellaswag_items, cfg, ranks, self.stop)
                self.report("hellaswag", acc, HELLASWAG_LINE)
            if self.due(cfg.sample_every) and ranks.main:
                self.sample()
            reason = self.stop.reason()
            if reason or self.step >= last_step:
                break

            # --- one optimizer step; its figures stay on the device until a log line is due: the host does not wait
            if not self.pending:  # time spent between steps does not count
                self.clock = time.perf_counter()
            loss = self.accumulate_gradients(batches)
            norm, lr = self.update_weights(loss)
            self.pending.append((self.step, loss, norm, lr))
            self.step += 1
            bar.update()
            first = self.step == start_step + 1  # it compiles and allocates memory, so its time is a line by itself
            due = map(self.due, (cfg.checkpoint_every, cfg.val_every, cfg.hellaswag_every, cfg.sample_every))
            if len(self.pending) >= cfg.log_every or first or any(due):
                self.flush()
            if first:
                gc.collect()
                gc.freeze()  # what lives now lives to the end: later collections do not pause for it
        bar.close()
        self.flush()
        if reason:
            self.save()
            return {"status": "preempted", "reason": f"{reason}; the same command resumes", "step": self.step}
        val, acc = self.last["val"], self.last["hellaswag"]
        tok_per_sec = (self.step - start_step) * cfg.total_batch_size / (time.perf_counter() - started_at)
        return {
            "status": "success", "step": self.step, "tokens": self.step * cfg.total_batch_size,
            "tok_per_sec": tok_per_sec,  # of this start, evaluations included
            "val_loss": val.get("loss"), "bits_per_byte": val.get("bits_per_byte"),
            **{f"hellaswag_{k}": acc[k] for k in ("items", "acc", "acc_norm") if acc},
            "unigram_entropy": self.unigram_entropy, "parameters": self.raw_model.num_params(),
            "skipped_steps": self.skipped,
        }  # fmt: skip

    def accumulate_gradients(self, batches):
        """Forward and backward pass of a step's micro-batches, (micro_batch_size, T) each -> the loss, on the device.

        The mean over the micro-batches of this rank; of all ranks under --exact-reduction.
        """
        cfg, ranks, params = self.cfg, self.ranks, list(self.raw_model.parameters())
        self.model.train()
        loss_sum = torch.zeros((), device=self.device)
        parts = self.grad_accum_steps * (ranks.world_size if self.tree else 1)  # DDP takes the mean over the ranks
        for micro_step in range(self.grad_accum_steps):
            idx, targets = next(batches)
            if self.step_model is not self.model:  # DDP exchanges gradients with the last micro-batch alone
                self.step_model.require_backward_grad_sync = micro_step == self.grad_accum_steps - 1
            if self.tree:  # dropout masks are those of the micro-batch, whoever computes it
                seeds = [cfg.seed, self.step, ranks.rank * self.grad_accum_steps + micro_step]
                torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
            with autocast(self.device, cfg.dtype):
                _, loss = self.step_model(idx, targets, return_logits=False)
            loss = loss / parts
            self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
            if self.tree:
                self.tree.add([loss.detach(), *(p.grad for p in params)])
                self.raw_model.zero_grad()  # the tree has the gradients
        if self.tree:
            loss_sum, *grads = self.tree.total()
            for p, grad in zip(params, grads):
                p.grad = grad
        return loss_sum

    def update_weights(self, loss):
        """Clip the gradients and step the optimizers, unless the step is skipped -> gradient norm, learning rate."""
        cfg, lr = self.cfg, set_lr(self.optimizers, self.step, self.cfg)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), cfg.grad_clip or math.inf)
        if not self.skip(loss, norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        if self.step >= cfg.max_steps - cfg.average_last:
            self.average.update_parameters(self.raw_model)
            if self.step + 1 == cfg.max_steps:  # the average is validated, sampled and saved (Izmailov et al. 2018)
                self.raw_model.load_state_dict(self.average.module.state_dict())
        return norm, lr

    def due(self, every):
        """Whether something that is done every so many steps is due now; at the last step everything is."""
        return every > 0 and (self.step % every == 0 or self.step >= self.cfg.max_steps)

    def skip(self, loss, norm):
        """Whether to skip this step's update; Diverged once --skip-nonfinite steps have been skipped."""
        # A float16 gradient that overflowed is normal: all optimizers skip the step, and the scaler lowers the scale.
        scaled, cfg = self.scaler.is_enabled(), self.cfg
        if cfg.skip_nonfinite and not all(map(math.isfinite, self.ranks.sum([loss] if scaled else [loss, norm]))):
            self.skipped += 1
            if self.skipped > cfg.skip_nonfinite:
                raise Diverged(f"step {self.step} is not finite, after {cfg.skip_nonfinite} skipped ones")
            self.say(f"step {self.step} is not finite: skipped ({self.skipped} of at most {cfg.skip_nonfinite})")
            return True
        return scaled and not math.isfinite(norm)

    def flush(self):
        """Read the pending figures (the only wait for the device), record them, and print the last as the log line."""
        if not self.pending:
            return
        cfg, scaled = self.cfg, self.scaler.is_enabled()
        steps, losses, norms, lrs = zip(*self.pending)
        losses, norms = self.ranks.sum(torch.stack(losses).tolist()), torch.stack(norms).tolist()
        seconds, self.pending = (time.perf_counter() - self.clock) / len(steps), []
        ms, tok_per_sec = seconds * 1e3, cfg.total_batch_size / seconds
        mfu = self.peak and tok_per_sec * self.raw_model.flops_per_token() / self.peak / self.ranks.world_size
        for step, loss, norm, lr in zip(steps, losses, norms, lrs):
            loss /= self.ranks.world_size
            self.log.metric(step, "train", loss=loss, grad_norm=norm, lr=lr, ms=ms, tok_per_sec=tok_per_sec, mfu=mfu)
            if not cfg.skip_nonfinite and not (math.isfinite(loss) and (scaled or math.isfinite(norm))):
                raise Diverged(f"the {'gradient' if math.isfinite(loss) else 'loss'} of step {step} is not finite")
        if scaled and self.scaler.get_scale() < 1:  # it has halved at step after step, to no avail
            raise Diverged(f"the gradient of step {step} is not finite, however small the loss is scaled")
        left = timedelta(seconds=int(seconds * (cfg.max_steps - step - 1)))
        self.say(
            f"step {step:>6}/{cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | {ms:.0f} ms | "
            f"{tok_per_sec:,.0f} tok/s" + (f" | MFU {mfu:.1%}" if mfu else "") + f" | ETA {left}"
        )

    def report(self, kind, figures, text):
        """Record and print an evaluation's figures (None: it was stopped), and redraw loss.png."""
        if figures is not None:
            self.last[kind] = figures
            self.log.metric(self.step, kind, **figures)
            self.say(f"  {kind[:5]:<6} | {text.format(**figures)}")
            self.log.plot(self.reference, submit=self.writer.submit)

    def sample(self):
        """Two continuations of the prompt: whole in samples.txt, shortened on the terminal."""
        cfg, tokenizer = self.cfg, self.tokenizer
        prompt = tokenizer.encode(cfg.sample_prompt) or [tokenizer.eot_token]
        room, seed = max(1, min(100, cfg.block_size - len(prompt))), cfg.seed + self.step
        for new in generate(self.raw_model, [prompt] * 2, room, seed=seed, eot=tokenizer.eot_token):
            text = tokenizer.decode(prompt + new)
            self.log.sample(self.step, text)
            self.say(f"  sample | {' '.join(text.split())[:160]}")


def main():
    """Plan, evaluate or train, as the command line says."""
    cfg = parse(sys.argv[1:])
    if cfg.plan:
        return print_plan(cfg)
    meta = check_folder(cfg.data_dir)
    keep_freed_memory(pick_device(cfg.device))
    ranks = Ranks(cfg.device)
    cfg = resolve(cfg, ranks, meta)
    settings, where = all_settings(cfg, meta), portable(cfg.run_dir)
    start, state, lines = find_start(cfg, settings, ranks)
    if start == "finished":
        if ranks.main:
            steps = read_run(cfg.run_dir).result["step"]
            print(f"{where} is finished: {steps} steps; nothing is left to do (another --run-dir starts a new run)")
        return ranks.wait()

    options = {"resume": start != "replace", "tensorboard": cfg.tensorboard, "wandb": cfg.wandb}
    with RunLog(cfg.run_dir, "gpt2", settings, enabled=ranks.main, **options) as log:
        if start == "replace" and ranks.main:
            shutil.rmtree(log.ckpt_dir, ignore_errors=True)
        for line in lines:
            log.print(line)
        ranks.wait()  # until one has the lock of the run directory: where it is refused, all end with one line
        trainer, state = Trainer(cfg, meta, ranks, log, state), None  # which frees gigabytes
        try:
            result = trainer.run()
        except Diverged as e:
            result = {"status": "diverged", "reason": f"{e}; the last good checkpoint is kept, try a lower --max-lr"}
        finally:
            trainer.writer.wait()
        peak_mb = peak_memory_mb(ranks.device.type)
        log.finish(**result, peak_mb=peak_mb, flops_per_token=settings["flops_per_token"])
        log.print(f"peak memory {peak_mb or '?'} MB, of one process")
        if result["status"] == "success":
            loss = "" if result["val_loss"] is None else f", validation loss {result['val_loss']:.4f}"
            log.print(f"success: {result['step']} steps{loss} | {where}/loss.png")
        else:
            log.print(f"{result['status']}: {result['reason']}")
    ranks.wait()


if __name__ == "__main__":
    cli(main)
