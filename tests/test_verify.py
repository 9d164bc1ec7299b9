"""`python -m runlog verify`: it passes on what a run computed, and finds what was changed afterwards."""

import json
import math
import shutil

import pytest
from conftest import ROOT
from lora_models import save_tiny

from bpe import train_bpe
from common import write_json
from gpt2 import train_gpt2
from lora import train_lora
from runlog import read_run
from runlog.__main__ import main
from runlog.verify import Report, compare_figures

TINY = [
    *("quickstart", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32", "--device", "cpu"),
    *("--total-batch-size", "256", "--micro-batch-size", "8", "--max-steps", "20", "--val-tokens", "1024"),
    *("--val-every", "10", "--sample-every", "0", "--checkpoint-every", "5", "--log-every", "1"),
    *("--optimizer", "adamw"),
]
pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A GPT-2 run of 20 steps with checkpoints at 15 and 20."""
    run_dir = tmp_path_factory.mktemp("verify") / "run"
    with pytest.MonkeyPatch.context() as patch:
        argv = ["gpt2/train_gpt2.py", *TINY, "--data-dir", str(corpus), "--run-dir", str(run_dir)]
        patch.setattr("sys.argv", argv)
        train_gpt2.main()
    settle(run_dir)
    return run_dir


def settle(run_dir):
    """Say that the run's code was committed: what these tests check must not depend on the state of the work tree."""
    from runlog.record import provenance

    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    write_json(run_dir / "config.json", {**config, "git_commit": provenance()["git_commit"], "git_dirty": False})


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
    """A copy of the run to be tampered with, on a repository whose code has not changed since."""
    monkeypatch.setattr("runlog.verify.code_reasons", lambda run: [])
    return shutil.copytree(trained, tmp_path / "run")


@pytest.fixture
def verify(in_process):
    """verify(run_dir, *flags, ok=True) -> stdout."""

    def run(run_dir, *flags, ok=True):
        code, out, err = in_process(main, "verify", run_dir, *flags)
        assert code == (0 if ok else 1), out + err
        return out

    return run


def edit(run_dir, step, kind, change, forge=False):
    """Change the loss of one row by hand: `change(text) -> text`. forge: put the new sum into result.json, too."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    for i, line in enumerate(lines):
        row = json.loads(line)
        if (row["step"], row["kind"]) == (step, kind):
            lines[i] = line.replace(repr(row["loss"]), change(repr(row["loss"])), 1)
            assert lines[i] != line
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    if forge:
        run = read_run(run_dir)
        write_json(run_dir / "result.json", {**run.result, "metrics_file_sha256": run.metrics_sha256})


def digit(text, place):
    return text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :]


def last_digit(text):  # of a long number, the change may be too small for a float: the text has changed all the same
    return digit(text, len(text) - 1)


def seventh_digit(text):  # which every float has room for
    return digit(text, 7)


def third_digit(text):
    return digit(text, 4)


# ---------------------------------------------------------------------------------------------------------------------
# GPT-2


def test_a_run_as_it_was_computed_passes_to_the_last_bit(run_dir, verify):
    out = verify(run_dir)
    assert "the 23 rows of metrics.jsonl match the checksum and figures in result.json" in out
    assert "the shards in" in out and "as the run read them" in out
    for part in ("step 0 to 5, from the start", "step 15 to 20, from step_000015.pt", "step 20 to 20, from step_"):
        line = next(line for line in out.splitlines() if part in line)
        assert line.startswith("ok ") and "the same to the last bit" in line
    assert "rows were not computed again" in out and "nothing contradicts" in out


@pytest.mark.parametrize("step, kind", [(9, "train"), (17, "train"), (10, "val")])
def test_one_digit_of_one_loss_is_found(run_dir, verify, step, kind):
    edit(run_dir, step, kind, last_digit)
    assert "FAIL      result.json says metrics_file_sha256" in verify(run_dir, "--steps", "0", ok=False)


@pytest.mark.parametrize("step, kind, where", [(2, "train", "from the start"), (17, "train", "from step_000015.pt")])
def test_a_digit_changed_together_with_the_sum_is_found_by_the_replay(run_dir, verify, step, kind, where):
    edit(run_dir, step, kind, seventh_digit, forge=True)
    out = verify(run_dir, ok=False)
    line = next(line for line in out.splitlines() if line.startswith("FAIL"))
    assert where in line and f"train loss of step {step}" in line and "1 of the checks failed" in out


def test_between_the_checkpoints_only_the_whole_replay_finds_it(run_dir, verify):
    edit(run_dir, 9, "train", seventh_digit, forge=True)
    assert "unproved" in verify(run_dir)
    out = verify(run_dir, "--whole", ok=False)
    assert "train loss of step 9" in out and "not computed again" not in out


def test_the_result_is_held_to_the_rows(run_dir, verify):
    result = read_run(run_dir).result
    write_json(run_dir / "result.json", {**result, "val_loss": result["val_loss"] - 0.1})
    assert "result.json says val_loss" in verify(run_dir, "--steps", "0", ok=False)


def test_without_checkpoints_it_says_what_is_not_proved(run_dir, verify):
    shutil.rmtree(run_dir / "ckpt")
    out = verify(run_dir)
    assert "no checkpoint is kept: the weights that the run ended with are not proved" in out
    assert "step 0 to 5, from the start" in out and "17 rows were not computed again" in out


def test_a_damaged_checkpoint_is_named(run_dir, verify):
    path = run_dir / "ckpt/step_000015.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    out = verify(run_dir, ok=False)
    assert "FAIL      step_000015.pt: its sha256 does not match" in out and "from step_000020.pt" in out


def test_other_shards_are_found_and_moved_ones_are_named_by_hand(run_dir, verify, corpus, tmp_path):
    moved = shutil.copytree(corpus, tmp_path / "moved")
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    config["settings"]["data_dir"] = "data/corpora/elsewhere"
    write_json(run_dir / "config.json", config)
    assert "data/corpora/elsewhere does not exist" in verify(run_dir)
    assert "to the last bit" in verify(run_dir, "--data", moved, "--steps", "1")
    config["settings"]["shards_sha256"] = "0" * 64
    write_json(run_dir / "config.json", config)
    assert "not as the run read them, shards_sha256 is another" in verify(run_dir, "--data", moved, ok=False)


def test_on_another_machine_it_allows_a_tolerance_and_says_why(run_dir, verify):
    env = json.loads((run_dir / "env.json").read_text(encoding="utf-8"))
    write_json(run_dir / "env.json", {**env, "torch": "2.11.0"})
    edit(run_dir, 2, "train", last_digit, forge=True)
    out = verify(run_dir)
    line = next(line for line in out.splitlines() if "from the start" in line)
    assert line.startswith("ok ") and "up to 0.0001 allowed: torch 2.11.0 then" in line
    edit(run_dir, 2, "train", third_digit, forge=True)
    assert "more than 0.0001 apart" in verify(run_dir, ok=False)


def test_a_record_from_before_the_sums_and_without_its_corpus(verify, tmp_path, corpus, run_dir):
    result = read_run(run_dir).result
    write_json(run_dir / "result.json", {k: v for k, v in result.items() if k != "metrics_file_sha256"})
    assert "no checksum of metrics.jsonl is recorded" in verify(run_dir, "--steps", "0")


def test_a_run_still_being_written_is_replayed_as_far_as_it_is(run_dir, verify):
    result = read_run(run_dir).result
    write_json(run_dir / "result.json", {"status": "running", "kind": "gpt2"})
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if json.loads(line)["step"] <= 16]
    (run_dir / "metrics.jsonl").write_text("\n".join(kept) + '\n{"step": 17, "ki', encoding="utf-8")
    (run_dir / "ckpt/step_000020.pt").unlink()
    out = verify(run_dir)
    assert result["status"] == "success" and "step 15 to 16, from step_000015.pt" in out and "FAIL" not in out


# ---------------------------------------------------------------------------------------------------------------------
# BPE, adapters, measurements


@pytest.fixture
def bpe_run(tmp_path, in_process):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran after the cat " * 50, encoding="utf-8")
    flags = ["--input", text, "--vocab-size", "270", "--out", tmp_path / "run/tiny", "--run-dir", tmp_path / "run"]
    code, out, err = in_process(train_bpe.main, *flags)
    assert code == 0, out + err
    return tmp_path / "run"


def test_bpe_trains_again_and_compares_the_merges(bpe_run, verify):
    out = verify(bpe_run)
    assert "trained again: 7 figures, the same to the last bit" in out
    result = read_run(bpe_run).result
    write_json(bpe_run / "result.json", {**result, "tokens": result["tokens"] + 1})
    assert "FAIL      trained again: tokens" in verify(bpe_run, ok=False)


def test_bpe_finds_other_merges_and_another_input(bpe_run, verify):
    model = bpe_run / "tiny.model"
    from bpe import Tokenizer

    tok = Tokenizer.load(model)
    forged = Tokenizer("gpt4")
    forged.train("the cat sat on the mat and the dog ran after the cat " * 50, 270 - 1)
    forged.register_special_tokens({"<|endoftext|>": 269})
    forged.training = tok.training
    forged.save(str(bpe_run / "tiny"))
    assert "is not the tokenizer of the run" in verify(bpe_run, ok=False)
    write_json(bpe_run / "result.json", {**read_run(bpe_run).result, "sha256": forged.sha256})
    assert "FAIL      trained again: " in verify(bpe_run, ok=False)
    (bpe_run.parent / "text.txt").write_text("another text", encoding="utf-8")
    assert "not the bytes that the tokenizer was trained on" in verify(bpe_run, ok=False)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    rows = [{"instruction": f"what of {i}", "input": "", "output": f"the cat sat on {i}"} for i in range(60)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    save_tiny(folder / "base")
    train_lora.run(train_lora.TrainConfig(
        base=str(folder / "base"), run_dir=str(folder / "run"), task="instruction", data_file=str(folder / "rows.json"),
        device="cpu", max_steps=4, eval_every=2, log_every=1, batch_size=2, max_new_tokens=4, metric_rows=0,
        eval_rows=4, held_out=0.2, lr=1e-2, prompt="the cat",
    ))  # fmt: skip
    settle(folder / "run")
    return folder


def test_an_adapters_held_out_loss_is_computed_again(adapter, verify, tmp_path, monkeypatch):
    monkeypatch.setattr("runlog.verify.code_reasons", lambda run: [])
    out = verify(adapter / "run")
    assert "base and rows are those of the run" in out
    assert "the kept adapter on the held-out rows: 2 figures, the same to the last bit" in out
    copy = shutil.copytree(adapter / "run", tmp_path / "run")
    result = read_run(copy).result
    write_json(copy / "result.json", {**result, "held_out_loss": float(last_digit(repr(result["held_out_loss"])))})
    assert "FAIL      the kept adapter on the held-out rows: held_out_loss" in verify(copy, ok=False)
    shutil.rmtree(copy / "ckpt")
    assert "holds no adapter" in verify(copy)


def test_another_base_or_other_rows_are_found(adapter, verify, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text((adapter / "rows.json").read_text() + " ", encoding="utf-8")
    out = verify(adapter / "run", "--data", rows, ok=False)
    assert "rows.json is not what the run read: its checksum is not the recorded data_file_sha256" in out


def test_a_sweep_is_verified_adapter_by_adapter(adapter, verify, tmp_path):
    from lora.sweep import SweepConfig, run_sweep

    settings = {"max_steps": 4, "eval_every": 2, "log_every": 1, "batch_size": 2, "metric_rows": 0, "eval_rows": 4}
    settings |= {"held_out": 0.2, "prompt": "the cat"}
    grid = {"task": "instruction", "settings": settings, "grid": {"r": [2, 4]}}
    (tmp_path / "grid.json").write_text(json.dumps(grid), encoding="utf-8")
    where = {"base": str(adapter / "base"), "data_file": str(adapter / "rows.json"), "run_dir": str(tmp_path / "sweep")}
    run_sweep(SweepConfig(grid=str(tmp_path / "grid.json"), device="cpu", sample_tokens=0, **where))
    out = verify(tmp_path / "sweep")
    assert out.count("ok        the kept adapter on the held-out rows: 2 figures") == 2
    assert out.count("base and rows are those of the run") == 2
    rows = tmp_path / "rows.json"
    rows.write_text((adapter / "rows.json").read_text() + " ", encoding="utf-8")
    assert "is not what the run read" in verify(tmp_path / "sweep", "--data", rows, ok=False)
    first = next((tmp_path / "sweep/adapters").iterdir())
    result = read_run(first).result
    write_json(first / "result.json", {**result, "held_out_loss": result["held_out_loss"] * 1.001})
    out = verify(tmp_path / "sweep", ok=False)
    assert "FAIL      the kept adapter on the held-out rows: held_out_loss" in out


def test_hellaswags_accuracies_follow_from_its_items(verify, tmp_path):
    out = verify(ROOT / "records/hellaswag_stories260K_turns")
    assert "accuracies of 512 items from hellaswag.jsonl: 10 figures, the same to" in out
    copy = shutil.copytree(ROOT / "records/hellaswag_stories260K_turns", tmp_path / "copy")
    record = json.loads((copy / "record.json").read_text(encoding="utf-8"))
    record["result"]["acc_norm"] += 1 / 512
    write_json(copy / "record.json", record)
    assert "acc_norm" in verify(copy, ok=False)


def test_committed_records_are_not_contradicted(verify):
    for name in ("bench_bpe_handbook", "quickstart", "lora-blowup-smollm2"):
        assert "unproved" in verify(ROOT / "records" / name, "--steps", "0")


def test_an_adapter_edited_inside_a_record_is_found(verify, tmp_path):
    copy = shutil.copytree(ROOT / "records/lora-blowup-smollm2", tmp_path / "copy")
    lines = (copy / "adapters.jsonl").read_text(encoding="utf-8").splitlines()
    adapter = json.loads(lines[1])
    adapter["metrics"][0]["loss"] += 1e-9
    (copy / "adapters.jsonl").write_text("\n".join([lines[0], json.dumps(adapter), ""]), encoding="utf-8")
    out = verify(copy, ok=False)
    assert out.count("FAIL      result.json says metrics_file_sha256") == 1 and "match the checksum" in out


@pytest.mark.core
@pytest.mark.parametrize(
    "recorded, again, reasons, says",
    [
        (1.5, 1.5, [], "ok"),
        (1.5, 1.5000001, [], "FAIL"),
        (1.5, 1.5000001, ["another CPU"], "ok"),
        (1.5, 1.6, ["another CPU"], "FAIL"),
        (1.5, math.nan, ["another CPU"], "FAIL"),
        (math.nan, 1.5, ["another CPU"], "FAIL"),
        (None, 1.5, ["another CPU"], "FAIL"),
        (math.nan, math.nan, [], "ok"),
        (None, math.nan, [], "ok"),  # what is not finite is recorded as null
    ],
)
def test_figures_are_compared_to_the_bit_or_within_a_tolerance(capsys, recorded, again, reasons, says):
    report = Report()
    report.reasons += reasons
    compare_figures(report, "the loss", {"loss": recorded}, {"loss": again}, 1e-4)
    assert capsys.readouterr().out.startswith(says) and report.failed == (says == "FAIL")
