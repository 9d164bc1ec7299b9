"""Speed and memory of BPE training and encoding against other tokenizers; and how far each vocabulary compresses.

    python bench/bench_bpe.py --input handbook.txt --vocab-size 1024 --pattern none --minbpe ../minbpe
    python bench/bench_bpe.py --input tinyshakespeare.txt --vocab-size 4096 --pattern gpt4 --growth 1 10 100
    python bench/bench_bpe.py encode --input english.txt chinese.txt --tokenizers gpt2 cl100k_base
    python bench/bench_bpe.py compression --input english.txt chinese.jsonl

Baselines: the naive algorithm (bpe/reference.py), Hugging Face `tokenizers`, `tiktoken` (encoding only), a checkout of
karpathy/minbpe, and if installed `rustbpe`, `fastokens` and `gigatoken` (encoding only; those that cannot read the
pattern fail). Each turn is a process of its own. Ours, `tiktoken` and minbpe use one thread, the others --threads,
which defaults to all cores. Timed are training, from a str in memory to the merges, and encoding of text that the
tokenizer has not seen before: "cold" with an empty cache, "warm" after encoding the preceding part of the file. Peak
memory is that of the process beyond its imports and the text.

encode: published vocabularies. Each turn loads one from its library's file, encodes a line ("first call"), the first
half of the text ("cold") and the second half ("warm"); ratios are tiktoken's time to that of the row.

compression: each text gets its own tokenizer, trained on nine tenths; bytes per token are measured on the last tenth.
One training serves all sizes, since the first merges of a large vocabulary are the smaller vocabulary.
"""

import base64
import importlib
import os
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import islice, product
from operator import sub
from pathlib import Path
from typing import Literal

import tiktoken
import tyro
from tqdm import tqdm

from bench.harness import BenchConfig, Contestant, finish, open_log, row, take_turns, timed
from bpe import reference
from bpe.pretokenizer import PATTERNS, Splitter
from bpe.tokenizer import Tokenizer, load_tokenizer
from common import UsageError, cli, read_documents, read_json, write_json
from data.sources import documents

HELD_OUT = 10  # every tenth document is not trained on


@dataclass(kw_only=True)
class Config(BenchConfig):
    mode: tyro.conf.Positional[Literal["speed", "encode", "compression"]] = "speed"
    input: tuple[Path, ...]  # .jsonl (a document per line) or UTF-8 text, gzipped or not; but for speed, each by itself
    pattern: str = "gpt4"  # how text is cut before merging: none, gpt2, gpt4 or a regular expression
    vocab_size: int = 4096  # speed: the 256 bytes and the merges
    growth: tuple[int, ...] = ()  # speed: megabytes of installed Python source to train on, each size by itself
    threads: int = 0  # speed: threads that the others may use; 0: all cores
    minbpe: Path | None = None  # speed: checkout of karpathy/minbpe
    tokenizers: tuple[str, ...] = ("gpt2",)  # encode: what `load_tokenizer` reads: tiktoken's names, files
    vocab_sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)  # compression: as vocab_size


def speed(cfg):
    """Training, encoding and growth; our merges must equal those of the naive algorithm."""
    text, tok = "".join(read_documents(cfg.input)), Tokenizer(cfg.pattern)  # which refuses a wrong pattern
    trainers, encoders = baselines(cfg.minbpe)
    cfg.threads = cfg.threads or os.cpu_count()
    os.environ["RAYON_NUM_THREADS"] = str(cfg.threads)
    with open_log(cfg, "bench_bpe") as log:
        log.print(f"{cfg.input[0].name}: {len(text.encode()):,} bytes, vocab {cfg.vocab_size}, {cfg.pattern}")
        settings = (cfg.vocab_size, cfg.pattern)
        facts, rows = compare(cfg, log, "train", training, trainers, text, settings)
        if "merges" in facts[NAIVE]:
            if facts["ours"].get("merges") != facts[NAIVE]["merges"]:
                raise RuntimeError("the merges differ from those of the naive algorithm")
            log.print("merges equal to those of the naive algorithm: yes")
        tok.train(text, cfg.vocab_size)
        # The last quarter of the text is encoded; the rest warms the caches, which text that is not split does not use.
        kinds = {"encode": False} if cfg.pattern == "none" else {"encode cold": False, "encode warm": True}
        part = 0 if cfg.pattern == "none" else len(text) - len(text) // 4
        for name, warm in kinds.items():
            rows += compare(cfg, log, name, encoding, encoders, text[part:], (text[:part] if warm else "", tok))[1]
        fast = {who: train for who, train in trainers.items() if who not in (NAIVE, "minbpe")}
        for megabytes in cfg.growth:
            source = python_source(megabytes * 10**6)
            rows += compare(cfg, log, f"train {megabytes} MB", training, fast, source, settings)[1]
        finish(log, rows, "mb_per_sec", input=cfg.input[0].name, threads=cfg.threads)


def compare(cfg, log, name, make, functions, text, args):
    """Turns of all trainers or all encoders -> their facts, their rows."""
    contestants = {who: Contestant(make, (function, text, *args)) for who, function in functions.items()}
    facts, rows, size = take_turns(contestants, cfg, log, name), [], len(text.encode())
    for who, f in facts.items():
        more = {"threads": 1 if who.startswith(("ours", "naive", "tiktoken", "minbpe")) else cfg.threads}
        more |= {"mb_per_sec": size / 1e6 / f["seconds"]} if "seconds" in f else {}
        more |= {"ids_equal_ours": f["ids"] == facts["ours"].get("ids")} if "ids" in f else {}
        rows.append(row(name, who, f, facts["ours"], "seconds of ours", **more))
    return facts, rows


def training(train, text, vocab_size, pattern):
    """A trainer -> its `turn`, after a warm-up for imports and patterns on other text."""
    train("warm up", 260, pattern)
    return timed(lambda: train(text, vocab_size, pattern), "merges")


def encoding(encoder, text, before, tok):
    """An encoder -> its `turn`. before: text that it encodes first, to fill its cache."""
    with tempfile.TemporaryDirectory() as folder:
        encode = encoder(tok, Path(folder))()
    encode(" ".join(f"x{k}y" for k in range(99)))  # builds the tables of the first call, on other text
    encode(before)
    return timed(lambda: encode(text), "ids")


PHASES = ("load", "first call", "cold", "warm")


def encode(cfg):
    """Load, first call, cold and warm encoding of each text by each published vocabulary."""
    texts, rows = {file.name: "".join(read_documents([file])) for file in cfg.input}, []
    vocabularies = {name: load_tokenizer(name) for name in cfg.tokenizers}
    encoders = baselines(None)[1]
    with open_log(cfg, "bench_bpe_encode") as log:
        for (vocab, tok), (file, text) in product(vocabularies.items(), texts.items()):
            middle, name = len(text) // 2, f"{vocab}, {file}"
            parts = [text[middle:].lstrip()[:80].split("\n")[0], text[:middle], text[middle:]]
            contestants = {who: Contestant(phases, (encoder, tok, parts)) for who, encoder in encoders.items()}
            facts = take_turns(contestants, cfg, log, name)
            for (phase, part), (who, f) in product(zip(PHASES, ["", *parts]), facts.items()):
                mine, theirs = ({"seconds": each[phase]} if phase in each else each for each in (f, facts[TIKTOKEN]))
                more = {"ids_equal_ours": f["ids"] == facts["ours"].get("ids")} if "ids" in f else {}
                if phase in ("cold", "warm") and "seconds" in mine:
                    more["mb_per_sec"] = len(part.encode("utf-8")) / 1e6 / mine["seconds"]
                rows.append(row(f"{name}, {phase}", who, mine, theirs, f"speed of {TIKTOKEN}", speedup=True, **more))
        finish(log, rows, "mb_per_sec")


def phases(encoder, tok, parts):
    """An encoder -> its `turn`: it loads the vocabulary from a file, then encodes the parts."""
    folder = tempfile.TemporaryDirectory()
    load = encoder(tok, Path(folder.name))

    def turn():
        """Its seconds by phase, in all, and the ids."""
        clock, ids = [time.perf_counter()], []
        encode = load()
        clock.append(time.perf_counter())
        for part in parts:
            ids.append(encode(part))
            clock.append(time.perf_counter())
        folder.cleanup()
        return dict(zip(PHASES, map(sub, clock[1:], clock))) | {"seconds": clock[-1] - clock[0], "ids": ids}

    return turn


def with_merges(tok, merges):
    """A tokenizer of the same pattern with these merges."""
    new = Tokenizer(tok.pattern)
    new.__setstate__({**tok.__getstate__(), "merges": merges})
    return new


def python_source(size):
    """`size` bytes of the installed Python files, in order of their paths; UsageError if there are fewer."""
    data = bytearray()
    for folder in map(Path, (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))):
        for file in sorted(folder.rglob("*.py")):
            if len(data) >= size:
                return data[:size].decode("utf-8", errors="ignore")
            data += file.read_bytes()
    raise UsageError(f"only {len(data):,} bytes of Python source are installed here; ask for less with --growth")


# trainers: function of (text, vocab_size, pattern) -> merges, or None from libraries that do not expose them
# encoders: function of (our Tokenizer, folder for its file) -> a function that loads it -> a function text -> ids

NAIVE, TIKTOKEN = "naive (bpe/reference.py)", f"tiktoken {version('tiktoken')}"


def baselines(minbpe):
    """Trainers and encoders by name with version, ours first. minbpe: a folder or None."""
    trainers = {"ours": train_ours, NAIVE: train_naive, f"tokenizers {version('tokenizers')}": train_tokenizers}
    encoders = {"ours": encoder_ours, TIKTOKEN: encoder_tiktoken}
    for library in filter(find_spec, ("tokenizers", "fastokens", "gigatoken")):
        encoders[f"{library} {version(library)}"] = partial(encoder_of_json, library)
    if find_spec("rustbpe"):
        trainers[f"rustbpe {version('rustbpe')}"] = train_rustbpe
    if minbpe:
        minbpe_tokenizer(minbpe, "none")  # fail now, not in its turn
        trainers["minbpe"] = partial(train_ours, make=partial(minbpe_tokenizer, minbpe))
        encoders["minbpe"] = partial(encoder_minbpe, minbpe)
    return trainers, encoders


def train_ours(text, vocab_size, pattern, make=Tokenizer):
    """Our tokenizer, or minbpe's, which has the same interface."""
    tok = make(pattern)
    tok.train(text, vocab_size)
    return list(tok.merges)


def train_naive(text, vocab_size, pattern):
    return list(reference.train(Splitter(pattern)(text), vocab_size - 256))


def train_rustbpe(text, vocab_size, pattern):
    source = r"[\s\S]+" if pattern == "none" else PATTERNS.get(pattern, pattern)
    importlib.import_module("rustbpe").Tokenizer().train_from_iterator([text], vocab_size, pattern=source)


def train_tokenizers(text, vocab_size, pattern):
    """Hugging Face's BPE trainer on bytes, split by the same pattern."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tok, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), "isolated")
    tok.pre_tokenizer = byte_level if pattern == "none" else pre_tokenizers.Sequence([split, byte_level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([text], trainer)


def encoder_ours(tok, folder):
    file = tok.save(folder / "ours")[0]
    return lambda: Tokenizer.load(file).encode_ordinary


def encoder_tiktoken(tok, folder):
    """tiktoken, which reads the rank file that we export."""
    encoding = tok.to_tiktoken()  # which refuses what tiktoken cannot express
    tok.save_tiktoken(folder / "ranks.tiktoken")
    return lambda: encode_by_ranks(folder / "ranks.tiktoken", encoding._pat_str, encoding._special_tokens)


def encode_by_ranks(file, pattern, special_tokens):
    """tiktoken's encode function for a rank file, which it reads in this way."""
    pairs = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    options = {"pat_str": pattern, "mergeable_ranks": ranks, "special_tokens": special_tokens}
    return tiktoken.Encoding(file.stem, **options).encode_ordinary


# GPT-4's pattern as conversions on the hub spell it, by which gigatoken knows it
GPT4_ON_THE_HUB = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def encoder_of_json(library, tok, folder):
    """A library that reads the tokenizer.json that we export."""
    make = importlib.import_module(library).Tokenizer
    tok.save_huggingface(folder)
    data = read_json(folder / "tokenizer.json")
    for part in data["pre_tokenizer"].get("pretokenizers", ()):
        if part["type"] == "Split" and part["pattern"].get("Regex", "").startswith("'(?i:[sdmt]|ll|ve|re)"):
            part["pattern"]["Regex"] = GPT4_ON_THE_HUB
            write_json(folder / "tokenizer.json", data)

    def load():
        theirs = getattr(make, "from_file", make)(f"{folder}/tokenizer.json")
        return lambda text: theirs.encode(text).tolist() if library == "gigatoken" else theirs.encode(text).ids

    return load


def minbpe_tokenizer(folder, pattern):
    """A tokenizer of a minbpe checkout."""
    spec = spec_from_file_location("minbpe", folder / "minbpe" / "__init__.py")
    sys.modules["minbpe"] = module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BasicTokenizer() if pattern == "none" else module.RegexTokenizer(PATTERNS.get(pattern, pattern))


def encoder_minbpe(checkout, tok, folder):
    theirs = minbpe_tokenizer(checkout, tok.pattern)
    theirs.merges = tok.merges
    return lambda: theirs.encode


def compression(cfg):
    """Bytes per token on held-out text by vocabulary size, and for each text those of GPT-2's vocabulary."""
    if min(cfg.vocab_sizes) < 256:
        raise UsageError("--vocab-sizes are sizes of at least the 256 bytes")
    texts, gpt2, rows = [halves(file) for file in cfg.input], Tokenizer.from_tiktoken("gpt2"), []
    with open_log(cfg, "bench_compression") as log:
        for file, (seen, unseen) in zip(cfg.input, texts):
            name, tok = file.name.split(".")[0], Tokenizer(cfg.pattern)
            tok.train(seen, max(cfg.vocab_sizes))
            for size in sorted({min(size, tok.n_vocab) for size in cfg.vocab_sizes}):
                merges = islice(tok.merges.items(), size - 256)  # merging is greedy: a smaller vocabulary is a prefix
                rows.append(compressed(name, "ours", with_merges(tok, dict(merges)), unseen))
            rows.append(compressed(name, "gpt2", gpt2, unseen))
        finish(log, rows, "bytes_per_token")


def halves(file):
    """A text -> (documents to train on, documents held out); UsageError if it has fewer than ten."""
    docs = list(documents("jsonl" if ".jsonl" in file.suffixes else "files", [file]))
    if len(docs) < HELD_OUT:
        raise UsageError(f"{file} is too short: it has {len(docs)} documents of a few kB, and every tenth is held out")
    return [text for i, text in enumerate(docs, 1) if i % HELD_OUT], docs[HELD_OUT - 1 :: HELD_OUT]


def compressed(name, who, tok, docs):
    """The row of a tokenizer on the documents."""
    encoded = [tok.encode_ordinary(text) for text in tqdm(docs, desc=f"{name}, {who}", leave=False, disable=None)]
    tokens, size = sum(map(len, encoded)), sum(len(text.encode("utf-8")) for text in docs)
    more = {"n_vocab": tok.n_vocab, "bytes": size, "tokens": tokens, "bytes_per_token": size / tokens}
    return {"name": name, "who": who, **more, "lever": f"{who} {tok.n_vocab:,}"}


def main():
    """The mode that was asked for."""
    cfg = tyro.cli(Config, description=__doc__)
    {"speed": speed, "encode": encode, "compression": compression}[cfg.mode](cfg)


if __name__ == "__main__":
    cli(main)
