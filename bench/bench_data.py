"""How much of tiktoken's own speed data/prepare.py keeps.

    python bench/bench_data.py --run-dir runs/bench_data
    python bench/bench_data.py --input fineweb_edu_sample.txt --megabytes 200 --run-dir runs/bench_data

tiktoken alone encodes documents that lie in memory, on all cores, and throws the ids away: with encode_ordinary_batch,
as its users do on threads, and with encode_ordinary in processes, as build-nanogpt does. prepare reads the same
documents from a jsonl file, starts its processes, hashes every document, writes blocks, joins them into shards and
computes checksums. The ratio is the speed over that of the faster of tiktoken's two ways. A start costs prepare about
two seconds whatever the corpus.
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import tyro

from bench.harness import BenchConfig, Contestant, finish, measured, open_log, row, take_turns
from bpe.tokenizer import load_tokenizer
from common import ROOT, cli
from data.prepare import Prepare, available_cores, prepare
from data.sources import documents


@dataclass(kw_only=True)
class Config(BenchConfig):
    run_dir: Path = ROOT / "runs" / "bench_data"  # run directory to write
    input: tuple[Path, ...] = ()  # local text; none: pydocs
    megabytes: int = 100  # size of the corpus: the documents are repeated up to it
    tokenizer: str = "gpt2"  # gpt2, or a PREFIX.model


_encoding = None  # of a worker process


def _start(name):
    global _encoding
    _encoding = load_tokenizer(name).to_tiktoken()


def _encode(texts):
    return sum(len(_encoding.encode_ordinary(text)) for text in texts)


def contestant(way, tokenizer, corpus):
    """Set up one way of tokenizing the whole corpus, a jsonl file -> its `turn`."""
    encoding, cores = load_tokenizer(tokenizer).to_tiktoken(), available_cores()
    texts = list(documents("jsonl", [corpus]))
    chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]

    def batches():
        for chunk in chunks:
            encoding.encode_ordinary_batch(chunk, num_threads=cores)

    def turn():
        """Tokenize the whole corpus once."""
        with (
            tempfile.TemporaryDirectory(dir=corpus.parent) as folder,
            ProcessPoolExecutor(cores, get_context("spawn"), initializer=_start, initargs=(tokenizer,)) as pool,
        ):
            list(pool.map(_encode, [texts[:8]] * 4 * cores))  # the processes are up before the clock starts
            settings = Prepare("jsonl", tokenizer=tokenizer, out=Path(folder) / "corpus", input=(corpus,))
            ways = {"batches": batches, "processes": lambda: sum(pool.map(_encode, chunks))}
            with measured() as facts:
                ways.get(way, lambda: prepare(settings))()
        return {"seconds": facts["seconds"], "peak_mb": None}  # most of the memory is that of other processes

    return turn


def main():
    """Let prepare.py and tiktoken alone take turns; table and result.json."""
    cfg = tyro.cli(Config, description=__doc__)
    once = list(documents("files" if cfg.input else "pydocs", cfg.input))
    texts = once * -(-cfg.megabytes * 10**6 // sum(len(text.encode("utf-8")) for text in once))
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    with open_log(cfg, "bench_data") as log, tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.jsonl"
        with open(corpus, "w", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        tiktoken = f"tiktoken {version('tiktoken')}"
        ways = {"batches": f"{tiktoken} encode_ordinary_batch", "processes": f"{tiktoken} encode_ordinary, processes"}
        ways |= {"prepare": "ours"}
        contestants = {way: Contestant(contestant, (way, cfg.tokenizer, corpus)) for way in ways}
        facts, rows = take_turns(contestants, cfg, log, "data", keep=True), []
        best = min(("batches", "processes"), key=lambda way: facts[way].get("seconds", float("inf")))
        for way, f in facts.items():
            speed = {"mb_per_sec": megabytes / f["seconds"]} if "seconds" in f else {}
            rows.append(row("data", ways[way], f, facts[best], f"speed of {ways[best]}", speedup=True, **speed))
        finish(log, rows, "mb_per_sec", megabytes=megabytes, cores=available_cores())


if __name__ == "__main__":
    cli(main)
