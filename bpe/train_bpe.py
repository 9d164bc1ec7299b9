"""Train a tokenizer on files and write it in four formats.

    python bpe/train_bpe.py --input data/corpora/pydocs.jsonl --vocab-size 4096 --pattern gpt4 --out data/corpora/pydocs

PREFIX.model is what the other stations read; PREFIX.vocab is for people; PREFIX.tiktoken and PREFIX-hf/ are for
tiktoken and for Hugging Face. `.jsonl` gives one document per line (its "text"), any other file is one document;
either may be gzipped. `<|endoftext|>` becomes the token after the last merge.

One process does a megabyte in a fraction of a second; --num-workers splits larger corpora in parallel, with the same
result. Started again with the same input and settings, it finds its files and leaves at once.
"""

import gzip
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from bpe.tokenizer import END_OF_TEXT, Tokenizer
from runlog import RunLog, UserError, cli


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
    """files to report compression on; by default the last tenth of the input, which is trained on as well"""
    num_workers: int = 1
    """processes that cut the text into chunks"""
    run_dir: Path | None = None
    """also write a run directory there"""
    verbose: bool = False
    """print each merge"""


def main():
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    sources = {"input": _fingerprint(cfg.input), "vocab_size": cfg.vocab_size, "pattern": cfg.pattern}
    if _is_done(cfg, sources):
        print(f"{cfg.out}.model is there already, made from the same input and settings")
        return
    with RunLog(cfg.run_dir or ".", kind="bpe", config=cfg, enabled=cfg.run_dir is not None) as log:
        started = time.perf_counter()
        tok = train(cfg)
        seconds = time.perf_counter() - started
        tok.training = sources
        save(tok, cfg.out)
        numbers = compression(tok, cfg.held_out or cfg.input)
        what = "held-out text" if cfg.held_out else "the input"
        say(log, f"{len(tok.merges):,} merges from {sources['input']['bytes']:,} bytes in {seconds:.2f} s")
        say(log, f"{numbers['bytes_per_token']:.3f} bytes per token on {what} ({numbers['tokens']:,} tokens)")
        say(log, f"wrote {cfg.out}.model, .vocab, .tiktoken and {cfg.out}-hf/")
        log.finish("success", n_vocab=tok.n_vocab, sha256=tok.sha256, train_seconds=round(seconds, 3), **numbers)


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


def compression(tok, files):
    """Bytes and characters per token, and the share of the vocabulary that is used at all."""
    size = chars = tokens = 0
    used = set()
    for text in read_documents(files):
        ids = tok.encode_ordinary(text)
        used.update(ids)
        tokens += len(ids)
        chars += len(text)
        size += len(text.encode("utf-8"))
    if not tokens:
        return {"tokens": 0, "bytes_per_token": 0.0, "chars_per_token": 0.0, "vocab_used": 0.0}
    shares = {
        "bytes_per_token": size / tokens,
        "chars_per_token": chars / tokens,
        "vocab_used": len(used) / tok.n_vocab,
    }
    return {"tokens": tokens, **{name: round(value, 4) for name, value in shares.items()}}


def read_documents(files):
    """Yield the documents of .jsonl and text files as str, line ends as they are."""
    for file in files:
        file = Path(file)
        opened = gzip.open if file.suffix == ".gz" else open
        name = file.name.removesuffix(".gz")
        try:
            with opened(file, "rt", encoding="utf-8", newline="") as f:
                if not name.endswith(".jsonl"):
                    yield f.read()
                    continue
                for number, line in enumerate(f, 1):
                    if line.strip():
                        yield _text_of(line, file, number)
        except UnicodeDecodeError as e:
            raise UserError(f"{file} is not UTF-8 text ({e.reason} at byte {e.start}); convert it first") from None
        except gzip.BadGzipFile:
            raise UserError(f"{file} ends in .gz but is not gzipped") from None
        except EOFError:
            raise UserError(f"{file} is cut short: the gzip stream has no end") from None


def _text_of(line, file, number):
    try:
        return json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f'{file}, line {number} is not a JSON object with a "text"') from None


def _fingerprint(files):
    """Total bytes and one sha256 over the input files in order."""
    if not files:
        raise UserError("--input names no file")
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
    except UserError:
        return False
    return training == sources


if __name__ == "__main__":
    cli(main)
