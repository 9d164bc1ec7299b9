"""Train a GPT-2: one process, or many under torchrun, with the same result.

    python gpt2/train_gpt2.py quickstart                                     # minutes on two cores
    python gpt2/train_gpt2.py gpt2-124M --plan                               # memory, hours, disk; starts nothing
    torchrun --standalone --nproc_per_node=8 gpt2/train_gpt2.py              # GPT-2 124M on FineWeb-Edu, eight GPUs
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 gpt2/train_gpt2.py

Kill it at any moment; the same command goes on from the newest checkpoint and ends with the same weights. SIGTERM,
Ctrl-C, a file STOP in the run directory and --stop-after-minutes save first. What to expect of gpt2-124M: a validation
loss of about 3.3 nats after one epoch of 10B tokens (OpenAI's weights: 3.29).

No preset means gpt2-124M, and PRESET --help lists every setting with its unit. The run directory gets config.json,
metrics.jsonl, log.txt, samples.txt, loss.png, result.json and ckpt/: see runlog/.
"""

import contextlib
import hashlib
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from bpe.tokenizer import Tokenizer
from common import ROOT, UsageError, cli, peak_memory_mb, portable
from data.shards import check_folder, count_ids
from gpt2 import checkpoint, hellaswag
from gpt2.config import DEFAULT_PRESET, FREE_ON_RESUME, PRESETS, GPTConfig
from gpt2.distributed import Ranks, Stop, autocast, pick_dtype
from gpt2.loader import Loader, Prefetcher
from gpt2.machine import advice, restart_with_memory_settings, sdpa_backend
from gpt2.model import GPT
from gpt2.optimizers import lr_at, make_optimizers, set_lr
from gpt2.plan import peak_flops, print_plan
from gpt2.sample import generate
from runlog import RunLog, read_run

# Published losses on the same validation data, for the reference line of the picture.
GPT2_ON_FINEWEB_EDU = {"GPT-2 124M (OpenAI)": 3.2924}


class Diverged(Exception):
    """A loss or gradient that is not finite, and the step at which it came."""


# ---------------------------------------------------------------------------------------------------------------------
# before the loop


def parse(argv):
    """Command line -> TrainConfig. The preset comes first; with none named it is GPT-2 124M."""
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = [DEFAULT_PRESET, *argv]
    presets = {name: (_about(preset), preset) for name, preset in PRESETS.items()}
    return tyro.extras.overridable_config_cli(presets, args=argv, description=__doc__)


def _about(preset):
    return (
        f"{preset.n_layer} layers, {preset.n_embd} wide, context {preset.block_size}: {preset.max_steps:,} steps of "
        f"{preset.total_batch_size:,} tokens of {Path(preset.data_dir).name}"
    )


def resolve(cfg, device):
    """Replace the settings that say auto by what they mean on this machine; set the global switches of torch."""
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it: what is left in float32 runs 8x faster
    if cfg.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return replace(cfg, dtype=pick_dtype(cfg.dtype, device))


def build_model(cfg, meta):
    """Fresh weights, or those of --init. Built on the CPU, from the seed alone: the same on every device."""
    torch.manual_seed(cfg.seed)
    if cfg.init == "random":
        shape = {k: getattr(cfg, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
        return GPT(GPTConfig(vocab_size=meta["vocab_size"], **shape))
    model = checkpoint.load_weights(cfg.init, cfg.dropout)
    c = model.config
    if c.vocab_size != meta["vocab_size"]:
        raise UsageError(
            f"{cfg.init} has a vocabulary of {c.vocab_size}, the shards in {cfg.data_dir} one of {meta['vocab_size']}; "
            "prepare the data with the model's own tokenizer"
        )
    if cfg.block_size > c.block_size:
        raise UsageError(f"--block-size {cfg.block_size} is more than the {c.block_size} of {cfg.init}; lower it")
    shape = {k: (getattr(cfg, k), getattr(c, k)) for k in ("n_layer", "n_head", "n_embd")}
    if wrong := [f"--{k.replace('_', '-')} {theirs}" for k, (asked, theirs) in shape.items() if asked != theirs]:
        raise UsageError(f"{cfg.init} has another shape; add {' '.join(wrong)}")
    return model


def compiled(model, cfg, device, say):
    """The model under torch.compile, or itself where that cannot work, saying so once.

    Compiling needs a C++ compiler or Triton with a C compiler, and Python's headers. Whether all of it is there is
    found out by compiling one line.
    """
    if not cfg.compile:
        return model
    # What is compiled once is read back at the next start, also after a reboot has emptied /tmp.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / "data/cache/torch-compile"))
    try:
        torch.compile(lambda x: x.sin() + x)(torch.ones(8, device=device))
    except Exception as e:  # torch raises several kinds, by platform and version
        why = " ".join(str(e).split())[:160]
        say(f"torch.compile does not work here ({why}), so --compile is left out: training runs eager")
        return model
    return torch.compile(model, dynamic=False)


def all_settings(cfg, meta):
    """Every setting, and the identity of the data: what config.json records."""
    sums = "".join(shard["sha256"] for shard in meta["shards"])
    data = {"tokenizer_sha256": meta["tokenizer"]["sha256"], "shards_sha256": hashlib.sha256(sums.encode()).hexdigest()}
    settings = {k: portable(v) for k, v in asdict(cfg).items()}
    return {**settings, **data}


def learned_settings(settings):
    """Those of the settings that decide what is learned: a resumed run may not change them."""
    return {k: v for k, v in settings.items() if k not in FREE_ON_RESUME}


def check_resume(saved, cfg, meta, step, say):
    """Refuse a resume that would learn something else than the recorded run, naming each difference."""
    now = learned_settings(all_settings(cfg, meta))
    changes = [f"{k} {saved.get(k)!r} -> {now[k]!r}" for k in now if saved.get(k) != now[k]]
    if saved.get("max_steps") != cfg.max_steps:
        before = lr_at(step, cfg.max_lr, cfg.warmup_steps, saved["max_steps"])
        after = lr_at(step, cfg.max_lr, cfg.warmup_steps, cfg.max_steps)
        changes.append(
            f"so the cosine is stretched and the learning rate of step {step} is {after:.2e}, not {before:.2e}"
        )
    if changes and not cfg.allow_config_change:
        raise UsageError(
            f"{cfg.run_dir} was started with other settings ({'; '.join(changes)}); "
            "use another --run-dir, or --allow-config-change to go on all the same"
        )
    for change in changes:
        say(f"changed on resume: {change}")


# ---------------------------------------------------------------------------------------------------------------------
# between steps


@torch.no_grad()
def validation_sums(model, loader, cfg, ranks, token_bytes, check):
    """This rank's share of the first val_tokens of the val split -> [summed nats, tokens, bytes of their text].

    Sequence i goes to rank i mod world_size, and sums are what the ranks exchange, so the loss depends neither on the
    number of processes nor on the micro-batch. token_bytes: (vocab_size,) UTF-8 bytes of each id. check: called between
    batches.
    """
    n = min(loader.n_sequences, max(1, cfg.val_tokens // cfg.block_size))
    per_batch = cfg.micro_batch_size * ranks.world_size
    nats = torch.zeros((), dtype=torch.float64 if ranks.device.type != "mps" else torch.float32, device=ranks.device)
    tokens = text_bytes = 0
    model.eval()
    for first in range(0, n, per_batch):
        check()
        idx, targets = loader.in_order(first + ranks.rank, cfg.micro_batch_size, ranks.world_size, n)
        known = targets[targets >= 0]
        tokens, text_bytes = tokens + known.numel(), text_bytes + int(token_bytes[known].sum())
        with autocast(ranks.device, cfg.dtype):
            _, loss = model(idx.to(ranks.device), targets.to(ranks.device), return_logits=False, reduction="sum")
        nats += loss
    return [nats, tokens, text_bytes]


def unigram_entropy(loader, vocab_size):
    """Entropy in nats of the token frequencies in the first 100M training tokens: what knowing no more would reach."""
    counts, left = np.zeros(vocab_size), 100_000_000
    for shard in loader.shards:
        counts += count_ids(shard[:left])[:vocab_size]
        left -= min(left, len(shard))
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# ---------------------------------------------------------------------------------------------------------------------
# the loop


class Trainer:
    """One training run: `__init__` sets up and resumes, `run` is the loop."""

    def __init__(self, cfg, meta, ranks, log):
        self.meta, self.ranks, self.log = meta, ranks, log
        self.stop = Stop(ranks, log.run_dir, cfg.stop_after_minutes)  # from here on signals are heard between steps
        self.device, self.say = ranks.device, log.print
        self.tokenizer = Tokenizer.load(Path(cfg.data_dir) / "tokenizer.model")
        if self.tokenizer.sha256 != meta["tokenizer"]["sha256"]:
            raise UsageError(f"{cfg.data_dir}/tokenizer.model did not make these shards; run data/prepare.py again")
        if ranks.main:
            shutil.copyfile(Path(cfg.data_dir) / "tokenizer.model", log.run_dir / "tokenizer.model")
        self.token_bytes = torch.tensor(self.tokenizer.byte_lengths())

        self.grad_accum_steps = cfg.grad_accum_steps(ranks.world_size)
        rows_per_step = cfg.total_batch_size // cfg.block_size
        self.train_loader = Loader(cfg.data_dir, "train", cfg.block_size, rows_per_step, cfg.seed)
        self.val_loader = Loader(cfg.data_dir, "val", cfg.block_size)
        self.batches = Prefetcher(
            self.train_loader, self.device, ranks.rank, ranks.world_size, cfg.micro_batch_size, self.grad_accum_steps
        )
        self.unigram_entropy = unigram_entropy(self.train_loader, meta["vocab_size"])
        if cfg.hellaswag_every:
            remedy = "name a local file with --hellaswag-file, or leave it out with --hellaswag-every 0"
            items = hellaswag.load_items(cfg.hellaswag_file or None, cfg.hellaswag_limit, remedy=remedy)
            encode = self.tokenizer.to_tiktoken().encode_ordinary_batch
            rows = hellaswag.rows_at_once(self.device)
            self.hellaswag_items = hellaswag.Encoded(items, encode, cfg.block_size, batch_size=rows)

        # The raw model serves odd shapes (samples) and checkpoints, whose names so stay free of prefixes; `model` may
        # be compiled; `step_model` adds the exchange of gradients between processes.
        self.cfg = cfg
        self.raw_model = build_model(cfg, meta).to(self.device)
        torch.manual_seed(cfg.seed + ranks.rank)  # dropout: other masks on every rank, whose rows are others, too
        self.model = self.step_model = compiled(self.raw_model, cfg, self.device, self.say)
        if ranks.world_size > 1:
            gpu = [self.device.index] if self.device.type == "cuda" else None
            self.step_model = DistributedDataParallel(self.model, device_ids=gpu)
        self.optimizers = make_optimizers(self.raw_model, cfg)
        # float16 gradients underflow unless the loss is scaled up; otherwise the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.dtype == "float16")

        self.step, self.skipped, self.saved_at = 0, 0, 0
        self.flops_per_token = self.raw_model.flops_per_token()
        self.peak = peak_flops(self.device, cfg.dtype)  # of one process's device, or None
        self.pending = []  # (step, loss, grad_norm, lr) whose tensors have not been read yet
        self.last_val, self.last_hellaswag = {}, {}
        self.resume()

    def resume(self):
        """Go on from the newest checkpoint that verifies, if there is one."""
        state = checkpoint.load_newest(self.log.ckpt_dir, warn=self.say)
        steps = self.ranks.gather(state and state["step"])
        if len(set(steps)) > 1:
            raise UsageError(
                f"the processes see different checkpoints in {self.log.ckpt_dir} (steps {steps}); "
                "--run-dir must be on a file system that all nodes share"
            )
        if state is None:
            return
        if "optimizers" not in state:
            raise UsageError(f"{self.cfg.run_dir} holds imported weights; name it by --init, with another --run-dir")
        check_resume(state["learned"], self.cfg, self.meta, state["step"], self.say)
        self.load(state)
        self.say(f"resumed at step {self.step}")

    def load(self, state):
        """Take over everything that a checkpoint holds."""
        self.raw_model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            now = [{name: group[name] for name in ("max_lr", "weight_decay")} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved)  # its settings, too; those of today may differ on purpose
            for group, settings in zip(optimizer.param_groups, now):
                group.update(settings)
        self.scaler.load_state_dict(state["scaler"])
        self.step = self.saved_at = state["step"]
        self.skipped = state["skipped"]
        if self.ranks.rank < len(state["rng"]):  # more processes than before: the new ones keep their fresh state
            checkpoint.set_rng_state(state["rng"][self.ranks.rank], self.device)

    def save(self):
        """Write a checkpoint of this step, unless there is one already."""
        self.flush()  # which raises Diverged, before a good checkpoint is replaced, if a loss was not finite
        rng = self.ranks.gather(checkpoint.rng_state(self.device))
        if self.ranks.main and self.step != self.saved_at:
            state = {
                **checkpoint.model_state(self.raw_model),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "scaler": self.scaler.state_dict(),
                "skipped": self.skipped,
                "rng": rng,
                "learned": learned_settings(all_settings(self.cfg, self.meta)),
            }
            path = checkpoint.save(self.log.ckpt_dir, self.step, state, self.cfg.keep_checkpoints)
            self.say(f"  saved {path.name}")
        self.saved_at = self.step

    def run(self):
        """Step after step, until the last one or a reason to stop -> the fields of result.json."""
        cfg, ranks = self.cfg, self.ranks
        self.announce()
        bar = tqdm(total=cfg.max_steps, initial=self.step, unit="step", disable=None if ranks.main else True)
        started_at = self.step
        while True:
            # --- between steps. The checkpoint comes first: after a kill the rest is done again, and comes out equal.
            if self.step > 0 and self.due(cfg.checkpoint_every):
                self.save()
            if self.due(cfg.val_every):
                self.validate()
            if self.step > 0 and self.due(cfg.hellaswag_every):
                self.score_hellaswag()
            if self.due(cfg.sample_every):
                self.sample()
            if reason := self.stop.reason():
                self.save()
                bar.close()
                return self.preempted(reason)
            if self.step >= cfg.max_steps:
                self.flush()
                bar.close()
                return self.final_numbers()

            # --- one optimizer step
            if not self.pending:  # what happens between steps is not the steps' time
                self.clock = time.perf_counter()
            self.model.train()
            loss_sum = torch.zeros((), device=self.device)
            for micro_step in range(self.grad_accum_steps):
                idx, targets = self.batches.get(self.step, micro_step)  # (micro_batch_size, T) each
                # Gradients travel between processes once a step: in the backward pass of the last micro-batch.
                last = micro_step == self.grad_accum_steps - 1
                with contextlib.nullcontext() if last or ranks.world_size == 1 else self.step_model.no_sync():
                    with autocast(self.device, cfg.dtype):
                        _, loss = self.step_model(idx, targets, return_logits=False)
                    loss = loss / self.grad_accum_steps
                    self.scaler.scale(loss).backward()
                loss_sum += loss.detach()
            lr = set_lr(self.optimizers, self.step, cfg)
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), cfg.grad_clip or math.inf)
            # A float16 gradient that overflowed leaves the step out in all optimizers, and lowers the scale.
            overflow = self.scaler.is_enabled() and not math.isfinite(norm)
            if not (cfg.skip_nonfinite and self.skip(loss_sum, norm)) and not overflow:
                for optimizer in self.optimizers:
                    self.scaler.step(optimizer)
            self.scaler.update()
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)

            # --- the figures stay on the device until a step line is due, so that the host never waits in between
            self.pending.append((self.step, loss_sum, norm, lr))
            self.step += 1
            bar.update()
            # Compiling shows by itself, in this start's first line.
            first = self.model is not self.raw_model and self.step == started_at + 1
            if len(self.pending) >= cfg.log_every or first:
                self.flush()

    def evaluate(self):
        """Evaluate once, without training -> the fields of result.json."""
        self.announce()
        self.validate()
        if self.cfg.hellaswag_every:
            self.score_hellaswag()
        reason = self.stop.reason()
        return self.preempted(reason) if reason else self.final_numbers()

    def due(self, every):
        """Whether something that is done every so many steps is due now; at the last step everything is."""
        return every > 0 and (self.step % every == 0 or self.step >= self.cfg.max_steps)

    def skip(self, loss, norm):
        """--skip-nonfinite: whether this step is to be left out; Diverged once too many have been."""
        # Under a gradient scaler an infinite norm is normal: it lowers the scale and leaves the step out by itself.
        vital = [loss] if self.scaler.is_enabled() else [loss, norm]
        if all(map(math.isfinite, self.ranks.sum(vital))):
            return False
        self.skipped += 1
        if self.skipped > self.cfg.skip_nonfinite:
            raise Diverged(f"step {self.step} is not finite, after {self.cfg.skip_nonfinite} skipped ones")
        self.say(f"step {self.step} is not finite: skipped ({self.skipped} of at most {self.cfg.skip_nonfinite})")
        return True

    def flush(self):
        """Read the pending figures (the one wait for the device), record them, and print the last as the step line."""
        if not self.pending:
            return
        pending, self.pending = self.pending, []
        losses = self.ranks.sum(torch.stack([loss for _, loss, _, _ in pending]).tolist())
        norms = torch.stack([norm for _, _, norm, _ in pending]).tolist()
        seconds = (time.perf_counter() - self.clock) / len(pending)
        tok_per_sec = self.cfg.total_batch_size / seconds
        mfu = tok_per_sec * self.flops_per_token / (self.peak * self.ranks.world_size) if self.peak else None
        for (step, _, _, lr), loss, norm in zip(pending, losses, norms):
            loss /= self.ranks.world_size
            self.log.metric(
                step, "train", loss=loss, grad_norm=norm, lr=lr, ms=seconds * 1e3, tok_per_sec=tok_per_sec, mfu=mfu
            )
            if self.cfg.skip_nonfinite == 0 and not math.isfinite(loss):
                raise Diverged(f"the loss of step {step} is not finite")
            if self.cfg.skip_nonfinite == 0 and not math.isfinite(norm) and not self.scaler.is_enabled():
                raise Diverged(f"the gradient of step {step} is not finite")
        if self.scaler.is_enabled() and self.scaler.get_scale() < 1:  # it has halved at step after step, to no avail
            raise Diverged(f"the gradient of step {step} is not finite, however small the loss is scaled")
        self.say(
            f"step {step:>6}/{self.cfg.max_steps} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
            f"{seconds * 1e3:.0f} ms | {tok_per_sec:,.0f} tok/s" + (f" | MFU {mfu:.1%}" if mfu else "")
            + f" | ETA {_hms(seconds * (self.cfg.max_steps - step - 1))}"
        )  # fmt: skip

    def validate(self):
        """Record the validation loss and refresh the picture."""
        self.flush()
        what = (self.model, self.val_loader, self.cfg, self.ranks, self.token_bytes, self.stop.check)
        sums = self.stop.unless(lambda: validation_sums(*what))
        if sums is None:  # it is done again, whole, when the run goes on from this step; so is HellaSwag
            return
        nats, tokens, text_bytes = self.ranks.sum(sums)
        loss, bits_per_byte = nats / tokens, nats / math.log(2) / max(1, text_bytes)
        self.last_val = {"loss": loss, "bits_per_byte": bits_per_byte, "tokens": int(tokens)}
        self.log.metric(self.step, "val", **self.last_val)
        self.say(f"  val    | loss {loss:.4f} | {bits_per_byte:.4f} bits per byte")
        lines = {"unigram entropy": self.unigram_entropy}
        if self.meta["name"].startswith("fineweb-edu") and self.meta["tokenizer"]["name"] == "gpt2":
            lines.update(GPT2_ON_FINEWEB_EDU)
        self.log.plot(reference=lines)

    def score_hellaswag(self):
        """Record HellaSwag's accuracies, each rank scoring its share."""
        self.flush()
        start = time.perf_counter()
        self.raw_model.eval()
        score_batch = hellaswag.shared_gpt(self.raw_model)

        def score(batch):
            self.stop.check()
            return score_batch(batch)

        share = (self.hellaswag_items, self.device, self.ranks.rank, self.ranks.world_size)
        context = partial(autocast, self.device, self.cfg.dtype)
        rows = self.stop.unless(lambda: hellaswag.evaluate(score, *share, autocast=context))
        if rows is None:
            return
        figures = hellaswag.figures(self.ranks.sum(hellaswag.counts(rows)))
        self.last_hellaswag = {f"hellaswag_{k}": figures[k] for k in ("items", "acc", "acc_norm")}
        self.log.metric(self.step, "hellaswag", **figures, seconds=time.perf_counter() - start)
        self.say(
            f"  hella  | acc_norm {figures['acc_norm']:.4f} ({figures['acc_norm_low']:.4f} … "
            f"{figures['acc_norm_high']:.4f}) | acc {figures['acc']:.4f} | {figures['items']} items, chance 0.25"
        )

    def sample(self):
        """Two continuations of the prompt: whole into samples.txt, shortened onto the terminal. On one rank."""
        self.flush()
        if self.ranks.main:
            cfg, tokenizer = self.cfg, self.tokenizer
            prompt = tokenizer.encode(cfg.sample_prompt) or [tokenizer.eot_token]
            room = max(1, min(100, cfg.block_size - len(prompt)))
            seed = cfg.seed + self.step
            for new in generate(self.raw_model, [prompt] * 2, room, seed=seed, eot=tokenizer.eot_token):
                text = tokenizer.decode(prompt + new)
                self.log.sample(self.step, text)
                self.say(f"  sample | {' '.join(text.split())[:160]}")

    def announce(self):
        """What is about to happen, in three lines."""
        cfg, ranks = self.cfg, self.ranks
        self.say(
            f"{self.raw_model.num_params():,} parameters | {cfg.dtype} on {self.device.type} x {ranks.world_size} | "
            f"{sum(map(len, self.train_loader.shards)):,} training tokens | a step is {cfg.total_batch_size:,} tokens: "
            f"{ranks.world_size} process(es) x {self.grad_accum_steps} x {cfg.micro_batch_size} sequences of "
            f"{cfg.block_size}"
        )
        heads = torch.empty(1, cfg.n_head, cfg.block_size, cfg.n_embd // cfg.n_head, device=self.device)
        kernel = sdpa_backend(heads.to(getattr(torch, cfg.dtype)))
        self.say(f"attention: {kernel} | {torch.get_num_threads()} threads" + advice(self.device, cfg))
        self.say(f"unigram entropy {self.unigram_entropy:.4f} nats: what knowing the frequencies alone would reach")

    def preempted(self, reason):
        """The fields of result.json when a run ends before its last step."""
        return {"status": "preempted", "reason": f"{reason}; the same command goes on", "step": self.step}

    def final_numbers(self):
        """The fields of result.json after the last step."""
        return {
            "status": "success",
            "step": self.step,
            "tokens": self.step * self.cfg.total_batch_size,
            "val_loss": self.last_val.get("loss"),
            "bits_per_byte": self.last_val.get("bits_per_byte"),
            **self.last_hellaswag,
            "unigram_entropy": self.unigram_entropy,
            "parameters": self.raw_model.num_params(),
            "skipped_steps": self.skipped,
        }


def _hms(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _peak_mb(device):
    """Largest memory so far in MB: of the GPU, or of this process; None where that is not known."""
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else peak_memory_mb()
    return None if peak is None else round(peak)


def how_to_start(cfg, meta):
    """What the run directory asks for -> "go on" (or begin), "replace" or "finished"; UsageError if another run's.

    Nothing is written before this is known, so that a refusal leaves the record as it was.
    """
    run_dir = Path(cfg.run_dir)
    kept = checkpoint.sorted_checkpoints(run_dir / "ckpt")
    if cfg.eval_only and kept:
        raise UsageError(
            f"{cfg.run_dir} is a training run; evaluate it with --init {cfg.run_dir} and another --run-dir"
        )
    if not (run_dir / "config.json").exists():
        return "go on"
    run = read_run(run_dir)
    if learned_settings(run.settings) == learned_settings(all_settings(cfg, meta)):
        # A record whose weights are gone is no finished run.
        return "finished" if run.result.get("status") == "success" and (kept or cfg.eval_only) else "go on"
    if cfg.overwrite or not (kept or run.metrics):
        return "replace"
    newest = checkpoint.step_of(kept[-1]) if kept else 0
    check_resume(run.settings, cfg, meta, newest, say=lambda change: None)
    return "go on"


def main():
    """Plan, evaluate or train, as the command line says."""
    cfg = parse(sys.argv[1:])
    if cfg.plan:
        return print_plan(cfg)
    meta = check_folder(cfg.data_dir)
    if cfg.cpu_memory_settings:
        restart_with_memory_settings()
    ranks = Ranks(cfg.device)
    cfg = resolve(cfg, ranks.device)
    start = how_to_start(cfg, meta)
    ranks.wait()  # all have looked before one writes
    if start == "finished":
        if ranks.main:
            result = read_run(cfg.run_dir).result
            print(
                f"{portable(cfg.run_dir)} is finished: {result['step']} steps, validation loss {result['val_loss']}; "
                "nothing is left to do (another --run-dir trains anew)"
            )
        return ranks.close()

    settings, mirrors = all_settings(cfg, meta), {"tensorboard": cfg.tensorboard, "wandb": cfg.wandb}
    with RunLog(cfg.run_dir, "gpt2", settings, resume=start != "replace", enabled=ranks.main, **mirrors) as log:
        if start == "replace" and ranks.main:
            log.print(f"{cfg.run_dir} was made with other settings or data: it is replaced")
            shutil.rmtree(log.ckpt_dir, ignore_errors=True)
        ranks.wait()  # for that, before any looks for checkpoints
        try:
            trainer = Trainer(cfg, meta, ranks, log)
            result = trainer.evaluate() if cfg.eval_only else trainer.run()
        except Diverged as e:
            result = {"status": "diverged", "reason": f"{e}; the last good checkpoint is kept, try a lower --max-lr"}
        peak_mb = _peak_mb(ranks.device)
        log.finish(**result, peak_mb=peak_mb)
        log.print(f"peak memory {peak_mb or '?'} MB, of one process")
        log.print(_last_line(cfg, result))
    ranks.close()


def _last_line(cfg, result):
    if result["status"] == "success":
        return (
            f"success: {result['step']} steps, validation loss {result['val_loss']} | {portable(cfg.run_dir)}/loss.png"
        )
    return f"{result['status']}: {result['reason']}"


if __name__ == "__main__":
    cli(main)
