"""Text from a model: a run directory, a checkpoint, a Hugging Face folder or a published name.

    python gpt2/sample.py --model runs/quickstart --prompt "Return the" --num-samples 3
    python gpt2/sample.py --model gpt2 --prompt "Hello, I'm a language model," "Once" --temperature 0.8   # as one batch

Keys and values of past tokens are kept (`KVCache`), so that each new token costs one position, not the whole context.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
import tyro
from torch.nn import functional as F

from common import UsageError, cli, pick_device
from gpt2.checkpoint import load_model


@dataclass
class SampleConfig:
    model: str = "runs/quickstart"  # run directory, checkpoint file, Hugging Face folder, or hub name (gpt2, …)
    prompt: list[str] = field(default_factory=lambda: ["Hello, I'm a language model,"])  # one or more, as one batch
    num_samples: int = 1  # samples a prompt
    max_new_tokens: int = 100  # tokens to generate; a sample ends earlier at the end-of-text token
    temperature: float = 1.0  # divides the logits; 0 always takes the likeliest token
    top_k: int = 50  # sample among the k likeliest tokens; 0: all
    seed: int = 1337  # seed of the random draws
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu


class KVCache:
    """Keys and values of the tokens seen so far, for every attention layer of a GPT.

    lengths: tokens of each prompt in the batch. Shorter prompts are padded on the left; the padding gets position 0 and
    is masked, so that each row's logits are those of its prompt alone. columns: width of the padded prompts; None: that
    of the longest.
    """

    def __init__(self, config, lengths, device, columns=None):
        self.block_size, self.device = config.block_size, device
        self.layers = {}  # attention module -> (keys, values), (B, nh, columns so far, hs) each
        self.padding = (columns or max(lengths)) - torch.tensor(lengths, device=device)  # (B,)

    @property
    def length(self):
        """Columns so far, the padding included."""
        return next((keys.shape[2] for keys, _ in self.layers.values()), 0)

    def positions(self, T):
        """Positions (B, T) of the next T columns."""
        columns = torch.arange(self.length, self.length + T, device=self.device)
        return (columns - self.padding[:, None]).clamp(0, self.block_size - 1)

    def append(self, layer, k, v):
        """Store k, v (B, nh, T, hs) of a layer -> all keys, all values (B, nh, S, hs), mask (B, 1, T, S)."""
        T = k.shape[2]
        if layer in self.layers:
            k, v = (torch.cat([past, new], dim=2) for past, new in zip(self.layers[layer], (k, v)))  # (B, nh, S, hs)
        self.layers[layer] = k, v
        columns = torch.arange(k.shape[2], device=self.device)
        causal = columns[None, :] <= columns[-T:, None]  # (T, S): a token sees itself and the past
        mask = causal & (columns >= self.padding[:, None])[:, None]  # (B, T, S): never a padding column …
        mask = mask | (columns[None, :] == columns[-T:, None])  # … but a padding token itself, or it is nan
        return k, v, mask[:, None]

    def repeat(self, n):
        """Repeat every row of the batch n times."""
        self.padding = self.padding.repeat_interleave(n)
        for layer, (keys, values) in self.layers.items():
            self.layers[layer] = keys.repeat_interleave(n, dim=0), values.repeat_interleave(n, dim=0)


def left_padded(rows, device, T=None):
    """Lists of ids -> (B, T), by default as wide as the longest; shorter ones are padded with 0 on the left."""
    T = T or max(map(len, rows))
    return torch.tensor([[0] * (T - len(row)) + row for row in rows], dtype=torch.long, device=device)


def pick(logits, temperature, top_k, generator):
    """Next tokens (B, 1) from logits (B, V)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    # The draw happens on the CPU, so that a seed gives the same text on every device.
    return torch.multinomial(F.softmax(logits, -1).cpu(), 1, generator=generator).to(logits.device)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, *, temperature=1.0, top_k=50, seed=1337, eot=None):
    """Continue prompts (lists of token ids) -> lists of new ids, each ending before `eot`.

    When a context has filled block_size, its older half is dropped and the rest is computed again: learned position
    embeddings cannot be shifted.
    """
    if not all(prompts):
        raise UsageError("a prompt is empty; give at least one token")
    device, block_size = next(model.parameters()).device, model.config.block_size
    generator = torch.Generator().manual_seed(seed)
    out = [[] for _ in prompts]
    was_training, cache = model.training, None
    model.eval()
    for _ in range(max_new_tokens):
        if cache is None or cache.length == block_size:
            keep = block_size if cache is None else max(1, block_size // 2)
            context = [[*prompt, *new][-keep:] for prompt, new in zip(prompts, out)]
            idx = left_padded(context, device)  # (B, T)
            cache = KVCache(model.config, [len(c) for c in context], device)
        else:
            idx = torch.tensor([new[-1:] for new in out], device=device)  # (B, 1)
        logits, _ = model(idx, cache=cache)
        for new, token in zip(out, pick(logits[:, -1], temperature, top_k, generator).flatten().tolist()):
            new.append(token)
        if all(eot in new for new in out):
            break
    model.train(was_training)
    return [ids[: ids.index(eot)] if eot in ids else ids for ids in out]


def main():
    """Generate from --model after each prompt."""
    cfg = tyro.cli(SampleConfig, description=__doc__)
    device = pick_device(cfg.device)
    model, tokenizer = load_model(cfg.model, device)
    encoded = [tokenizer.encode(p, allowed_special="all") for p in cfg.prompt for _ in range(cfg.num_samples)]
    settings = {"temperature": cfg.temperature, "top_k": cfg.top_k, "seed": cfg.seed, "eot": tokenizer.eot_token}
    new_ids = generate(model, encoded, cfg.max_new_tokens, **settings)
    for prompt, new in zip(encoded, new_ids):
        print(tokenizer.decode(prompt + new), end="\n\n")


if __name__ == "__main__":
    cli(main)
