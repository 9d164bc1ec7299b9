"""Speed and memory of BPE training and encoding against other tokenizers; and how far each vocabulary compresses.

    python bench/bench_bpe.py --input handbook.txt --vocab-size 1024 --pattern none --minbpe ../minbpe
    python bench/bench_bpe.py --input tinyshakespeare.txt --vocab-size 4096 --pattern gpt4 --growth 1 10 100
    python bench/bench_bpe.py compression --input english.txt chinese.jsonl

Baselines: the naive algorithm (bpe/reference.py), Hugging Face `tokenizers`, `tiktoken` (encoding only), `rustbpe`
where it is installed, and minbpe from a checkout. Each turn is a process of its own. Ours uses one thread, `rustbpe`
and `tokenizers` as many as they like, unless --threads says otherwise. Timed is training from a str in memory to the
merges, and encoding of text that the tokenizer has not seen before: "cold" with an empty cache, "warm" after the
preceding part of the file went through it. Peak memory is what the process needed beyond its imports and the text.

compression: each text gets a tokenizer of its own, trained on nine tenths; bytes per token are those of the last tenth.
One training serves all sizes, since the first merges of a large vocabulary are the smaller vocabulary.
"""

import importlib
import os
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from itertools import islice
from pathlib import Path

import tyro
from tqdm import tqdm

from bench.harness import BenchConfig, Contestant, finish, measured, open_log, row, take_turns
from bpe import reference
from bpe.pretokenizer import PATTERNS, Splitter
from bpe.tokenizer import Tokenizer
from bpe.train_bpe import read_documents
from common import ROOT, UsageError, cli

MEASURED_PART = 4  # the last quarter of the text is encoded; the rest warms the caches
HELD_OUT = 10  # every tenth document is not trained on
DOCUMENT = 4000  # characters into which a text without documents is cut


@dataclass(kw_only=True)
class Speed(BenchConfig):
    """Time and memory of training and encoding."""

    input: Path  # text to train on and to encode
    vocab_size: int = 4096  # the 256 bytes and the merges
    pattern: str = "gpt4"  # how text is cut before merging: none, gpt2, gpt4 or a regular expression
    growth: tuple[int, ...] = ()  # megabytes of installed Python source to train on, each size by itself
    threads: int = 0  # threads that the others may use; 0: all cores
    minbpe: Path | None = None  # checkout of karpathy/minbpe
    run_dir: Path = ROOT / "runs" / "bench_bpe"  # run directory to write: table, picture, result.json
    rounds: int = 5  # turns of each contestant, in alternation; the median counts
    slow_seconds: float = 5.0  # who needs longer than this has a single turn
    limit_seconds: float = 150.0  # who needs longer than this for a turn is stopped

    def run(self):
        """Training, encoding and growth; what ours learns must equal what the naive algorithm learns."""
        text = "".join(read_documents([self.input]))
        tok = Tokenizer(self.pattern)  # refuses a wrong pattern before anything is measured
        os.environ |= {"RAYON_NUM_THREADS": str(self.threads or os.cpu_count()), "MINBPE": str(self.minbpe)}
        with open_log(self, "bench_bpe") as log:
            log.print(f"{self.input.name}: {len(text.encode()):,} bytes, vocab {self.vocab_size}, {self.pattern}")
            baselines = installed(log, self.minbpe)
            settings = (self.vocab_size, self.pattern)
            facts, rows = self.compare("train", training, baselines, text, settings, log)
            if "merges" in facts.get("naive", {}):
                same = facts["ours"]["merges"] == facts["naive"]["merges"]
                log.print(f"merges equal to those of the naive algorithm: {'yes' if same else 'NO'}")
                if not same:
                    raise RuntimeError("the merges differ from those of the naive algorithm")
            tok.train(text, self.vocab_size)
            # text that is not split is one chunk, of which nothing is cached
            kinds = {"encode": None} if self.pattern == "none" else {"encode cold": False, "encode warm": True}
            part = 0 if self.pattern == "none" else len(text) - len(text) // MEASURED_PART
            for name, warm in kinds.items():
                args = (text[:part] if warm else "", tok.merges, self.pattern)
                rows += self.compare(name, encoding, baselines, text[part:], args, log)[1]
            few = {who: baselines[who] for who in ("ours", "rustbpe", "tokenizers") if who in baselines}
            for megabytes in self.growth:
                name, source = f"train {megabytes} MB", python_source(megabytes * 10**6)
                rows += self.compare(name, training, few, source, settings, log)[1]
            finish(log, rows, "mb_per_sec", input=self.input.name, threads=self.threads or os.cpu_count())

    def compare(self, name, make, baselines, text, args, log):
        """Turns of everyone who can do it -> their facts, their rows."""
        able = TRAINERS if make is training else ENCODERS
        contestants = {who: Contestant(make, (who, text, *args)) for who in baselines if who in able}
        facts, rows, size = take_turns(contestants, self, log, name), [], len(text.encode())
        for who, f in facts.items():
            more = {"threads": (self.threads or os.cpu_count()) if who in ("rustbpe", "tokenizers") else 1}
            more |= {"mb_per_sec": size / 1e6 / f["seconds"]} if "seconds" in f else {}
            more |= {"ids_equal_ours": f["ids"] == facts["ours"].get("ids")} if "ids" in f else {}
            rows.append(row(name, baselines[who], f, facts["ours"], "seconds of ours", **more))
        return facts, rows


def installed(log, minbpe):
    """{key: name with version} of those that are installed; a line for those that are not. minbpe: its checkout."""
    names = {"ours": "ours", "naive": "naive (bpe/reference.py)"}
    if minbpe and not (minbpe / "minbpe/__init__.py").is_file():
        raise UsageError(f"{minbpe} is not a checkout of minbpe: it has no minbpe/__init__.py")
    names |= {"minbpe": "minbpe"} if minbpe else {}
    for package in ("rustbpe", "tokenizers", "tiktoken"):
        try:
            names[package] = f"{package} {version(package)}"
        except PackageNotFoundError:
            log.print(f"{package} is not installed: left out (pip install {package})")
    return names


def python_source(size):
    """`size` bytes of the Python files installed here, in order of their path; UsageError if there are not so many."""
    parts, total = [], 0
    for folder in ("stdlib", "purelib"):
        for file in sorted(Path(sysconfig.get_path(folder)).rglob("*.py")):
            parts.append(file.read_bytes().decode("utf-8", errors="replace"))
            total += len(parts[-1].encode("utf-8"))
            if total >= size:
                return "".join(parts).encode("utf-8")[:size].decode("utf-8", errors="ignore")
    raise UsageError(f"only {total:,} bytes of Python source are installed here; ask for less with --growth")


# ----------------------------------------------------------------------------------------------------------------------
# who trains: function of (text, vocab_size, pattern) -> merges, or None from those that keep them to themselves


def train_ours(text, vocab_size, pattern):
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
    source = r"[\s\S]+" if pattern == "none" else PATTERNS.get(pattern, pattern)
    importlib.import_module("rustbpe").Tokenizer().train_from_iterator([text], vocab_size, pattern=source)


def train_minbpe(text, vocab_size, pattern):
    tok = minbpe_tokenizer(pattern)
    tok.train(text, vocab_size)
    return list(tok.merges)


def minbpe_tokenizer(pattern):
    """A tokenizer of the minbpe in the checkout."""
    spec = spec_from_file_location("minbpe", Path(os.environ["MINBPE"]) / "minbpe/__init__.py")
    sys.modules["minbpe"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BasicTokenizer() if pattern == "none" else module.RegexTokenizer(PATTERNS.get(pattern, pattern))


TRAINERS = {"ours": train_ours, "naive": train_naive, "rustbpe": train_rustbpe, "tokenizers": train_tokenizers}
TRAINERS["minbpe"] = train_minbpe


# ----------------------------------------------------------------------------------------------------------------------
# who encodes: function of (our Tokenizer) -> a function text -> ids, with the same merges


def encoder_tokenizers(tok):
    """Through the tokenizer.json that we export."""
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as folder:
        tok.save_huggingface(folder)
        theirs = Tokenizer.from_file(f"{folder}/tokenizer.json")
    return lambda text: theirs.encode(text).ids


def encoder_minbpe(tok):
    theirs = minbpe_tokenizer(tok.pattern)
    theirs.merges = tok.merges
    return theirs.encode if tok.pattern == "none" else theirs.encode_ordinary


ENCODERS = {
    "ours": lambda tok: tok.encode_ordinary,
    "tiktoken": lambda tok: tok.to_tiktoken().encode_ordinary,
    "tokenizers": encoder_tokenizers,
    "minbpe": encoder_minbpe,
}


def training(who, text, vocab_size, pattern):
    """One of TRAINERS -> its `turn`, after a warm-up for imports and patterns, which sees nothing of the text."""
    TRAINERS[who]("warm up", 260, pattern)

    def turn():
        with measured() as facts:
            merges = TRAINERS[who](text, vocab_size, pattern)
        return facts | {"merges": merges}

    return turn


def encoding(who, text, before, merges, pattern):
    """One of ENCODERS -> its `turn`. before: what has gone through its cache."""
    tok = with_merges(Tokenizer(pattern), merges)
    encode = ENCODERS[who](tok)
    encode(" ".join(f"x{k}y" for k in range(99)))  # builds tables that are made at the first call; nothing of the text
    if before:
        encode(before)

    def turn():
        with measured() as facts:
            ids = encode(text)
        return facts | {"ids": ids}

    return turn


def with_merges(tok, merges):
    """A tokenizer of the same pattern with these merges."""
    new = Tokenizer(tok.pattern)
    new.__setstate__({**tok.__getstate__(), "merges": merges})
    return new


# ----------------------------------------------------------------------------------------------------------------------
# compression


@dataclass(kw_only=True)
class Compression:
    """Bytes per token on held-out text, against the size of the vocabulary."""

    input: tuple[
        Path, ...
    ]  # texts, each measured by itself: .jsonl (a document per line) or UTF-8 text, gzipped or not
    vocab_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # the 256 bytes and the merges
    pattern: str = "gpt4"  # how text is cut before merging: none, gpt2, gpt4 or a regular expression
    peer: str = "gpt2"  # a tokenizer to compare with: a tiktoken name or a rank file; empty: none
    run_dir: Path = ROOT / "runs" / "bench_compression"  # run directory to write: table, picture, result.json
    overwrite: bool = False  # replace a finished benchmark in the run directory

    def run(self):
        """Train at each size on one part of each text, measure on the other; table, picture, result.json."""
        if not self.input or min(self.vocab_sizes, default=0) < 256:
            raise UsageError("--input needs a file, and --vocab-sizes sizes of at least the 256 bytes")
        texts = {file.name.split(".")[0]: halves(file) for file in self.input}
        if len(texts) < len(self.input):
            raise UsageError("two files of --input have the same name up to its first dot; rename one")
        other = Tokenizer.from_tiktoken(self.peer) if self.peer else None
        with open_log(self, "bpe_compression") as log:
            finish(
                log, [r for name, halves in texts.items() for r in curve(name, *halves, self, other)], "bytes_per_token"
            )


def halves(file):
    """A text -> (documents to train on, documents held out); at least one of each, or a UsageError."""
    documents = list(read_documents([file]))
    if len(documents) == 1:
        documents = pieces(documents[0])
    held_out = documents[HELD_OUT - 1 :: HELD_OUT]
    del documents[HELD_OUT - 1 :: HELD_OUT]
    if not held_out:
        raise UsageError(f"{file} is too short: a tenth of it is no document of {DOCUMENT} characters")
    return documents, held_out


def pieces(text):
    """Cut a text after line ends into documents of DOCUMENT characters or a little more."""
    documents = [""]
    for line in text.splitlines(keepends=True):
        if len(documents[-1]) >= DOCUMENT:
            documents.append("")
        documents[-1] += line
    return documents


def curve(name, seen, unseen, cfg, other):
    """Yield one row per vocabulary size, smallest first, then the other's. A text without pairs left ends the sizes."""
    tok = Tokenizer(cfg.pattern)
    tok.train(seen, max(cfg.vocab_sizes))
    for size in sorted({min(size, tok.n_vocab) for size in cfg.vocab_sizes}):
        small = with_merges(tok, dict(islice(tok.merges.items(), size - 256)))  # merging is greedy, so a prefix it is
        yield compressed(name, "ours", small, unseen)
    if other:
        yield compressed(name, other.name, other, unseen)


def compressed(name, who, tok, documents):
    """One row: how the tokenizer does on the documents."""
    encoded = [tok.encode_ordinary(text) for text in tqdm(documents, desc=f"{name}, {who}", leave=False, disable=None)]
    tokens, size = sum(map(len, encoded)), sum(len(text.encode("utf-8")) for text in documents)
    return {
        "name": name, "who": who, "n_vocab": tok.n_vocab, "bytes": size, "tokens": tokens,
        "bytes_per_token": size / tokens, "chars_per_token": sum(map(len, documents)) / tokens,
        "vocab_used": len(set().union(*encoded)) / tok.n_vocab, "lever": f"{who} {tok.n_vocab:,}",
    }  # fmt: skip


def main():
    """Speed, unless the command line begins with another name."""
    args = sys.argv[1:]
    named = args[:1] in (["speed"], ["compression"], ["-h"], ["--help"])
    tyro.cli(Speed | Compression, args=args if named else ["speed", *args], description=__doc__).run()


if __name__ == "__main__":
    cli(main)
