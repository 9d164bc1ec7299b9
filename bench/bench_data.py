"""Speed of data/prepare.py relative to tiktoken alone.

    python bench/bench_data.py --run-dir runs/bench_data
    python bench/bench_data.py --input fineweb_edu_sample.txt --megabytes 200 --run-dir runs/bench_data

tiktoken alone encodes documents in memory, on all cores, and discards the ids: with encode_ordinary_batch on threads,
and with encode_ordinary in processes, as build-nanogpt does. prepare reads the same
documents from a jsonl file, starts its processes, hashes every document, writes blocks, merges them into shards and
computes checksums. The ratio is the speed over that of the faster of tiktoken's two methods. Starting prepare takes
about two seconds for any corpus.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import tyro

from bench.harness import BenchConfig, Contestant, finish, open_log, row, take_turns, timed
from bpe.tokenizer import load_tokenizer
from common import available_cores, cli
from data.prepare import Prepare, prepare
from data.sources import documents


@dataclass(kw_only=True)
class Config(BenchConfig):
    slow_seconds: float = 30.0  # a contestant slower than this has a single turn
    input: tuple[Path, ...] = ()  # local text; none: pydocs
    megabytes: int = 100  # size of the corpus: the documents are repeated to reach it
    tokenizer: str = "gpt2"  # gpt2, or a PREFIX.model


@cache
def _encode_ordinary(tokenizer):
    return load_tokenizer(tokenizer).to_tiktoken().encode_ordinary


def _count(tokenizer, texts):
    return sum(len(_encode_ordinary(tokenizer)(text)) for text in texts)


def contestant(way, tokenizer, corpus):
    """Set up one way of tokenizing the whole corpus, a jsonl file -> its `turn`."""
    cores, count = available_cores(), partial(_count, tokenizer)
    texts = list(documents("jsonl", [corpus]))
    chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    if way.endswith("batch"):
        batch = load_tokenizer(tokenizer).to_tiktoken().encode_ordinary_batch
        return timed(lambda: [len(batch(chunk, num_threads=cores)) for chunk in chunks], "tokens")

    def in_processes():
        with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
            list(pool.map(count, [texts[:8]] * 4 * cores))  # start the processes before measuring
            return timed(lambda: list(pool.map(count, chunks)), "tokens")()

    def prepare_anew():
        out = Path(tempfile.mkdtemp(dir=corpus.parent)) / "corpus"
        prepare(Prepare("jsonl", tokenizer=tokenizer, out=out, input=(corpus,)))

    return in_processes if way.endswith("processes") else timed(prepare_anew, "tokens")


def main():
    """Measure prepare.py and tiktoken in alternation; table and result.json."""
    cfg = tyro.cli(Config, description=__doc__)
    once = list(documents("files" if cfg.input else "pydocs", cfg.input))
    texts = once * -(-cfg.megabytes * 10**6 // sum(len(text.encode("utf-8")) for text in once))
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    tiktoken = f"tiktoken {version('tiktoken')} encode_ordinary"
    ways = (f"{tiktoken}_batch", f"{tiktoken}, processes", "ours")
    with open_log(cfg, "bench_data") as log, tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with open(corpus, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        contestants = {way: Contestant(contestant, (way, cfg.tokenizer, corpus)) for way in ways}
        facts, rows = take_turns(contestants, cfg, log, "data", keep=True), []
        best = min(ways[:2], key=lambda way: facts[way].get("seconds", float("inf")))
        for way, f in facts.items():
            more = {"mb_per_sec": megabytes / f["seconds"]} if "seconds" in f else {}
            more["peak_mb"] = None  # most of the memory belongs to other processes
            rows.append(row("data", way, f, facts[best], f"speed of {best}", speedup=True, **more))
        finish(log, rows, "mb_per_sec", megabytes=megabytes, cores=available_cores())


if __name__ == "__main__":
    cli(main)
