"""Generate text with a base model, with an adapter on it, or with a merged model; merge an adapter.

    python lora/generate.py --base gpt2 --prompt "I love this movie because"
    python lora/generate.py --base exported/ --adapter runs/lora/ --prompt "…"        (a run directory or PEFT folder)
    python lora/generate.py --base smollm2 --chat --prompt "Name three colours."      (the model's chat template)
    python lora/generate.py --base exported/ --adapter runs/lora/ --merge merged/     (a Hugging Face folder)

Greedy with repetition penalty 1.5, as in the course notebook; `--temperature 0.8` samples instead. Generation stops at
end-of-text. Merging adds the adapter to the weights in float32, whatever --dtype they are saved in.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from transformers import AutoTokenizer, GenerationConfig

from common import UsageError, atomic_folder, cli, pick_device, validate
from lora.base import RANGES, block_size, evaluating, load_adapter, load_base, load_pretrained, quiet_libraries
from lora.tasks import Example, pad_id, prompt_ids, stop_ids, to_examples


@dataclass
class GenerateConfig:
    base: str  # hub name or Hugging Face folder; "smollm2" for the packaged one
    adapter: str = ""  # PEFT folder, or the run directory that holds it
    prompt: str = ""  # text to continue
    chat: bool = False  # the prompt is a user's turn in the model's chat template; the answer ends with its turn
    max_new_tokens: int = 100  # tokens
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # sample from the most likely tokens that make up this probability
    repetition_penalty: float = 1.5  # 1: off
    seed: int = 0  # of the sampling
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base
    device: str = "auto"  # auto, cuda, mps or cpu
    merge: str = ""  # folder for the merged model; text is generated only if a prompt is given, too


def generate(
    model, tokenizer, ids, n=1, *, stop_ids, max_new_tokens=100, temperature=0.0, top_p=1.0, repetition_penalty=1.5
):
    """Continue a prompt (a list of ids) n times in one batch -> n texts, each without its stop token.

    The n rows differ when sampled, or when the model holds n adapters (`MultiLora`), each of which reads its own row.
    An id that only pads the vocabulary is never generated.
    """
    room = block_size(model.config) - max_new_tokens
    if room < 1:
        raise UsageError(f"the model reads {block_size(model.config)} tokens; ask for fewer new ones")
    ids = torch.tensor([ids[-room:] or [stop_ids[0] if stop_ids else 0]] * n, device=model.device)  # (n, T)
    vocab_size = model.config.get_text_config(decoder=True).vocab_size  # nested in Gemma-3's config, say
    unused = list(range(len(tokenizer), vocab_size))  # rows that only pad the embedding
    sampling = {"temperature": temperature, "top_p": top_p} if temperature else {}
    options = GenerationConfig(
        max_new_tokens=max_new_tokens, repetition_penalty=repetition_penalty, eos_token_id=stop_ids or None,
        pad_token_id=pad_id(tokenizer), suppress_tokens=unused or None, do_sample=bool(temperature), **sampling,
    )  # fmt: skip
    with evaluating(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=options)
    texts, before = [], tokenizer.decode(ids[0].tolist())
    for row in out.tolist():
        new = row[ids.shape[1] :]
        new = new[: next((i for i, token in enumerate(new) if token in stop_ids), None)]
        # SentencePiece drops the space of what comes first in a text, so a continuation is decoded after its prompt.
        text = tokenizer.decode([*row[: ids.shape[1]], *new])
        texts.append(text.removeprefix(before) if text.startswith(before) else tokenizer.decode(new))
    return texts


def save_merged(model, tokenizer, folder, dtype):
    """Merge a PeftModel's adapter into its float32 base; write a Hugging Face folder, whole or not at all."""
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise UsageError(f"{folder} is not empty; choose another folder for --merge")
    with atomic_folder(folder) as part:
        model.merge_and_unload().to(getattr(torch, dtype)).save_pretrained(part)
        tokenizer.save_pretrained(part)


def encode_prompt(tokenizer, prompt, chat=False):
    """What the model reads, and where its answer ends -> (ids, stop ids), as in training."""
    row = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": "."}]}
    [example] = to_examples("chat", row, tokenizer, "corrected") if chat else [Example(((prompt, True),), prompt)]
    return prompt_ids(tokenizer, example.prompt, chat), stop_ids(tokenizer, example)


def main():
    """Continue --prompt, or merge the adapter into --merge FOLDER."""
    cfg = tyro.cli(GenerateConfig)
    validate(cfg, RANGES)
    if not cfg.prompt and not cfg.merge:
        raise UsageError("give a --prompt to continue, or --merge FOLDER")
    if cfg.merge and not cfg.adapter:
        raise UsageError("--merge needs the --adapter to merge")
    quiet_libraries()
    torch.manual_seed(cfg.seed)
    tokenizer = load_pretrained(AutoTokenizer, cfg.base)
    model = load_base(cfg.base, "float32" if cfg.merge else cfg.dtype, pick_device(cfg.device))
    if cfg.adapter:
        model = load_adapter(model, cfg.adapter)
    if cfg.merge:
        save_merged(model, tokenizer, cfg.merge, cfg.dtype)
        print(f"wrote {cfg.merge} ({cfg.dtype})")
    if cfg.prompt:
        ids, stops = encode_prompt(tokenizer, cfg.prompt, cfg.chat)
        names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
        [text] = generate(model, tokenizer, ids, stop_ids=stops, **{name: getattr(cfg, name) for name in names})
        print(text.lstrip() if cfg.chat else cfg.prompt + text)


if __name__ == "__main__":
    cli(main)
