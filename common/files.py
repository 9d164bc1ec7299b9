"""Atomic file writing, UTF-8 text, standard JSON and checksums."""

import errno
import gzip
import hashlib
import json
import math
import os
import shutil
import sys
import zlib
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from threading import get_ident

from common.usage import UsageError

ROOT = Path(__file__).resolve().parent.parent


@contextmanager
def atomic_open(path, mode="w"):
    """Open a temporary neighbour of `path` for writing and rename it into place, fsynced, when the block succeeds.

    A reader sees the old file or the complete new one; a failing block leaves nothing behind. Text is UTF-8 with "\\n".
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{get_ident()}.part")
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
def atomic_folder(path):
    """A temporary neighbour of the folder `path` to write into, renamed into its place when the block succeeds.

    Replaces `path`; a failing block leaves the old folder unchanged and nothing else behind.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a killed process with the same pid
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def locked(path, what):
    """Hold the operating system's lock `path` on the folder `what`; UsageError if another process, on any host, does.

    The lock is dropped when its holder dies; the file that remains has no meaning.
    """
    import filelock  # not above: doctor.py runs before anything is installed

    lock = filelock.FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(timeout=0.3)  # who only asks may hold it for an instant
    except filelock.Timeout:
        raise UsageError(f"{what} is being written by another process; wait for it, or name another folder") from None
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        print(f"warning: the file system of {what} has no locks; start one process on it at a time", file=sys.stderr)
    try:
        yield
    finally:
        lock.release()


def is_locked(path):
    """Whether a process holds the lock `path`: on this host, or on another one if the file system shares locks."""
    import filelock

    if not Path(path).exists():
        return False
    try:
        with filelock.FileLock(path, timeout=0, fallback_to_soft=False):
            return False
    except filelock.Timeout:
        return True
    except OSError:  # a read-only copy, or a file system without locks
        return False


@contextmanager
def open_text(path, newline=None):
    """Open a UTF-8 file for reading, gzipped where its name ends in .gz; a byte order mark is dropped.

    newline: as for `open`. UsageError where it is missing, not UTF-8 or a damaged gzip file, also while it is read.
    """
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as f:
            yield f
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path} is a folder; name a file in it") from None
    except UnicodeDecodeError as e:
        raise UsageError(f"{path} is not UTF-8 ({e.reason}); convert it first") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UsageError(f"{path} is a damaged gzip file ({e})") from None


def write_json(path, value):
    """Write `value` atomically as indented JSON. Non-finite floats become null: JSON has no NaN."""
    with atomic_open(path) as f:
        json.dump(plain(value), f, indent=2, ensure_ascii=False, allow_nan=False)
        f.write("\n")


def read_json(path, **options):
    """Read a JSON file, gzipped or not, with the options of `json.load`; UsageError names a missing or damaged one."""
    with open_text(path) as f:
        try:
            return json.load(f, **options)
        except (json.JSONDecodeError, RecursionError) as e:
            raise UsageError(f"{path} is not valid JSON ({e}); it may be damaged") from None


def read_jsonl(path):
    """Yield (line number, value) of a .jsonl file, gzipped or not; UsageError names a line that is not JSON."""
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    raise UsageError(f"{path}, line {number} is not valid JSON ({e})") from None


def valid(text):
    """A str, or bytes in UTF-8, as str; a surrogate pair is joined, a lone one, which UTF-8 cannot hold, is U+FFFD."""
    if isinstance(text, bytes):
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError as e:
            raise UsageError(f"bytes of text are UTF-8, and these are not: {e}") from None
    if not isinstance(text, str):
        raise UsageError(f"text is str or bytes, or for training an iterable of them; here is {type(text).__name__}")
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def read_texts(path, field="text"):
    """Yield the text in each line of a .jsonl file; a lone surrogate, which JSON can spell, is replaced."""
    for number, row in read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            raise UsageError(f'{path}, line {number} is not a JSON object with a "{field}"')
        yield valid(row[field])


def read_documents(files):
    """Yield the documents of .jsonl and text files as str, line ends as they are."""
    for file in map(Path, files):
        if file.name.removesuffix(".gz").endswith(".jsonl"):
            yield from read_texts(file)
        else:
            with open_text(file, newline="") as f:
                yield f.read()


def read_parquet(path, text_field=None):
    """Yield the rows of a parquet file as dicts, or the texts of one column, a few hundred in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            texts = [f.name for f in file.schema_arrow if f.type in (pyarrow.string(), pyarrow.large_string())]
            if text_field and text_field not in texts:
                raise UsageError(f"{path} has no column {text_field} of text, but {', '.join(texts) or 'none'}")
            for batch in file.iter_batches(batch_size=256, columns=text_field and [text_field]):
                rows = batch.to_pylist()
                yield from (row[text_field] for row in rows) if text_field else rows
    except (pyarrow.ArrowException, OSError) as e:  # the latter without a number where a page is damaged
        raise UsageError(f"{path} is not a readable parquet file ({str(e).splitlines()[0]})") from None


def is_held_out(text, share):
    """Whether a text is in the held-out share, by its hash alone: equal texts always fall on the same side."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < share * 2**64


def file_sha256(path):
    """The sha256 of a file's bytes, as hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def plain(value):
    """dataclasses, paths, numpy scalars, tuples -> JSON types; NaN and infinities -> None."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, Path):  # paths inside the repository are relative, so that records are portable
        return (value.relative_to(ROOT) if value.is_relative_to(ROOT) else value).as_posix()
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:  # numpy and torch scalars
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def portable(value):
    """A path inside the repository, as text relative to its root, so that records are portable.

    Any other value is returned unchanged.
    """
    root = f"{ROOT}{os.sep}"
    return Path(value[len(root) :]).as_posix() if isinstance(value, str) and value.startswith(root) else value
