"""How many bytes a token covers, against the size of the vocabulary.

    python bench/compression.py --input english.txt chinese.jsonl
    python bench/compression.py --input book.txt --vocab-sizes 512 1024 2048 --pattern gpt2

Each text gets a tokenizer of its own, trained on nine tenths; the figures are those of the tenth that it has not seen.
One training serves all sizes: the first merges of a large vocabulary are the smaller vocabulary. GPT-2's tokenizer
encodes the same text for comparison. A table on the terminal; `result.json` and `compression.png` in the run
directory.
"""

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import tyro
from tqdm import tqdm

from bpe.tokenizer import Tokenizer
from bpe.train_bpe import read_documents
from common import ROOT, UsageError, atomic_open, cli
from runlog import RunLog

HELD_OUT = 10  # every tenth document
DOCUMENT = 4000  # characters into which a text without documents is cut
COLORS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"


@dataclass
class Config:
    input: tuple[Path, ...]
    """texts, each measured by itself: .jsonl (a document per line) or UTF-8 text, gzipped or not"""
    vocab_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    """the 256 bytes and the merges"""
    pattern: str = "gpt4"
    """how text is cut before merging: none, gpt2, gpt4 or a regular expression"""
    peer: str | None = "gpt2"
    """a tokenizer to compare with: a tiktoken name or a rank file"""
    run_dir: Path = ROOT / "runs" / "compression"
    """where result.json, log.txt and compression.png go"""


def main():
    """Train at each size on one part of each text, measure on the other; table, picture, result.json."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    if not cfg.input or not cfg.vocab_sizes:
        raise UsageError("--input and --vocab-sizes each need a value")
    if min(cfg.vocab_sizes) < 256:
        raise UsageError(f"a vocabulary has the 256 bytes at least; leave out --vocab-sizes {min(cfg.vocab_sizes)}")
    texts = {file.name.split(".")[0]: halves(file) for file in cfg.input}
    if len(texts) < len(cfg.input):
        raise UsageError("two files of --input have the same name up to its first dot; rename one")
    peer = Tokenizer.from_tiktoken(cfg.peer) if cfg.peer else None
    with RunLog(cfg.run_dir, kind="bpe_compression", config=cfg) as log:
        log.print(f"{'text':<24} {'vocab':>7} {'bytes/tok':>9} {'chars/tok':>9} {'used':>7}")
        rows = []
        for name, (seen, unseen) in texts.items():
            for row in curve(name, seen, unseen, cfg, peer):
                log.print(
                    f"{name:<24} {row['n_vocab']:>7,} {row['bytes_per_token']:>9.3f} {row['chars_per_token']:>9.3f} "
                    f"{row['vocab_used']:>7.1%}  {row['who']}"
                )
                rows.append(row)
        plot(rows, cfg, log.run_dir / "compression.png")
        log.finish("success", rows=rows)


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
    documents, size = [[]], 0
    for line in text.splitlines(keepends=True):
        if size >= DOCUMENT:
            documents.append([])
            size = 0
        documents[-1].append(line)
        size += len(line)
    return ["".join(lines) for lines in documents]


def curve(name, seen, unseen, cfg, peer):
    """Yield one row per vocabulary size, smallest first, then the peer's. A text without pairs left ends the sizes."""
    tok = Tokenizer(cfg.pattern)
    tok.train(seen, max(cfg.vocab_sizes), progress=True)
    for size in sorted({min(size, tok.n_vocab) for size in cfg.vocab_sizes}):
        yield measured(name, "ours", prefix(tok, size), unseen)
    if peer:
        yield measured(name, peer.name, peer, unseen)


def prefix(tok, vocab_size):
    """The tokenizer of the first merges: what training to the smaller size gives, since merging is greedy."""
    small = Tokenizer(tok.pattern)
    small.__setstate__({**tok.__getstate__(), "merges": dict(islice(tok.merges.items(), vocab_size - 256))})
    return small


def measured(name, who, tok, documents):
    """One row: how the tokenizer does on the documents."""
    encoded = [tok.encode_ordinary(text) for text in tqdm(documents, desc=f"{name}, {who}", leave=False, disable=None)]
    tokens, size = sum(map(len, encoded)), sum(len(text.encode("utf-8")) for text in documents)
    used = len(set().union(*encoded))
    return {
        "name": name,
        "who": who,
        "n_vocab": tok.n_vocab,
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": round(size / tokens, 4),
        "chars_per_token": round(sum(map(len, documents)) / tokens, 4),
        "vocab_used": round(used / tok.n_vocab, 4),
    }


def plot(rows, cfg, file):
    """One line per text, and a star where the peer stands."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(6.4, 4), dpi=130, layout="constrained")
    ax = fig.subplots()
    for name, color in zip(dict.fromkeys(r["name"] for r in rows), COLORS * len(rows)):
        ours = [r for r in rows if r["name"] == name and r["who"] == "ours"]
        x, y = [r["n_vocab"] for r in ours], [r["bytes_per_token"] for r in ours]
        ax.plot(x, y, marker="o", ms=4, color=color, label=name)
        for r in (r for r in rows if r["name"] == name and r["who"] != "ours"):
            ax.plot(r["n_vocab"], r["bytes_per_token"], marker="*", ms=10, ls="", color=color)
    if cfg.peer:
        ax.plot([], [], marker="*", ms=10, ls="", color="#444444", label=cfg.peer)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="vocabulary (tokens)", ylabel="bytes per token, text not trained on")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    with atomic_open(file, "wb") as f:
        fig.savefig(f, format="png")


if __name__ == "__main__":
    cli(main)
