"""Speed and memory of training and encoding, ours and the peers', measured in one run.

    python bench/bench_bpe.py --input handbook.txt --vocab-size 1024 --pattern none
    python bench/bench_bpe.py --input tinyshakespeare.txt --vocab-size 4096 --pattern gpt4 --minbpe ../minbpe
    python bench/bench_bpe.py --input tinyshakespeare.txt --pattern gpt4 --growth 1 10 100

The peers are the naive algorithm (bpe/reference.py), Hugging Face `tokenizers`, `tiktoken` (encoding only), `rustbpe`
where it is installed, and minbpe where --minbpe names a checkout. Each measurement is a process of its own, the
contestants take turns, and the median of --rounds is reported; who needs longer than --slow-seconds has one turn, who
needs longer than --limit-seconds is stopped, and the row says so. Ours uses one thread; the others as many as they
like, unless --threads says otherwise.

What is timed: training from a str in memory to the merges. Encoding of text that the tokenizer has not seen before:
"cold" with an empty cache, "warm" after the preceding part of the file went through it. Peak memory is what the process
needed beyond its imports and the text.

--growth MB… trains on that much Python source and documentation as installed on this machine, to show how time grows.
"""

import multiprocessing
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import tyro
from tqdm import tqdm

from bpe import reference
from bpe.pretokenizer import PATTERNS, Splitter
from bpe.tokenizer import Tokenizer
from bpe.train_bpe import read_documents
from common import ROOT, UsageError, atomic_open, cli, peak_memory_mb
from runlog import RunLog

MEASURED_PART = 4  # the last quarter of the text is encoded; the rest warms the caches


@dataclass
class Config:
    input: Path
    """text to train on and to encode"""
    vocab_size: int = 4096
    """the 256 bytes and the merges"""
    pattern: str = "gpt4"
    """how text is cut before merging: none, gpt2, gpt4 or a regular expression"""
    minbpe: Path | None = None
    """checkout of karpathy/minbpe to measure as well"""
    growth: tuple[int, ...] = ()
    """megabytes of Python source to train on, each size by itself"""
    rounds: int = 5
    """turns of each contestant; the median counts"""
    slow_seconds: float = 5.0
    """who needs longer than this has a single turn"""
    limit_seconds: float = 150.0
    """who needs longer than this is stopped"""
    threads: int = 0
    """threads that the peers may use; 0: all cores"""
    run_dir: Path = ROOT / "runs" / "bench_bpe"
    """where result.json, log.txt and bench.png go"""


def main():
    """Training, encoding and growth, as the flags ask; table, metrics.jsonl and result.json."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    text = read_text(cfg.input)
    if cfg.minbpe and not (cfg.minbpe / "minbpe" / "__init__.py").is_file():
        raise UsageError(f"{cfg.minbpe} is not a checkout of minbpe: it has no minbpe/__init__.py")
    Tokenizer(cfg.pattern)  # refuses a wrong pattern before anything is measured
    with RunLog(cfg.run_dir, kind="bench_bpe", config=cfg) as log:
        log.print(f"{cfg.input.name}: {len(text.encode()):,} bytes, vocab {cfg.vocab_size}, pattern {cfg.pattern}")
        log.print(f"{platform.machine()}, {os.cpu_count()} cores; peers on {cfg.threads or os.cpu_count()} threads")
        contestants = peers(cfg, log)
        rows = training(cfg, text, contestants, log) + encoding(cfg, text, contestants, log)
        rows += growth(cfg, contestants, log)
        log.print(table(rows))
        plot(rows, cfg, log.run_dir / "bench.png")
        log.print(f"wrote {log.run_dir.name}/result.json and bench.png")
        log.finish("success", input_bytes=len(text.encode()), rows=rows)


def read_text(file):
    """The text of a file, documents run together."""
    return "".join(read_documents([file]))


# ----------------------------------------------------------------------------------------------------------------------
# the contestants: who -> function of (text, vocab_size, pattern) that trains; and one that makes an encoder


def train_ours(text, vocab_size, pattern):
    """As every train_*: text -> merges, or None from those that keep them to themselves."""
    tok = Tokenizer(pattern)
    tok.train(text, vocab_size)
    return list(tok.merges)


def train_naive(text, vocab_size, pattern):
    return list(reference.train(Splitter(pattern)(text), vocab_size - 256))


def train_tokenizers(text, vocab_size, pattern):
    """Hugging Face's BPE trainer on bytes, split by the same pattern."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    source = Regex(PATTERNS.get(pattern, pattern))
    split = [] if pattern == "none" else [pre_tokenizers.Split(source, "isolated")]
    tok.pre_tokenizer = pre_tokenizers.Sequence([*split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([text], trainer)


def train_rustbpe(text, vocab_size, pattern):
    import rustbpe

    source = r"[\s\S]+" if pattern == "none" else PATTERNS.get(pattern, pattern)
    rustbpe.Tokenizer().train_from_iterator([text], vocab_size, pattern=source)


def train_minbpe(text, vocab_size, pattern, folder):
    minbpe = load_minbpe(folder)
    source = PATTERNS.get(pattern, pattern)
    tok = minbpe.BasicTokenizer() if pattern == "none" else minbpe.RegexTokenizer(source)
    tok.train(text, vocab_size)


def load_minbpe(folder):
    """Import a checkout without putting it on the path."""
    init = folder / "minbpe" / "__init__.py"
    spec = spec_from_file_location("minbpe", init, submodule_search_locations=[str(init.parent)])
    sys.modules["minbpe"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TRAINERS = {
    "ours": train_ours,
    "naive": train_naive,
    "rustbpe": train_rustbpe,
    "tokenizers": train_tokenizers,
    "minbpe": train_minbpe,
}


def encoder_ours(tok):
    """As every encoder_*: our Tokenizer -> a function text -> ids of the contestant, with the same merges."""
    return tok.encode_ordinary


def encoder_tiktoken(tok):
    return tok.to_tiktoken().encode_ordinary


def encoder_tokenizers(tok):
    """Through the tokenizer.json that we export."""
    import tempfile

    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tok.save_huggingface(folder)
        theirs = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return lambda text: theirs.encode(text).ids


def encoder_minbpe(tok, folder):
    minbpe = load_minbpe(folder)
    source = PATTERNS.get(tok.pattern, tok.pattern)
    theirs = minbpe.BasicTokenizer() if tok.pattern == "none" else minbpe.RegexTokenizer(source)
    theirs.merges, theirs.vocab = tok.merges, tok.vocab
    return theirs.encode if tok.pattern == "none" else theirs.encode_ordinary


ENCODERS = {
    "ours": encoder_ours,
    "tiktoken": encoder_tiktoken,
    "tokenizers": encoder_tokenizers,
    "minbpe": encoder_minbpe,
}


def peers(cfg, log):
    """{key: name with version} of those that are here; a line for those that are not."""
    names = {"ours": "ours", "naive": "naive (bpe/reference.py)"}
    for package in ("rustbpe", "tokenizers", "tiktoken"):
        try:
            names[package] = f"{package} {version(package)}"
        except PackageNotFoundError:
            log.print(f"{package} is not installed: left out (pip install {package})")
    if cfg.minbpe:
        names["minbpe"] = "minbpe"
    else:
        log.print("no --minbpe DIR: minbpe left out")
    return names


# ----------------------------------------------------------------------------------------------------------------------
# one measurement, in a process of its own


def timed_training(who, text, vocab_size, pattern, minbpe):
    """Train once in a fresh process -> the measurement; peak memory is what training adds."""
    train = partial(TRAINERS[who], folder=minbpe) if who == "minbpe" else TRAINERS[who]
    train("warm up", 260, pattern)  # imports and compiled patterns; nothing of the text
    before = peak_memory(reset=True)
    started = time.perf_counter()
    merges = train(text, vocab_size, pattern)
    return {"seconds": time.perf_counter() - started, "peak_mb": peak_memory() - before, "merges": merges}


def timed_encoding(who, text, warm, merges, pattern, minbpe):
    """Encode once in a fresh process -> the measurement; warm: with what came before in the cache."""
    tok = Tokenizer(pattern)
    tok.__setstate__({**tok.__getstate__(), "merges": merges})
    encode = ENCODERS[who](tok, minbpe) if who == "minbpe" else ENCODERS[who](tok)
    encode(" ".join(f"x{k}y" for k in range(99)))  # builds tables that are made at the first call; nothing of the text
    part = len(text) - len(text) // MEASURED_PART if warm is not None else 0
    if warm:
        encode(text[:part])
    before = peak_memory(reset=True)
    started = time.perf_counter()
    ids = encode(text[part:])
    return {"seconds": time.perf_counter() - started, "peak_mb": peak_memory() - before, "ids": ids}


def peak_memory(reset=False):
    """Highest resident memory of this process in MB, since the last reset where the system can reset it (Linux)."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except OSError:
        return peak_memory_mb() or 0.0


def _child(pipe, function, args):
    pipe.send(function(*args))


def in_own_process(function, args, limit_seconds):
    """Run function(*args) in a fresh interpreter -> its result, or None if it had to be stopped."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_child, args=(there, function, args), daemon=True)
    process.start()
    there.close()
    try:
        result = here.recv() if here.poll(limit_seconds) else None
        process.join(10 if result else 0)
        return result
    except EOFError:
        raise RuntimeError(f"{function.__name__}{args[:1]} failed; its own message is above") from None
    finally:
        process.kill()
        process.join()


def contest(cfg, log, name, contestants, size, call):
    """Let contestants take turns -> {who: row}. `call(who)` gives the function and its arguments."""
    seconds, peaks, first = {who: [] for who in contestants}, {}, {}
    for turn in range(cfg.rounds):
        for who in tqdm(contestants, desc=f"{name}, round {turn + 1}", leave=False, disable=None):
            if turn and (not seconds[who] or seconds[who][0] > cfg.slow_seconds):
                continue
            result = in_own_process(*call(who), cfg.limit_seconds)
            if result is None:
                log.print(f"{name}: {contestants[who]} stopped after {cfg.limit_seconds:.0f} s")
                continue
            seconds[who].append(result.pop("seconds"))
            peaks.setdefault(who, []).append(result.pop("peak_mb"))
            first.setdefault(who, result)
    rows = {}
    for who, label in contestants.items():
        row = {"name": name, "who": label, "turns": len(seconds[who]), "threads": threads_of(who, cfg)}
        if seconds[who]:
            median = statistics.median(seconds[who])
            ratio = median / statistics.median(seconds["ours"])
            row |= {"seconds": round(median, 5), "mb_per_sec": round(size / 1e6 / median, 3)}
            row |= {"peak_mb": round(statistics.median(peaks[who]), 1), "ratio": round(ratio, 3)}
        else:
            row |= {"stopped_after_seconds": cfg.limit_seconds, "ratio": None}
        rows[who] = row | {"ratio_to": "seconds of ours"}
    return rows, first


def threads_of(who, cfg):
    """Threads that a contestant may use; ours, tiktoken and minbpe have one."""
    several = who in ("rustbpe", "tokenizers")
    return (cfg.threads or os.cpu_count()) if several else 1


# ----------------------------------------------------------------------------------------------------------------------
# the three parts


def training(cfg, text, contestants, log):
    """Rows of training on the whole text. Ours must have made the merges of the naive algorithm."""
    os.environ["RAYON_NUM_THREADS"] = str(cfg.threads or os.cpu_count())
    names = {who: label for who, label in contestants.items() if who in TRAINERS}
    size = len(text.encode())
    rows, first = contest(
        cfg, log, "train", names, size,
        lambda who: (timed_training, (who, text, cfg.vocab_size, cfg.pattern, cfg.minbpe)),
    )  # fmt: skip
    if "naive" in first:
        same = first["ours"]["merges"] == first["naive"]["merges"]
        rows["ours"]["merges_equal_naive"] = same
        log.print(f"merges equal to those of the naive algorithm: {'yes' if same else 'NO'}")
        if not same:
            raise RuntimeError("the merges differ from those of the naive algorithm")
    return list(rows.values())


def encoding(cfg, text, contestants, log):
    """Rows of encoding, with the vocabulary that ours learns from the text."""
    tok = Tokenizer(cfg.pattern)
    tok.train(text, cfg.vocab_size)
    names = {who: label for who, label in contestants.items() if who in ENCODERS}
    part = text if cfg.pattern == "none" else text[len(text) - len(text) // MEASURED_PART :]
    # unsplit text is one chunk, of which nothing is cached
    kinds = {"encode": None} if cfg.pattern == "none" else {"encode cold": False, "encode warm": True}
    rows = []
    for name, warm in kinds.items():
        got, first = contest(
            cfg, log, name, names, len(part.encode()),
            lambda who, warm=warm: (timed_encoding, (who, text, warm, tok.merges, cfg.pattern, cfg.minbpe)),
        )  # fmt: skip
        for who, result in first.items():
            got[who]["ids_equal_ours"] = result["ids"] == first["ours"]["ids"]
        rows += got.values()
    return rows


def growth(cfg, contestants, log):
    """Rows of training on more and more text."""
    rows = []
    names = {who: label for who, label in contestants.items() if who in ("ours", "rustbpe", "tokenizers")}
    for megabytes in cfg.growth:
        text = python_source(megabytes * 10**6)
        log.print(f"{megabytes} MB of Python source: {len(text):,} characters")
        got, _ = contest(
            cfg, log, f"train {megabytes} MB", names, len(text.encode()),
            lambda who, text=text: (timed_training, (who, text, cfg.vocab_size, cfg.pattern, None)),
        )  # fmt: skip
        rows += got.values()
    return rows


def python_source(size):
    """`size` bytes of the Python files installed here, in order of their path; UsageError if there are not so many."""
    import sysconfig

    parts, total = [], 0
    for folder in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            data = file.read_bytes().decode("utf-8", errors="replace")
            parts.append(data)
            total += len(data.encode("utf-8"))
            if total >= size:
                return "".join(parts).encode("utf-8")[:size].decode("utf-8", errors="ignore")
    raise UsageError(f"only {total:,} bytes of Python source are installed here; ask for less with --growth")


# ----------------------------------------------------------------------------------------------------------------------
# showing it


def table(rows):
    """The rows as text, a line each."""
    lines = [f"{'what':<13} {'who':<26} {'seconds':>9} {'MB/s':>9} {'peak MB':>8} {'thr':>3} {'× ours':>9}"]
    for r in rows:
        left = f"{r['name']:<13} {r['who']:<26}"
        if "seconds" in r:
            numbers = f"{r['seconds']:>9.4f} {r['mb_per_sec']:>9.3f} {r['peak_mb']:>8.1f} {r['threads']:>3}"
            lines.append(f"{left} {numbers} {r['ratio']:>9.2f}")
        else:
            lines.append(f"{left} stopped after {r['stopped_after_seconds']:.0f} s")
    return "\n".join(lines)


def plot(rows, cfg, file):
    """Bars of MB/s for each part, and lines of seconds over megabytes where growth was measured."""
    from matplotlib.figure import Figure

    done = [r for r in rows if "seconds" in r]
    parts = [name for name in dict.fromkeys(r["name"] for r in done) if not name.endswith("MB")]
    grown = [r for r in done if r["name"].endswith("MB")]
    fig = Figure(figsize=(4 * (len(parts) + bool(grown)), 3.4), dpi=130, layout="constrained")
    axes = list(fig.subplots(1, len(parts) + bool(grown), squeeze=False)[0])
    for ax, name in zip(axes, parts):
        some = sorted((r for r in done if r["name"] == name), key=lambda r: r["mb_per_sec"])
        labels, speeds = [r["who"].split(" (")[0] for r in some], [r["mb_per_sec"] for r in some]
        colors = ["#D55E00" if r["who"] == "ours" else "#8FB8D8" for r in some]
        ax.bar_label(ax.barh(labels, speeds, color=colors), fmt="%.3g", padding=3, fontsize=8)
        decades = max(speeds) / min(speeds) > 50
        ax.set(xscale="log" if decades else "linear", xlabel="MB/s (log)" if decades else "MB/s", title=name)
        ax.margins(x=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    if grown:
        for who in dict.fromkeys(r["who"] for r in grown):
            some = [r for r in grown if r["who"] == who]
            sizes = [float(r["name"].split()[1]) for r in some]
            axes[-1].plot(sizes, [r["seconds"] for r in some], marker="o", label=who)
        axes[-1].set(xscale="log", yscale="log", xlabel="MB of Python source", ylabel="seconds", title="training grows")
        axes[-1].legend(frameon=False, fontsize=8)
        axes[-1].grid(alpha=0.25, which="both")
    fig.suptitle(f"{cfg.input.name}, vocab {cfg.vocab_size}, pattern {cfg.pattern}", fontsize=10)
    with atomic_open(file, "wb") as f:
        fig.savefig(f, format="png")


if __name__ == "__main__":
    cli(main)
