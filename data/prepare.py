"""A corpus and a tokenizer -> shards, over all cores, resumably.

    python data/prepare.py pydocs --tokenizer tokenizer.model --out data/corpora/pydocs
    python data/prepare.py fineweb-edu --tokenizer gpt2 --out data/corpora/fineweb-edu            # 10B tokens
    python data/prepare.py fineweb-edu --input sample.parquet --tokenizer gpt2 --out data/corpora/sample

On n machines over a shared file system, each runs `--shard i/n` with i from 0; then one joins the parts. A machine of
more than some ten cores, too, is kept busy by several parts at once, because in each a single process reads the text:

    python data/prepare.py fineweb-edu --tokenizer gpt2 --out data/corpora/fineweb-edu --shard 0/4
    python data/prepare.py merge data/corpora/fineweb-edu

Ready-made GPT-2 shards of llm.c and modded-nanogpt, fetched, or lying there already:

    python data/prepare.py download fineweb-edu --shards 10 --out data/corpora/fineweb-edu-1B
    python data/prepare.py adopt data/corpora/fineweb10B --tokenizer gpt2

Documents are taken in blocks of about 2M characters. A process turns a block into ids and puts them, whole or not at
all, into DIR/blocks/; when all are there they are joined in order and cut into shards. So a killed run goes on with
the block that it was at, and the number of processes, machines and interruptions leaves no mark on the bytes. Until the
join is done the blocks take as much disk again as the shards.
"""

import itertools
import os
import re
import shutil
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import filelock
import numpy as np
import tyro
from tqdm import tqdm

from bpe.tokenizer import Tokenizer, load_tokenizer
from common import UsageError, atomic_open, cli, file_sha256, from_hub, read_json, write_json
from data.shards import MAX_VOCAB, SPLITS, count_ids, read_meta, read_shard, verify, write_meta, write_shard
from data.sources import VAL_SHARE, SourceName, describe, documents, is_validation, locate, text_bytes

IN_PROCESS_BLOCKS = 4  # so few are done before a pool has started


@dataclass
class Prepare:
    """Turn a corpus into shards. Other commands: merge DIR, adopt DIR, download CORPUS."""

    source: tyro.conf.Positional[SourceName]
    tokenizer: str
    """gpt2, or a PREFIX.model of bpe/train_bpe.py."""
    out: Path
    """Folder of the shards; its name becomes theirs."""
    input: tuple[Path, ...] = ()
    """Local files or folders (parquet, jsonl, text; gzipped too) instead of the hub's."""
    subset: str = "sample-10BT"
    """Part of fineweb-edu: sample-10BT, sample-100BT, sample-350BT, a crawl such as CC-MAIN-2024-10, or default."""
    text_field: str = "text"
    """Column or key that holds the text."""
    shard_tokens: int = 100_000_000
    """Tokens a shard; the last one has what is left."""
    val_share: float | None = None
    """Share of the documents held out by hash; the default is the source's own (fineweb-edu: its first shard)."""
    workers: int = 0
    """Processes that tokenize; 0: one for each core that this process may use."""
    block_chars: int = 1 << 21
    """Characters of text that a process takes at once; does not change the result."""
    shard: str = "0/1"
    """i/n: this machine's part, i from 0; afterwards `merge`."""
    overwrite: bool = False
    """Replace what lies in the folder when it is damaged or was made otherwise; a valid result is kept."""

    @property
    def options(self):
        return {"inputs": self.input, "subset": self.subset, "text_field": self.text_field}


@dataclass
class Merge:
    """Check the parts that several machines prepared with --shard i/n, and join them into shards."""

    out: tyro.conf.Positional[Path]
    """Folder that they all wrote to."""


@dataclass
class Adopt:
    """Write the manifest for shards of another project (llm.c, modded-nanogpt), so that they train here."""

    out: tyro.conf.Positional[Path]
    """Folder with NAME_train_000001.bin … and NAME_val_000000.bin."""
    tokenizer: str = "gpt2"
    """The tokenizer that made them."""


@dataclass
class Download:
    """Fetch ready-made GPT-2 shards from the hub (100M tokens, 200 MB each), and adopt them."""

    corpus: tyro.conf.Positional[Literal["fineweb", "fineweb-edu"]]
    out: Path
    """Folder of the shards."""
    shards: int = 10
    """How many training shards; the validation shard comes on top."""
    input: Path | None = None
    """A folder that already has the files, instead of the hub."""


# ---------------------------------------------------------------------------------------------------------------------
# prepare: documents -> blocks


def prepare(cfg):
    """Everything that this machine has to do; on one machine that includes the join."""
    part, parts = parse_shard(cfg.shard)
    tokenizer = load(cfg.tokenizer)
    plan = make_plan(cfg, tokenizer)
    if is_finished(cfg.out, plan, cfg.overwrite):
        print(f"{cfg.out} is finished and every sum is right: nothing to do")
        return
    check_target(cfg.out, plan, cfg.overwrite)
    with locked(cfg.out, f"part_{part}_of_{parts}"):
        begin(cfg.out, plan, tokenizer)
        tokenize(cfg, tokenizer, part, parts)
    if parts == 1:
        merge(cfg.out, tokenizer)
    else:
        print(f"part {cfg.shard} is done; when all are: python data/prepare.py merge {cfg.out.as_posix()}")


def parse_shard(shard):
    """ "1/4" -> (1, 4)"""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"--shard {shard} is not a part i/n with i from 0 to n-1")
    return int(match[1]), int(match[2])


def load(name):
    """A tokenizer fit for shards: ids below 65,536, and an end-of-text token."""
    tokenizer = load_tokenizer(name)
    if tokenizer.n_vocab > MAX_VOCAB:
        raise UsageError(f"{name} has {tokenizer.n_vocab:,} tokens; shards hold ids up to {MAX_VOCAB - 1:,}")
    if tokenizer.eot_token is None:
        raise UsageError(f"{name} has no <|endoftext|> token, which opens every document; train it with one")
    return tokenizer


def make_plan(cfg, tokenizer):
    """What decides the bytes of the result; recorded in plan.json, and from there in meta.json."""
    if min(cfg.shard_tokens, cfg.block_chars) < 1 or cfg.workers < 0:
        raise UsageError("--shard-tokens and --block-chars must be at least 1, --workers at least 0")
    if cfg.val_share is not None and not 0 < cfg.val_share < 1:
        raise UsageError(f"--val-share {cfg.val_share} is not between 0 and 1")
    share = VAL_SHARE[cfg.source] if cfg.val_share is None else cfg.val_share
    source = {**describe(cfg.source, **cfg.options), "val_share": share, "shard_tokens": cfg.shard_tokens}
    name = cfg.tokenizer if cfg.tokenizer.isidentifier() else Path(cfg.tokenizer).name
    tokenizer = {"name": name, "sha256": tokenizer.sha256}
    return {"name": cfg.out.resolve().name, "source": source, "tokenizer": tokenizer, "block_chars": cfg.block_chars}


def is_finished(out, plan, overwrite):
    """Whether `out` already holds exactly this result. UsageError where it holds another, unless overwrite."""
    if not (out / "meta.json").exists():
        return False
    try:
        meta = read_meta(out)
        if any(meta[key] != plan[key] for key in ("name", "source", "tokenizer")):
            raise UsageError(f"{out} was made from another corpus, with another tokenizer or options")
        verify(out)
    except UsageError as e:
        if overwrite:
            return False
        raise UsageError(f"{e}; choose another --out, or replace it with --overwrite") from None
    shutil.rmtree(out / "blocks", ignore_errors=True)  # a kill may have come just before
    (out / "plan.json").unlink(missing_ok=True)
    return True


def check_target(out, plan, overwrite):
    """Refuse a folder that holds something else, or with overwrite empty it of what this script writes."""
    other = None
    if (out / "meta.json").exists():
        other = "a corpus that was made otherwise"
    elif any((out / "blocks").glob("*.npz")):
        if read_json(out / "plan.json") != plan:
            other = "an unfinished corpus of another source, tokenizer or options"
    elif any(out.glob("*.bin")):
        other = "shards without a manifest (`adopt` takes them in)"
    if other and not overwrite:
        raise UsageError(f"{out} holds {other}; choose another --out, or replace it with --overwrite")
    if other:
        for path in (out / "meta.json", out / "plan.json", *out.glob("*.bin")):
            path.unlink(missing_ok=True)
        shutil.rmtree(out / "blocks", ignore_errors=True)


def begin(out, plan, tokenizer):
    """Leave the plan and the tokenizer for the other machines and the join."""
    tokenizer.save(out / "tokenizer")
    write_json(out / "plan.json", plan)


@contextmanager
def locked(out, what):
    """Keep a second process off the same part; the operating system drops the lock of one that died."""
    (out / "blocks").mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out / "blocks" / f"{what}.lock")
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise UsageError(f"{out} is being written by another process; wait for it") from None
    try:
        yield
    finally:
        lock.release()
        if not any((out / "blocks").glob("*.npz")):  # a mistake before the first block leaves nothing behind
            for path in (out / "plan.json", out / "tokenizer.model", out / "tokenizer.vocab"):
                path.unlink(missing_ok=True)
            shutil.rmtree(out / "blocks", ignore_errors=True)
            with suppress(OSError):
                out.rmdir()


def block_path(out, index):
    return out / "blocks" / f"{index:06d}.npz"


def blocks(texts, block_chars):
    """Group documents into lists of at least `block_chars` characters, the same whoever reads them."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= block_chars:
            yield block
            block, size = [], 0
    if block:
        yield block


def tokenize(cfg, tokenizer, part, parts):
    """Write this part's blocks; those already there are passed over. Few are in memory at a time."""
    share = VAL_SHARE[cfg.source] if cfg.val_share is None else cfg.val_share
    files = [] if cfg.source == "pydocs" else locate(cfg.source, cfg.input, cfg.subset)[0]
    total = sum(map(text_bytes, files)) or None
    count = tokens = 0
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", disable=None)

    def wanted():
        nonlocal count
        for index, block in enumerate(blocks(documents(cfg.source, **cfg.options), cfg.block_chars)):
            count = index + 1
            if index % parts == part and not block_path(cfg.out, index).exists():
                yield index, block
            else:
                bar.update(sum(map(len, block)))

    with bar:
        encode = Encoder(cfg.out, share, tokenizer)
        for size, ids in encode_blocks(encode, wanted(), cfg.workers or available_cores()):
            tokens += ids
            bar.update(size)
            bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):,.0f} tok/s", refresh=False)
    if not count:
        raise UsageError(f"{cfg.source} gave no document")
    write_json(cfg.out / "blocks" / "end.json", {"blocks": count})


def available_cores():
    """Cores that this process may use, which under a scheduler are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_blocks(encode, numbered, workers):
    """`encode` on `workers` processes over (index, block) pairs -> its results, in order.

    Processes and not threads, although tiktoken lets go of Python's lock: inside it two threads of one process wait for
    each other.
    """
    numbered = iter(numbered)
    first = list(itertools.islice(numbered, IN_PROCESS_BLOCKS))
    if workers == 1 or len(first) < IN_PROCESS_BLOCKS:
        yield from map(encode, itertools.chain(first, numbered))
        return
    # Nothing else runs in this process yet, so that Linux may fork, which spares each worker a second of imports.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(encode,)) as pool:
        pending = deque()
        try:
            for job in itertools.chain(first, numbered):
                pending.append(pool.submit(_work, job))
                if len(pending) > 2 * workers:  # the source waits: memory stays flat
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise UsageError("a worker was killed, perhaps for memory; start again, with fewer --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


class Encoder:
    """Documents -> a block file with the ids of both splits, an <|endoftext|> before each document."""

    def __init__(self, out, share, tokenizer):
        self.out, self.share = out, share
        self.encoding, self.eot = tokenizer.to_tiktoken(), np.array([tokenizer.eot_token], dtype=np.uint16)

    def __call__(self, job):
        """(index, texts) -> (characters, tokens), once the block is on disk."""
        index, texts = job
        parts, size = {split: [] for split in SPLITS}, 0
        for text in texts:
            held_out = self.share is not None and is_validation(text, self.share)
            ids = self.encoding.encode_to_numpy(text, disallowed_special=())  # a spelled-out special token is text
            parts["val" if held_out else "train"] += [self.eot, ids.astype(np.uint16)]
            size += len(text)
        arrays = {split: np.concatenate(ids) if ids else np.empty(0, np.uint16) for split, ids in parts.items()}
        with atomic_open(block_path(self.out, index), "wb") as f:
            np.savez(f, counts=[len(arrays[split]) for split in SPLITS], **arrays)  # a zip file: it carries checksums
        return size, sum(map(len, arrays.values()))


_encode = None  # of a worker process


def _start_worker(encode):
    global _encode
    _encode = encode
    # A worker whose parent was killed would wait for work for ever.
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def _work(job):
    return _encode(job)


# ---------------------------------------------------------------------------------------------------------------------
# merge: blocks -> shards


def merge(out, tokenizer=None):
    """Join the blocks of `out`, whoever wrote them, into shards and their manifest; then the blocks go.

    tokenizer: the one that lies in `out`, where it is loaded already.
    """
    if not (out / "plan.json").exists():
        raise UsageError(f"{out} has no parts to join: no plan.json")
    plan = read_json(out / "plan.json")
    with locked(out, "merge"):
        for path in out.glob(".*.part"):  # half a file, where an earlier join was killed
            path.unlink()
        counts = count_tokens(out)
        tokenizer = tokenizer or Tokenizer.load(out / "tokenizer.model")
        shards = []
        for split, index, start, stop in layout(counts, plan["source"]):
            path = out / f"{plan['name']}_{split}_{index:06d}.bin"
            stream = "train" if plan["source"]["val_share"] is None else split
            write_shard(path, cut_stream(out, counts, stream, start, stop))
            shards.append(shard_row(path, split, tokenizer))
        vocabulary = {"vocab_size": tokenizer.n_vocab, "eot": tokenizer.eot_token}
        given = {key: plan[key] for key in ("name", "source", "tokenizer")}
        write_meta(out, **given, **vocabulary, shards=shards)
    shutil.rmtree(out / "blocks", ignore_errors=True)
    (out / "plan.json").unlink()
    report(out, shards)


def count_tokens(out):
    """Check that every block is there and reads -> (blocks, 2) token counts, in the order of SPLITS."""
    if not (out / "blocks" / "end.json").exists():
        raise UsageError(f"{out} is not complete: no part has come to the end of the corpus; run them again")
    total = read_json(out / "blocks" / "end.json")["blocks"]
    missing = [i for i in range(total) if not block_path(out, i).exists()]
    if missing:
        raise UsageError(
            f"{out} lacks {len(missing)} of {total} blocks (the first is number {missing[0]}); "
            "run the parts --shard i/n again, all of them with the same n"
        )
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
    size = source["shard_tokens"]
    start = 0
    if source["val_share"] is None:  # the first shard, or a tenth where the corpus is small
        start = val = min(size, train // 10)
    if not val or train == start:
        raise UsageError(
            f"with {train + val * (source['val_share'] is not None):,} tokens no document fell to "
            f"{'validation' if not val else 'training'}; take more text, or another --val-share"
        )
    for index, at in enumerate(range(0, val, size)):
        yield "val", index, at, min(at + size, val)
    for index, at in enumerate(range(start, train, size)):
        yield "train", index + 1, at, min(at + size, train)


def cut_stream(out, counts, stream, start, stop):
    """Tokens start…stop of the blocks' joined arrays of one split, block by block."""
    ends = np.cumsum(counts[:, SPLITS.index(stream)])
    for index in range(int(np.searchsorted(ends, start, side="right")), len(ends)):
        begin = int(ends[index - 1]) if index else 0
        if begin >= stop:
            return
        yield read_block(out, index, stream)[max(start - begin, 0) : stop - begin]


def shard_row(path, split, tokenizer):
    """A shard's line in the manifest; counts the documents that start in it and the bytes of its text."""
    ids = read_shard(path)
    counts = count_ids(ids)
    if counts[tokenizer.n_vocab :].any():
        highest = int(counts.nonzero()[0][-1])
        raise UsageError(f"{path} holds the id {highest}, beyond the tokenizer's vocabulary of {tokenizer.n_vocab:,}")
    documents = int(counts[tokenizer.eot_token])
    size = int(counts[: tokenizer.n_vocab] @ np.array(tokenizer.byte_lengths()))
    row = {"file": path.name, "split": split, "documents": documents, "tokens": len(ids), "bytes": size}
    return {**row, "sha256": file_sha256(path)}


def report(out, shards):
    """Print documents, tokens and bytes of each split."""
    for split in SPLITS:
        rows = [s for s in shards if s["split"] == split]
        documents, tokens, size = (sum(s[k] for s in rows) for k in ("documents", "tokens", "bytes"))
        print(
            f"{split:<5} {len(rows):>5} shards {documents:>12,} documents {tokens:>15,} tokens "
            f"{size / max(tokens, 1):.2f} bytes/token"
        )
    print(f"{out}: ready")


# ---------------------------------------------------------------------------------------------------------------------
# shards of other projects

READY_MADE = {  # the hub's datasets of modded-nanogpt: (repository, file prefix, training shards)
    "fineweb": ("kjj0/fineweb10B-gpt2", "fineweb", 103),
    "fineweb-edu": ("kjj0/finewebedu10B-gpt2", "finewebedu", 99),
}


def adopt(out, tokenizer_name, source=None):
    """Write tokenizer.model and meta.json beside shards that have none."""
    source = source or {"source": "adopted"}
    refuse_another_corpus(out, source)
    paths = sorted(out.glob("*.bin"), key=lambda p: ("_val_" not in p.name, p.name))
    if not paths:
        raise UsageError(f"{out} holds no *.bin")
    for path in paths:
        if "_val_" not in path.name and "_train_" not in path.name:
            raise UsageError(f"{path} is neither NAME_train_000001.bin nor NAME_val_000000.bin; rename it")
        read_shard(path)
    tokenizer = load(tokenizer_name)
    rows = []
    for path in tqdm(paths, desc="adopting", unit="shard", disable=None):
        rows.append(shard_row(path, "val" if "_val_" in path.name else "train", tokenizer))
    tokenizer.save(out / "tokenizer")
    described = {"name": tokenizer_name if tokenizer_name.isidentifier() else Path(tokenizer_name).name}
    write_meta(
        out, name=paths[0].name.partition("_")[0], source=source,
        tokenizer={**described, "sha256": tokenizer.sha256}, vocab_size=tokenizer.n_vocab, eot=tokenizer.eot_token,
        shards=rows,
    )  # fmt: skip
    report(out, rows)


def refuse_another_corpus(out, source):
    """A folder holds the shards of one corpus: those of two in one manifest would be trained on as if they were one."""
    if (out / "plan.json").exists():
        raise UsageError(f"{out} is being prepared from a source; name another folder, or join that one with merge")
    if (out / "meta.json").exists() and (there := read_json(out / "meta.json").get("source")) != source:
        kind = there.get("source") if isinstance(there, dict) else there
        raise UsageError(f"{out} already holds a corpus from another source ({kind}); name another folder")


def download(cfg):
    """Fetch the validation shard and the first training shards; files already whole are not fetched again."""
    repo, prefix, available = READY_MADE[cfg.corpus]
    if not 1 <= cfg.shards <= available:
        raise UsageError(f"{repo} has {available} training shards; --shards {cfg.shards} is not among them")
    names = [f"{prefix}_val_000000.bin", *(f"{prefix}_train_{i:06d}.bin" for i in range(1, cfg.shards + 1))]
    source = {"source": "download", "hub": repo}
    refuse_another_corpus(cfg.out, source)
    for name in tqdm(names, desc="fetching", unit="shard", disable=None):
        try:
            read_shard(cfg.out / name)
        except UsageError:
            fetch(repo, name, cfg)
    adopt(cfg.out, "gpt2", source)


def fetch(repo, name, cfg):
    """One ready-made shard, from the hub or the local folder --input, whole or not at all."""
    if cfg.input is not None:
        if not (cfg.input / name).is_file():
            raise UsageError(f"{cfg.input / name} does not exist")
        with open(cfg.input / name, "rb") as source, atomic_open(cfg.out / name, "wb") as target:
            shutil.copyfileobj(source, target)
        return
    import huggingface_hub

    with from_hub(repo, "name a folder with --input"):
        huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", local_dir=cfg.out)


# ---------------------------------------------------------------------------------------------------------------------
# command line


def main():
    """merge, adopt and download by their names; else the name is a source."""
    command, rest = (sys.argv[1] if len(sys.argv) > 1 else ""), sys.argv[2:]
    if command == "merge":
        merge(tyro.cli(Merge, args=rest, prog="data/prepare.py merge").out)
    elif command == "adopt":
        cfg = tyro.cli(Adopt, args=rest, prog="data/prepare.py adopt")
        adopt(cfg.out, cfg.tokenizer)
    elif command == "download":
        download(tyro.cli(Download, args=rest, prog="data/prepare.py download"))
    else:
        prepare(tyro.cli(Prepare))


if __name__ == "__main__":
    cli(main)
