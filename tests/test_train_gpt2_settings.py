"""train_gpt2.py's settings and run directories: what is resumed, replaced or refused, and usage errors."""

import errno
import json
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from gpt2_runs import TINY, identical

from common import UsageError, checkpoints
from common.checkpoints import sorted_checkpoints
from gpt2 import checkpoint, train_gpt2
from gpt2.config import FREE_ON_RESUME, PRESETS, TrainConfig
from gpt2.train_gpt2 import parse
from runlog import comparable_metrics, read_run

pytest_plugins = ["gpt2_runs"]
pytestmark = pytest.mark.usefixtures("signal_handlers")


def parse_only():
    parse(sys.argv[1:])


def test_a_finished_run_is_left_alone(reference, train):
    before = (reference[0] / "metrics.jsonl").read_bytes()
    assert "is finished: 20 steps" in train(reference[0])
    assert (reference[0] / "metrics.jsonl").read_bytes() == before


def test_a_record_whose_weights_are_gone_is_trained_again(reference, train, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run", ignore=shutil.ignore_patterns("ckpt"))
    assert "is finished" not in train(tmp_path / "run")
    assert identical(reference[0], tmp_path / "run")


def test_a_resume_with_other_settings_is_refused_with_the_difference(reference, assert_usage_error, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    record = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}
    assert_usage_error(tmp_path / "run", "--max-lr", "0.1", says="max_lr 0.01 -> 0.1")
    assert_usage_error(tmp_path / "run", "--max-steps", "40", says="max_steps 20 -> 40")
    assert record == {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.is_file()}


def test_a_run_made_otherwise_is_replaced_when_asked(reference, train, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    assert "is finished" in train(tmp_path / "run", "--overwrite")
    assert "it is replaced" in train(tmp_path / "run", "--overwrite", "--max-steps", "3")
    assert [r["step"] for r in read_run(tmp_path / "run").rows("train")] == [0, 1, 2]
    assert [p.name for p in sorted_checkpoints(tmp_path / "run/ckpt")] == ["step_000003.pt"]


def test_a_process_that_does_not_see_the_checkpoint_is_stopped(reference, assert_usage_error, tmp_path, monkeypatch):
    """A run directory that the nodes do not share: rank 0 decides which checkpoint all take."""
    shutil.copytree(reference[0], tmp_path / "run", ignore=shutil.ignore_patterns("result.json"))
    monkeypatch.setattr(train_gpt2.Ranks, "gather", lambda self, value: [("run", "step_000007.pt"), value])
    assert_usage_error(tmp_path / "run", says="is missing on a node; all must share the file system of --run-dir")


def test_imported_weights_are_no_run_to_go_on_with(assert_usage_error, tmp_path):
    checkpoint.save(tmp_path / "run/ckpt", 0, {"model": {}})
    assert_usage_error(tmp_path / "run", says="holds imported weights; name it by --init")


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(reference, train, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run", ignore=shutil.ignore_patterns("result.json"))
    newest = tmp_path / "run/ckpt/step_000020.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    out = train(tmp_path / "run")
    assert "warning: step_000020.pt is skipped" in out and "resumed at step 15" in out
    assert identical(reference[0], tmp_path / "run")


def test_a_full_disk_is_one_line_and_the_last_good_checkpoint_stays(
    reference, train, assert_usage_error, tmp_path, monkeypatch
):
    save, calls = torch.save, []

    def full_at_the_second(state, file):
        calls.append(1)
        if len(calls) == 2:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full_at_the_second)
    assert_usage_error(
        tmp_path / "run", says="step_000010.pt could not be written ([Errno 28] No space left on device)"
    )
    assert [p.name for p in (tmp_path / "run/ckpt").glob("*.pt*")] == ["step_000005.pt", "step_000005.pt.sha256"]
    assert read_run(tmp_path / "run").result["status"] == "failed"
    assert "resumed at step 5" in train(tmp_path / "run")
    assert identical(reference[0], tmp_path / "run")


def test_settings_that_do_not_change_what_is_learned_may_differ(train, reference, tmp_path):
    train(tmp_path / "run", "--stop-after-minutes", "0.0000001")
    assert read_run(tmp_path / "run").result["status"] == "preempted"
    train(tmp_path / "run", "--val-every", "5", "--log-every", "3", "--keep-checkpoints", "1")
    rows = [r for r in comparable_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert rows == [r for r in comparable_metrics(reference[0]) if r["kind"] == "train"]
    stretched = train(tmp_path / "run", "--max-steps", "22", "--allow-config-change")
    assert "changed on resume: max_steps 20 -> 22" in stretched
    assert read_run(tmp_path / "run").result["step"] == 22
    train(tmp_path / "run", "--max-steps", "24", "--max-lr", "0.5", "--weight-decay", "0.3", "--allow-config-change")
    assert read_run(tmp_path / "run").rows("train")[-1]["lr"] > PRESETS["quickstart"].max_lr
    groups = checkpoint.load_newest(tmp_path / "run/ckpt")["optimizers"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}


def test_every_field_is_a_flag_and_every_preset_is_listed(script, in_process):
    shown = script("gpt2/train_gpt2.py", "--help").stdout
    assert all(name in shown for name in PRESETS)
    flags = in_process(parse_only, "quickstart", "--help")[1]
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in flags
    assert "--no-compile" in flags
    assert set(TrainConfig.__dataclass_fields__) > FREE_ON_RESUME


@pytest.mark.parametrize("wrong", [["nonsense"], ["quickstart", "--nonsense", "1"], ["--max-steps", "many"]])
def test_an_unknown_preset_or_flag_is_the_parsers_message_and_status_2(in_process, wrong):
    code, _, err = in_process(parse_only, *wrong)
    assert code == 2 and (wrong[-1] in err or wrong[-2] in err)


@pytest.mark.core
def test_a_setting_that_cannot_be_is_named(in_process):
    code, _, err = in_process(parse_only, "quickstart", "--total-batch-size", "1000")
    assert code == 2 and "no multiple of" in err and "--block-size 128" in err


@pytest.mark.core
def test_no_preset_means_gpt2_124m():
    assert parse([]) == PRESETS["gpt2-124M"] == parse(["gpt2-124M"])
    assert parse(["--max-steps", "7"]).max_steps == 7
    assert parse(["quickstart"]).n_layer == 4


def test_usage_errors_before_the_start_are_one_line_and_leave_nothing(assert_usage_error, assert_refuses, tmp_path):
    assert_refuses("gpt2/train_gpt2.py", "--data-dir", tmp_path / "nowhere", says="no meta.json")
    missing = "cuda" if not torch.cuda.is_available() else "mps"
    assert_usage_error(tmp_path / "run", "--device", missing, says=f"--device {missing} is not available here")
    assert not (tmp_path / "run").exists()


def test_usage_errors_found_later_are_one_line_too(assert_usage_error, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(
        GPT2Config(vocab_size=77, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )
    hf.save_pretrained(tmp_path / "hf")
    deep = GPT2LMHeadModel(
        GPT2Config(vocab_size=385, n_positions=32, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    deep.save_pretrained(tmp_path / "deep")
    huge = ["--block-size", "131072", "--total-batch-size", "131072", "--micro-batch-size", "1"]
    for flags, says in [
        (["--micro-batch-size", "3"], "leave out --micro-batch-size"),
        (["--init", "nobody/nothing"], "no GPT-2 weights"),
        (["--init", str(tmp_path / "hf")], "vocabulary of 77"),
        (["--init", str(tmp_path / "deep")], "add --n-layer 3"),
        (huge, "lower --block-size"),
    ]:
        assert_usage_error(tmp_path / "run", *flags, says=says)
        assert json.loads((tmp_path / "run/result.json").read_text())["status"] == "failed"


@pytest.mark.core
def test_steps_divide_into_micro_batches_or_the_message_says_what_does():
    cfg = TrainConfig(total_batch_size=24 * 1024, micro_batch_size=8)
    assert [cfg.grad_accum_steps(n) for n in (1, 3)] == [3, 1]
    with pytest.raises(UsageError, match="micro-batches of 8 on 2 process"):
        cfg.grad_accum_steps(2)
    with pytest.raises(UsageError, match="on 5 process"):
        cfg.grad_accum_steps(5)


@pytest.mark.core
def test_exact_reduction_says_which_micro_batches_it_can_sum():
    cfg = TrainConfig(total_batch_size=24 * 1024, micro_batch_size=6, exact_reduction=True)
    assert [cfg.grad_accum_steps(n) for n in (1, 2, 4)] == [4, 2, 1]
    with pytest.raises(UsageError, match="on 3 process"):
        cfg.grad_accum_steps(3)
    with pytest.raises(UsageError, match="1, 2, 4, … micro-batches a step, not 6"):
        replace(cfg, micro_batch_size=4).grad_accum_steps(1)
    with pytest.raises(UsageError, match="needs a --micro-batch-size"):
        replace(cfg, micro_batch_size=0)


def test_exact_reduction_is_not_resumed_with_what_would_change_the_bits(train, assert_usage_error, tmp_path):
    train(tmp_path / "run", "--exact-reduction", "--micro-batch-size", "4")
    wrong = ["--exact-reduction", "--micro-batch-size", "8"]
    assert_usage_error(tmp_path / "run", *wrong, says="micro_batch_size 4 -> 8")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert_usage_error(tmp_path / "run", *wrong, says=f"OMP_NUM_THREADS {threads} -> {threads + 1}")
    finally:
        torch.set_num_threads(threads)


def test_a_setting_that_an_older_record_lacks_had_its_default(reference, train, assert_usage_error, tmp_path):
    shutil.copytree(reference[0], tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text(encoding="utf-8"))
    del config["settings"]["exact_reduction"]
    (tmp_path / "run/config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "is finished" in train(tmp_path / "run")
    assert_usage_error(tmp_path / "run", "--exact-reduction", says="exact_reduction False -> True")
    now = read_run(reference[0]).settings
    then = {k: v for k, v in train_gpt2.learned_settings(now).items() if k != "exact_reduction"}  # as checkpoints have
    assert train_gpt2.changed_settings(then, now) == []
    assert train_gpt2.changed_settings(then, {**now, "seed": 2}) == ["seed 1337 -> 2"]


def test_checkpoints_are_hashed_once(reference, corpus, tmp_path, monkeypatch):
    shutil.copytree(reference[0], tmp_path / "run", ignore=shutil.ignore_patterns("result.json"))
    cfg = parse([*TINY, "--data-dir", str(corpus), "--run-dir", str(tmp_path / "run")])
    hashed, answer = [], ("run", "step_000020.pt")
    monkeypatch.setattr(checkpoints, "problem", lambda path: hashed.append(path))
    for main in (True, False):
        ranks = SimpleNamespace(main=main, gather=lambda value: [answer, value])
        start, state, _ = train_gpt2.find_start(cfg, read_run(reference[0]).settings, ranks)
        assert (start, state["step"], len(hashed)) == ("run", 20, 1)
