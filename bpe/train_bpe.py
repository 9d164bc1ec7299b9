"""Train a tokenizer on files and write it in four formats.

    python bpe/train_bpe.py --input data/corpora/pydocs.jsonl --vocab-size 4096 --pattern gpt4 --out data/corpora/pydocs

PREFIX.model is what the other stations read; PREFIX.vocab is for people; PREFIX.tiktoken and PREFIX-hf/ are for
tiktoken and for Hugging Face. `.jsonl` gives one document per line (its "text"), any other file is one document;
either may be gzipped. `<|endoftext|>` becomes the token after the last merge.

One process does a megabyte in a fraction of a second; --num-workers splits larger corpora in parallel, with the same
result. Started again with the same input and settings, it finds its files and leaves at once.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from bpe.pretokenizer import valid
from bpe.tokenizer import END_OF_TEXT, Tokenizer
from common import UsageError, cli, open_text
from runlog import RunLog

ENOUGH = 20_000_000  # characters that tell the compression


@dataclass
class Config:
    input: tuple[Path, ...]
    """files to train on: .jsonl (a document per line) or UTF-8 text, gzipped or not"""
    out: Path
    """prefix of the files to write: PREFIX.model, PREFIX.vocab, PREFIX.tiktoken, PREFIX-hf/"""
    vocab_size: int = 4096
    """the 256 bytes and the merges; <|endoftext|> comes on top"""
    pattern: str = "gpt4"
    """how text is cut before merging: none, gpt2, gpt4 or a regular expression"""
    held_out: tuple[Path, ...] = ()
    """files to report compression on; without any it is reported on the input itself"""
    num_workers: int = 1
    """processes that cut the text into chunks"""
    run_dir: Path | None = None
    """also write a run directory there"""
    verbose: bool = False
    """print each merge"""


def main():
    """Train, write the files in all formats; leave at once where they are there already."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    sources = {"input": fingerprint(cfg.input), "vocab_size": cfg.vocab_size, "pattern": cfg.pattern}
    if _is_done(cfg, sources):
        print(f"{cfg.out}.model is there already, made from the same input and settings")
        return
    with RunLog(cfg.run_dir or ".", kind="bpe", config=cfg, enabled=cfg.run_dir is not None) as log:
        started = time.perf_counter()
        tok = train(cfg)
        seconds = time.perf_counter() - started
        tok.training = sources
        save(tok, cfg.out)
        say(log, f"{len(tok.merges):,} merges from {sources['input']['bytes']:,} bytes in {seconds:.2f} s")
        numbers = round_trip(f"{cfg.out}.model", cfg.held_out or cfg.input)
        what = "held-out text" if cfg.held_out else "the input itself"
        say(
            log,
            f"{numbers['bytes_per_token']:.3f} bytes per token on {what}: {numbers['bytes']:,} bytes, "
            f"{numbers['tokens']:,} tokens, {numbers['vocab_used']:.0%} of the vocabulary",
        )
        say(log, f"loaded, encoded, decoded, identical: {numbers['round_trip_seconds']:.2f} s")
        say(log, f"wrote {cfg.out}.model, .vocab, .tiktoken and {cfg.out}-hf/")
        held_out = {"measured_on": what, **numbers}
        log.finish("success", n_vocab=tok.n_vocab, sha256=tok.sha256, train_seconds=round(seconds, 4), **held_out)


def say(log, text):
    """Print, and keep in the run's log if there is one."""
    if log.enabled:
        log.print(text)
    else:
        print(text)


def train(cfg):
    """Config -> Tokenizer with <|endoftext|>."""
    tok = Tokenizer(cfg.pattern)
    tok.train(
        read_documents(cfg.input), cfg.vocab_size, cfg.verbose, num_workers=cfg.num_workers, progress=not cfg.verbose
    )
    tok.register_special_tokens({END_OF_TEXT: 256 + len(tok.merges)})
    return tok


def save(tok, prefix):
    """Write all formats; the .model last, because it stands for the others being there."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    tok.name = prefix.name
    tok.save_tiktoken(f"{prefix}.tiktoken")
    tok.save_huggingface(f"{prefix}-hf")
    tok.save(prefix)


def round_trip(model_file, files):
    """Load the tokenizer and send text through it and back -> compression and the seconds it took.

    Measured on the first ENOUGH characters: bytes and characters per token, and the share of the vocabulary that is
    used at all.
    """
    texts, chars = [], 0
    for text in read_documents(files):
        texts.append(text[: ENOUGH - chars])
        chars += len(texts[-1])
        if chars >= ENOUGH:
            break
    started = time.perf_counter()
    tok = Tokenizer.load(model_file)
    encoded = [tok.encode_ordinary(text) for text in texts]
    same = all(tok.decode(ids, errors="strict") == text for ids, text in zip(encoded, texts))
    seconds = time.perf_counter() - started
    if not same:
        raise RuntimeError(f"{model_file} does not give the text back that it encoded")
    tokens, size = sum(map(len, encoded)), sum(len(text.encode("utf-8")) for text in texts)
    used = set().union(*encoded)
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": round(size / max(tokens, 1), 4),
        "chars_per_token": round(chars / max(tokens, 1), 4),
        "vocab_used": round(len(used) / tok.n_vocab, 4),
        "round_trip_seconds": round(seconds, 4),
    }


def read_documents(files):
    """Yield the documents of .jsonl and text files as str, line ends as they are."""
    for file in files:
        file = Path(file)
        with open_text(file, newline="") as f:
            if not file.name.removesuffix(".gz").endswith(".jsonl"):
                yield f.read()
                continue
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield _text_of(line, file, number)


def _text_of(line, file, number):
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UsageError(f'{file}, line {number} is not a JSON object with a "text"')
    return valid(text) if "\\u" in line else text  # JSON can spell a lone surrogate


def fingerprint(files):
    """Total bytes and one sha256 over the input files in order."""
    if not files:
        raise UsageError("--input names no file")
    digest, size = hashlib.sha256(), 0
    for file in files:
        with open(file, "rb") as f:
            data = hashlib.file_digest(f, "sha256")
            size += f.tell()
        digest.update(data.digest())
    return {"files": [file.name for file in files], "bytes": size, "sha256": digest.hexdigest()}


def _is_done(cfg, sources):
    """Are the files there, and from the same bytes and settings?"""
    files = [Path(f"{cfg.out}{end}") for end in (".model", ".vocab", ".tiktoken", "-hf/tokenizer.json")]
    if not all(file.is_file() for file in files):
        return False
    try:
        training = Tokenizer.load(files[0]).training
    except UsageError:
        return False
    return training == sources


if __name__ == "__main__":
    cli(main)
