"""Train a recorded tokenizer again and compare the merges: `python -m runlog verify RUN` calls this."""

from dataclasses import fields
from pathlib import Path

from bpe.tokenizer import Tokenizer
from bpe.train_bpe import Config, fingerprint, round_trip, train
from common import ROOT, UsageError
from runlog.verify import locate_input


def replay_run(run, report, *, data=None, **_):
    """The tokenizer is the recorded one, its input the recorded input, and training gives the same merges.

    BPE counts whole numbers, so nothing here needs a tolerance: any machine and any number of workers gives the same.
    """
    model = model_file(run)
    tok = Tokenizer.load(model)
    if tok.sha256 != run.result.get("sha256"):
        report.fail(f"{model.name} is not the tokenizer of the run: its sha256 is not the one in result.json")
    else:
        report.ok(f"{model.name} has the sha256 that result.json holds")
    files = tuple(
        locate_input(file, data if len(run.settings["input"]) == 1 else None) for file in run.settings["input"]
    )
    recorded = (tok.training or {}).get("input", {})
    if fingerprint(files)["sha256"] != recorded.get("sha256"):
        report.fail(f"{', '.join(f.name for f in files)}: not the bytes that the tokenizer was trained on")
        return
    report.ok(f"{recorded['bytes']:,} bytes of input are those of the run")
    known = {f.name for f in fields(Config)}
    settings = {k: v for k, v in run.settings.items() if k in known}
    again = train(Config(**settings | {"input": files, "out": model.with_suffix(""), "verbose": False}))
    compare_merges(report, list(tok.merges.items()), list(again.merges.items()))
    check_compression(run, report, model, files)


def model_file(run):
    """PREFIX.model: where the record says, or beside it."""
    out = Path(run.settings["out"])
    for prefix in (run.run_dir / out.name, out, ROOT / out):
        path = prefix.with_name(f"{prefix.name}.model")
        if path.exists():
            return path
    raise UsageError(f"{out.name}.model is neither in {run.run_dir} nor at {out}: there is nothing to compare with")


def compare_merges(report, recorded, again):
    """Same merges in the same order."""
    if recorded == again:
        report.ok(f"trained again: the same {len(again):,} merges in the same order")
        return
    at = next((i for i, (a, b) in enumerate(zip(recorded, again)) if a != b), min(len(recorded), len(again)))
    report.fail(f"trained again: {len(again):,} merges instead of {len(recorded):,}, different from merge {at} on")


def check_compression(run, report, model, files):
    """The figures of result.json that follow from tokenizer and text."""
    held_out = tuple(locate_input(file) for file in run.settings.get("held_out") or ())
    numbers = round_trip(model, held_out or files)
    for name in ("bytes", "tokens", "bytes_per_token", "chars_per_token", "vocab_used"):
        if run.result.get(name) != numbers[name]:
            report.fail(f"result.json says {name} {run.result.get(name)}, the text gives {numbers[name]}")
            return
    report.ok(f"compression is as recorded: {numbers['tokens']:,} tokens, {numbers['bytes_per_token']} bytes each")
