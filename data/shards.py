"""The token format: write, read and verify shards.

A shard is llm.c's and modded-nanogpt's file: 256 little-endian int32 (magic 20240520, version 1, token count, zeros),
then the ids as little-endian uint16. Theirs train here (`data/prepare.py adopt`), ours train there. A folder of shards
carries a manifest, `meta.json`, and the tokenizer that made them, `tokenizer.model`:

    {"format": "bytes-to-lora/shards", "version": 1, "name": "pydocs",
     "source": {...}, "tokenizer": {"name", "sha256"}, "vocab_size": 4353, "eot": 4352,
     "shards": [{"file", "split": "train" | "val", "documents", "tokens", "bytes", "sha256"}, ...]}

"bytes" counts the UTF-8 bytes of the text in a shard (what bits per byte are per), "documents" those that start in it;
every document starts with the end-of-text token, and a shard may end in the middle of one.

    python data/shards.py verify data/corpora/pydocs     # reads every byte; a start of the trainer reads headers only
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

from common import UsageError, atomic_open, cli, file_sha256, read_json, write_json

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 1 << 16  # ids are uint16
FORMAT, FORMAT_VERSION = "bytes-to-lora/shards", 1
SPLITS = ("train", "val")


# ---------------------------------------------------------------------------------------------------------------------
# one shard


def write_shard(path, ids):
    """Write token ids (tokens,) to `path`, whole or not at all. ids: an array, or an iterable of arrays to be joined.

    Returns the number of tokens. UsageError where an id does not fit into uint16.
    """
    tokens = 0
    with atomic_open(path, "wb") as f:
        f.write(bytes(HEADER_BYTES))
        for chunk in [ids] if isinstance(ids, np.ndarray | list) else ids:
            chunk = np.asarray(chunk)
            if chunk.dtype != np.uint16 and chunk.size and (chunk.min() < 0 or chunk.max() >= MAX_VOCAB):
                raise UsageError(f"{path}: ids must lie in 0…65535; use a smaller vocabulary")
            f.write(np.ascontiguousarray(chunk, dtype="<u2"))
            tokens += chunk.size
        header = np.zeros(HEADER_INTS, dtype="<i4")
        header[:3] = MAGIC, VERSION, tokens
        f.seek(0)
        f.write(header.tobytes())
    return tokens


def read_shard(path):
    """Map a shard into memory -> (tokens,) uint16. Checks header and size; UsageError says what is wrong."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing; prepare the corpus again")
    with open(path, "rb") as f:
        raw = f.read(HEADER_BYTES)
    header = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4")
    if len(header) < HEADER_INTS or header[0] != MAGIC:
        raise UsageError(f"{path} is not a token shard: its header is not llm.c's (magic {MAGIC})")
    if header[1] != VERSION:
        raise UsageError(f"{path} has version {header[1]} of the shard format; this code reads version {VERSION}")
    tokens, size = int(header[2]), path.stat().st_size
    if tokens < 1 or size != HEADER_BYTES + 2 * tokens:
        raise UsageError(
            f"{path} is truncated or damaged: its header promises {tokens:,} tokens, "
            f"its {size:,} bytes hold {(size - HEADER_BYTES) / 2:,.10g}"
        )
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def count_ids(ids):
    """How often each id occurs in a shard (tokens,) -> (65536,) int64, in pieces, so that memory stays flat."""
    counts = np.zeros(MAX_VOCAB, dtype=np.int64)
    for at in range(0, len(ids), 1 << 22):
        counts += np.bincount(ids[at : at + (1 << 22)], minlength=MAX_VOCAB)
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# a folder of shards


def write_meta(data_dir, *, name, source, tokenizer, vocab_size, eot, shards):
    """Write the manifest; it comes last, so a folder with a meta.json is a whole one."""
    meta = {"format": FORMAT, "version": FORMAT_VERSION, "name": name, "source": source, "tokenizer": tokenizer}
    write_json(Path(data_dir) / "meta.json", {**meta, "vocab_size": vocab_size, "eot": eot, "shards": shards})


def read_meta(data_dir):
    """The manifest of a folder of shards, as a dict (see the top of this file). UsageError where there is none."""
    data_dir = Path(data_dir)
    path = data_dir / "meta.json"
    if not path.exists():
        if any(data_dir.glob("*.bin")):
            raise UsageError(
                f"{data_dir} has shards but no meta.json: finish data/prepare.py there, "
                f"or take in shards of another project with `data/prepare.py adopt {data_dir} --tokenizer gpt2`"
            )
        raise UsageError(f"{data_dir} has no meta.json; make the corpus with data/prepare.py … --out {data_dir}")
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise UsageError(f"{path} is not the manifest of a folder of shards")
    if meta["version"] != FORMAT_VERSION:
        raise UsageError(f"{path} has version {meta['version']}; this code reads version {FORMAT_VERSION}")
    return meta


def check_folder(data_dir):
    """Headers and sizes of every shard against the manifest, and no shard that the manifest does not know -> manifest.

    Reads a kilobyte a shard: this is what a start of the trainer pays.
    """
    data_dir = Path(data_dir)
    meta = read_meta(data_dir)
    for shard in meta["shards"]:
        tokens = len(read_shard(data_dir / shard["file"]))
        if tokens != shard["tokens"]:
            raise UsageError(f"{data_dir / shard['file']} has {tokens:,} tokens, meta.json says {shard['tokens']:,}")
    foreign = {p.name for p in data_dir.glob("*.bin")} - {shard["file"] for shard in meta["shards"]}
    if foreign:
        raise UsageError(f"{data_dir / min(foreign)} is not in meta.json; move it out of the folder")
    return meta


def open_split(data_dir, split):
    """The shards of one split ("train" or "val") as a list of memory maps (tokens,) uint16, in the manifest's order.

    Checks headers, sizes and the manifest, not the sums (that is `verify`).
    """
    meta = check_folder(data_dir)
    shards = [read_shard(Path(data_dir) / s["file"]) for s in meta["shards"] if s["split"] == split]
    if not shards:
        raise UsageError(
            f"{data_dir} has no {split} shard; it holds {sum(s['tokens'] for s in meta['shards']):,} tokens"
        )
    return shards


def verify(data_dir):
    """Read every byte of a folder: sums, ids below vocab_size, the tokenizer's presence -> manifest.

    UsageError names the first file that is corrupt, truncated, foreign or missing.
    """
    data_dir = Path(data_dir)
    meta = check_folder(data_dir)
    for shard in tqdm(meta["shards"], unit="shard", disable=None):
        path = data_dir / shard["file"]
        if file_sha256(path) != shard["sha256"]:
            raise UsageError(f"{path} is corrupt: its sha256 is not the one in meta.json; prepare or download it again")
        highest = int(read_shard(path).max())
        if highest >= meta["vocab_size"]:
            raise UsageError(f"{path} holds the id {highest}, beyond the vocabulary of {meta['vocab_size']}")
    tokenizer = data_dir / "tokenizer.model"
    sha256 = read_json(tokenizer).get("sha256")
    if sha256 != meta["tokenizer"]["sha256"]:
        raise UsageError(f"{tokenizer} is not the tokenizer of these shards: its sha256 is not the one in meta.json")
    return meta


# ---------------------------------------------------------------------------------------------------------------------
# command line


@dataclass
class Config:
    """Read every byte of a folder of shards and check it against its manifest."""

    command: tyro.conf.Positional[Literal["verify"]]
    data_dir: tyro.conf.Positional[Path]
    """Folder with meta.json."""


def main():
    args = tyro.cli(Config)
    meta = verify(args.data_dir)
    for split in SPLITS:
        shards = [s for s in meta["shards"] if s["split"] == split]
        documents, tokens = (sum(s[k] for s in shards) for k in ("documents", "tokens"))
        print(f"{split:<5} {len(shards):>5} shards {documents:>12,} documents {tokens:>15,} tokens")
    print(f"{args.data_dir}: every sum is right")


if __name__ == "__main__":
    cli(main)
