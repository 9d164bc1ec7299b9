"""A corpus and a tokenizer -> shards, over all cores, resumably.

    python data/prepare.py pydocs --tokenizer tokenizer.model --out data/corpora/pydocs
    python data/prepare.py fineweb-edu --tokenizer gpt2 --out data/corpora/fineweb-edu            # 10B tokens
    python data/prepare.py fineweb-edu --input sample.parquet --tokenizer gpt2 --out data/corpora/sample

On n machines over a shared file system, each runs `--shard i/n` with i from 0; then one merges the parts:

    python data/prepare.py fineweb-edu --tokenizer gpt2 --out data/corpora/fineweb-edu --shard 0/4
    python data/prepare.py merge data/corpora/fineweb-edu

Ready-made GPT-2 shards of llm.c and modded-nanogpt, downloaded, or already on disk:

    python data/prepare.py download fineweb-edu --shards 10 --out data/corpora/fineweb-edu-1B
    python data/prepare.py adopt data/corpora/fineweb10B --tokenizer gpt2

Documents are grouped into blocks of about 2M characters. Each of n processes reads all of them, tokenizes every n-th
block and writes it atomically to DIR/blocks/ (which takes as much disk as the shards); when all are there they are
merged in order and split into shards. So a killed run resumes at the block where it stopped, with the same bytes.
"""

import os
import re
import shutil
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import huggingface_hub
import numpy as np
import tyro
from tqdm import tqdm

from bpe.tokenizer import Tokenizer, load_tokenizer
from common import UsageError, atomic_open, available_cores, cli, file_sha256, from_hub, locked, read_json, write_json
from common.files import is_held_out
from common.usage import LIMIT, parse_shard, validate
from data import sources
from data.shards import MAX_VOCAB, SPLITS, count_ids, read_meta, read_shard, summary, verify, write_meta, write_shard
from data.sources import Corpus

READY_MADE = {  # the hub's datasets of modded-nanogpt: (repository, file prefix, training shards)
    "fineweb": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb-edu": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}
SHARD_NAME = re.compile(r"(.+)_(train|val)_\d+\.bin")


@dataclass(kw_only=True)
class Prepare(Corpus):
    """Turn a corpus into shards. Other commands: merge DIR, adopt DIR, download CORPUS."""

    tokenizer: str  # gpt2, or a PREFIX.model of bpe/train_bpe.py
    out: Path  # folder of the shards; its name becomes theirs
    shard_tokens: int = 100_000_000  # tokens a shard; the last one has what is left
    workers: int = 0  # processes that tokenize; 0: one for each core that this process may use
    block_chars: int = 1 << 21  # characters of text that a process takes at once; does not change the result
    shard: str = "0/1"  # i/n: this machine's part, i from 0; afterwards `merge`
    overwrite: bool = False  # replace what is in the folder if damaged or made otherwise; a valid result is kept


# --- prepare: documents -> blocks


def prepare(cfg):
    """Tokenize this machine's part; on a single machine, merge as well."""
    validate(cfg, {"shard_tokens": (1, LIMIT - 1), "block_chars": (1, LIMIT)})  # a header counts in int32
    part, parts = parse_shard(cfg.shard)
    name, tokenizer = load(cfg.tokenizer)
    plan = {  # what decides the bytes of the result
        "name": cfg.out.resolve().name,
        "source": {**cfg.describe(), "val_share": cfg.val_share, "shard_tokens": cfg.shard_tokens},
        "tokenizer": {"name": name, "sha256": tokenizer.sha256},
        "block_chars": cfg.block_chars,
    }
    if is_finished(cfg.out, plan, cfg.overwrite):
        return print("nothing to do")
    if not next(blocks(cfg.documents(), cfg.block_chars), None):  # fails before anything is written
        raise UsageError(f"{cfg.source} gave no document")
    with locked(cfg.out / f"blocks/part_{part}_of_{parts}.lock", cfg.out):
        tokenizer.save(cfg.out / "tokenizer")
        write_json(cfg.out / "blocks/plan.json", plan)  # for the other machines and the merge
        tokenize(cfg, part, parts)
    if cfg.source == "fineweb-edu" and not cfg.input:
        fetch_hellaswag()
    if parts == 1:
        merge(cfg.out)
    else:
        print(f"part {cfg.shard} is done; when all are: python data/prepare.py merge {cfg.out.as_posix()}")


def fetch_hellaswag():
    """The items that gpt2/train_gpt2.py scores on FineWeb-Edu, into the hub's cache: nodes may have no network."""
    with suppress(UsageError):  # training works without them
        sources.download("hellaswag")


def load(name):
    """A tokenizer fit for shards (ids below 65,536, an end-of-text token) -> (its name in the manifest, Tokenizer)."""
    tokenizer = load_tokenizer(name)
    if tokenizer.n_vocab > MAX_VOCAB:
        raise UsageError(f"{name} has {tokenizer.n_vocab:,} tokens; shards hold ids up to {MAX_VOCAB - 1:,}")
    if tokenizer.eot_token is None:
        raise UsageError(f"{name} has no <|endoftext|> token, which opens every document; train it with one")
    return name if name.isidentifier() else Path(name).name, tokenizer


def is_finished(out, plan, overwrite):
    """Whether `out` holds exactly this result already. Another one is refused, or with overwrite removed.

    An unfinished part of this result stays where it is: it is resumed.
    """
    try:
        if (out / "meta.json").exists():
            meta = read_meta(out)
            if any(meta[key] != plan[key] for key in ("name", "source", "tokenizer")):
                raise UsageError(f"{out} was made from another corpus, with another tokenizer or options")
            verify(out)
            shutil.rmtree(out / "blocks", ignore_errors=True)  # a kill may have come just before
            return True
        if (out / "blocks/plan.json").exists():
            if read_json(out / "blocks/plan.json") != plan:
                raise UsageError(f"{out} holds an unfinished corpus of another source, tokenizer or options")
        elif any(out.glob("*.bin")):
            raise UsageError(f"{out} holds shards without a manifest (`adopt` takes them in)")
    except UsageError as e:
        if not overwrite:
            raise UsageError(f"{e}; choose another --out, or replace it with --overwrite") from None
        for path in (out / "blocks").glob("*.lock"):  # of a process that would go on writing its own blocks here
            with locked(path, out):
                pass
        shutil.rmtree(out / "blocks", ignore_errors=True)
        for path in (out / "meta.json", *out.glob("*.bin")):
            path.unlink(missing_ok=True)
    return False


def block_path(out, index):
    return out / "blocks" / f"{index:06d}.npz"


def blocks(texts, block_chars):
    """Group documents into lists of at least `block_chars` characters, the same in every process."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= block_chars:
            yield block
            block, size = [], 0
    if block:
        yield block


def tokenize(cfg, part, parts):
    """Write this part's blocks, on several processes: each takes every n-th of its blocks.

    Processes, because threads would wait for the GIL. Each reads all of the text, which is many times as fast as
    tokenizing it.
    """
    workers = min(cfg.workers or available_cores(), 1 + cfg.text_bytes() // (4 * cfg.block_chars))  # 1 for a few blocks
    work = partial(write_blocks, cfg, parts * workers)
    if workers == 1:
        return work(part)
    # Nothing else runs in this process yet, so that Linux may fork, which spares each worker a second of imports.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, initializer=_end_with_parent) as pool:
        try:
            list(pool.map(work, range(part, parts * workers, parts)))
        except BrokenProcessPool:
            raise UsageError("a worker was killed, perhaps for memory; start again, with fewer --workers") from None


def _end_with_parent():
    """End a worker whose parent was killed; it would wait for work forever."""
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def write_blocks(cfg, parts, part):
    """Write the blocks of one part that are not there yet, and then the number of all blocks."""
    tokenizer = Tokenizer.load(cfg.out / "tokenizer.model")
    bar = tqdm(total=cfg.text_bytes(), unit="B", unit_scale=True, desc="tokenizing", disable=True if part else None)
    for index, block in enumerate(blocks(cfg.documents(), cfg.block_chars)):
        bar.update(sum(map(len, block)))
        path = block_path(cfg.out, index)
        if index % parts == part and not path.exists():
            arrays = encode(block, tokenizer, cfg.val_share)
            with atomic_open(path, "wb") as f:  # a zip file: it carries checksums
                np.savez(f, counts=[len(arrays[split]) for split in SPLITS], **arrays)
    bar.close()
    write_json(cfg.out / "blocks/end.json", {"blocks": index + 1})


def encode(texts, tokenizer, val_share):
    """Documents -> {split: ids (tokens,) uint16}, an <|endoftext|> before each; a spelled-out special token is text."""
    ids, lengths = tokenizer.encode_documents(texts)
    ids = np.insert(ids.astype(np.uint16), np.cumsum(lengths) - lengths, tokenizer.eot_token)
    held_out = np.array([val_share is not None and is_held_out(text, val_share) for text in texts], bool)
    in_val = np.repeat(held_out, lengths + 1)
    return {"train": ids[~in_val], "val": ids[in_val]}


# --- merge: blocks -> shards


def merge(out: tyro.conf.Positional[Path]):
    """Merge the blocks in OUT, written with --shard i/n, into shards and their manifest."""
    if not (out / "blocks/plan.json").exists():
        raise UsageError(f"{out} has no parts to merge: no blocks/plan.json")
    plan, tokenizer = read_json(out / "blocks/plan.json"), Tokenizer.load(out / "tokenizer.model")
    with locked(out / "blocks/merge.lock", out):
        for path in out.glob(".*.part"):  # left by a merge that was killed
            path.unlink()
        counts, paths = count_tokens(out), []
        for split, index, start, stop in layout(counts, plan["source"]):
            paths.append(out / f"{plan['name']}_{split}_{index:06d}.bin")
            stream = "train" if plan["source"]["val_share"] is None else split
            write_shard(paths[-1], cut_stream(out, counts, stream, start, stop))
        write_manifest(out, plan["source"], plan["tokenizer"]["name"], tokenizer, paths)
    shutil.rmtree(out / "blocks", ignore_errors=True)


def count_tokens(out):
    """Check that every block is there and readable -> (blocks, 2) token counts, in the order of SPLITS."""
    end = out / "blocks" / "end.json"
    total = read_json(end)["blocks"] if end.exists() else 0
    missing = [i for i in range(total) if not block_path(out, i).exists()]
    if missing or not total:
        lacks = f"{len(missing)} of {total}" if total else "the last of its"
        raise UsageError(f"{out} lacks {lacks} blocks; run the parts --shard i/n again, all of them with the same n")
    return np.array([read_block(out, i, "counts") for i in range(total)])


def read_block(out, index, name):
    """One array of a block, its checksum verified."""
    path = block_path(out, index)
    try:
        with np.load(path) as block:
            return block[name]
    except (BadZipFile, ValueError, KeyError, EOFError, OSError) as e:
        raise UsageError(f"{path} is damaged ({e}); delete it and run the same command again") from None


def layout(counts, source):
    """Where the shards begin and end: rows (split, number, start, stop) in tokens of that split's stream."""
    train, val = map(int, counts.sum(axis=0))
    size, start = source["shard_tokens"], 0
    if source["val_share"] is None:  # the first shard, or a tenth where the corpus is small
        start = val = min(size, train // 10)
    if not val or train == start:
        empty = "training" if val else "validation"
        raise UsageError(f"no document fell to {empty}; take more text, or another --val-share")
    rows = [("val", i, at, min(at + size, val)) for i, at in enumerate(range(0, val, size))]
    return rows + [("train", i, at, min(at + size, train)) for i, at in enumerate(range(start, train, size), 1)]


def cut_stream(out, counts, stream, start, stop):
    """Tokens start…stop of the concatenated blocks of one split, block by block."""
    ends = np.cumsum(counts[:, SPLITS.index(stream)])
    for index in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
        begin = int(ends[index - 1]) if index else 0
        if begin >= stop:
            return
        yield read_block(out, index, stream)[max(start - begin, 0) : stop - begin]


def write_manifest(out, source, tokenizer_name, tokenizer, paths):
    """Count tokens, documents and bytes of shards NAME_SPLIT_NUMBER.bin; write the tokenizer and, last, meta.json."""
    byte_lengths, shards = np.array(tokenizer.byte_lengths()), []
    for path in tqdm(paths, desc="counting", unit="shard", disable=None):
        name, split = SHARD_NAME.fullmatch(path.name).groups()
        counts = count_ids(read_shard(path))
        if (highest := int(counts.nonzero()[0][-1])) >= tokenizer.n_vocab:
            raise UsageError(f"{path} holds the id {highest}, beyond the tokenizer's vocabulary of {tokenizer.n_vocab}")
        facts = {"documents": int(counts[tokenizer.eot_token]), "tokens": int(counts.sum())}
        facts |= {"bytes": int(counts[: tokenizer.n_vocab] @ byte_lengths), "sha256": file_sha256(path)}
        shards.append({"file": path.name, "split": split, **facts})
    tokenizer.save(out / "tokenizer")
    identity = {"name": tokenizer_name, "sha256": tokenizer.sha256}
    vocabulary = {"vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token}
    write_meta(out, name=name, source=source, tokenizer=identity, **vocabulary, shards=shards)
    print(f"{summary(shards)}\n{out}: ready")


# --- ready-made shards


def adopt(out: tyro.conf.Positional[Path], tokenizer: str = "gpt2", hub: tyro.conf.Suppress[str] = ""):
    """Write the manifest for shards of another project (llm.c, modded-nanogpt), so that they train here.

    OUT has NAME_train_000001.bin … and NAME_val_000000.bin; TOKENIZER is the one that made them.
    """
    source = {"source": "download", "hub": hub} if hub else {"source": "adopted"}
    refuse_another_corpus(out, source)
    paths = sorted(out.glob("*.bin"), key=lambda p: ("_val_" not in p.name, p.name))
    names = {SHARD_NAME.sub(r"\1", path.name) for path in paths}
    if len(names) != 1 or not SHARD_NAME.fullmatch(paths[0].name):
        there = f"there are {', '.join(sorted(names))}" if names else "there is no *.bin"
        raise UsageError(f"{out} must hold NAME_train_000001.bin … and NAME_val_000000.bin of one NAME; {there}")
    write_manifest(out, source, *load(tokenizer), paths)


def refuse_another_corpus(out, source):
    """A folder holds the shards of one corpus: those of two in one manifest would be trained on as one."""
    if (out / "blocks").exists():
        raise UsageError(f"{out} is being prepared from a source; name another folder, or finish that one with merge")
    if (out / "meta.json").exists() and (there := read_meta(out)["source"]) != source:
        raise UsageError(f"{out} already holds a corpus from another source ({there['source']}); name another folder")


def download(corpus: tyro.conf.Positional[Literal["fineweb", "fineweb-edu"]], out: Path, shards: int = 10):
    """Download a validation shard and SHARDS training shards of GPT-2 tokens (100M, 200 MB each), and adopt them.

    Complete files are not downloaded again. `adopt` alone takes in a folder of them from elsewhere.
    """
    repo, prefix, available = READY_MADE[corpus]
    if not 1 <= shards <= available:
        raise UsageError(f"{repo} has {available} training shards; --shards {shards} is not among them")
    refuse_another_corpus(out, {"source": "download", "hub": repo})
    names = [f"{prefix}_val_000000.bin", *(f"{prefix}_train_{i:06d}.bin" for i in range(1, shards + 1))]
    with from_hub(repo, f"bring its files to {out} and take them in with `adopt`"):
        huggingface_hub.snapshot_download(repo, repo_type="dataset", local_dir=out, allow_patterns=names)
        for name in names:  # without a network, the hub's library returns a folder as it is
            read_shard(out / name)
    adopt(out, hub=repo)
    fetch_hellaswag()


def main():
    """The commands merge, adopt and download; any other first argument is a source."""
    commands = {"merge": merge, "adopt": adopt, "download": download}
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in commands:
        tyro.cli(commands[command], args=sys.argv[2:], prog=f"data/prepare.py {command}")
    else:
        prepare(tyro.cli(Prepare))


if __name__ == "__main__":
    cli(main)
