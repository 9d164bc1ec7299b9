"""One-line error messages for usage errors, settings out of range and failed downloads."""

import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import fields
from typing import Literal, get_args, get_origin


class UsageError(ValueError):
    """A usage error. The message is one line: what is wrong, and what to do."""


def cli(main):
    """Run `main()` as a script: a usage error becomes one line on stderr and exit status 2, never a traceback.

    Bugs keep their traceback; only UsageError and the operating system's errors (no such file, no permission,
    disk full) are shortened. What is printed into a file or a pipe is UTF-8, on Windows too.

    One of several ranks ends without the interpreter's shutdown: now and then a thread of gloo that still releases a
    tensor aborts it, and torchrun restarts a finished run.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if stream.isatty() else "utf-8", errors="replace")
    try:
        main()
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
            print(end="", flush=True)
            os._exit(0)
        return
    except UsageError as e:
        message = str(e)
    except BrokenPipeError:  # `… | head` closed our stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.filename is None and e.strerror is None:
            raise
        message = f"{e.filename}: " * bool(e.filename) + (e.strerror or str(e))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


LIMIT = 2**31  # of numeric settings


def validate(cfg, ranges, prefix="--"):
    """UsageError for a wrong type, an unknown choice, or a number out of range in a dataclass of settings.

    ranges: {field: (smallest, largest)}; of other numbers 0 to LIMIT. prefix: of the fields' names in the message.
    """
    for field in fields(cfg):
        value, kind = getattr(cfg, field.name), field.type
        flag, (low, high) = f"{prefix}{field.name.replace('_', '-')}", ranges.get(field.name, (0, LIMIT))
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise UsageError(f"unknown {field.name} {value}; choose from {', '.join(map(str, get_args(kind)))}")
        if kind in (bool, int, float, str, list, dict) and type(value) not in (kind, {float: int}.get(kind)):
            raise UsageError(f"{flag} should be {kind.__name__}, not {value!r}")
        if kind in (int, float) and not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"{flag} {value} should be a number from {low} to {high}")


def parse_shard(text):
    """--shard "1/4" -> (1, 4): which part, from 0, of how many."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {text} is not a part i/n with i from 0 to n-1")
    return int(match[1]), int(match[2])


@contextmanager
def from_hub(what, instead):
    """Around a download: every exception of the hub's library (offline, moved, gated) becomes a UsageError.

    instead: what to do without the hub.
    """
    try:
        yield
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise UsageError(f"the download of {what} failed ({reason}); {instead}") from None
