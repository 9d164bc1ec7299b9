"""train_gpt2.py as users run it: what it learns and records, alone and under torchrun, eager, compiled, in 16 bits."""

import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from gpt2_runs import TINY, identical, torchrun, weights

from common import UsageError
from gpt2 import checkpoint, distributed, plan, train_gpt2
from gpt2.config import PRESETS, GPTConfig, TrainConfig
from gpt2.model import GPT
from gpt2.train_gpt2 import main
from runlog import comparable_metrics, read_run

pytest_plugins = ["gpt2_runs"]
pytestmark = pytest.mark.usefixtures("signal_handlers")


def test_the_run_directory_holds_what_is_promised(reference):
    run_dir, stdout = reference
    names = {p.name for p in run_dir.iterdir()}
    assert {"config.json", "env.json", "metrics.jsonl", "log.txt", "loss.png", "result.json", "ckpt"} <= names
    run = read_run(run_dir)
    assert run.result["status"] == "success" and run.result["step"] == 20
    assert [r["step"] for r in run.rows("train")] == list(range(20))
    assert [r["step"] for r in run.rows("val")] == [0, 10, 20]
    first, last = (run.rows("val")[i]["loss"] for i in (0, -1))
    assert last < first - 0.3 and run.result["val_loss"] == last
    speed, train_seconds = run.result["tok_per_sec"], sum(row["ms"] for row in run.rows("train")) / 1e3
    assert 20 * 256 / run.result["seconds"] <= speed < 20 * 256 / train_seconds  # of the whole run
    assert run.settings["tokenizer_sha256"] and run.settings["dtype"] == "float32"
    assert run.env["threads"] == 1 and run.env["torch"] == torch.__version__
    assert (run_dir / "log.txt").read_text(encoding="utf-8") == stdout
    last_line = stdout.splitlines()[-1]
    assert last_line.startswith(f"success: 20 steps, validation loss {last:.4f} | ")  # result.json has all the digits
    model = GPT(GPTConfig(block_size=32, vocab_size=385, n_layer=1, n_head=2, n_embd=16))
    assert run.settings["flops_per_token"] == run.result["flops_per_token"] == model.flops_per_token()
    assert sorted(p.name for p in (run_dir / "ckpt").glob("*.pt")) == ["step_000015.pt", "step_000020.pt"]


@pytest.mark.core
def test_a_run_learns_and_resumes_in_process(train, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(whole, "--checkpoint-every", "5")
    train(halves, "--stop-after-minutes", "0.0000001")
    assert read_run(halves).result["status"] == "preempted"
    train(halves)
    losses = read_run(whole).curve("val")[1]
    assert losses[-1] < losses[0] - 0.3 and identical(whole, halves)


def test_two_identical_runs_give_identical_metrics_and_weights(reference, train, tmp_path):
    train(tmp_path / "again")
    assert identical(reference[0], tmp_path / "again")
    train(tmp_path / "other", "--seed", "2")
    assert not identical(reference[0], tmp_path / "other")


def test_bits_per_byte_agrees_with_the_loss_and_the_text(reference, corpus):
    """build-nanogpt reports nats a token alone, which two tokenizers cannot compare."""
    from bpe import Tokenizer
    from data.shards import open_split

    row = read_run(reference[0]).rows("val")[-1]
    tokenizer = Tokenizer.load(str(corpus / "tokenizer.model"))
    targets = open_split(corpus, "val")[0][1 : 1 + row["tokens"]].tolist()
    text_bytes = len(tokenizer.decode_bytes(targets))
    assert row["tokens"] == 1024 and tokenizer.eot_token not in targets
    assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / math.log(2) / text_bytes)


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 2), (2, 4), (4, 2)])
def test_the_result_does_not_depend_on_processes_or_micro_batches(
    reference, corpus, tmp_path, world_size, micro_batch_size
):
    """karpathy/nanoGPT#145, #225, #468: results that depend on the number of GPUs."""
    flags = ["--micro-batch-size", str(micro_batch_size)]
    torchrun(tmp_path / "run", corpus, *flags, nproc=world_size, before=["--standalone"])
    ours, theirs = comparable_metrics(reference[0]), comparable_metrics(tmp_path / "run")
    assert [(r["step"], r["kind"]) for r in ours] == [(r["step"], r["kind"]) for r in theirs]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs)) < 1e-5


def test_exact_reduction_gives_the_same_bits_on_another_number_of_processes(corpus, train, tmp_path):
    """The masks of --dropout and NorMuon's update included; resumed on one process as well."""
    flags = ["--exact-reduction", "--micro-batch-size", "2", "--dropout", "0.1", "--optimizer", "normuon"]
    train(tmp_path / "alone", *flags)
    torchrun(tmp_path / "run", corpus, *flags, before=["--standalone"])
    assert identical(tmp_path / "alone", tmp_path / "run")
    for name in ("result.json", "ckpt/step_000020.pt"):
        (tmp_path / "run" / name).unlink()
    assert "resumed at step 15" in train(tmp_path / "run", *flags)
    assert identical(tmp_path / "alone", tmp_path / "run")


@pytest.mark.parametrize("has", [True, False])
def test_dtype_auto_looks_at_the_processor_and_the_quickstart_does_not(train, tmp_path, monkeypatch, has):
    monkeypatch.setattr(distributed, "half_type", lambda device: "bfloat16" if has else None)
    for flags, dtype in [([], "float32"), (["--dtype", "auto"], "bfloat16" if has else "float32")]:
        out = train(tmp_path / str(len(flags)), "--max-steps", "1", *flags)
        assert read_run(tmp_path / str(len(flags))).settings["dtype"] == dtype and f"{dtype} on cpu" in out


@pytest.mark.parametrize("where", ["validation", "HellaSwag"])
def test_a_reason_to_stop_is_heard_in_the_middle_of(where, train, shared_data, tmp_path, monkeypatch):
    """They may take longer than the 30 s that torchrun gives. When the run resumes they are repeated, whole."""
    flags = ["--hellaswag-every", "10", "--hellaswag-file", shared_data / "hellaswag_val.jsonl.gz"]
    flags += ["--hellaswag-limit", "8", "--max-steps", "12"]
    train(tmp_path / "undisturbed", *flags)
    module, name = {"validation": (train_gpt2, "evaluate_loss"), "HellaSwag": (train_gpt2.hellaswag, "evaluate")}[where]
    original, seen = getattr(module, name), []

    def stopped(*args, **kwargs):
        seen.append(1)
        if len(seen) == (2 if where == "validation" else 1):  # at step 10
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, stopped)
    out = train(tmp_path / "run", *flags)
    run = read_run(tmp_path / "run")
    assert out.splitlines()[-1].startswith("preempted: received SIGTERM") and run.result["step"] == 10
    kind = "val" if where == "validation" else "hellaswag"
    assert 10 not in [row["step"] for row in run.rows(kind)]
    train(tmp_path / "run", *flags)
    assert identical(tmp_path / "undisturbed", tmp_path / "run")


def test_gpt2s_own_loss_is_a_line_in_the_picture_of_fineweb_edu(corpus, in_process, tmp_path, monkeypatch):
    shutil.copytree(corpus, tmp_path / "corpus")
    meta = json.loads((tmp_path / "corpus/meta.json").read_text(encoding="utf-8"))
    lines = []
    monkeypatch.setattr(train_gpt2.RunLog, "plot", lambda self, reference, submit: lines.append(reference))
    for name, expected in [("fineweb-edu", 3.2924), ("tiny", None)]:
        meta.update(name=name, tokenizer={**meta["tokenizer"], "name": "gpt2"})
        (tmp_path / "corpus/meta.json").write_text(json.dumps(meta), encoding="utf-8")
        flags = ["--data-dir", tmp_path / "corpus", "--run-dir", tmp_path / name, "--max-steps", "1"]
        code, _, err = in_process(main, *TINY, *flags)
        assert code == 0, err
        assert lines[-1].get("GPT-2 124M (OpenAI)") == expected and lines[-1]["unigram entropy"] > 0


def test_a_bar_on_a_terminal_and_none_in_a_file(in_process, corpus, tmp_path, monkeypatch):
    flags = [*TINY, "--data-dir", corpus, "--max-steps", "2"]
    assert "2/2" not in in_process(main, *flags, "--run-dir", tmp_path / "file")[2]
    monkeypatch.setattr(type(sys.stderr), "isatty", lambda self: True)
    _, out, err = in_process(main, *flags, "--run-dir", tmp_path / "terminal")
    assert "2/2" in err and "step      1/2 | loss" in out and "ETA 0:00:00" in out


def test_a_published_model_is_where_training_may_begin(train, corpus, tmp_path):
    """--init takes a Hugging Face folder; --eval-only gives its loss on our shards, the reference line of a curve."""
    import numpy as np
    from transformers import GPT2Config, GPT2LMHeadModel

    from data.shards import open_split

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(
        GPT2Config(vocab_size=385, n_positions=64, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    hf.save_pretrained(tmp_path / "hf")
    shape = ["--n-layer", "2"]
    train(tmp_path / "eval", "--init", tmp_path / "hf", "--eval-only", *shape)
    result = read_run(tmp_path / "eval").result
    assert result["status"] == "success" and not (tmp_path / "eval/ckpt").exists()
    tokens = torch.from_numpy(open_split(corpus, "val")[0][: 1024 + 1].astype(np.int64))
    with torch.no_grad():
        logits = hf.eval()(tokens[:-1].view(32, 32)).logits.view(-1, 385)
    expected = torch.nn.functional.cross_entropy(logits, tokens[1:]).item()
    assert result["val_loss"] == pytest.approx(expected, abs=1e-5)
    train(tmp_path / "run", "--init", tmp_path / "hf", "--max-steps", "2", *shape)
    assert read_run(tmp_path / "run").rows("val")[0]["loss"] == result["val_loss"]


def test_a_plan_starts_nothing_and_times_what_will_run(train, tmp_path, monkeypatch):
    shown = train(tmp_path / "run", "--plan")
    for word in ("parameters", "tokens", "memory", "fits here", "fits GPUs", "time", "disk", "float32, eager"):
        assert word in shown
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: calls.append(f) or f)
    assert "float32, compiled" in train(tmp_path / "run", "--plan", "--compile")
    assert any(isinstance(f, GPT) for f in calls) and not (tmp_path / "run").exists()
    monkeypatch.setattr(plan, "measure_speed", lambda *args: 1000.0)
    shown = train(tmp_path / "run", "--plan", "--val-tokens", "36000000")  # three times, at a third of a step's cost
    assert " 10.0 h with evaluations, at 1,000 tokens/s" in shown


@pytest.mark.core
def test_the_last_weights_are_averaged_and_a_resumed_run_ends_the_same(train, tmp_path):
    train(tmp_path / "plain", "--checkpoint-every", "1", "--keep-checkpoints", "9")
    last = [checkpoint.load(path)["model"] for path in sorted((tmp_path / "plain/ckpt").glob("*.pt"))[-7:]]
    train(tmp_path / "run", "--average-last", "7")
    for name, averaged in weights(tmp_path / "run").items():
        mean = torch.stack([model[name].double() for model in last]).mean(0)
        torch.testing.assert_close(averaged.double(), mean, rtol=0, atol=1e-6)
    plain, ours = (read_run(tmp_path / name).curve("val")[1] for name in ("plain", "run"))
    assert ours[:2] == plain[:2] and ours[2] != plain[2]
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for name in ("result.json", "ckpt/step_000020.pt"):
        (tmp_path / "resumed" / name).unlink()
    assert "resumed at step 15" in train(tmp_path / "resumed", "--average-last", "7")
    assert identical(tmp_path / "run", tmp_path / "resumed")


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged_and_names_the_step(train, tmp_path):
    out = train(tmp_path / "run", "--max-lr", "1e30", "--warmup-steps", "0", "--checkpoint-every", "1")
    result = read_run(tmp_path / "run").result
    assert result["status"] == "diverged" and "of step 1 is not finite" in result["reason"]
    assert out.splitlines()[-1].startswith("diverged: the ")
    good = checkpoint.load_newest(tmp_path / "run/ckpt")  # the weights before the step that spoiled them, or after it,
    assert good["step"] <= 1  # but none from after it was noticed


def test_without_the_hub_training_goes_on_without_hellaswag_and_says_so_once(train, assert_usage_error, tmp_path):
    out = train(tmp_path / "run", "--hellaswag-every", "5", "--max-steps", "5")
    assert out.count("HellaSwag is not scored: the download of Rowan/hellaswag") == 1 and "--hellaswag-file FILE" in out
    assert read_run(tmp_path / "run").result["status"] == "success"
    assert_usage_error(
        tmp_path / "other", "--hellaswag-every", "5", "--hellaswag-file", "none.jsonl", says="none.jsonl"
    )


def test_a_gradient_that_is_not_finite_is_skipped_when_asked(train, tmp_path, monkeypatch):
    calls, clip = [], torch.nn.utils.clip_grad_norm_

    def spoilt_at_the_third_call(parameters, max_norm):
        calls.append(max_norm)
        return clip(parameters, max_norm) * (math.nan if len(calls) in spoilt else 1)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", spoilt_at_the_third_call)
    spoilt = {3}
    train(tmp_path / "stopped")
    assert "the gradient of step 2 is not finite" in read_run(tmp_path / "stopped").result["reason"]
    calls.clear()
    out = train(tmp_path / "skipped", "--skip-nonfinite", "1")
    assert "step 2 is not finite: skipped (1 of at most 1)" in out
    result = read_run(tmp_path / "skipped").result
    assert result["status"] == "success" and result["skipped_steps"] == 1
    calls.clear()
    spoilt = {3, 5}
    train(tmp_path / "twice", "--skip-nonfinite", "1")
    assert "step 4 is not finite, after 1 skipped" in read_run(tmp_path / "twice").result["reason"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bits_train_like_thirty_two(reference, train, tmp_path, dtype):
    """nanoGPT#87: cards without bfloat16 get float16 and a gradient scaler."""
    train(tmp_path / "run", "--dtype", dtype)
    wide, narrow = (read_run(run_dir).curve("val")[1] for run_dir in (reference[0], tmp_path / "run"))
    assert narrow == pytest.approx(wide, abs=0.02) and narrow != wide


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_overflow_in_float16_leaves_the_step_out_in_all_optimizers(train, tmp_path, monkeypatch, optimizer):
    """Clipped by a norm that is not finite, the gradients that did not overflow would be spoilt, too."""
    seen, clip = [], torch.nn.utils.clip_grad_norm_

    def overflow(parameters, max_norm):
        parameters = list(parameters)
        seen.append([p.detach().clone() for p in parameters])
        if len(seen) in (3, 4):
            parameters[0].grad.fill_(math.inf)
        return clip(parameters, max_norm)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    flags = ("--dtype", "float16", "--optimizer", optimizer, "--skip-nonfinite", "9", "--max-steps", "6")
    train(tmp_path / "run", *flags)
    assert read_run(tmp_path / "run").result["status"] == "success"
    still = [all(map(torch.equal, a, b)) for a, b in pairwise(seen)]
    assert still == [False, False, True, True, False]
    assert all(torch.isfinite(p).all() for p in seen[-1])


def test_a_skipped_step_in_float16_is_followed_by_a_good_one(train, tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt2.Trainer, "skip", lambda self, loss, norm: self.step == 2)
    train(tmp_path / "run", "--dtype", "float16", "--skip-nonfinite", "1", "--max-steps", "6")
    assert read_run(tmp_path / "run").result["status"] == "success"


@pytest.mark.slow
def test_compiled_ranks_stay_together_when_one_has_a_terminal(corpus, tmp_path):
    """What only the main process shows must not decide when all processes sum their losses."""
    pty = pytest.importorskip("pty")
    ours, terminal = pty.openpty()
    said = []
    drain = threading.Thread(target=lambda: said.extend(iter(partial(os.read, ours, 4096), b"")), daemon=True)
    drain.start()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "gpt2/train_gpt2.py", *TINY]
    command += ["--data-dir", str(corpus), "--run-dir", str(tmp_path / "run"), "--compile", "--log-every", "5"]
    command += ["--micro-batch-size", "4"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=terminal, text=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, b"".join(said)[-3000:].decode(errors="replace")
    shown = [line.split("/")[0].split()[-1] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert shown == ["0", "4", "9", "14", "19"]  # compiled, the first step by itself; then as checkpoints come


def test_without_a_compiler_training_is_eager_and_says_so_once(reference, script, corpus, tmp_path):
    """karpathy/nanochat#502, #604: no toolchain for torch.compile."""
    flags = [*TINY, "--compile", "--data-dir", corpus, "--run-dir", tmp_path / "run"]
    env = {"CXX": "/no/such/compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    out = script("gpt2/train_gpt2.py", *flags, env=env).stdout
    assert out.count("torch.compile does not work here (") == 1 and "/no/such/compiler" in out
    assert identical(reference[0], tmp_path / "run")


def test_if_compiling_fails_on_one_rank_all_go_eager(monkeypatch):
    said, model = [], torch.nn.Linear(2, 2)
    monkeypatch.setattr(train_gpt2, "compile_problem", lambda device: None)
    ranks = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: [value, "no compiler", value])
    assert train_gpt2.compiled(model, TrainConfig(), ranks, said.append) is model
    assert len(said) == 1 and "(rank 1: no compiler)" in said[0]


def test_gradients_live_in_the_buckets_that_are_exchanged(in_process, corpus, tmp_path, monkeypatch):
    """A copy of each gradient beside its bucket would be 4 bytes a parameter more."""
    seen = {}

    def refuse(model, **options):
        seen.update(options)
        raise UsageError("seen")

    def two(device):
        ranks = distributed.Ranks(device)
        ranks.world_size, ranks.gather = 2, lambda value: [value] * 2
        return ranks

    monkeypatch.setattr(train_gpt2, "DistributedDataParallel", refuse)
    monkeypatch.setattr(train_gpt2, "Ranks", two)
    flags = [*TINY, "--data-dir", corpus, "--run-dir", tmp_path / "run", "--micro-batch-size", "4"]
    assert "seen" in in_process(main, *flags)[2] and seen == {"gradient_as_bucket_view": True}


def test_the_cache_of_compiled_code_is_this_nodes_own():
    """A repository on NFS would be shared by all nodes' ranks."""
    code = """from types import SimpleNamespace
import torch
from gpt2 import train_gpt2
train_gpt2.compile_problem = lambda device: None
ranks = SimpleNamespace(device=torch.device("cpu"), gather=lambda value: [value])
train_gpt2.compiled(torch.nn.Linear(2, 2), train_gpt2.TrainConfig(), ranks, print)
from torch._inductor.runtime.cache_dir_utils import cache_dir
print(cache_dir())"""
    env = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert not Path(done.stdout.strip()).resolve().is_relative_to(ROOT)


def test_what_lives_after_the_first_step_is_kept_from_the_garbage_collector(train, tmp_path):
    gc.unfreeze()
    train(tmp_path / "run", "--max-steps", "2")
    assert gc.get_freeze_count() > 10_000
    gc.unfreeze()


def test_hellaswag_and_samples_come_in_between(train, shared_data, tmp_path):
    flags = [
        "--hellaswag-every",
        "10",
        "--hellaswag-file",
        shared_data / "hellaswag_val.jsonl.gz",
        "--hellaswag-limit",
        "8",
    ]
    out = train(tmp_path / "run", *flags, "--sample-every", "10", "--sample-prompt", "Return the")
    run = read_run(tmp_path / "run")
    assert [row["step"] for row in run.rows("hellaswag")] == [10, 20]
    assert all(row["items"] == 8 and 0 <= row["acc_norm"] <= 1 for row in run.rows("hellaswag"))
    assert run.result["hellaswag_acc_norm"] == run.rows("hellaswag")[-1]["acc_norm"]
    assert out.count("  sample | Return the") == 6  # two each at steps 0, 10 and 20
    assert (tmp_path / "run/samples.txt").read_text(encoding="utf-8").count("--- step") == 6


def test_a_sample_costs_a_position_a_token(train, tmp_path, monkeypatch):
    """The other ranks wait for it; without the key-value cache each token would cost the whole context again."""
    forward, shapes = GPT.forward, []

    def counted(self, idx, targets=None, **kwargs):
        shapes.extend([] if targets is not None else [tuple(idx.shape)])
        return forward(self, idx, targets, **kwargs)

    monkeypatch.setattr(GPT, "forward", counted)
    train(tmp_path / "run", "--sample-every", "20", "--sample-prompt", "Return the")
    prompt = shapes[0]
    assert prompt[1] > 1 and shapes.count(prompt) == 2 and set(shapes) == {prompt, (2, 1)}  # at steps 0 and 20
    assert len(shapes) <= 2 * (32 - prompt[1])
    assert all(preset.sample_every >= 1000 for name, preset in PRESETS.items() if name.startswith("gpt2"))


def test_tensorboard_shows_the_curves_when_asked(train, tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", "--tensorboard", "--stop-after-minutes", "0.0000001")
    train(tmp_path / "run", "--tensorboard")
    events = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for kind in ("train", "val"):
        steps, losses = read_run(tmp_path / "run").curve(kind)
        assert [event.step for event in events.Scalars(f"{kind}/loss")] == steps
        assert [event.value for event in events.Scalars(f"{kind}/loss")] == pytest.approx(losses)


def test_compiled_training_validates_scores_samples_and_saves_plain_names(train, shared_data, tmp_path):
    """build-nanogpt#79, #78, #60: compiling breaks HellaSwag and sampling. nanoGPT#325: `_orig_mod.` in checkpoints."""
    file = shared_data / "hellaswag_val.jsonl.gz"
    items = ["--hellaswag-every", "2", "--hellaswag-file", file, "--hellaswag-limit", "8"]
    often = [*items, "--sample-every", "2", "--val-every", "2", "--max-steps", "4", "--val-tokens", "384"]
    out = train(tmp_path / "compiled", "--compile", *often)
    assert "eager" not in out
    train(tmp_path / "eager", *often)
    ours, eager = read_run(tmp_path / "compiled"), read_run(tmp_path / "eager")
    for kind, field in [("train", "loss"), ("val", "loss"), ("hellaswag", "acc_norm")]:
        assert ours.curve(kind, field)[1] == pytest.approx(eager.curve(kind, field)[1], abs=1e-4)
    assert out.count("  sample | ") == 6
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in weights(tmp_path / "compiled"))
    assert set(weights(tmp_path / "compiled")) == set(weights(tmp_path / "eager"))


def test_mfu_stands_in_the_step_line_where_the_peak_is_known(train, tmp_path, monkeypatch):
    """build-nanogpt#182."""
    monkeypatch.setattr(train_gpt2, "peak_flops", lambda device, dtype: 1e12)
    out = train(tmp_path / "run", "--max-steps", "2")
    row = read_run(tmp_path / "run").rows("train")[-1]
    model = GPT(GPTConfig(block_size=32, vocab_size=385, n_layer=1, n_head=2, n_embd=16))
    assert row["mfu"] == pytest.approx(row["tok_per_sec"] * model.flops_per_token() / 1e12)
    assert f"MFU {row['mfu']:.1%}" in out


def test_a_float16_overflow_lowers_the_scale_and_leaves_the_step_out(train, tmp_path, monkeypatch):
    """nanoGPT#87: the gradient scaler of cards without bfloat16, as far as a CPU shows it."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**40, backoff_factor=2.0**-12)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    train(tmp_path / "run", "--dtype", "float16", "--max-steps", "8")
    run = read_run(tmp_path / "run")
    norms = [row["grad_norm"] for row in run.rows("train")]
    assert norms[0] is None and all(norm is not None for norm in norms[-4:])  # null: not finite
    assert run.result["status"] == "success" and run.result["val_loss"] < run.rows("val")[0]["loss"]
    state = checkpoint.load_newest(tmp_path / "run/ckpt")
    assert state["scaler"]["scale"] < 2.0**40


def test_float16_that_overflows_at_every_scale_has_diverged(train, tmp_path, monkeypatch):
    """nanoGPT#87."""
    build = train_gpt2.build_model

    def spoilt(cfg, meta):
        model = build(cfg, meta)
        model.transformer.ln_f.weight.register_hook(lambda grad: grad * torch.inf)
        return model

    monkeypatch.setattr(train_gpt2, "build_model", spoilt)
    train(tmp_path / "run", "--dtype", "float16", "--max-steps", "40")
    result = read_run(tmp_path / "run").result
    assert result["status"] == "diverged" and "of step 16 is not finite, however small" in result["reason"]


@pytest.mark.core
def test_the_validation_loss_is_the_same_for_every_number_of_processes(corpus):
    """To the last bit, also where the last batch is not full: 23 sequences in batches of 4."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=385, n_layer=1, n_head=2, n_embd=16))
    cfg = TrainConfig(val_tokens=23 * 32, block_size=32, micro_batch_size=4, dtype="float32")
    loader, stop = train_gpt2.Loader(corpus, "val", 32), SimpleNamespace(here=lambda: None, reason=lambda: None)

    def evaluate(rank, world_size, exchange):
        ranks = SimpleNamespace(rank=rank, world_size=world_size, device=torch.device("cpu"), sum=exchange)
        return train_gpt2.evaluate_loss(model, loader, cfg, ranks, torch.ones(385), stop)

    found = []
    for world_size in (1, 2, 3):
        shares = []
        for rank in range(world_size):
            evaluate(rank, world_size, lambda values, shares=shares: shares.append(values) or values)
        sums = [sum(map(float, column)) for column in zip(*shares)]
        found.append(evaluate(0, world_size, lambda values, sums=sums: sums))
    assert found[0] == found[1] == found[2] and found[0]["tokens"] == 23 * 32
