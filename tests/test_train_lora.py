import json
import math
import os
import subprocess
import sys

import pytest
import torch
from lora_models import save_tiny, tiny_model
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from common import UsageError
from lora import tasks, train_lora
from lora.base import check_adapter, load_adapter, load_base, target_modules
from lora.multi_lora import MultiLora
from lora.train_lora import TrainConfig
from runlog import comparable_metrics, read_run

QUICK = ("--device", "cpu", "--max-steps", "6", "--eval-every", "3", "--log-every", "1", "--batch-size", "2")
QUICK += ("--max-new-tokens", "8", "--metric-rows", "2", "--eval-rows", "4", "--held-out", "0.2", "--lr", "1e-2")


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"instruction": f"what of {i}", "input": "", "output": f"the cat sat on {i}"} for i in range(60)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def config(base, rows, run_dir, **changes):
    """A run of a few seconds; the test says what is different about it."""
    settings = {
        "task": "instruction", "data_file": str(rows), "device": "cpu", "max_steps": 6, "eval_every": 3, "log_every": 1,
        "batch_size": 2, "max_new_tokens": 8, "metric_rows": 0, "eval_rows": 4, "held_out": 0.2, "lr": 1e-2,
        "prompt": "the cat",
    }  # fmt: skip
    return TrainConfig(base=str(base), run_dir=str(run_dir), **(settings | changes))


def logits(model, ids=None):
    with torch.no_grad():
        return model(torch.arange(1, 20)[None] if ids is None else ids).logits


def adapted(base, run_dir, dtype="float32"):
    return load_adapter(load_base(str(base), dtype), run_dir)


def test_the_script_trains_one_adapter(script, base, rows, tmp_path):
    args = ("--base", base, "--task", "alpaca", "--data-file", rows, "--run-dir", tmp_path, *QUICK)
    first = script("lora/train_lora.py", *args)
    assert "before training" in first.stdout and "after training" in first.stdout
    run = read_run(tmp_path)
    assert run.result["status"] == "success" and run.result["step"] == 6
    assert [row["step"] for row in run.rows("train")] == [1, 2, 3, 4, 5, 6]
    losses = run.curve("val")[1]
    assert losses[-1] < losses[0] and run.result["held_out_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert run.rows("val")[0]["perplexity"] == pytest.approx(math.exp(losses[0]))
    assert set(run.result["before"]) == {"exact_match", "token_f1"} == set(run.result["after"])
    assert (tmp_path / "loss.png").stat().st_size > 5000 and "--- step 6" in (tmp_path / "samples.txt").read_text()
    human = (tmp_path / "lora_experiments_alpaca.log").read_text(encoding="utf-8")
    assert "PARAMETERS:" in human and '"lora_alpha": 16' in human and "RESULTS:" in human
    before = (tmp_path / "metrics.jsonl").read_bytes()
    again = script("lora/train_lora.py", *args)
    assert "already done" in again.stdout and (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_adapter_changes_the_model(base, rows, tmp_path):
    train_lora.run(config(base, rows, tmp_path))
    assert (logits(adapted(base, tmp_path)) - logits(load_base(str(base)))).abs().max() > 1e-3


def test_other_settings_are_refused_and_overwrite_replaces(base, rows, tmp_path):
    train_lora.run(config(base, rows, tmp_path, max_steps=2))
    with pytest.raises(UsageError, match=r"other settings \(r\)"):
        train_lora.run(config(base, rows, tmp_path, max_steps=2, r=4))
    result = train_lora.run(config(base, rows, tmp_path, max_steps=2, r=4, overwrite=True))
    assert result["step"] == 2 and len(read_run(tmp_path).rows("train")) == 2


AT_A_ROW = (
    "record = train_lora.RunLog.metric\n"
    "def metric(self, step, kind, **fields):\n"
    "    record(self, step, kind, **fields)\n"
    "    if (step, kind) == ({step}, 'train'): os._exit(9)\n"
    "train_lora.RunLog.metric = metric\n"
)
AFTER_THE_LAST_STEP = "train_lora.mean_train_loss = lambda run: os._exit(9)\n"


def kill(moment, base, rows, run_dir, **changes):
    """Train in a process that is gone at once at a moment."""
    code = f"import os\nfrom lora import train_lora\nfrom lora.train_lora import TrainConfig\n{moment}"
    code += f"train_lora.run({config(base, rows, run_dir, **changes)!r})\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert read_run(run_dir).result["status"] == "running"


def assert_same_run(one, other):
    """Equal metrics, weights and results, but for what time it took."""
    assert comparable_metrics(one) == comparable_metrics(other)
    name = "ckpt/adapter/adapter_model.safetensors"
    assert (one / name).read_bytes() == (other / name).read_bytes()
    results = [read_run(run_dir).result for run_dir in (one, other)]
    assert all(results[0][key] == results[1][key] for key in ("step", "best_step", "train_loss", "before", "after"))


@pytest.mark.parametrize(
    "moment, changes",
    [
        (AT_A_ROW.format(step=8), {"max_steps": 9, "metric_rows": 2, "batch_size": 12}),  # in the second epoch
        pytest.param(AT_A_ROW.format(step=8), {"max_steps": 9, "log_every": 4}, marks=pytest.mark.slow),
        pytest.param(AFTER_THE_LAST_STEP, {"max_steps": 10}, marks=pytest.mark.slow),
    ],
)
def test_complaint_resume_fails_with_lora_transformers_35850(base, rows, tmp_path, moment, changes):
    """Killed after a checkpoint and started again, a run ends with the metrics and weights of an undisturbed one."""
    train_lora.run(config(base, rows, tmp_path / "whole", **changes))
    kill(moment, base, rows, tmp_path / "killed", **changes)
    train_lora.run(config(base, rows, tmp_path / "killed", **changes))
    assert "resuming from checkpoint-" in (tmp_path / "killed/log.txt").read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_finished_run_is_extended(base, rows, tmp_path):
    """With a constant rate, to the weights of a run that was that long from its start."""
    settings = {"lr_scheduler": "constant", "eval_every": 3, "lora_dropout": 0.1}
    train_lora.run(config(base, rows, tmp_path / "whole", max_steps=9, **settings))
    train_lora.run(config(base, rows, tmp_path / "longer", max_steps=6, **settings))
    with pytest.raises(UsageError, match=r"other settings \(max_steps\)"):
        train_lora.run(config(base, rows, tmp_path / "longer", max_steps=9, **settings))
    with pytest.raises(UsageError, match="other settings"):
        train_lora.run(config(base, rows, tmp_path / "longer", max_steps=9, extend=True, **settings | {"lr": 1e-3}))
    for _ in range(2):  # the second time it is done
        train_lora.run(config(base, rows, tmp_path / "longer", max_steps=9, extend=True, **settings))
    runs = [read_run(tmp_path / name) for name in ("whole", "longer")]
    assert runs[0].curve("val") == runs[1].curve("val") and runs[1].settings["max_steps"] == 9
    whole, longer = (run.run_dir / "ckpt/adapter/adapter_model.safetensors" for run in runs)
    assert whole.read_bytes() == longer.read_bytes() and runs[1].result["step"] == 9


def test_the_trainer_reads_the_rows_that_adapters_at_once_read(base, rows, tmp_path, monkeypatch):
    read, inner = [], train_lora.LoraTrainer.training_step

    def noted(self, model, inputs, *args):
        read.append(inputs["labels"])
        return inner(self, model, inputs, *args)

    monkeypatch.setattr(train_lora.LoraTrainer, "training_step", noted)
    cfg = config(base, rows, tmp_path, seed=3, batch_size=12, max_steps=9, eval_every=9)
    train_lora.run(cfg)
    data = train_lora.load(cfg)[2].train
    assert len(read) == 9
    for step, labels in enumerate(read):
        batch = [data[i] for i in tasks.batch_rows(len(data), 12, step, seed=3)]
        assert torch.equal(labels, tasks.collate(batch, 0)["labels"])


@pytest.mark.parametrize("settings", [{}, {"lr_scheduler": "constant", "warmup_steps": 3}, {"grad_accum_steps": 3}])
def test_the_trainer_trains_as_adapters_at_once(base, rows, tmp_path, monkeypatch, settings):
    """From the same weights the same losses and weights, with weight decay and LoRA+."""
    settings |= {"loraplus_lr_ratio": 4.0, "weight_decay": 0.1, "lora_dropout": 0.0, "bias": "none"}
    cfg = config(base, rows, tmp_path, **settings)
    _, model, data = train_lora.load(cfg)
    engine, losses = MultiLora(model, [cfg]), []
    start = {name: tensor.clone() for name, tensor in engine.tensors(0).items()}
    inner = train_lora.base.add_adapter

    def add_adapter(*args):
        wrapped = inner(*args)
        set_peft_model_state_dict(wrapped, start)
        return wrapped

    monkeypatch.setattr(train_lora.base, "add_adapter", add_adapter)
    train_lora.run(cfg)
    for step in range(cfg.max_steps * cfg.grad_accum_steps):
        batch = tasks.collate([data.train[i] for i in tasks.batch_rows(len(data.train), 2, step, cfg.seed)], 0)
        losses.append(engine.step(engine.forward(batch))[0][0])
    losses = losses[cfg.grad_accum_steps - 1 :: cfg.grad_accum_steps]
    assert read_run(tmp_path).curve("train")[1] == pytest.approx(losses, abs=1e-4)
    trained = load_file(tmp_path / "ckpt/adapter/adapter_model.safetensors")
    for name, tensor in engine.tensors(0).items():
        assert (tensor - start[name]).abs().max() > 1e-3
        assert (tensor - trained[name]).abs().max() < 1e-3 * (tensor - start[name]).abs().max(), name


def test_a_damaged_checkpoint_gives_way_to_the_one_before(base, rows, tmp_path):
    changes = {"max_steps": 9, "eval_every": 2}
    train_lora.run(config(base, rows, tmp_path / "whole", **changes))
    kill(AT_A_ROW.format(step=5), base, rows, tmp_path / "killed", **changes)
    damaged = tmp_path / "killed/ckpt/checkpoint-4/optimizer.pt"
    damaged.write_bytes(damaged.read_bytes()[:-500])
    train_lora.run(config(base, rows, tmp_path / "killed", **changes))
    assert "resuming from checkpoint-2" in (tmp_path / "killed/log.txt").read_text()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_full_disk_is_one_line(base, rows, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(train_lora.Trainer, "_save_checkpoint", full)
    with pytest.raises(UsageError, match=r"a checkpoint could not be written .*free disk and resume"):
        train_lora.run(config(base, rows, tmp_path))


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora"])
def test_an_adapter_of_any_initialization_is_loaded_with_the_loss_recorded(rows, tmp_path, init):
    base = save_tiny(tmp_path / "base", "llama", width=64)
    cfg = config(base, rows, tmp_path, init_lora_weights=init, max_steps=3, eval_every=1, lora_dropout=0.0)
    result = train_lora.run(cfg)
    _, model, data = train_lora.load(cfg)
    loss = train_lora.held_out_loss(load_adapter(model, tmp_path), data.held_out[:4], 0)
    assert loss == pytest.approx(result["held_out_loss"], abs=1e-5)


def test_modules_trained_whole_learn_new_tokens_and_are_kept(rows, tmp_path):
    """The new token is in the rows, and the base's vocabulary has room for it."""
    from transformers import AutoTokenizer

    base, data_file = save_tiny(tmp_path / "base", "llama"), tmp_path / "rows.json"
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<sat>"])
    tokenizer.save_pretrained(base)
    data_file.write_text(rows.read_text().replace(" sat ", "<sat>"))
    cfg = config(base, data_file, tmp_path / "run", modules_to_save="embed_tokens,lm_head", lora_dropout=0.0)
    result = train_lora.run(cfg)
    _, model, data = train_lora.load(cfg)
    before = {name: p.clone() for name, p in model.named_parameters() if p.shape == (300, 32)}
    assert train_lora.held_out_loss(load_adapter(model, tmp_path / "run"), data.held_out[:4], 0) == pytest.approx(
        result["held_out_loss"], abs=1e-6
    )
    kept = load_file(tmp_path / "run/ckpt/adapter/adapter_model.safetensors")
    for name, weight in before.items():
        moved = (kept[f"base_model.model.{name}"] - weight).abs().sum(1)
        assert moved[tokenizer.convert_tokens_to_ids("<sat>")] > 0.1
    assert set(before) == {"model.embed_tokens.weight", "lm_head.weight"}
    with pytest.raises(UsageError, match="cannot have modules_to_save embed_tokens,lm_head; use"):
        MultiLora(load_base(str(base)), [cfg])


@pytest.mark.slow
def test_patience_outlives_a_kill(base, rows, tmp_path):
    changes = {"lr": 3.0, "max_steps": 40, "eval_every": 1, "patience": 3}
    last = train_lora.run(config(base, rows, tmp_path / "whole", **changes))["step"]
    assert last < 40  # patience ended it
    for name, moment in [("middle", AT_A_ROW.format(step=last - 1)), ("end", AFTER_THE_LAST_STEP)]:
        kill(moment, base, rows, tmp_path / name, **changes)
        train_lora.run(config(base, rows, tmp_path / name, **changes))
        assert_same_run(tmp_path / name, tmp_path / "whole")


def test_complaint_nan_step_hidden_trl_6702_and_loss_0_alpaca_lora_391(base, rows, tmp_path):
    """A non-finite loss stops the run at that step; it is neither logged as 0 nor averaged away."""
    result = train_lora.run(config(base, rows, tmp_path, lr=1e30, max_grad_norm=0.0, max_steps=6))
    run = read_run(tmp_path)
    assert run.result["status"] == "diverged" and result["step"] < 6
    assert "not finite at step" in (tmp_path / "log.txt").read_text()
    assert all(row["loss"] > 0 for row in run.rows("train"))
    assert torch.isfinite(logits(adapted(base, tmp_path))).all()


def test_complaint_empty_adapters_saved_alpaca_lora_446(base, rows, tmp_path):
    """What was saved has the shapes that r says and weights that have moved; an empty one is refused."""
    train_lora.run(config(base, rows, tmp_path, r=3))
    tensors = load_file(tmp_path / "ckpt/adapter/adapter_model.safetensors")
    shapes = {name.rsplit("c_attn.", 1)[1]: tuple(t.shape) for name, t in tensors.items()}
    assert shapes == {"lora_A.weight": (3, 32), "lora_B.weight": (96, 3), "base_layer.bias": (96,)}
    assert len(tensors) == 6 and all(t.abs().sum() > 0 for t in tensors.values())
    with pytest.raises(UsageError, match="empty"):
        check_adapter({}, "here")
    with pytest.raises(UsageError, match="empty"):
        check_adapter({"x.lora_B.weight": torch.zeros(0)}, "here")


def test_complaint_fp16_spikes_llama_factory_506(base, rows, tmp_path):
    """float16 is refused; on a bfloat16 base the adapter's weights are float32."""
    with pytest.raises(UsageError, match="float16"):
        train_lora.run(config(base, rows, tmp_path / "a", dtype="float16"))
    train_lora.run(config(base, rows, tmp_path / "b", dtype="bfloat16", bias="none", max_steps=2))
    model = adapted(base, tmp_path / "b", "bfloat16")
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert read_run(tmp_path / "b").result["status"] == "success"


def test_biases_of_a_bfloat16_base_are_trained_in_float32(base, rows, tmp_path):
    """Steps of 3e-4 on values of about 0.1 are rounded away in bfloat16."""
    train_lora.run(config(base, rows, tmp_path, dtype="bfloat16", lr=3e-4, max_steps=4))
    tensors = load_file(tmp_path / "ckpt/adapter/adapter_model.safetensors")
    biases = {name: t for name, t in tensors.items() if name.endswith("bias")}
    before = dict(load_base(str(base), "bfloat16").named_parameters())
    assert biases and all(t.dtype == torch.float32 for t in tensors.values())
    for name, trained in biases.items():
        was = before[name.removeprefix("base_model.model.").replace("base_layer.", "")].float()
        assert (trained != was).float().mean() > 0.9
    assert read_run(tmp_path).result["held_out_loss"] < read_run(tmp_path).curve("val")[1][0]


def test_several_gpus_without_torchrun_do_not_multiply_the_batch(base, rows, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    setup = TrainingArguments.__post_init__
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: (setup(self), setattr(self, "_n_gpu", 2))[0])
    seen, inner = [], train_lora.LoraTrainer.run
    monkeypatch.setattr(train_lora.LoraTrainer, "run", lambda self, *args: seen.append(self) or inner(self, *args))
    train_lora.run(config(base, rows, tmp_path, max_steps=2))
    assert seen[0].args.train_batch_size == 2 and seen[0].args.n_gpu == 1


def test_early_stopping_keeps_the_best_adapter_llama_factory_4637_3336(base, rows, tmp_path):
    """A rate that makes things worse stops early, and the adapter saved is that of the best held-out loss."""
    result = train_lora.run(config(base, rows, tmp_path, lr=3.0, max_steps=40, eval_every=1, patience=3, epochs=9))
    losses = read_run(tmp_path).curve("val")[1]
    assert result["step"] < 40 and result["best_step"] == losses.index(min(losses))
    assert result["held_out_loss"] == pytest.approx(min(losses), abs=1e-5)


@pytest.mark.core
def test_held_out_loss_is_per_token_whatever_the_batch(base):
    from lora.tasks import IGNORE

    model = tiny_model("llama", torch.float64)
    g = torch.Generator().manual_seed(0)
    rows = []
    for n in (3, 9, 20, 21, 7):
        ids = torch.randint(1, 290, (n,), generator=g).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE] * (n // 2) + ids[n // 2 :]})
    losses = [train_lora.held_out_loss(model, rows, 0, batch_size=b) for b in (1, 2, 5)]
    nll = [
        -torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0].float(), -1)[t - 1, label].item()
        for row in rows
        for t, label in enumerate(row["labels"])
        if label != IGNORE
    ]
    assert losses == pytest.approx([sum(nll) / len(nll)] * 3, abs=1e-6)


def llama_tokenizer():
    """Pieces of whole words with a space before the first, as SentencePiece makes them for Llama."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    text = "a film that goes on and on\nSentiment: positive\nSentiment: negative "
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([text] * 9, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


@pytest.mark.core
@pytest.mark.parametrize("sentiment, max_length", [("positive", 400), ("negative", 32)])
def test_the_accuracy_scores_the_tokens_that_were_trained(monkeypatch, sentiment, max_length):
    """On a SentencePiece tokenizer, too, where a text begins with a space that is not there in the middle of one."""
    tokenizer, asked = llama_tokenizer(), []
    row = {"review": "a film 😀 that goes on " * 4, "sentiment": sentiment}
    [example] = tasks.to_examples("imdb", row, tokenizer, "corrected")
    trained, _ = tasks.encode(example, tokenizer, max_length)
    whole = tokenizer("".join(text for text, _ in example.segments), add_special_tokens=False).input_ids
    whole = [*whole, tokenizer.eos_token_id]
    assert trained["input_ids"][:8] == whole[:8] and trained["input_ids"][-3:] == whole[-3:]
    assert len(trained["input_ids"]) == min(len(whole), max_length)
    monkeypatch.setattr(train_lora, "held_out_loss", lambda model, rows, pad: asked.extend(rows) or len(asked))
    train_lora.likelier_sentiment(None, tokenizer, example, max_length)
    [scored] = [row for row in asked if row["input_ids"] == trained["input_ids"]]
    assert tokenizer.decode([label for label in scored["labels"] if label >= 0]).strip() == sentiment
    assert all(label in (-100, token) for label, token in zip(scored["labels"], trained["labels"]))


@pytest.mark.core
@pytest.mark.parametrize("family, names", [("bloom", ["query_key_value"]), ("llama", ["q_proj", "k_proj", "v_proj"])])
def test_targets_are_the_originals(family, names):
    assert target_modules("auto", tiny_model(family)) == names
    assert target_modules(", ".join(names), tiny_model(family)) == names


def test_a_base_that_cannot_keep_packed_rows_apart_is_refused(rows, tmp_path):
    with pytest.raises(UsageError, match="does not keep packed rows apart"):
        train_lora.run(config(save_tiny(tmp_path / "base", "bloom"), rows, tmp_path / "run", packing=True))


def test_a_base_in_four_bits(rows, tmp_path, monkeypatch):
    """QLoRA learns, its losses near those on the whole base; without the package it is refused in one line."""
    base = save_tiny(tmp_path / "base", "llama", width=64)
    monkeypatch.setattr("transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda *_, **__: False)
    with pytest.raises(UsageError, match="bitsandbytes"):
        train_lora.run(config(base, rows, tmp_path / "run", load_in_4bit=True))
    monkeypatch.undo()
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    whole, quantized = (
        train_lora.run(config(base, rows, tmp_path / name, load_in_4bit=name == "quantized"))["held_out_loss"]
        for name in ("whole", "quantized")
    )
    assert quantized != whole and quantized == pytest.approx(whole, rel=0.05)


def test_a_misspelt_target_is_refused(base, rows, tmp_path):
    """PEFT would train the others and say nothing."""
    with pytest.raises(UsageError, match="no module c_prj"):
        train_lora.run(config(base, rows, tmp_path, target_modules="c_attn,c_prj"))
    with pytest.raises(UsageError, match="--modules-to-save: the model has no module wet"):
        train_lora.run(config(base, rows, tmp_path / "other", modules_to_save="wet"))


@pytest.mark.core
@pytest.mark.parametrize(
    "changes, says",
    [
        ({"data_file": "no.json"}, "no.json is not a file"),
        ({"task": "poetry"}, "unknown task poetry"),
        ({"base": "./no"}, "./no does not exist"),
        ({"r": 0}, "--r 0 should be a number from 1"),
        ({"log_every": 0}, "--log-every 0 should be a number from 1"),
        ({"bias": "lora"}, "unknown bias lora; choose from none"),
        ({"lr_scheduler": "linaer"}, "choose from linear"),
        ({"batch_size": 2.5}, "batch-size should be int"),
        ({"lr": -1e-3}, "--lr -0.001 should be a number from 0"),
        ({"lr": math.nan}, "--lr nan should be"),
        ({"lr": []}, r"--lr should be float, not \[\]"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"max_grad_norm": -1.0}, "--max-grad-norm"),
        ({"patience": -1}, "--patience"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"r": 10**6}, "--r 1000000 should be a number from 1 to 4096"),
        ({"seed": 2**64}, "--seed"),
        *[
            ({"init_lora_weights": name}, "choose from default")
            for name in ("lora_ga", "eva", "pissa_niter_4", "loftq")
        ],
        ({"max_steps": 0, "epochs": 0}, "nothing to train"),
        ({"modules_to_save": "lm_head", "dtype": "bfloat16"}, "choose --dtype float32"),
    ],
)
def test_usage_errors_are_named_before_anything_is_loaded_or_written(base, rows, tmp_path, changes, says):
    cfg = config(base, rows, tmp_path / "run")
    for name, value in changes.items():
        setattr(cfg, name, value)
    with pytest.raises(UsageError, match=says):
        train_lora.run(cfg)
    assert not (tmp_path / "run").exists()


def test_a_usage_error_is_one_line(assert_refuses, tmp_path):
    assert_refuses("lora/train_lora.py", "--base", "./no", "--run-dir", tmp_path / "run", says="./no does not exist")
    assert not (tmp_path / "run").exists()


def test_on_a_real_llama(shared_data, tmp_path):
    changes = {"task": "imdb", "data_file": str(shared_data / "imdb_review_3000.csv.gz"), "prompt": ""}
    cfg = config(shared_data / "stories260K", "", tmp_path, max_length=64, metric_rows=4, **changes)
    result = train_lora.run(cfg)
    run = read_run(tmp_path)
    assert result["prompt"] == "I love this movie because"
    assert run.result["held_out_loss"] < run.curve("val")[1][0] and 0 <= run.result["after"]["sentiment_accuracy"] <= 1


@pytest.mark.slow
def test_two_processes_train_one_adapter(base, rows, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["lora/train_lora.py", "--base", str(base), "--task", "alpaca", "--data-file", str(rows)]
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run([*command, "--run-dir", str(tmp_path), *QUICK], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    run = read_run(tmp_path)
    assert run.result["status"] == "success" and run.env["world_size"] == 2
    assert torch.isfinite(logits(adapted(base, tmp_path))).all()
