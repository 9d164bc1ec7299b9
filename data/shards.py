"""The token format: write, read and verify shards.

A shard is llm.c's and modded-nanogpt's file: 256 little-endian int32 (magic 20240520, version 1, token count, zeros),
then the ids as little-endian uint16. Theirs train here (`data/prepare.py adopt`), ours train there. A folder of shards
also has a manifest, `meta.json`, and the tokenizer that made them, `tokenizer.model`:

    {"format": "bytes-to-lora/shards", "version": 1, "name": "pydocs",
     "source": {...}, "tokenizer": {"name", "sha256"}, "vocab_size": 4353, "eot": 4352,
     "shards": [{"file", "split": "train" | "val", "documents", "tokens", "bytes", "sha256"}, ...],
     "unigram_counts": "1280 0 31 ..."}

"bytes" counts the UTF-8 bytes of the text in a shard (what bits per byte are per), "documents" those that start in it;
every document starts with the end-of-text token, and a shard may end in the middle of one. "unigram_counts" says how
often each id occurs in the first 100M training tokens: vocab_size numbers in one line of text.

    python data/shards.py verify data/corpora/pydocs     # reads every byte; the trainer reads headers only
"""

from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from bpe.tokenizer import Tokenizer
from common import UsageError, atomic_open, cli, file_sha256, read_json, write_json

MAGIC, VERSION, HEADER_INTS = 20240520, 1, 256
HEADER_BYTES = 4 * HEADER_INTS
MAX_VOCAB = 1 << 16  # ids are uint16
FORMAT, FORMAT_VERSION = "bytes-to-lora/shards", 1
SPLITS = ("train", "val")
UNIGRAM_TOKENS = 100_000_000  # count ids in the first so many tokens


# --- one shard


def write_shard(path, ids):
    """Write token ids (tokens,) atomically to `path`. ids: an array, or an iterable of arrays to concatenate.

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
    """Map a shard into memory -> (tokens,) uint16. Checks header and size; UsageError if they are wrong."""
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path} is missing; prepare the corpus again")
    header = np.fromfile(path, "<i4", HEADER_INTS)
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
    return map_shard(path, tokens)


def map_shard(path, tokens):
    """Map a shard whose header has been checked -> (tokens,) uint16."""
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(tokens,))


def count_ids(ids):
    """How often each id occurs in a shard (tokens,) -> (65536,) int64, in pieces, for constant memory."""
    counts = np.zeros(MAX_VOCAB, dtype=np.int64)
    for at in range(0, len(ids), 1 << 22):
        counts += np.bincount(ids[at : at + (1 << 22)], minlength=MAX_VOCAB)
    return counts


# --- a folder of shards


def write_meta(data_dir, **fields):
    """Write the manifest (its fields: see the top). It is written last: a folder with a meta.json is complete."""
    meta = {"format": FORMAT, "version": FORMAT_VERSION, **fields}
    counts = " ".join(map(str, unigram_counts(data_dir, meta)))  # one line; an indented list would be 50,000
    write_json(Path(data_dir) / "meta.json", {**meta, "unigram_counts": counts})


def read_meta(data_dir):
    """The manifest of a folder of shards, as a dict (see the top of this file). UsageError where there is none."""
    path = Path(data_dir) / "meta.json"
    if not path.exists():
        raise UsageError(
            f"{data_dir} has no meta.json; make the corpus with data/prepare.py … --out {data_dir}, "
            f"or take in shards of another project with `data/prepare.py adopt {data_dir} --tokenizer gpt2`"
        )
    meta = read_json(path)
    found = (meta.get("format"), meta.get("version")) if isinstance(meta, dict) else None
    if found != (FORMAT, FORMAT_VERSION):
        raise UsageError(f"{path} is a manifest of {found}; this code reads {(FORMAT, FORMAT_VERSION)}")
    if lacking := {"name", "source", "tokenizer", "vocab_size", "eot", "shards"} - meta.keys():
        raise UsageError(f"{path} is damaged: it lacks {', '.join(sorted(lacking))}")
    return meta


def check_folder(data_dir):
    """Check headers and sizes of all shards against the manifest, and that it knows every shard -> the manifest.

    Reads one kilobyte per shard; the trainer does this at every start.
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


def open_split(data_dir, split, meta=None):
    """The shards of one split ("train" or "val") as a list of memory maps (tokens,) uint16, in the manifest's order.

    meta: what `check_folder` returned; without it the folder is checked here. Checksums are not read: see `verify`.
    """
    meta = meta or check_folder(data_dir)
    shards = [map_shard(Path(data_dir) / s["file"], s["tokens"]) for s in meta["shards"] if s["split"] == split]
    if not shards:
        raise UsageError(f"{data_dir} has no {split} shard, only {len(meta['shards'])} of the other split")
    return shards


def unigram_counts(data_dir, meta):
    """How often each id occurs in the first 100M tokens of the train split -> (vocab_size,) int64.

    Read from the manifest; counted where it is new, or from an earlier version that lacks them.
    """
    if "unigram_counts" in meta:
        return np.array(meta["unigram_counts"].split(), dtype=np.int64)
    counts, left = np.zeros(MAX_VOCAB, dtype=np.int64), UNIGRAM_TOKENS
    for shard in meta["shards"]:
        if shard["split"] == "train" and left:
            ids = map_shard(Path(data_dir) / shard["file"], shard["tokens"])[:left]
            counts += count_ids(ids)
            left -= len(ids)
    return counts[: meta["vocab_size"]]


def verify(data_dir: tyro.conf.Positional[Path]):
    """Read every byte of a folder of shards: checksums, ids below vocab_size, the tokenizer -> manifest.

    UsageError names the first file that is corrupt, truncated, foreign or missing.
    """
    data_dir, meta = Path(data_dir), check_folder(data_dir)
    for shard in tqdm(meta["shards"], unit="shard", disable=None):
        path = data_dir / shard["file"]
        if file_sha256(path) != shard["sha256"]:
            raise UsageError(f"{path} is corrupt: its sha256 is not the one in meta.json; prepare or download it again")
        highest = int(map_shard(path, shard["tokens"]).max())
        if highest >= meta["vocab_size"]:
            raise UsageError(f"{path} holds the id {highest}, beyond the vocabulary of {meta['vocab_size']}")
    tokenizer = data_dir / "tokenizer.model"
    if Tokenizer.load(tokenizer).sha256 != meta["tokenizer"]["sha256"]:
        raise UsageError(f"{tokenizer} is not the tokenizer of these shards: its sha256 is not the one in meta.json")
    print(f"{summary(meta['shards'])}\n{data_dir}: checksums match")
    return meta


def summary(shards):
    """Rows of a manifest -> a table: shards, documents, tokens and bytes a token of each split."""
    lines = []
    for split in SPLITS:
        rows = [s for s in shards if s["split"] == split]
        documents, tokens, size = (sum(s[k] for s in rows) for k in ("documents", "tokens", "bytes"))
        figures = f"{len(rows):>5} shards {documents:>12,} documents {tokens:>15,} tokens"
        lines.append(f"{split:<5} {figures} {size / max(tokens, 1):.2f} bytes/token")
    return "\n".join(lines)


def main():
    """`verify` by its name, the only command."""
    tyro.extras.subcommand_cli_from_dict({"verify": verify})


if __name__ == "__main__":
    cli(main)
