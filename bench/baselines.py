"""Who trains in bench/bench_gpt2.py: our step, lever by lever, and the peers' models with their own ways of stepping.

A contestant is a function of (size, device, …) that gives a `Contestant`: `step()` runs one optimizer step on the next
batch and gives the loss as a tensor, without waiting for it. All start from the same weights, see the same batches
(the Trainer shuffles them) and use the same learning rate, decay and clipping, so their losses agree as far as their
models do.
"""

import contextlib
import importlib.util
import io
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from common import UsageError
from gpt2.config import GPTConfig, TrainConfig
from gpt2.distributed import autocast
from gpt2.model import GPT, CausalSelfAttention
from gpt2.optimizers import make_optimizers
from gpt2.train_gpt2 import compiled

LR, WEIGHT_DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Size:
    """The shape of a model and of a step's batch."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int

    @property
    def tokens(self):
        """Tokens of a step."""
        return self.batch_size * self.block_size

    def gpt_config(self, **changes):
        """The shape as our model takes it."""
        shape = {k: getattr(self, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}
        return GPTConfig(**{**shape, **changes})


SIZES = {
    "tiny": Size(260, 2, 2, 16, 16, 2),
    "vocab-1024": Size(1024, 4, 4, 256, 256, 8),
    "vocab-50304": Size(50304, 4, 4, 128, 64, 16),
    "gpt2-124M": Size(50304, 12, 12, 768, 1024, 32),
}


@dataclass
class Contestant:
    """One that steps: `step()` -> loss, and the module whose parameters it trains."""

    step: Callable
    model: torch.nn.Module


def batches(size, device, n=8):
    """The same n batches of synthetic tokens for everybody, round and round: (idx, targets), (B, T) each."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(size.vocab_size, (n, size.batch_size, size.block_size + 1), generator=generator)
    return cycle([(r[:, :-1].contiguous().to(device), r[:, 1:].contiguous().to(device)) for r in rows])


def first_weights(size):
    """Our model with the weights that everybody starts from."""
    torch.manual_seed(0)
    return GPT(size.gpt_config())


# ---------------------------------------------------------------------------------------------------------------------
# ours


@dataclass(frozen=True)
class Levers:
    """What the speed ladder climbs, step by step; the defaults are what gpt2/train_gpt2.py does."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    tf32: bool = True
    compile: bool = True
    attention: Literal["naive", "sdpa"] = "sdpa"
    pad_vocab_to: int = 128
    fused_adamw: bool = True
    loss: Literal["plain", "library", "chunked"] = "chunked"


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


def library_loss(hidden, model, idx, targets):
    """Our trunk `hidden` with the library's fusion of output projection and cross-entropy, as it chooses its chunks."""
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    x = hidden(idx).flatten(0, 1)  # (B * T, C)
    weight, targets = model.lm_head.weight[: model.config.vocab_size], targets.flatten()
    if torch.is_autocast_enabled(x.device.type):  # which the library's function does not look at
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return F.linear_cross_entropy(x, weight, targets, options=LinearCrossEntropyOptions())


def ours(size, device, levers=None, group=None):
    """Our model and the step of gpt2/train_gpt2.py. group: processes that train together."""
    levers = levers or Levers()
    torch.set_float32_matmul_precision("high" if levers.tf32 else "highest")
    model = GPT(size.gpt_config(pad_vocab_to=levers.pad_vocab_to))
    with torch.no_grad():  # the rows of padding, of which there may be fewer or more, play no part
        state = first_weights(size).state_dict()
        for name, tensor in model.state_dict().items():
            n = min(len(tensor), len(state[name]))
            tensor[:n].copy_(state[name][:n])
    model.to(device)
    if levers.attention == "naive":
        for block in model.transformer.h:
            block.attn.__class__ = NaiveAttention
    cfg = TrainConfig(compile=levers.compile, max_lr=LR, weight_decay=WEIGHT_DECAY, grad_clip=CLIP)
    fast = compiled(model.hidden if levers.loss == "library" else model, cfg, torch.device(device), print)
    if group is not None:
        fast = DistributedDataParallel(fast, process_group=group)
    optimizers = make_optimizers(model, cfg)
    for params in optimizers[0].param_groups:
        params["fused"] = levers.fused_adamw

    def loss(idx, targets):
        if levers.loss == "library":
            return library_loss(fast, model, idx, targets)
        return fast(idx, targets, return_logits=levers.loss == "plain")[1]

    return _plain_loop(model, optimizers, size, device, levers.dtype, loss)


def _plain_loop(model, optimizers, size, device, dtype, loss_of):
    """The step that all but the Trainer take; loss_of(idx, targets) is what they differ in."""
    source = batches(size, device)

    def step():
        idx, targets = next(source)
        with autocast(torch.device(device), dtype):
            loss = loss_of(idx, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Contestant(step, model)


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def hf_model(size):
    """transformers' GPT2LMHeadModel with our first weights, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocab_size, n_positions=size.block_size, n_embd=size.n_embd, n_layer=size.n_layer,
            n_head=size.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    model.load_state_dict(first_weights(size).hf_state_dict(), strict=False)  # lm_head is tied to wte
    return model


def transformers(size, device, dtype="float32", compile=False, fused=False):
    """GPT2LMHeadModel in a plain loop. It shifts the labels itself, so a row's last position is not learned."""
    torch.set_float32_matmul_precision("high")
    model = hf_model(size).to(device)
    fast = torch.compile(model) if compile else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=fused)
    return _plain_loop(
        model, [optimizer], size, device, dtype, lambda idx, targets: fast(input_ids=idx, labels=idx).loss
    )


def hf_trainer(size, device, dtype="float32", compile=False):
    """The Hugging Face Trainer with fused AdamW, its own loop and loader; it waits between steps until told to go on.

    `train()` runs on a thread, and a callback at each step's end hands over.
    """
    import tempfile

    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    torch.set_float32_matmul_precision("high")
    model, go, done, losses = hf_model(size), threading.Semaphore(0), threading.Semaphore(0), []

    class Wait(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            done.release()
            go.acquire()

    class Keeping(Trainer):
        def training_step(self, *args, **kwargs):
            losses[:] = [super().training_step(*args, **kwargs)]
            return losses[0]

    source = batches(size, "cpu")
    rows = [{"input_ids": row, "labels": row} for _ in range(8) for row in next(source)[0]]
    args = TrainingArguments(
        output_dir=tempfile.gettempdir(), max_steps=10**9, per_device_train_batch_size=size.batch_size,
        learning_rate=LR, weight_decay=WEIGHT_DECAY, adam_beta2=BETAS[1], max_grad_norm=CLIP, optim="adamw_torch_fused",
        lr_scheduler_type="constant", bf16=dtype == "bfloat16", torch_compile=compile, use_cpu=device == "cpu",
        logging_steps=10**9, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=device == "cuda",
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs would multiply the batch
    trainer = Keeping(model=model, args=args, train_dataset=rows, callbacks=[Wait()])
    trainer.remove_callback(PrinterCallback)
    thread = threading.Thread(target=trainer.train, daemon=True)

    def step():
        thread.start() if not thread.ident else go.release()
        while not done.acquire(timeout=1):
            if not thread.is_alive():
                raise RuntimeError("the Trainer ended early; its own message is above")
        return losses[0].detach()

    return Contestant(step, model)


# ---------------------------------------------------------------------------------------------------------------------
# karpathy's, from a local checkout


def check_checkout(folder, file, says):
    """The path of a checkout's file; UsageError if it is not there or does not hold what `says` names."""
    path = Path(folder) / file
    if not path.is_file() or says not in path.read_text(encoding="utf-8"):
        raise UsageError(f"{folder} is no checkout of karpathy's: it has no {file} with {says.strip()!r}")
    return path


def karpathy_module(folder):
    """model.py of a checkout of nanoGPT, as a module."""
    file = check_checkout(folder, "model.py", "class GPTConfig")
    spec = importlib.util.spec_from_file_location("nanogpt_model", file)
    sys.modules["nanogpt_model"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _karpathy_model(gpt, config, size):
    with contextlib.redirect_stdout(io.StringIO()):
        shape = {k: getattr(size, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd", "block_size")}
        model = gpt(config(**shape))
    state = first_weights(size).state_dict()
    vocab = ("transformer.wte.weight", "lm_head.weight")  # theirs without rows of padding
    model.load_state_dict({k: v[: size.vocab_size] if k in vocab else v for k, v in state.items()})
    return model


def nanogpt(size, device, folder, dtype="float32", compile=False):
    """nanoGPT's model and the step of its train.py: autocast on a GPU alone, AdamW fused there alone."""
    module = karpathy_module(folder)
    model = _karpathy_model(module.GPT, module.GPTConfig, size).to(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with contextlib.redirect_stdout(io.StringIO()):
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, device)
    return _karpathy_step(model, optimizer, size, device, dtype if device == "cuda" else "float32", compile)


def build_nanogpt(size, device, folder, dtype="float32", compile=False):
    """build-nanogpt's model and step. Its file trains on import, so only what stands before that is executed."""
    text = check_checkout(folder, "train_gpt2.py", "\nimport tiktoken").read_text(encoding="utf-8")
    model_part = text.split("\nimport tiktoken")[0].replace("from hellaswag import", "# from hellaswag import")
    spec = importlib.util.spec_from_loader("build_nanogpt_model", loader=None)
    sys.modules["build_nanogpt_model"] = module = importlib.util.module_from_spec(spec)
    module.master_process = False
    exec(model_part, module.__dict__)
    model = _karpathy_model(module.GPT, module.GPTConfig, size).to(device)
    torch.set_float32_matmul_precision("high")
    optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, device)
    return _karpathy_step(model, optimizer, size, device, dtype, compile)


def _karpathy_step(model, optimizer, size, device, dtype, compile):
    fast = torch.compile(model) if compile else model
    return _plain_loop(model, [optimizer], size, device, dtype, lambda idx, targets: fast(idx, targets)[1])


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def contestants(device, half, nanogpt_folder, build_nanogpt_folder):
    """{label: (function, keyword arguments)}, ours first.

    half: the 16-bit type of the stated settings. Without hardware for it, the same settings in float32 run as well,
    and are then a peer's best.
    """
    fast = half if device == "cuda" else "float32"
    hf = f"transformers {version('transformers')}"
    everybody = {
        "ours": (ours, {"levers": Levers(dtype=fast)}),
        "ours eager": (ours, {"levers": Levers(dtype=fast, compile=False)}),
        f"{hf} eager float32": (transformers, {}),
        f"{hf} compiled {half} fused AdamW": (transformers, {"dtype": half, "compile": True, "fused": True}),
    }
    if fast != half:
        everybody[f"{hf} compiled float32 fused AdamW"] = (transformers, {"compile": True, "fused": True})
    everybody[f"Trainer {version('transformers')} {fast}"] = (hf_trainer, {"dtype": fast})
    if nanogpt_folder:
        check_checkout(nanogpt_folder, "model.py", "class GPTConfig")  # now, not after minutes of compiling
        kw = {"folder": nanogpt_folder, "dtype": fast}
        everybody[f"nanoGPT eager {fast}"] = (nanogpt, kw)
        everybody[f"nanoGPT compiled {fast}"] = (nanogpt, {**kw, "compile": True})
    if build_nanogpt_folder:
        check_checkout(build_nanogpt_folder, "train_gpt2.py", "\nimport tiktoken")
        everybody[f"build-nanogpt eager {fast}"] = (build_nanogpt, {"folder": build_nanogpt_folder, "dtype": fast})
    return everybody
