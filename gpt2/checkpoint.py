"""Checkpoints of a GPT-2 run, and loading a model by its name.

A checkpoint holds plain tensors and plain containers, so that `torch.load(…, weights_only=True)` reads it anywhere and
without the trainer: {format, version, step, model_config, model, optimizers, scaler, rng, learned, skipped, average}.
How it is written and verified: common/checkpoints.py.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch
from torch.utils._pytree import tree_map_only

from bpe.tokenizer import Tokenizer, load_tokenizer
from common import UsageError
from common.checkpoints import newest_checkpoint, problem, save_checkpoint
from gpt2.config import GPTConfig
from gpt2.model import GPT

FORMAT, VERSION = "bytes-to-lora checkpoint", 1


def save(ckpt_dir, step, state, keep=2):
    """Write ckpt_dir/step_000500.pt atomically and keep the newest `keep` -> its path."""
    return save_checkpoint(ckpt_dir, step, {**state, "format": FORMAT, "version": VERSION, "step": step}, keep)


class Writer:
    """Writes files on a thread, one at a time, while training continues: checkpoints from a copy of their tensors.

    done: called with the path of each checkpoint that is on disk.
    """

    def __init__(self, done):
        self.done, self.thread, self.pending = done, ThreadPoolExecutor(1), []

    def save(self, ckpt_dir, step, state, keep):
        """As `save`, after the last one is on disk."""
        self.wait()
        state = on_cpu(state)
        self.submit(lambda: self.done(save(ckpt_dir, step, state, keep)))

    def submit(self, work, *args, **kwargs):
        """Call work(*args, **kwargs) on the thread."""
        self.pending.append(self.thread.submit(work, *args, **kwargs))

    def wait(self):
        """Until all is on disk; UsageError if a checkpoint could not be written."""
        while self.pending:
            self.pending.pop(0).result()


def on_cpu(state):
    """A copy of a state whose tensors are on the CPU; those that share memory (wte and lm_head) still do."""
    copies = {}

    def copy(value):
        key = value.data_ptr(), value.shape, value.dtype
        if key not in copies or not value.numel():
            target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            copies[key] = target.copy_(value, non_blocking=True)
        return copies[key]

    state = tree_map_only(torch.Tensor, copy, state)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return state


def load(path):
    """Read one checkpoint whose sha256 matches, onto the CPU -> dict; UsageError otherwise."""
    if reason := problem(path):
        raise UsageError(f"{path} is not a usable checkpoint: {reason}; take another one")
    return read(path)


def load_newest(ckpt_dir, warn=print):
    """The newest checkpoint of a folder whose sha256 matches -> dict, or None. `warn` gets a line for each skipped."""
    path = newest_checkpoint(ckpt_dir, warn)
    return path and read(path)


def read(path):
    """Read a checkpoint whose sha256 has been checked; its tensors are mapped from the file, not copied."""
    # Windows deletes no mapped file, and old checkpoints are to be deleted.
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=os.name != "nt")
    found = state.get("format"), state.get("version")
    if found != (FORMAT, VERSION):
        raise UsageError(f"{path} has format {found[0]!r} version {found[1]}, not {FORMAT} {VERSION}")
    return state


def load_model(name, device="cpu"):
    """Any GPT-2 and its tokenizer (GPT-2's own for a hub name) -> (GPT in eval mode, Tokenizer). name: as for
    `load_weights`.
    """
    path, model = Path(name), load_weights(name).to(device).eval()
    if _is_ours(path):
        return model, Tokenizer.load((path.parent.parent if path.suffix == ".pt" else path) / "tokenizer.model")
    if (path / "tokenizer.json").exists():
        return model, Tokenizer.from_huggingface(path / "tokenizer.json")
    return model, load_tokenizer("gpt2")


def load_weights(name, dropout=0.0):
    """A run directory (its newest valid checkpoint), a checkpoint file, a Hugging Face folder or hub name -> GPT."""
    path = Path(name)
    if not _is_ours(path):
        return GPT.from_pretrained(str(name), dropout=dropout)
    state = load(path) if path.suffix == ".pt" else load_newest(path / "ckpt")
    if state is None:
        raise UsageError(f"{path} holds no usable checkpoint; train one, or name another run")
    model = GPT(GPTConfig(**{**state["model_config"], "dropout": dropout}))
    model.load_state_dict(state["model"])
    return model


def _is_ours(path):
    """Whether a path is a checkpoint or a run directory, not something of Hugging Face's."""
    if path.suffix == ".pt" and not path.exists():
        raise UsageError(f"{path} does not exist; give a run directory or a checkpoint file")
    return path.suffix == ".pt" or (path.is_dir() and not (path / "config.json").exists()) or (path / "ckpt").is_dir()


def model_state(model):
    """{"model_config", "model"}: the part of a checkpoint that describes the model; no compile or DDP prefixes."""
    return {"model_config": asdict(model.config), "model": model.state_dict()}


def rng_state(device):
    """The random states of this process: torch's, and the GPU's if there is one."""
    state = {"torch": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = getattr(torch, device.type).get_rng_state()
    return state


def set_rng_state(state, device):
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    if device.type in state:
        getattr(torch, device.type).set_rng_state(state[device.type].cpu())
