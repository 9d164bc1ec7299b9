"""The manners that every script shares.

A person's mistake is one line and exit status 2 (`UserError`, `cli`); files appear whole or not at all (`atomic_open`);
text is UTF-8, gzipped or not (`open_text`); a hub that is out of reach is said in one line, too (`from_hub`).
"""

import gzip
import hashlib
import json
import math
import os
import sys
import zlib
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class UserError(ValueError):
    """A person's mistake. The message is one line: what is wrong, and what to do."""


def cli(main):
    """Run `main()` as a script: a mistake becomes one line on stderr and exit status 2, never a traceback.

    Bugs keep their traceback; only UserError and the operating system's own refusals (no such file, no permission,
    disk full) are shortened. What is printed into a file or a pipe is UTF-8, on Windows too.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    try:
        main()
    except UserError as e:
        sys.exit(_complain(str(e)))
    except BrokenPipeError:  # `… | head` closed our stdout: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.filename is None and e.strerror is None:
            raise
        where = f"{e.filename}: " if e.filename else ""
        sys.exit(_complain(f"{where}{e.strerror or e}"))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _complain(message):
    print(f"error: {message}", file=sys.stderr)
    return 2


@contextmanager
def atomic_open(path, mode="w"):
    """Open a temporary neighbour of `path` for writing and rename it into place, fsynced, when the block succeeds.

    A reader sees the old file or the whole new one; a failing block leaves no trace. Text is UTF-8 with "\\n".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(part, mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def open_text(path, newline=None):
    """Open a UTF-8 file for reading, gzipped where its name ends in .gz; a byte order mark is dropped.

    newline: as for `open`. UserError where it is missing, not UTF-8 or a damaged gzip file, also while it is read.
    """
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as f:
            yield f
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 ({e.reason}); convert it first") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"{path} is a damaged gzip file ({e})") from None


@contextmanager
def from_hub(what, instead):
    """Around a download: whatever the hub's library raises (offline, moved, gated: many classes) becomes one line.

    instead: what a person without the hub can do.
    """
    try:
        yield
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UserError(f"{what} cannot be had from the hub ({reason}); {instead}") from None


def write_json(path, value):
    """Write `value` atomically as indented JSON. Non-finite floats become null: other languages refuse NaN."""
    with atomic_open(path) as f:
        json.dump(plain(value), f, indent=2, ensure_ascii=False, allow_nan=False)
        f.write("\n")


def read_json(path):
    """Read a JSON file; UserError names a missing or damaged one."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); it may be damaged") from None


def peak_memory_mb():
    """The most memory in MB that this process has had resident so far; None where Python cannot tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts in bytes, Linux in kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def pick_device(name="auto"):
    """auto | cuda | mps | cpu -> torch.device (under torchrun this process's GPU); one that is not there is refused."""
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(d for d in ("cuda", "mps", "cpu") if has[d])
    if not has.get(name):
        raise UserError(f"--device {name}: there is none here; choose from {', '.join(d for d in has if has[d])}")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0))) if name == "cuda" else torch.device(name)


def file_sha256(path):
    """The sha256 of a file's bytes, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def plain(value):
    """dataclasses, paths, numpy scalars, tuples -> what JSON knows; NaN and infinities -> None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, set | frozenset):
        return [plain(v) for v in sorted(value)]
    if isinstance(value, Path):  # records read alike on every machine: paths inside the repository are relative
        return (value.relative_to(ROOT) if value.is_relative_to(ROOT) else value).as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def portable(value):
    """A path inside the repository, as text relative to its root, so that records read alike on every machine.

    Any other value is handed back as it is.
    """
    root = f"{ROOT}{os.sep}"
    return Path(value[len(root) :]).as_posix() if isinstance(value, str) and value.startswith(root) else value
