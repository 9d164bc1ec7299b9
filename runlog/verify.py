"""A run's own proof: is what its record says what its code, data and weights give?

Every kind of run is held to its sums and to the figures that its record states twice. What a kind can compute again
lies with its station (`replay_run`), imported here only when it is asked.
"""

import importlib
import json
from pathlib import Path

from common import ROOT, UsageError
from runlog.record import environment, git
from runlog.run import find_runs, metrics_sha256, read_run

REPLAYS = {"gpt2": "gpt2.replay", "hellaswag": "gpt2.replay", "bpe": "bpe.replay_bpe", "lora": "lora.replay_lora"}
PACKAGES = ("bpe", "data", "gpt2", "lora")  # code that decides what is learned
# Figures that stand in result.json and, as the last row of a kind, in metrics.jsonl as well.
STATED_TWICE = {"val_loss": ("val", "loss"), "bits_per_byte": ("val", "bits_per_byte")}


class Report:
    """What was found, line by line, printed as it comes. `reasons`: why a replay here may give other bits."""

    def __init__(self):
        self.failed, self.unproved, self.reasons = 0, 0, []

    def ok(self, text):
        """A check that held."""
        print(f"ok        {text}", flush=True)

    def fail(self, text):
        """A check that shows the record to be wrong."""
        self.failed += 1
        print(f"FAIL      {text}", flush=True)

    def open(self, text):
        """Something that could neither be shown nor refuted."""
        self.unproved += 1
        print(f"unproved  {text}", flush=True)

    def verdict(self):
        """The last line: what all checks together say."""
        if self.failed:
            return f"{self.failed} of the checks failed: this record is not what the run computed"
        open_ends = f"; not proved: {self.unproved}" if self.unproved else ""
        return f"nothing contradicts the record{open_ends}"


def verify(run_dir, steps=5, whole=False, data=None):
    """Check one run and print what is found -> whether nothing failed.

    steps: optimizer steps to replay from the start and from each kept checkpoint. whole: replay all of them.
    data: where the corpus, text or rows lie now, if not where the record says.
    """
    run, report = read_run(run_dir), Report()
    print(f"{run.run_dir.as_posix()}: {run.kind}, {run.status}")
    check_sum(run, report)
    check_result(run, report)
    report.reasons += [*code_reasons(run), *machine_reasons(run)]
    if run.kind in REPLAYS:
        station = importlib.import_module(REPLAYS[run.kind])
        try:
            station.replay_run(run, report, steps=steps, whole=whole, data=data)
        except UsageError as e:
            report.open(str(e))
    elif run.kind == "lora_sweep":
        check_adapters(run, report, steps, whole, data)
    else:
        report.open(f"a run of kind {run.kind} measures: there is nothing to compute again with the same outcome")
    print(f"          {report.verdict()}")
    return not report.failed


# ---------------------------------------------------------------------------------------------------------------------
# what holds for every kind


def check_sum(run, report):
    """The rows of metrics.jsonl against the sum that the run left in result.json."""
    recorded = run.result.get("metrics_file_sha256")
    if recorded is None:
        report.open("no sum over metrics.jsonl is recorded: a changed digit is found only where it is computed again")
    elif recorded == metrics_sha256(run.run_dir):
        report.ok(f"the {len(run.metrics):,} rows of metrics.jsonl have the sum that result.json holds")
    else:
        report.fail("metrics.jsonl was changed after the run: its sum is not the one in result.json")


def check_result(run, report):
    """Figures of result.json against the rows that they were taken from."""
    compared, failed = [], report.failed
    for name, (kind, field) in STATED_TWICE.items():
        rows = [row for row in run.rows(kind) if field in row]
        if run.result.get(name) is not None and rows:
            compared.append(name)
            if run.result[name] != rows[-1][field]:
                report.fail(f"result.json says {name} {run.result[name]!r}, the last {kind} row {rows[-1][field]!r}")
    per_step = run.settings.get("total_batch_size")
    if run.result.get("tokens") is not None and per_step and run.result.get("step") is not None:
        compared.append("tokens")
        if run.result["tokens"] != run.result["step"] * per_step:
            report.fail(f"result.json says {run.result['tokens']:,} tokens, which is not {run.result['step']} steps'")
    if compared and report.failed == failed:
        report.ok(f"result.json agrees with the rows ({', '.join(compared)})")


def check_adapters(run, report, steps, whole, data):
    """A sweep stands or falls with its adapters, each a run of its own."""
    adapters = find_runs(run.run_dir / "adapters")
    losses = {folder.name: read_run(folder).result.get("held_out_loss") for folder in adapters}
    best, said = run.result.get("best"), run.result.get("best_held_out_loss")
    if best is not None and losses.get(best) != said:
        report.fail(f"result.json says held-out loss {said} of {best}, its own record {losses.get(best)}")
    for folder in adapters:
        print()
        report.failed += not verify(folder, steps, whole, data)
    print()


def code_reasons(run):
    """Why the code here may not be the code of the run -> list of texts; empty if it is the same."""
    commit = run.config.get("git_commit")
    if run.config.get("git_dirty") is not False:
        return ["the run's code was not committed" if run.config.get("git_dirty") else "the run's code is not known"]
    if commit is None or git("cat-file", "-e", f"{commit}^{{commit}}", seconds=30) is None:
        return [f"the run's commit {str(commit)[:9]} is not in this repository"]
    changed = git("diff", "--name-only", commit, "--", *(f"{name}/*.py" for name in PACKAGES), seconds=30)
    if changed:
        return [f"{len(changed.split())} of the code's files have changed since commit {commit[:9]}"]
    return []


def machine_reasons(run):
    """What of this machine is not as it was -> list of texts."""
    if run.env.get("torch"):
        importlib.import_module("torch")  # `environment` tells of it once it is there
    here, reasons = environment(), []
    for name in ("cpu", "gpus", "torch", "cuda", "numpy"):
        if run.env.get(name) not in (None, []) and run.env[name] != here.get(name):
            reasons.append(f"{name} {_brief(run.env[name])} then, {_brief(here.get(name))} here")
    if run.env.get("world_size", 1) != 1:
        reasons.append(f"{run.env['world_size']} processes then, one here")
    return reasons


def _brief(value):
    return value if isinstance(value, str) else json.dumps(value)


# ---------------------------------------------------------------------------------------------------------------------
# for the stations


def locate_input(recorded, replacement=None):
    """A path of a record -> where it lies here: as it stands, or from the repository's root; UsageError if nowhere."""
    if replacement is not None:
        if not Path(replacement).exists():
            raise UsageError(f"{replacement} does not exist")
        return Path(replacement)
    for path in (Path(recorded), ROOT / recorded):
        if path.exists():
            return path
    raise UsageError(f"{recorded} is not here, so nothing was computed again (say with --data where it lies now)")


def compare_figures(report, what, recorded, again, tolerance):
    """Hold figures that were computed again to the recorded ones, {name: value} both.

    They have to be the same to the last bit, unless the report has reasons why they may not be: then to a relative
    `tolerance`, which is said together with the reasons.
    """
    bad, worst = [], 0.0
    for name, value in recorded.items():
        other = again.get(name)
        if value == other:
            continue
        both = isinstance(value, int | float) and isinstance(other, int | float)
        off = abs(value - other) / max(abs(value), abs(other)) if both else float("inf")
        worst = max(worst, off)
        if not report.reasons or off > tolerance:
            bad.append(f"{name} {value!r} recorded, {other!r} computed")
    if bad:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        why = f", more than {tolerance:g} apart" if report.reasons else ""
        report.fail(f"{what}: {bad[0]}{more}{why}")
    elif worst == 0.0:
        report.ok(f"{what}: {len(recorded)} figures, the same to the last bit")
    else:
        why = "; ".join(report.reasons)
        report.ok(f"{what}: {len(recorded)} figures, the same to {worst:.1e} (up to {tolerance:g} allowed: {why})")
