"""How much of tiktoken's own speed data/prepare.py keeps, measured in one run.

    python bench/bench_data.py --run-dir runs/bench_data
    python bench/bench_data.py --input fineweb_edu_sample.txt --megabytes 200 --run-dir runs/bench_data

tiktoken alone encodes documents that lie in memory, on all cores, and throws the ids away: with encode_ordinary_batch,
as its users do on threads, and with encode_ordinary in processes, as build-nanogpt does. prepare reads the same
documents from a jsonl file, starts its processes, hashes every document, writes blocks, joins them into shards and sums
them. The contestants take turns; the median of the rounds counts, and the ratio is to the faster of tiktoken's two
ways. A start costs prepare about two seconds whatever the corpus.
"""

import json
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import tyro

from bpe.tokenizer import load_tokenizer
from common import cli
from data.prepare import Prepare, available_cores, prepare
from data.sources import documents
from runlog import RunLog


@dataclass
class Config:
    run_dir: Path
    """Run directory to write."""
    input: tuple[Path, ...] = ()
    """Local text; none: pydocs."""
    megabytes: int = 100
    """Size of the corpus: the documents are repeated up to it."""
    tokenizer: str = "gpt2"
    """gpt2, or a PREFIX.model."""
    rounds: int = 3
    """Turns of each contestant."""


def corpus(cfg):
    """Documents, repeated up to the size -> list of str."""
    once = list(documents("files" if cfg.input else "pydocs", cfg.input))
    times = -(-cfg.megabytes * 10**6 // sum(len(text.encode("utf-8")) for text in once))
    return once * times


_encoding = None  # of a worker process


def _start(name):
    global _encoding
    _encoding = load_tokenizer(name).to_tiktoken()


def _encode(texts):
    return sum(len(_encoding.encode_ordinary(text)) for text in texts)


def contestants(cfg, texts, folder, pool):
    """{name: function that tokenizes the whole corpus once}"""
    encoding, cores = load_tokenizer(cfg.tokenizer).to_tiktoken(), available_cores()
    chunks = [texts[i : i + 256] for i in range(0, len(texts), 256)]
    source = folder / "corpus.jsonl"
    with open(source, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)

    def batches():
        for chunk in chunks:
            encoding.encode_ordinary_batch(chunk, num_threads=cores)

    def ours():
        out = Path(tempfile.mkdtemp(dir=folder)) / "corpus"
        prepare(Prepare("jsonl", tokenizer=cfg.tokenizer, out=out, input=(source,)))
        shutil.rmtree(out)

    return {
        "encode_ordinary_batch": batches,
        "encode_ordinary, processes": lambda: sum(pool.map(_encode, chunks)),
        "prepare": ours,
    }


def main():
    """Let prepare.py and tiktoken alone take turns; table and result.json."""
    cfg = tyro.cli(Config)
    texts = corpus(cfg)
    megabytes = sum(len(text.encode("utf-8")) for text in texts) / 1e6
    cores = available_cores()
    with (
        RunLog(cfg.run_dir, "bench", cfg) as log,
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(cores, get_context("spawn"), initializer=_start, initargs=(cfg.tokenizer,)) as pool,
    ):
        list(pool.map(_encode, [texts[:8]] * 4 * cores))  # the processes are up before the clock starts
        runs = contestants(cfg, texts, Path(folder), pool)
        seconds = {name: [] for name in runs}
        for turn in range(cfg.rounds):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - started)
                log.metric(turn, name, seconds=seconds[name][-1], mb_per_sec=megabytes / seconds[name][-1])
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        peer = min((name for name in medians if name != "prepare"), key=medians.get)
        rows = []
        for name, s in medians.items():
            who = "ours" if name == "prepare" else f"tiktoken {version('tiktoken')}"
            rows.append(
                {"name": name, "who": who, "seconds": s, "mb_per_sec": megabytes / s, "ratio": medians[peer] / s}
            )
            log.print(f"{name:<26} {s:6.2f} s   {megabytes / s:6.1f} MB/s   {medians[peer] / s:.2f} of {peer}")
        log.finish("success", rows=rows, ratio_to=peer, megabytes=megabytes, cores=cores)


if __name__ == "__main__":
    cli(main)
