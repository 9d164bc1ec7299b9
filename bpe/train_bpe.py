"""Train a tokenizer on files and write it in four formats.

    python bpe/train_bpe.py --input data/corpora/pydocs.jsonl --vocab-size 4096 --pattern gpt4 --out data/corpora/pydocs

PREFIX.model is read by the other scripts, PREFIX.tiktoken by tiktoken and PREFIX-hf/ by Hugging Face; PREFIX.vocab
lists the tokens as readable text. `.jsonl` has one document per line (its "text"), any other file is one document;
either may be gzipped. `<|endoftext|>` gets the id after the last merge.

One process trains on a megabyte in a fraction of a second; --num-workers splits larger corpora in parallel, with the
same result. Run again with the same input and settings, it exits at once.
"""

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from bpe.interop import to_huggingface, to_tiktoken
from bpe.tokenizer import END_OF_TEXT, Tokenizer
from common import UsageError, cli, file_sha256, peak_memory_mb, read_documents
from runlog import RunLog
from runlog.verify import compare_figures, locate_input

SETTINGS = "vocab_size", "pattern", "min_frequency", "max_token_length"  # what decides the merges
EXPORTS = ".vocab", ".tiktoken", "-hf/tokenizer.json"  # in addition to .model
ENOUGH = 20_000_000  # characters on which compression is measured


@dataclass
class Config:
    input: tuple[Path, ...]  # files to train on: .jsonl (a document per line) or UTF-8 text, gzipped or not
    out: Path  # prefix of the files to write: PREFIX.model, PREFIX.vocab, PREFIX.tiktoken, PREFIX-hf/
    vocab_size: int = 4096  # the 256 bytes and the merges; <|endoftext|> comes on top
    pattern: str = "gpt4"  # how text is split before merging: none, gpt2, gpt4 or a regular expression
    min_frequency: int = 1  # a pair that occurs less often is not merged
    max_token_length: int | None = None  # bytes; a pair whose token would be longer is not merged
    init: Path | None = None  # PREFIX.model to continue: its merges are kept, new ones follow
    num_workers: int = 1  # processes that split the text into chunks
    run_dir: Path | None = None  # also write a run directory there
    verbose: bool = False  # print each merge


def main():
    """Train and write the files in all formats; exit at once if they exist."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    if cfg.init and cfg.init.resolve() == Path(f"{cfg.out}.model").resolve():
        raise UsageError(f"--init and --out are both {cfg.init}, which would be replaced; choose another --out")
    sources = {"input": fingerprint(cfg.input), **{key: getattr(cfg, key) for key in SETTINGS}}
    sources["init"] = cfg.init and file_sha256(cfg.init)
    if is_done(cfg.out, sources):
        print(f"{cfg.out}.model is already there, made from the same input and settings")
        return
    for export in (to_tiktoken, to_huggingface):
        export(Tokenizer(cfg.pattern))  # UsageError, before training, for a pattern that they cannot express
    with RunLog(cfg.run_dir or ".", kind="bpe", config=cfg, enabled=cfg.run_dir is not None) as log:
        say = log.print if log.enabled else print
        started = time.perf_counter()
        tok = train(cfg)
        cost = {"train_seconds": round(time.perf_counter() - started, 4), "peak_mb": peak_memory_mb()}
        tok.training = sources
        save(tok, cfg.out)
        took = f"{cost['train_seconds']:.2f} s, {cost['peak_mb'] or '?'} MB of memory"
        say(f"{len(tok.merges):,} merges from {sources['input']['bytes']:,} bytes in {took}")
        numbers = round_trip(f"{cfg.out}.model", cfg.input)
        say(
            f"{numbers['bytes_per_token']:.3f} bytes per token of the input: {numbers['bytes']:,} bytes, "
            f"{numbers['tokens']:,} tokens, {numbers['vocab_used']:.0%} of the vocabulary"
        )
        say(f"loaded, encoded, decoded, identical: {numbers['round_trip_seconds']:.2f} s")
        say(f"wrote {cfg.out}.model, .vocab, .tiktoken and {cfg.out}-hf/")
        log.finish("success", n_vocab=tok.n_vocab, sha256=tok.sha256, **cost, **numbers)


def train(cfg):
    """Config -> Tokenizer with <|endoftext|>."""
    tok, documents = Tokenizer(cfg.pattern), read_documents(cfg.input)
    more = {"min_frequency": cfg.min_frequency, "max_token_length": cfg.max_token_length}
    more["init"] = cfg.init and Tokenizer.load(cfg.init)
    tok.train(documents, cfg.vocab_size, cfg.verbose, num_workers=cfg.num_workers, **more)
    tok.register_special_tokens({END_OF_TEXT: 256 + len(tok.merges)})
    return tok


def save(tok, prefix):
    """Write all formats, the .model first, in case an export fails."""
    for end in EXPORTS:
        Path(f"{prefix}{end}").unlink(missing_ok=True)  # an interrupted run must not leave another tokenizer's
    tok.name = prefix.name
    tok.save(prefix)
    tok.save_tiktoken(f"{prefix}.tiktoken")
    tok.save_huggingface(f"{prefix}-hf")


def round_trip(model_file, files):
    """Load a tokenizer, encode the first ENOUGH characters, decode them -> compression and time in seconds."""
    texts, chars = [], 0
    for text in read_documents(files):
        texts.append(text[: ENOUGH - chars])
        chars += len(texts[-1])
        if chars >= ENOUGH:
            break
    started = time.perf_counter()
    tok = Tokenizer.load(model_file)
    encoded = [tok.encode_ordinary(text) for text in texts]
    if any(tok.decode(ids, errors="strict") != text for ids, text in zip(encoded, texts)):
        raise RuntimeError(f"{model_file} does not decode to the text that it encoded")
    seconds = time.perf_counter() - started
    tokens, size = sum(map(len, encoded)), sum(len(text.encode("utf-8")) for text in texts)
    return {
        "bytes": size,
        "tokens": tokens,
        "bytes_per_token": round(size / max(tokens, 1), 4),
        "chars_per_token": round(chars / max(tokens, 1), 4),
        "vocab_used": round(len(set().union(*encoded)) / tok.n_vocab, 4),  # share of the ids that occur
        "round_trip_seconds": round(seconds, 4),
    }


def fingerprint(files):
    """Total bytes of the input files, and one sha256 over them in order."""
    if not files:
        raise UsageError("--input names no file")
    digest = hashlib.sha256(b"".join(bytes.fromhex(file_sha256(file)) for file in files))
    size = sum(file.stat().st_size for file in files)
    return {"files": [file.name for file in files], "bytes": size, "sha256": digest.hexdigest()}


def is_done(prefix, sources):
    """Whether the files exist and were made from the same bytes and settings."""
    try:
        same = Tokenizer.load(f"{prefix}.model").training == sources
    except UsageError:
        return False
    return same and all(Path(f"{prefix}{end}").is_file() for end in EXPORTS)


def replay_run(run, report, *, data=None, **_):
    """For `runlog verify`: tokenizer and input are the recorded ones, and training again gives the same tokenizer.

    BPE counts integers, so the result is exact on any hardware and with any number of workers.
    """
    settings, out = run.settings, Path(run.settings["out"])
    model = run.run_dir / f"{out.name}.model"
    model = model if model.exists() else locate_input(f"{out}.model")
    tok = Tokenizer.load(model)
    if tok.sha256 != run.result.get("sha256"):
        report.fail(f"{model.name} is not the tokenizer of the run: its sha256 is not the one in result.json")
    files = [locate_input(file, data if len(settings["input"]) == 1 else None) for file in settings["input"]]
    if fingerprint(files)["sha256"] != tok.training.get("input", {}).get("sha256"):
        report.fail(f"{', '.join(f.name for f in files)}: not the bytes that the tokenizer was trained on")
        return
    report.ok(f"{model.name} and {', '.join(f.name for f in files)} are those of the run")
    init = locate_input(settings["init"]) if settings.get("init") else None
    again = train(Config(tuple(files), out, init=init, **{key: settings[key] for key in SETTINGS if key in settings}))
    numbers = {"n_vocab": again.n_vocab, "sha256": again.sha256, **round_trip(model, files)}
    recorded = {name: run.result.get(name) for name in numbers if name != "round_trip_seconds"}
    compare_figures(report, "trained again", recorded, numbers, tolerance=0.0)


if __name__ == "__main__":
    cli(main)
