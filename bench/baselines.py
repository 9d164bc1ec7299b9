"""Contestants of bench/bench_gpt2.py: our step with its optimizations on or off, and other codebases' models and steps.

A baseline is a function of (size, device, …) that returns (step, model, optimizers): `step()` runs one optimizer step
on the next batch and returns the loss as a tensor, without waiting for it. All start from the same weights and use
the same batches, learning rate, decay and clipping, so their losses agree as far as their models do.
"""

import contextlib
import io
import sys
import tempfile
import threading
import types
from collections import namedtuple
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count, cycle, islice
from pathlib import Path
from queue import SimpleQueue

import torch
from torch.optim.swa_utils import AveragedModel

from common import keep_freed_memory
from data.shards import read_meta
from gpt2.config import GPTConfig, TrainConfig
from gpt2.distributed import autocast
from gpt2.loader import Loader
from gpt2.model import GPT, CausalSelfAttention
from gpt2.optimizers import make_optimizers

LR, WEIGHT_DECAY, BETA2 = 6e-4, 0.1, 0.95
TRAIN_CONFIG = TrainConfig(max_lr=LR, weight_decay=WEIGHT_DECAY)

# The shape of a model and of a step's batch, in sequences; data_dir: token shards to train on, else synthetic tokens.
SHAPE = ["vocab_size", "n_layer", "n_head", "n_embd", "block_size"]
Size = namedtuple("Size", [*SHAPE, "batch_size", "data_dir"], defaults=[""])
SIZES = {
    "tiny": Size(260, 2, 2, 16, 16, 2),
    "vocab-1024": Size(1024, 4, 4, 256, 256, 8),
    "vocab-50304": Size(50304, 4, 4, 128, 64, 16),
    "gpt2-124M": Size(50304, 12, 12, 768, 1024, 16),  # 48 GB in the naive form: logits, attention matrices
}


def batches(size, device, align_documents=False):
    """The same batches for all, (idx, targets), (B, T) each: from the shards, or 8 synthetic ones in a cycle."""
    T, B = size.block_size, size.batch_size
    if size.data_dir:
        loader = Loader(size.data_dir, "train", T, B, eot=read_meta(size.data_dir)["eot"] if align_documents else None)
        return ([t.to(device) for t in loader.batch(step)] for step in count())
    rows = torch.randint(size.vocab_size, (8, B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return cycle([(r[:, :-1].contiguous(), r[:, 1:].contiguous()) for r in rows])


def first_weights(size):
    """Our model with the initial weights that all use."""
    torch.manual_seed(0)
    return GPT(GPTConfig(**dict(zip(SHAPE, size))))


def plain_loop(model, optimizers, source, device, dtype, loss_of):
    """The step of all but the Trainer. source: iterator of batches; loss_of(idx, targets): where they differ."""

    def step():
        """Forward, backward, clipping, update -> the loss."""
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


@dataclass(frozen=True)
class Options:
    """Switches of the ablation; the defaults are those of gpt2/train_gpt2.py."""

    dtype: str = "float32"
    tf32: bool = True
    compile: bool = True
    flash: bool = True
    pad_vocab_to: int = 128
    fused_adamw: bool = True
    chunked_loss: bool = True
    keep_memory: bool = True


class NaiveAttention(CausalSelfAttention):
    """Attention without fusion: every head's (T, T) matrix in memory."""

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        scores = (q @ k.transpose(-2, -1)) * (C // self.n_head) ** -0.5  # (B, nh, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        y = scores.masked_fill(future, -torch.inf).softmax(-1) @ v  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


def average_last(model, optimizer, cfg):
    """Average the weights of the last steps as gpt2/train_gpt2.py does. optimizer: the last one of a step."""
    average, steps = AveragedModel(model), count(1)

    def update(*_):
        step = next(steps)
        if step > cfg.max_steps - cfg.average_last:
            average.update_parameters(model)
            if step == cfg.max_steps:
                model.load_state_dict(average.module.state_dict())

    optimizer.register_step_post_hook(update)


def ours(size, device, options=Options(), cfg=TRAIN_CONFIG):
    """Our model and the step of gpt2/train_gpt2.py. cfg: of the optimizers."""
    if options.keep_memory:
        keep_freed_memory(device)
    torch.set_float32_matmul_precision("high" if options.tf32 else "highest")
    shape = {"pad_vocab_to": options.pad_vocab_to, "low_precision_residual": cfg.low_precision_residual}
    model = GPT(GPTConfig(**dict(zip(SHAPE, size)), **shape))
    model.load_hf_state_dict(first_weights(size).hf_state_dict())  # without the rows of padding
    model.to(device)
    if not options.flash:
        for block in model.transformer.h:
            block.attn.__class__ = NaiveAttention
    fast = torch.compile(model, dynamic=False) if options.compile else model
    optimizers = make_optimizers(model, cfg)
    for params in optimizers[0].param_groups:
        params["fused"] = options.fused_adamw
    if cfg.average_last:
        average_last(model, optimizers[-1], cfg)
    logits, source = not options.chunked_loss, batches(size, device, cfg.align_documents)
    return plain_loop(
        model, optimizers, source, device, options.dtype, lambda *batch: fast(*batch, return_logits=logits)[1]
    )


def hf_model(size):
    """transformers' GPT2LMHeadModel with our first weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    options = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    model = GPT2LMHeadModel(GPT2Config(n_positions=size.block_size, **dict(zip(SHAPE, size)), **options))
    model.load_state_dict(first_weights(size).hf_state_dict(), strict=False)  # lm_head is tied to wte
    return model


def transformers(size, device, dtype="float32", compile=False):
    """GPT2LMHeadModel in a plain loop, compiled with fused AdamW. It shifts labels: a row's last one has no target."""
    torch.set_float32_matmul_precision("high")
    model = hf_model(size).to(device)
    fast, betas, source = torch.compile(model) if compile else model, (0.9, BETA2), batches(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=betas, weight_decay=WEIGHT_DECAY, fused=compile)
    return plain_loop(model, [optimizer], source, device, dtype, lambda idx, _: fast(input_ids=idx, labels=idx).loss)


def stock_trainer(model, rows, device, **settings):
    """The Hugging Face Trainer, which reads the rows in order; `.last` is its last loss."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Keeping(Trainer):
        def training_step(self, *args, **kwargs):
            self.last = super().training_step(*args, **kwargs)
            return self.last

    settings |= {"output_dir": tempfile.gettempdir(), "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    settings |= {"use_cpu": device == "cpu", "dataloader_pin_memory": device == "cuda", "logging_steps": 10**9}
    args = TrainingArguments(train_sampling_strategy="sequential", **settings)
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs would multiply the batch
    trainer = Keeping(model=model, args=args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    return trainer


def hf_trainer(size, device, dtype="float32"):
    """The Hugging Face Trainer with fused AdamW, its own loop and loader.

    `train()` runs on a thread, and a callback before each step waits for the next call of `step`.
    """
    from transformers import TrainerCallback

    torch.set_float32_matmul_precision("high")
    model, wanted, losses = hf_model(size), SimpleQueue(), SimpleQueue()

    class Wait(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            wanted.get()

        def on_step_end(self, *args, **kwargs):
            losses.put(trainer.last.detach())

    rows = [{"input_ids": row, "labels": row} for idx, _ in islice(batches(size, "cpu"), 8) for row in idx]
    trainer = stock_trainer(
        model, rows, device, max_steps=10**9, per_device_train_batch_size=size.batch_size, learning_rate=LR,
        weight_decay=WEIGHT_DECAY, adam_beta2=BETA2, max_grad_norm=1.0, optim="adamw_torch_fused",
        lr_scheduler_type="constant", bf16=dtype == "bfloat16",
    )  # fmt: skip
    trainer.add_callback(Wait())

    def train():
        try:
            trainer.train()
        finally:
            losses.put(None)

    threading.Thread(target=train, daemon=True).start()

    def step():
        wanted.put(True)
        if (loss := losses.get()) is None:
            raise RuntimeError("the Trainer ended early; its own message is above")
        return loss

    return step, model, []


def model_of(folder):
    """The module with the model in a checkout of nanoGPT (model.py), or of build-nanogpt (train_gpt2.py).

    build-nanogpt's trains on import, so only the code before that is executed.
    """
    build = Path(folder) / "train_gpt2.py"
    path = build if build.exists() else Path(folder) / "model.py"
    text = path.read_text(encoding="utf-8").split("\nimport tiktoken")[0]
    module = sys.modules[path.stem] = types.ModuleType(path.stem)  # where dataclasses look up their module
    module.master_process = False  # build-nanogpt prints if it is true
    exec(compile(text.replace("from hellaswag import", "# from hellaswag import"), path, "exec"), module.__dict__)
    return module


def karpathy(size, device, folder, dtype="float32", compile=False, lr=LR, beta2=BETA2):
    """Model, optimizer and step of nanoGPT, or of build-nanogpt; autocast also where nanoGPT's own loop has none."""
    module, state = model_of(folder), first_weights(size).state_dict()
    build = module.__name__ == "train_gpt2"
    torch.set_float32_matmul_precision("high")
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**dict(zip(SHAPE, size))))
        vocab = ("transformer.wte.weight", "lm_head.weight")  # theirs without rows of padding
        model.load_state_dict({k: v[: size.vocab_size] if k in vocab else v for k, v in state.items()})
        model.to(device)
        betas = () if build else ((0.9, beta2),)  # build-nanogpt has fixed ones
        optimizer = model.configure_optimizers(WEIGHT_DECAY, lr, *betas, device)
    fast, source = torch.compile(model) if compile else model, batches(size, device)
    return plain_loop(model, [optimizer], source, device, dtype, lambda *batch: fast(*batch)[1])


def everybody(dtypes, nanogpt, build_nanogpt):
    """{label: (function, keyword arguments)}, first ours in the first of the types, then all in each.

    nanogpt, build_nanogpt: folders, or empty.
    """
    hf, found = version("transformers"), {"ours": (ours, {"options": Options(dtypes[0])})}
    found["ours eager"] = ours, {"options": Options(dtypes[0], compile=False)}
    found["ours, memory not kept"] = ours, {"options": Options(dtypes[0], keep_memory=False)}
    found[f"transformers {hf} eager float32"] = transformers, {"dtype": "float32"}
    for dtype in dtypes:
        if dtype != dtypes[0]:
            found[f"ours {dtype}"] = ours, {"options": Options(dtype)}
        found[f"transformers {hf} compiled {dtype} fused AdamW"] = transformers, {"dtype": dtype, "compile": True}
        found[f"Trainer {hf} {dtype}"] = hf_trainer, {"dtype": dtype}
        for name, folder, ways in (("nanoGPT", nanogpt, (False, True)), ("build-nanogpt", build_nanogpt, (False,))):
            for compiled in ways if folder else ():
                model_of(folder)  # fail now, not after minutes of compiling
                kwargs = {"folder": folder, "dtype": dtype, "compile": compiled}
                found[f"{name} {'compiled' if compiled else 'eager'} {dtype}"] = karpathy, kwargs
    return found
