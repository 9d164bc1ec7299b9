"""HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest?

    python gpt2/hellaswag.py --checkpoint runs/gpt2-124M --run-dir runs/hellaswag                # our run, hub's items
    python gpt2/hellaswag.py --model gpt2 --run-dir runs/hellaswag_gpt2                          # any causal LM
    torchrun --standalone --nproc_per_node=8 gpt2/hellaswag.py --model gpt2 --run-dir runs/hellaswag_gpt2

An ending's score is the summed log-probability of its tokens (acc), their mean (acc_norm, as in build-nanogpt), or the
sum per character (acc_char, which lm-evaluation-harness calls acc_norm, on tidier text). GPT-2 124M: 0.2859, acc_norm
0.2955; chance: 0.25. A context's keys and values are computed once for its four endings, logits at the endings alone.
"""

import inspect
import json
import time
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import huggingface_hub
import numpy as np
import torch
import tyro
from scipy.stats import binomtest
from torch.nn import functional as F
from tqdm import tqdm

from common import UsageError, atomic_open, cli, from_hub, read_jsonl, read_parquet
from gpt2.checkpoint import load_model
from gpt2.distributed import Ranks, autocast
from gpt2.sample import KVCache, left_padded
from runlog import RunLog

HUB = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")
ACCURACIES = ("acc", "acc_norm", "acc_char")


# --- items


def load_items(file=None, limit=0, fix="name a local file with --input"):
    """Read HellaSwag -> list of {"item", "ind", "label", "ctx", "endings"}, "item" being the place in the file.

    file: jsonl as published, or with `ctx` alone, gzipped or not; None: the hub's validation split, or, where it cannot
    be reached, a message that ends with `fix`. limit: the first so many of a fixed permutation; 0: all, in order.
    """
    path = file
    if not file:
        with from_hub(HUB[0], fix):
            path = huggingface_hub.hf_hub_download(*HUB, repo_type="dataset")
    rows = [row for _, row in read_jsonl(path)] if file else list(read_parquet(path))
    if not rows:
        raise UsageError(f"{path} holds no items")
    order = np.random.default_rng(1337).permutation(len(rows))[:limit] if limit else range(len(rows))
    return [_item(int(i), rows[i], path) for i in order]


def _item(number, row, file):
    try:
        ctx, endings, label = row["ctx"], list(row["endings"]), int(row["label"])
        if len(endings) != 4 or not 0 <= label < 4 or not ctx.strip():
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{file}, item {number} is not a HellaSwag item with a context and four endings") from None
    return {"item": number, "ind": row.get("ind", number), "label": label, "ctx": ctx, "endings": endings}


class Encoded:
    """Items {"ctx", "endings"} as ids, cut to the block, in batches of similar length; scored any number of times.

    encode: list of str -> list of lists of ids, without special tokens; prefix: ids in front of every context (the
    begin-of-text token of models that were trained with one). block_size: longest row; a longer context is truncated
    on the left and counted in `cut`. batch_size: items in a batch.

    An ending's ids are those of the whole text beyond the context's, as in lm-evaluation-harness: some tokenizers
    (Llama's) put a space of their own in front of a text, also of an ending encoded by itself.
    """

    def __init__(self, items, encode, block_size, prefix=(), batch_size=16):
        self.items, self.block_size = items, block_size
        contexts = encode([item["ctx"] for item in items])
        texts = iter(encode([f"{item['ctx']} {ending}" for item in items for ending in item["endings"]]))
        endings = [[next(texts)[len(context) :] for _ in range(4)] for context in contexts]
        fitted = [_fit(list(prefix), c, e, block_size) for c, e in zip(contexts, endings)]
        self.contexts, self.endings, cut = (list(column) for column in zip(*fitted))
        self.cut = sum(cut)
        lengths = [(max(map(len, e)) // 4, len(c)) for c, e in zip(self.contexts, self.endings)]
        order = sorted(range(len(items)), key=lengths.__getitem__)  # by endings first: they cost the logits
        self.batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def _fit(prefix, context, endings, block_size):
    """Truncate a context so that the longest ending fits -> (ids with the prefix, endings, whether truncated)."""
    room = max(1, block_size + 1 - len(prefix) - max(map(len, endings)))  # the last id of a row is only predicted
    endings = [ending[:block_size] for ending in endings]  # only a tiny block truncates these
    return prefix + context[-room:], endings, len(context) > room


# --- models: B contexts (lists of ids) once, then ids (4 B, E), four rows after each context -> logits (4 B, E, V)


def bucket(n, device, most):
    """The width n, on a GPU rounded up to a multiple of 16: attention kernels are built for each shape."""
    return n if device.type == "cpu" else min(-(-n // 16) * 16, most)


def gpt_logits(model, contexts, ids):
    """Our GPT, with `sample.KVCache`."""
    C = bucket(max(map(len, contexts)), ids.device, model.config.block_size)
    cache = KVCache(model.config, [len(context) for context in contexts], ids.device, columns=C)
    if C:
        model(left_padded(contexts, ids.device, C), cache=cache, return_logits=False)
    cache.repeat(4)
    return model(ids, cache=cache)[0]


def hf_logits(model, block_size, contexts, ids):
    """Any Hugging Face causal LM with the usual key-value cache."""
    from transformers import DynamicCache

    C, (rows, E) = bucket(max(map(len, contexts)), ids.device, block_size), ids.shape
    # Contexts are padded on the right, where it does no harm before the endings come.
    padded = torch.tensor([context + [0] * (C - len(context)) for context in contexts], device=ids.device)  # (B, C)
    cache = model.base_model(padded, use_cache=True).get("past_key_values")
    if type(cache) is not DynamicCache:  # a state instead of keys, or positions of its own
        raise UsageError(f"{model.name_or_path} keeps no usual key-value cache: its endings cannot share their context")
    cache.batch_repeat_interleave(4)
    lengths = torch.tensor([len(context) for context in contexts], device=ids.device).repeat_interleave(4)[:, None]
    known = (torch.arange(C, device=ids.device) < lengths).long()  # (4 B, C): 0 for padding
    more = {"attention_mask": torch.cat([known, known.new_ones(rows, E)], dim=1)}  # (4 B, C + E)
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = lengths + torch.arange(E, device=ids.device)  # (4 B, E), beyond the model's for padding alone
        more["position_ids"] = positions.clamp(max=block_size - 1)
    return model(ids, past_key_values=cache, **more).logits


# --- scores


@torch.inference_mode()
def evaluate(logits_of, encoded, device, rank=0, world_size=1, dtype="float32", stop=lambda: None):
    """Score the items of one rank -> list of rows, the lines of hellaswag.jsonl.

    logits_of: (contexts, ids) -> logits, as above, of a model in eval mode. stop: called between batches; scoring
    ends when it returns a reason.
    """
    rows = []
    for batch in tqdm(encoded.batches[rank::world_size], leave=False, disable=True if rank else None):
        if stop():
            break
        pairs = [(encoded.contexts[i], ending) for i in batch for ending in encoded.endings[i]]  # 4 B of them
        E = bucket(max(len(ending) for _, ending in pairs), device, encoded.block_size)
        # Rows begin with the context's last id, which predicts the ending's first one.
        ids = torch.tensor([(context[-1:] + ending[:-1] + [0] * E)[:E] for context, ending in pairs], device=device)
        targets = torch.tensor([(ending + [-1] * E)[:E] for _, ending in pairs], device=device)  # (4 B, E)
        with autocast(device, dtype):
            logits = logits_of([encoded.contexts[i][:-1] for i in batch], ids).flatten(0, 1)  # (4 B * E, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view(-1, 4, E)
        for i, logprobs in zip(batch, (-nats.cpu().double().sum(-1)).tolist()):
            rows.append(score(encoded.items[i], logprobs, [len(ending) for ending in encoded.endings[i]]))
    return rows


def score(item, logprobs, tokens):
    """One item's row; acc, acc_norm, acc_char: the ending with the highest sum, mean a token, sum a character."""
    chars = [len(ending) for ending in item["endings"]]
    return {
        "item": item["item"], "ind": item["ind"], "label": item["label"],
        "logprobs": [round(x, 5) for x in logprobs], "tokens": tokens, "chars": chars,
        "acc": int(np.argmax(logprobs)), "acc_norm": int(np.argmax(np.divide(logprobs, tokens))),
        "acc_char": int(np.argmax(np.divide(logprobs, np.maximum(chars, 1)))),
    }  # fmt: skip


def figures(rows):
    """All ranks' rows -> {"items", and for each of the accuracies its value and 95 % interval, …_low and …_high}."""
    n = len(rows)
    result = {"items": n}
    for kind in ACCURACIES:
        k = sum(row[kind] == row["label"] for row in rows)
        interval = binomtest(k, n).proportion_ci(method="wilson")
        result |= {kind: k / n, f"{kind}_low": float(interval.low), f"{kind}_high": float(interval.high)}
    return result


# --- command line


@dataclass
class Config:
    """Score HellaSwag with a checkpoint of ours or any Hugging Face causal LM."""

    run_dir: Path  # run directory to write
    model: str = ""  # a Hugging Face causal LM: a folder or a name on the hub
    checkpoint: str = ""  # a run of gpt2/train_gpt2.py, or one of its checkpoint files
    input: str = ""  # local items: jsonl, gzipped or not; empty: from the hub
    limit: int = 0  # items: the first so many of a fixed permutation; 0: all 10,042
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # type of the matmuls (autocast)
    batch_size: int = 16  # items in a forward pass


def load_hf(name, device):
    """A Hugging Face causal LM, from a folder or the hub -> (logits_of, the further arguments of Encoded)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as e:
        raise UsageError(f"no causal LM at {name!r}: {str(e).splitlines()[0]} Give a local folder") from None

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False).input_ids

    whole, bare = tokenizer("x").input_ids, encode(["x"])[0]
    prefix = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
    block_size = getattr(model.config, "max_position_embeddings", None) or 2048
    return partial(hf_logits, model, block_size), (encode, block_size, prefix)


def main():
    """Score, print the figures, write the run directory."""
    cfg = tyro.cli(Config)
    if bool(cfg.model) == bool(cfg.checkpoint):
        raise UsageError("name one model: --model FOLDER or --checkpoint RUN")
    items = load_items(cfg.input, cfg.limit)
    ranks = Ranks(cfg.device)
    device = ranks.device
    if cfg.model:
        logits_of, arguments = load_hf(cfg.model, device)
    else:
        model, tokenizer = load_model(cfg.checkpoint, device)
        logits_of = partial(gpt_logits, model)
        arguments = tokenizer.to_tiktoken().encode_ordinary_batch, model.config.block_size
    with RunLog(cfg.run_dir, "hellaswag", cfg, enabled=ranks.main) as log:
        started = time.perf_counter()
        encoded = Encoded(items, *arguments, batch_size=cfg.batch_size)
        rows = evaluate(logits_of, encoded, device, ranks.rank, ranks.world_size, cfg.dtype)
        rows = sorted(chain.from_iterable(ranks.gather(rows)), key=lambda row: row["item"])
        result, seconds = figures(rows), time.perf_counter() - started
        speed = len(rows) / seconds
        if ranks.main:
            with atomic_open(log.run_dir / "hellaswag.jsonl") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        log.metric(0, "hellaswag", **result, items_per_sec=speed, seconds=seconds)
        for kind in ACCURACIES:
            low, high = result[f"{kind}_low"], result[f"{kind}_high"]
            log.print(f"{kind:<8} {result[kind]:.4f}   95 % interval {low:.4f} to {high:.4f}")
        log.print(f"{len(rows):,} items, {encoded.cut} contexts cut on the left, {speed:.1f} items/s")
        log.finish("success", **result, cut=encoded.cut, items_per_sec=speed)
    ranks.wait()


if __name__ == "__main__":
    cli(main)
