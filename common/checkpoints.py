"""Atomic checkpoints: a temporary file, fsynced and renamed, with a sha256 beside it; the newest valid one is used.

The caller chooses the contents: plain tensors and containers, which `torch.load(…, weights_only=True)` reads. Importing
this module does not import torch.
"""

import re
from pathlib import Path

from common.files import atomic_open, file_sha256
from common.usage import UsageError

NAME = re.compile(r"step_(\d+)\.pt")


def save_checkpoint(folder, step, state, keep=2):
    """Write folder/step_000500.pt and its sha256, then delete old ones so that `keep` remain (0: keep all) -> path.

    An error while writing (a full disk, say) leaves the earlier checkpoints unchanged.
    """
    import torch

    path = Path(folder) / f"step_{step:06d}.pt"
    for part in path.parent.glob(".step_*.part"):  # left by a process killed during a save
        part.unlink(missing_ok=True)
    try:
        with atomic_open(path, "wb") as f:
            torch.save(state, f)
            f.flush()
            # The sha256 comes first: a checkpoint without one is invalid, a sha256 without a checkpoint is harmless.
            with atomic_open(sha256_path(path)) as sums:
                sums.write(f"{file_sha256(f.name)}  {path.name}\n")
    except (OSError, RuntimeError) as e:  # torch's writer hides a full disk behind a RuntimeError
        why = str(e.__context__ if isinstance(e.__context__, OSError) else e).splitlines()[0]
        raise UsageError(f"{path} could not be written ({why}); earlier ones are kept: free disk and resume") from None
    # A later one is damaged, or training would have resumed from it: it is not among those kept.
    earlier = [p for p in sorted_checkpoints(folder) if step_of(p) < step]
    for old in earlier[: max(0, len(earlier) + 1 - keep)] if keep else []:
        old.unlink(missing_ok=True)
        sha256_path(old).unlink(missing_ok=True)
    return path


def sorted_checkpoints(folder):
    """The checkpoints in a folder, oldest first."""
    return sorted((p for p in Path(folder).glob("step_*.pt") if NAME.fullmatch(p.name)), key=step_of)


def step_of(path):
    """The step of a checkpoint, from its name."""
    return int(NAME.fullmatch(path.name)[1])


def sha256_path(path):
    """Where the sha256 of a checkpoint is kept."""
    return path.with_name(f"{path.name}.sha256")


def problem(path):
    """Why a checkpoint is invalid, in a few words, or None."""
    try:
        expected = sha256_path(Path(path)).read_text(encoding="utf-8").split()[0]
    except (OSError, IndexError, UnicodeDecodeError):
        return "its sha256 is missing"
    return None if file_sha256(path) == expected else "its sha256 does not match: truncated or altered"


def newest_checkpoint(folder, warn=print):
    """The newest checkpoint whose checksum matches -> its path, or None; `warn` is told of those skipped."""
    for path in reversed(sorted_checkpoints(folder)):
        if reason := problem(path):
            warn(f"warning: {path.name} is skipped: {reason}")
        else:
            return path
    return None
