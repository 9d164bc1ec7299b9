"""Who trains in bench/bench_gpt2.py: our step with its optimizations on or off, and other codebases' models and steps.

A baseline is a function of (size, device, …) that returns (step, model, optimizers): `step()` runs one optimizer step
on the next batch and returns the loss as a tensor, without waiting for it. All start from the same weights, see the
same batches (the Trainer shuffles them) and use the same learning rate, decay and clipping, so their losses agree as
far as their models do.
"""

import contextlib
import io
import sys
import tempfile
import threading
import types
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, cycle, islice
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from common import UsageError
from gpt2.config import GPTConfig, TrainConfig
from gpt2.distributed import autocast
from gpt2.loader import Loader
from gpt2.model import GPT, CausalSelfAttention
from gpt2.optimizers import make_optimizers

LR, WEIGHT_DECAY, BETA2 = 6e-4, 0.1, 0.95
TRAIN_CONFIG = TrainConfig(max_lr=LR, weight_decay=WEIGHT_DECAY)


@dataclass(frozen=True)
class Size:
    """The shape of a model and of a step's batch."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int  # sequences of a step
    data_dir: str = ""  # token shards to train on; empty: synthetic tokens

    @property
    def tokens(self):
        """Tokens of a step."""
        return self.batch_size * self.block_size

    @property
    def shape(self):
        """What a model's config needs."""
        return {k: getattr(self, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}


SIZES = {
    "tiny": Size(260, 2, 2, 16, 16, 2),
    "vocab-1024": Size(1024, 4, 4, 256, 256, 8),
    "vocab-50304": Size(50304, 4, 4, 128, 64, 16),
    "gpt2-124M": Size(50304, 12, 12, 768, 1024, 32),
}


def batches(size, device):
    """The same batches for everybody, (idx, targets), (B, T) each: of the shards, or 8 synthetic ones in a circle."""
    T, B = size.block_size, size.batch_size
    if size.data_dir:
        loader = Loader(size.data_dir, "train", T, B)
        return ([t.to(device) for t in loader.batch(step)] for step in count())
    rows = torch.randint(size.vocab_size, (8, B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return cycle([(r[:, :-1].contiguous(), r[:, 1:].contiguous()) for r in rows])


def first_weights(size):
    """Our model with the weights that everybody starts from."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**size.shape))


def plain_loop(model, optimizers, size, device, dtype, loss_of):
    """The step that all but the Trainer take; loss_of(idx, targets) is what they differ in."""
    source = batches(size, device)

    def step():
        """One optimizer step on the next batch -> its loss."""
        idx, targets = next(source)
        with autocast(torch.device(device), dtype):
            loss = loss_of(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, model, optimizers


# ---------------------------------------------------------------------------------------------------------------------
# ours


@dataclass(frozen=True)
class Options:
    """What the ablation switches, one after another; the defaults are what gpt2/train_gpt2.py does."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tf32: bool = True
    compile: bool = True
    attention: Literal["naive", "sdpa"] = "sdpa"
    pad_vocab_to: int = 128
    fused_adamw: bool = True
    chunked_loss: bool = True


class NaiveAttention(CausalSelfAttention):
    """Attention as the formula has it: the (T, T) matrix of every head in memory."""

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        scores = (q @ k.transpose(-2, -1)) * (C // self.n_head) ** -0.5  # (B, nh, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def ours(size, device, options=Options(), cfg=TRAIN_CONFIG, group=None):
    """Our model and the step of gpt2/train_gpt2.py. cfg: of the optimizers; group: processes that train together."""
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    model = GPT(GPTConfig(**size.shape, pad_vocab_to=options.pad_vocab_to))
    model.load_hf_state_dict(first_weights(size).hf_state_dict())  # which leaves the rows of padding out
    model.to(device)
    if options.attention == "naive":
        for block in model.transformer.h:
            block.attn.__class__ = NaiveAttention
    fast = torch.compile(model, dynamic=False) if options.compile else model
    if group is not None:
        fast = DistributedDataParallel(fast, process_group=group)
    optimizers = make_optimizers(model, cfg)
    for params in optimizers[0].param_groups:
        params["fused"] = options.fused_adamw
    logits = not options.chunked_loss
    return plain_loop(
        model, optimizers, size, device, options.dtype, lambda *batch: fast(*batch, return_logits=logits)[1]
    )


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def hf_model(size):
    """transformers' GPT2LMHeadModel with our first weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    shape = {k: v for k, v in size.shape.items() if k != "block_size"}
    model = GPT2LMHeadModel(GPT2Config(n_positions=size.block_size, **shape, **options))
    model.load_state_dict(first_weights(size).hf_state_dict(), strict=False)  # lm_head is tied to wte
    return model


def transformers(size, device, dtype="float32", compile=False, fused=False):
    """GPT2LMHeadModel in a plain loop. It shifts the labels itself, so a row's last position has no target."""
    torch.set_float32_matmul_precision("high")
    model = hf_model(size).to(device)
    fast = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, BETA2), weight_decay=WEIGHT_DECAY, fused=fused)
    return plain_loop(model, [optimizer], size, device, dtype, lambda idx, _: fast(input_ids=idx, labels=idx).loss)


def stock_trainer(model, rows, device, order=None, collate=None, callbacks=(), **settings):
    """The Hugging Face Trainer; `.last` is its last loss. order: of the rows; None: it shuffles them itself."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Keeping(Trainer):
        def _get_train_sampler(self, *args):
            return order or super()._get_train_sampler(*args)

        def training_step(self, *args, **kwargs):
            self.last = super().training_step(*args, **kwargs)
            return self.last

    settings |= {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings |= {"use_cpu": device == "cpu", "dataloader_pin_memory": device == "cuda", "logging_steps": 10**9}
    args = TrainingArguments(**settings)
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs would multiply the batch
    trainer = Keeping(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    return trainer


def hf_trainer(size, device, dtype="float32", compile=False):
    """The Hugging Face Trainer with fused AdamW, its own loop and loader.

    `train()` runs on a thread, and a callback at each step's end waits for the next call of `step`.
    """
    from transformers import TrainerCallback

    torch.set_float32_matmul_precision("high")
    model, go, done = hf_model(size), threading.Semaphore(0), threading.Semaphore(0)

    class Wait(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            done.release()
            go.acquire()

    rows = [{"input_ids": row, "labels": row} for idx, _ in islice(batches(size, "cpu"), 8) for row in idx]
    trainer = stock_trainer(
        model, rows, device, callbacks=[Wait()], max_steps=10**9, per_device_train_batch_size=size.batch_size,
        learning_rate=LR, weight_decay=WEIGHT_DECAY, adam_beta2=BETA2, max_grad_norm=1.0, optim="adamw_torch_fused",
        lr_scheduler_type="constant", bf16=dtype == "bfloat16", torch_compile=compile,
    )  # fmt: skip
    thread = threading.Thread(target=trainer.train, daemon=True)

    def step():
        thread.start() if not thread.ident else go.release()
        while not done.acquire(timeout=1):
            if not thread.is_alive():
                raise RuntimeError("the Trainer ended early; its own message is above")
        return trainer.last.detach()

    return step, model, []


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT and build-nanogpt, from a local checkout


def model_of(folder, build=False):
    """The module with the model in a checkout of nanoGPT (model.py), or of build-nanogpt.

    build-nanogpt's train_gpt2.py trains on import, so only what stands before that is executed.
    """
    file, end = ("train_gpt2.py", "\nimport tiktoken") if build else ("model.py", "")
    path = Path(folder) / file
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if "class GPTConfig" not in text or end not in text:
        raise UsageError(f"{folder} is not a checkout of {'build-nanogpt' if build else 'nanoGPT'}: it has no {file}")
    text = text.split(end)[0].replace("from hellaswag import", "# from hellaswag import") if build else text
    module = sys.modules[file] = types.ModuleType(file)  # dataclasses look for their module there
    module.master_process = False  # build-nanogpt prints where it is true
    exec(compile(text, path, "exec"), module.__dict__)
    return module


def karpathy(size, device, folder, build=False, dtype="float32", compile=False, lr=LR, beta2=BETA2):
    """Model, optimizer and step of nanoGPT, or of build-nanogpt. nanoGPT has autocast on GPUs alone."""
    module, state = model_of(folder, build), first_weights(size).state_dict()
    torch.set_float32_matmul_precision("high")
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**size.shape))
        vocab = ("transformer.wte.weight", "lm_head.weight")  # theirs without rows of padding
        model.load_state_dict({k: v[: size.vocab_size] if k in vocab else v for k, v in state.items()})
        model.to(device)
        betas = () if build else ((0.9, beta2),)  # build-nanogpt sets its own
        optimizer = model.configure_optimizers(WEIGHT_DECAY, lr, *betas, device)
    dtype = dtype if build or device == "cuda" else "float32"
    fast = torch.compile(model) if compile else model
    return plain_loop(model, [optimizer], size, device, dtype, lambda *batch: fast(*batch)[1])


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def everybody(device, half, nanogpt, build_nanogpt):
    """{label: (function, keyword arguments)}, ours first. nanogpt, build_nanogpt: folders, or empty.

    half: the 16-bit type of the stated settings. Without hardware for it, the same settings in float32 are measured as
    well, and are then a baseline's best.
    """
    fast = half if device == "cuda" else "float32"
    hf = f"transformers {version('transformers')}"
    found = {
        "ours": (ours, {"options": Options(dtype=fast)}),
        "ours eager": (ours, {"options": Options(dtype=fast, compile=False)}),
        f"{hf} eager float32": (transformers, {}),
        f"{hf} compiled {half} fused AdamW": (transformers, {"dtype": half, "compile": True, "fused": True}),
    }
    if fast != half:
        found[f"{hf} compiled float32 fused AdamW"] = (transformers, {"compile": True, "fused": True})
    found[f"Trainer {version('transformers')} {fast}"] = (hf_trainer, {"dtype": fast})
    if nanogpt:
        model_of(nanogpt)  # refused now, not after minutes of compiling
        found[f"nanoGPT eager {fast}"] = (karpathy, {"folder": nanogpt, "dtype": fast})
        found[f"nanoGPT compiled {fast}"] = (karpathy, {"folder": nanogpt, "dtype": fast, "compile": True})
    if build_nanogpt:
        model_of(build_nanogpt, build=True)
        found[f"build-nanogpt eager {fast}"] = (karpathy, {"folder": build_nanogpt, "build": True, "dtype": fast})
    return found
