"""Checkpoints that a crash cannot spoil: written aside, fsynced, renamed, with a sha256; the newest valid one counts.

A checkpoint holds plain tensors and plain containers, so that `torch.load(…, weights_only=True)` reads it, on any
machine and without the trainer: {format, version, step, model_config, model, optimizers, scaler, rng, settings, …}.
"""

import hashlib
import json
import random
import re
from dataclasses import asdict
from pathlib import Path

import torch

from bpe.tokenizer import Tokenizer, load_tokenizer
from common import UsageError, atomic_open, file_sha256
from gpt2.config import GPTConfig
from gpt2.model import GPT

FORMAT, VERSION = "bytes-to-lora checkpoint", 1
NAME = re.compile(r"step_(\d+)\.pt")


def save(ckpt_dir, step, state, keep=2):
    """Write ckpt_dir/step_000500.pt atomically and its sum beside it, then drop all but the newest `keep`. -> its path

    An error while writing (a full disk, say) leaves the earlier checkpoints as they were.
    """
    path, summed = Path(ckpt_dir) / f"step_{step:06d}.pt", _Summed()
    for part in path.parent.glob(".step_*.part"):  # gigabytes that a kill in the middle of a save has left
        part.unlink(missing_ok=True)
    try:
        with atomic_open(path, "wb") as summed.file:
            torch.save({**state, "format": FORMAT, "version": VERSION, "step": step}, summed)
            # The sum comes first: a checkpoint without one does not exist yet, a sum without a checkpoint does no harm.
            with atomic_open(_sum_path(path)) as s:
                s.write(f"{summed.sha256.hexdigest()}  {path.name}\n")
    except (OSError, RuntimeError) as e:  # torch's writer hides a full disk behind a RuntimeError of its own
        why = str(summed.error or e).splitlines()[0]
        raise UsageError(
            f"{path} could not be written ({why}); the earlier ones are kept: free some disk, go on"
        ) from None
    # A later one is damaged, or this one would have gone on from it: it does not count among those kept.
    earlier = [p for p in sorted_checkpoints(ckpt_dir) if step_of(p) < step]
    for old in earlier[: max(0, len(earlier) + 1 - keep)] if keep else []:
        old.unlink(missing_ok=True)
        _sum_path(old).unlink(missing_ok=True)
    return path


class _Summed:
    """A file being written that sums its bytes, so that gigabytes need not be read again when a stop is urgent."""

    def __init__(self):
        self.file, self.sha256, self.error = None, hashlib.sha256(), None

    def write(self, data):
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as e:
            self.error = self.error or e
            raise

    def flush(self):
        self.file.flush()


def sorted_checkpoints(ckpt_dir):
    """The checkpoints in a folder, oldest first."""
    return sorted((p for p in Path(ckpt_dir).glob("step_*.pt") if NAME.fullmatch(p.name)), key=step_of)


def step_of(path):
    """The step of a checkpoint, from its name."""
    return int(NAME.fullmatch(path.name)[1])


def problem(path):
    """Why this checkpoint cannot be trusted, in a few words, or None."""
    path = Path(path)
    try:
        expected = _sum_path(path).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return "its sha256 is missing"
    return None if file_sha256(path) == expected else "its sha256 does not match: truncated or altered"


def load(path, map_location="cpu"):
    """Read one checkpoint that verifies -> dict; UsageError otherwise."""
    if reason := problem(path):
        raise UsageError(f"{path} is not a usable checkpoint: {reason}; take another one")
    state = torch.load(path, map_location=map_location, weights_only=True)
    if state.get("format") != FORMAT or state.get("version") != VERSION:
        raise UsageError(
            f"{path} has format {state.get('format')!r} version {state.get('version')}, not {FORMAT} {VERSION}"
        )
    return state


def load_newest(ckpt_dir, warn=print, map_location="cpu"):
    """The newest checkpoint of a folder that verifies -> dict, or None; those passed over are named through `warn`."""
    for path in reversed(sorted_checkpoints(ckpt_dir)):
        if reason := problem(path):
            warn(f"warning: {path.name} is skipped: {reason}")
        else:
            return load(path, map_location)
    return None


def load_model(name, device="cpu"):
    """Any GPT-2 and its tokenizer -> (GPT in eval mode, Tokenizer). name: as for `load_weights`."""
    return load_weights(name).to(device).eval(), load_tokenizer_of(name)


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


def load_tokenizer_of(name):
    """The tokenizer that belongs to what `load_weights` reads; a hub name means GPT-2's own."""
    path = Path(name)
    if _is_ours(path):
        run_dir = path.parent.parent if path.suffix == ".pt" else path
        return Tokenizer.load(run_dir / "tokenizer.model")
    if (path / "tokenizer.json").exists():
        return Tokenizer.from_huggingface(path / "tokenizer.json")
    return load_tokenizer("gpt2")


def _is_ours(path):
    """Whether a path is a checkpoint or a run directory, rather than something of Hugging Face's."""
    if path.suffix == ".pt" and not path.exists():
        raise UsageError(f"{path} does not exist; give a run directory or a checkpoint file")
    return path.suffix == ".pt" or (path.is_dir() and not (path / "config.json").exists()) or (path / "ckpt").is_dir()


def model_state(model):
    """{"model_config", "model"}: what of a checkpoint describes the model itself; no compile or DDP prefixes in it."""
    return {"model_config": asdict(model.config), "model": model.state_dict()}


def rng_state(device):
    """The random states of this process as plain containers: python, torch, and the GPU's if there is one."""
    state = {"python": json.dumps(random.getstate()), "torch": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_rng_state(state, device):
    """The inverse of `rng_state`."""
    version, internal, gauss = json.loads(state["python"])
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    elif device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"].cpu())


def _sum_path(path):
    return path.with_name(path.name + ".sha256")
