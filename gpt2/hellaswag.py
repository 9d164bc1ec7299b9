"""HellaSwag (Zellers et al. 2019): which of four endings does a model find likeliest?

    python gpt2/hellaswag.py --checkpoint runs/gpt2-124M --run-dir runs/hellaswag                # our run, hub's items
    python gpt2/hellaswag.py --model gpt2 --run-dir runs/hellaswag_gpt2                          # any causal LM
    python gpt2/hellaswag.py --model gpt2 --prompt lm-eval --input hellaswag_val.jsonl --run-dir runs/hellaswag_lm_eval
    torchrun --standalone --nproc_per_node=8 gpt2/hellaswag.py --model gpt2 --run-dir runs/hellaswag_gpt2
    python gpt2/hellaswag.py … --compare runs/hellaswag_gpt2                                 # item by item, McNemar

An ending's score is the summed log-probability of its tokens (acc), their mean (acc_norm, as build-nanogpt has it), or
the sum per character (acc_char, what lm-evaluation-harness calls acc_norm). GPT-2 124M: 0.2859, acc_norm 0.2955; with
--prompt lm-eval 0.2892, acc_char 0.3114. Chance is 0.25.

The run directory gets hellaswag.jsonl, a line per item. A context is computed once for its four endings, and batches
are the same for any number of processes.
"""

import copy
import gzip
import inspect
import json
import math
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch.nn import functional as F
from tqdm import tqdm

from gpt2.checkpoint import load_model
from gpt2.distributed import Ranks
from runlog import RunLog, UserError, atomic_open, cli

HUB = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")
SEED = 1337  # of the permutation whose first items --limit takes
ACCURACIES = ("acc", "acc_norm", "acc_char")


# ---------------------------------------------------------------------------------------------------------------------
# items


def load_items(file=None, limit=0, prompt="plain"):
    """Read HellaSwag -> list of {"item", "ind", "label", "ctx", "endings"}, "item" being the place in the file.

    file: jsonl as published, or with `ctx` alone, gzipped or not; None: the hub's validation split.
    limit: the first so many of a fixed permutation; 0: all, in the order of the file.
    prompt: "plain" takes `ctx` and the endings as they are (build-nanogpt); "lm-eval" builds them as
    lm-evaluation-harness does, which needs `ctx_a`, `ctx_b` and the markers of the official file.
    """
    rows = _read_hub() if not file else _read_jsonl(Path(file))
    order = np.random.default_rng(SEED).permutation(len(rows))[:limit] if limit else range(len(rows))
    return [_item(int(i), rows[i], prompt, file or HUB[0]) for i in order]


def _read_jsonl(path):
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as e:
        raise UserError(f"{path} is not a jsonl file of HellaSwag items ({e})") from None
    if not rows:
        raise UserError(f"{path} holds no items")
    return rows


def _read_hub():
    import huggingface_hub
    import pyarrow.parquet

    try:
        path = huggingface_hub.hf_hub_download(HUB[0], HUB[1], repo_type="dataset")
    except Exception as e:  # offline, moved: many classes, one remedy
        reason = str(e).strip().splitlines()[0]
        raise UserError(f"{HUB[0]} cannot be had from the hub ({reason}); give a local file") from None
    return pyarrow.parquet.read_table(path).to_pylist()


def _item(number, row, prompt, file):
    try:
        ctx, endings, label = row["ctx"], list(row["endings"]), int(row["label"])
        if len(endings) != 4 or not 0 <= label < 4 or not ctx.strip():
            raise ValueError
        if prompt == "lm-eval":
            ctx, endings = lm_eval_prompt(row)
    except (KeyError, TypeError, ValueError) as e:
        if prompt == "lm-eval" and isinstance(e, KeyError):
            raise UserError(f"{file} lacks {e.args[0]}, which --prompt lm-eval needs: take the official file") from None
        raise UserError(f"{file}, item {number} is not a HellaSwag item with a context and four endings") from None
    return {"item": number, "ind": row.get("ind", number), "label": label, "ctx": ctx, "endings": endings}


def lm_eval_prompt(row):
    """A row of the official file -> (context, endings) as lm-evaluation-harness writes them."""
    ctx = row["ctx_a"] + " " + row["ctx_b"].capitalize()
    return _tidy(row["activity_label"] + ": " + ctx), [_tidy(ending) for ending in row["endings"]]


def _tidy(text):
    """WikiHow's titles become sentences, other [markers] go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


# ---------------------------------------------------------------------------------------------------------------------
# items -> batches


@dataclass
class Rows:
    """Endings of similar length, each with the last id of its context in front: logits are needed there alone.

    ids (R, E): last context id, ending ids but the last, padding; targets (R, E): ending ids, -1 for padding;
    owner (R,): which context of the batch; places: (item, ending) of the rows that count, the rest being filling.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    owner: torch.Tensor
    places: list


@dataclass
class Batch:
    """R contexts of similar length, and their 4R endings, R at a time.

    contexts (R, C): context ids without the last, padded on the right; lengths (R,): how many are not padding.
    """

    contexts: torch.Tensor
    lengths: torch.Tensor
    rows: list


class Encoded:
    """Items as ids, and their batches. Made once, scored as often as one likes.

    encode: list of str -> list of lists of ids, without special tokens.
    block_size: longest row; a longer context loses its left end, and is counted in `cut`.
    prefix: ids in front of every context (the begin-of-text token of models that were trained with one).
    batch_size: contexts, and rows, at once.
    """

    def __init__(self, items, encode, block_size, prefix=(), batch_size=32):
        self.items, self.batch_size = items, batch_size
        contexts, endings = _encode_items(items, encode)
        fitted = [_fit(list(prefix), c, e, block_size) for c, e in zip(contexts, endings)]
        self.contexts, self.endings, cut = (list(column) for column in zip(*fitted))
        self.cut = sum(cut)
        order = sorted(range(len(items)), key=lambda i: len(self.contexts[i]))
        self.groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]

    def batches(self, rank=0, world_size=1, device="cpu"):
        """Batches of one rank; who computes a batch changes nothing in it."""
        R = self.batch_size
        for group in self.groups[rank::world_size]:
            group = group + group[:1] * (R - len(group))  # every batch has R of everything
            contexts = [self.contexts[i][:-1] for i in group]
            C = max(map(len, contexts))
            padded = torch.tensor([c + [0] * (C - len(c)) for c in contexts], dtype=torch.long)  # (R, C)
            places = [(i, k) for i in dict.fromkeys(group) for k in range(4)]
            places.sort(key=lambda place: len(self.endings[place[0]][place[1]]))
            chunks = [places[i : i + R] for i in range(0, len(places), R)]
            rows = [self._rows(chunk, group, device) for chunk in chunks]
            yield Batch(padded.to(device), torch.tensor([len(c) for c in contexts]).to(device), rows)

    def _rows(self, places, group, device):
        filled = places + places[:1] * (self.batch_size - len(places))
        endings = [self.endings[i][k] for i, k in filled]
        E = max(map(len, endings))
        ids = [self.contexts[i][-1:] + e[:-1] + [0] * (E - len(e)) for (i, _), e in zip(filled, endings)]
        targets = [e + [-1] * (E - len(e)) for e in endings]
        owner = [group.index(i) for i, _ in filled]
        return Rows(*(torch.tensor(t).to(device) for t in (ids, targets, owner)), places)


def _encode_items(items, encode):
    """-> contexts (list of lists of ids), endings (list of four lists of ids).

    An ending's ids are those of " " + ending. Tokenizers that put a space of their own in front of a text (Llama's)
    would double it; there the ids of the whole text are taken, as far as they go beyond the context's.
    """
    contexts = encode([item["ctx"] for item in items])
    alone = encode(["x", " x", "x x"])
    if alone[0] + alone[1] == alone[2]:
        flat = encode([" " + ending for item in items for ending in item["endings"]])
    else:
        whole = encode([item["ctx"] + " " + ending for item in items for ending in item["endings"]])
        flat = [ids[len(contexts[i // 4]) :] for i, ids in enumerate(whole)]
    return contexts, [flat[i : i + 4] for i in range(0, len(flat), 4)]


def _fit(prefix, context, endings, block_size):
    """Cut the left end of a context so that the longest ending fits -> (ids with the prefix, endings, whether cut)."""
    room = block_size + 1 - len(prefix) - max(map(len, endings))  # the last id of a row is only predicted
    if len(context) <= room:
        return prefix + context, endings, False
    if room < 1:  # a tiny block: one id of context, and what fits of the endings
        return context[-1:], [ending[:block_size] for ending in endings], True
    return prefix + context[-room:], endings, True


# ---------------------------------------------------------------------------------------------------------------------
# models: Batch -> for each of its `rows`, the logits (R, E, V)


def plain(logits_of, block_size, compile=False):
    """Any callable idx (R, T) -> logits (R, T, V); each ending is a row with its whole context.

    compile: compile the callable; T is then a multiple of 64, so that a handful of shapes is compiled.
    """
    multiple = 64 if compile else 1
    if compile:
        logits_of = torch.compile(logits_of, dynamic=False)

    def logits(batch):
        C = batch.contexts.shape[1]
        for rows in batch.rows:
            R, E = rows.ids.shape
            start = batch.lengths[rows.owner][:, None]  # (R, 1)
            T = min(block_size, -(-(int(start.max()) + E) // multiple) * multiple)
            both = torch.cat([batch.contexts[rows.owner], rows.ids, rows.ids.new_zeros(R, T)], dim=1)
            columns = torch.arange(T, device=both.device).expand(R, -1)
            idx = both.gather(1, torch.where(columns < start, columns, C + columns - start))  # (R, T), no gap inside
            out = logits_of(idx)  # (R, T, V)
            at = (start + torch.arange(E, device=idx.device)).clamp(max=T - 1)  # (R, E); beyond T lies padding
            yield out.gather(1, at[:, :, None].expand(-1, -1, out.shape[-1]))

    return logits


def shared_gpt(model):
    """Our GPT; a context's keys and values are computed once, for all four endings."""

    def logits(batch):
        context = SharedContext(batch.lengths, batch.contexts.shape[1])
        if batch.contexts.shape[1]:
            model(batch.contexts, cache=context, return_logits=False)
        for rows in batch.rows:
            yield model(rows.ids, cache=EndingsAfter(context, rows.owner, model.config.block_size))[0]

    return logits


class SharedContext:
    """A cache, as GPT takes it, for one pass over right-padded contexts (R, C): it keeps their keys and values."""

    length = 0  # columns before the ones that come; GPT checks that all fit into block_size

    def __init__(self, lengths, C):
        self.lengths, self.layers = lengths, {}
        self.known = torch.arange(C, device=lengths.device) < lengths[:, None]  # (R, C): False for padding

    def positions(self, T):
        return torch.arange(T, device=self.lengths.device)

    def append(self, layer, k, v):
        self.layers[layer] = k, v  # (R, nh, C, hs)
        return k, v, torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()  # causal (C, C)


class EndingsAfter:
    """A cache for one pass over rows (R, E) of endings, each after its `owner` (R,) among the contexts."""

    length = 0

    def __init__(self, context, owner, block_size):
        self.context, self.owner, self.block_size = context, owner, block_size

    def positions(self, T):
        start = self.context.lengths[self.owner][:, None]
        return (start + torch.arange(T, device=start.device)).clamp(
            max=self.block_size - 1
        )  # (R, E); padding may exceed

    def append(self, layer, k, v):
        E = k.shape[2]
        if layer in self.context.layers:
            past = self.context.layers[layer]
            k, v = (torch.cat([p[self.owner], t], dim=2) for p, t in zip(past, (k, v)))  # (R, nh, C + E, hs)
        known = self.context.known[self.owner][:, None].expand(-1, E, -1)  # (R, E, C)
        causal = torch.ones(E, E, dtype=torch.bool, device=k.device).tril().expand(len(known), -1, -1)
        return k, v, torch.cat([known, causal], dim=2)[:, None]  # mask (R, 1, E, C + E)


def shared_hf(model, block_size):
    """Any Hugging Face causal LM with the usual key-value cache; contexts are shared likewise."""
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    def logits(batch):
        lengths, C = batch.lengths, batch.contexts.shape[1]
        known = (torch.arange(C, device=lengths.device) < lengths[:, None]).long()  # (R, C): 0 for padding
        # The padding stands on the right, where it does no harm before the endings come.
        past = model.base_model(batch.contexts, use_cache=True).past_key_values
        for rows in batch.rows:
            R, E = rows.ids.shape
            cache = copy.deepcopy(past)
            cache.batch_select_indices(rows.owner)
            places = {"attention_mask": torch.cat([known[rows.owner], known.new_ones(R, E)], dim=1)}  # (R, C + E)
            if takes_positions:
                places["position_ids"] = lengths[rows.owner][:, None] + torch.arange(E, device=lengths.device)  # (R, E)
                places["position_ids"].clamp_(max=block_size - 1)  # padding may lie beyond
            yield model(rows.ids, past_key_values=cache, **places).logits

    return logits


# ---------------------------------------------------------------------------------------------------------------------
# scores


@torch.no_grad()
def evaluate(logits_of, encoded, device="cpu", rank=0, world_size=1, autocast=nullcontext, progress=False):
    """Score the items of one rank -> list of rows, the lines of hellaswag.jsonl.

    logits_of: Batch -> logits of each of its rows: `plain(f, block_size)`, `shared_gpt(model)` or
    `shared_hf(model, block_size)`, the model in eval mode. autocast: makes the context of the forward pass.
    For the figures, sum `counts(rows)` over the ranks, then `figures`.
    A row: {"item", "ind", "label", "logprobs" (4), "tokens" (4), "chars" (4), "acc", "acc_norm", "acc_char"}, the last
    three being the choices.
    """
    sums = {}  # (item, ending) -> summed log-probability
    bar = tqdm(total=len(encoded.items), unit="item", desc="hellaswag", disable=None if progress and not rank else True)
    for batch in encoded.batches(rank, world_size, device):
        with autocast():
            for rows, logits in zip(batch.rows, logits_of(batch)):
                logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))  # (R * E, V)
                nats = F.cross_entropy(logits, rows.targets.flatten(), ignore_index=-1, reduction="none")
                logprobs = -nats.view(rows.targets.shape).cpu().double().sum(-1)  # (R,)
                sums.update(zip(rows.places, logprobs.tolist()))
        bar.update(min(sum(len(rows.places) for rows in batch.rows) // 4 * world_size, bar.total - bar.n))
    bar.close()
    return [
        score(encoded.items[i], [sums[i, k] for k in range(4)], [len(e) for e in encoded.endings[i]])
        for i in dict.fromkeys(i for i, _ in sums)
    ]


def score(item, logprobs, tokens):
    """One item's row: the ending with the highest sum, mean a token, and sum a character."""
    chars = [len(ending) for ending in item["endings"]]
    return {
        "item": item["item"], "ind": item["ind"], "label": item["label"],
        "logprobs": [round(x, 5) for x in logprobs], "tokens": tokens, "chars": chars,
        "acc": int(np.argmax(logprobs)), "acc_norm": int(np.argmax(np.divide(logprobs, tokens))),
        "acc_char": int(np.argmax(np.divide(logprobs, np.maximum(chars, 1)))),
    }  # fmt: skip


def counts(rows):
    """[items, right by acc, by acc_norm, by acc_char]: numbers to be summed over the ranks."""
    return [len(rows), *(sum(row[kind] == row["label"] for row in rows) for kind in ACCURACIES)]


def figures(counted):
    """Summed counts -> {"items", and for each of the accuracies its value and its 95 % interval, …_low and …_high}."""
    n, *right = map(int, counted)
    result = {"items": n}
    for kind, k in zip(ACCURACIES, right):
        low, high = wilson(k, n)
        result |= {kind: k / n, f"{kind}_low": low, f"{kind}_high": high}
    return result


def wilson(k, n, z=1.959964):
    """Wilson's 95 % interval for a share of k in n (Wilson 1927)."""
    p, zz = k / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    return max(0.0, (middle - half) / (1 + zz)), min(1.0, (middle + half) / (1 + zz))


def mcnemar(only_a, only_b):
    """Exact two-sided p-value that two models are equally good, from the items that only one of them has right."""
    n, term, total = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        total += term  # n choose k
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


# ---------------------------------------------------------------------------------------------------------------------
# the naive way, in its most readable form: the oracle


@torch.no_grad()
def naive_logprobs(model, tokenizer, item, device="cpu"):
    """Four summed log-probabilities of one item with a Hugging Face model, its four endings as one small batch."""
    context = tokenizer(item["ctx"]).input_ids
    rows = [tokenizer(item["ctx"] + " " + ending).input_ids for ending in item["endings"]]
    width = max(map(len, rows))
    idx = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)  # (4, T), padded on the right
    logprobs = model(idx).logits.float().log_softmax(-1)  # (4, T, V)
    return [sum(logprobs[k, t - 1, row[t]].item() for t in range(len(context), len(row))) for k, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------------------------------
# command line


@dataclass
class Config:
    """Score HellaSwag with a checkpoint of ours or any Hugging Face causal LM."""

    run_dir: Path
    """Run directory to write."""
    model: str = ""
    """A Hugging Face causal LM: a folder or a name on the hub."""
    checkpoint: str = ""
    """A run of gpt2/train_gpt2.py, or one of its checkpoint files."""
    input: str = ""
    """Local items: jsonl, gzipped or not; empty: from the hub."""
    limit: int = 0
    """Items: the first so many of a fixed permutation; 0: all 10,042."""
    prompt: Literal["plain", "lm-eval"] = "plain"
    """plain: contexts as they are, as build-nanogpt; lm-eval: as lm-evaluation-harness (needs the official file)."""
    compare: Path | None = None
    """An earlier run of this script, compared item by item (McNemar's test)."""
    naive: int = 0
    """Also score so many items one at a time with plain transformers: the largest difference, the ratio of speeds."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: cuda, else mps, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the matmuls (autocast)."""
    compile: bool = False
    """Compile the model; each ending then carries its context, in few shapes."""
    batch_size: int = 0
    """Sequences at once; 0: 32 on a CPU, else 128."""


@dataclass
class Scorer:
    """A loaded model and how to feed it."""

    model: torch.nn.Module
    tokenizer: object
    encode: object  # list of str -> list of lists of ids
    prefix: list
    block_size: int
    logits_of: object  # Batch -> logits of its rows


def load_ours(cfg, device):
    """A checkpoint of gpt2/train_gpt2.py -> Scorer."""
    model, tokenizer = load_model(cfg.checkpoint, device)
    block_size = model.config.block_size
    logits_of = plain(lambda idx: model(idx)[0], block_size, compile=True) if cfg.compile else shared_gpt(model)
    return Scorer(model, tokenizer, tokenizer.to_tiktoken().encode_ordinary_batch, [], block_size, logits_of)


def load_hf(cfg, device):
    """A Hugging Face causal LM, from a folder or the hub -> Scorer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(cfg.model, dtype=torch.float32).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    except (OSError, ValueError) as e:
        raise UserError(f"no causal LM at {cfg.model!r}: {str(e).splitlines()[0]} Give a local folder") from None

    def encode(texts):
        return tokenizer(texts, add_special_tokens=False).input_ids

    def logits_of(idx):
        return model(idx, use_cache=False).logits

    whole, bare = tokenizer("x").input_ids, encode(["x"])[0]
    prefix = whole[: len(whole) - len(bare)] if whole[len(whole) - len(bare) :] == bare else []
    block_size = getattr(model.config, "max_position_embeddings", None) or 2048
    apart = plain(logits_of, block_size, compile=cfg.compile)
    scorer = Scorer(model, tokenizer, encode, prefix, block_size, apart)
    if not cfg.compile and shares(scorer, device):
        scorer.logits_of = shared_hf(model, block_size)
    return scorer


@torch.no_grad()
def shares(scorer, device):
    """Whether a model takes shared contexts: some keep another kind of cache, or count positions in another way."""
    items = [
        {"ctx": "One two three four, five", "endings": ["six", "seven eight nine", "ten", "eleven"]},
        {"ctx": "One", "endings": ["and two", "and three", "and", "and then four"]},
    ]
    batch = next(Encoded(items, scorer.encode, scorer.block_size, scorer.prefix, batch_size=2).batches(device=device))
    try:
        pairs = list(zip(shared_hf(scorer.model, scorer.block_size)(batch), scorer.logits_of(batch), batch.rows))
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    logprobs = [[x[rows.targets >= 0].log_softmax(-1) for x in (a, b)] for a, b, rows in pairs]
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in logprobs)


def check_naive(scorer, encoded, rows, cfg, device, log):
    """Score the first --naive items one at a time as well -> the differences, and the ratio of the speeds.

    For the ratio both ways take turns over the same items in this process, so that both meet the same machine.
    """
    rows, worst, agree = {row["item"]: row for row in rows}, 0.0, 0
    items, seconds = encoded.items[: cfg.naive], {"naive": 0.0, "batched": 0.0}
    for first in range(0, len(items), 4 * encoded.batch_size):
        part = items[first : first + 4 * encoded.batch_size]
        started = time.perf_counter()
        again = Encoded(part, scorer.encode, scorer.block_size, scorer.prefix, encoded.batch_size)
        evaluate(scorer.logits_of, again, device)
        seconds["batched"] += time.perf_counter() - started
        started = time.perf_counter()
        for item in tqdm(part, unit="item", desc="one at a time", disable=None):
            logprobs, row = naive_logprobs(scorer.model, scorer.tokenizer, item, device), rows[item["item"]]
            worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, row["logprobs"])))
            chosen = score(item, logprobs, row["tokens"])
            agree += all(chosen[kind] == row[kind] for kind in ACCURACIES)
        seconds["naive"] += time.perf_counter() - started
    naive, batched = (len(items) / seconds[way] for way in ("naive", "batched"))
    log.print(f"one at a time: {agree} of {len(items)} items agree, log-probabilities to {worst:.1e}")
    log.print(
        f"in turns, one process: one at a time {naive:.1f} items/s, batched {batched:.1f}: {batched / naive:.2f}x"
    )
    figures = {"naive_items": len(items), "naive_agree": agree, "naive_max_diff": worst}
    return figures | {"naive_items_per_sec": naive, "batched_items_per_sec": batched, "speedup": batched / naive}


def compare(rows, run_dir):
    """Item by item against an earlier run -> {"items", kind: {"only_this", "only_other", "p"}}."""
    path = Path(run_dir) / "hellaswag.jsonl"
    path = path if path.exists() else path.with_name("hellaswag.jsonl.gz")  # gzipped for keeping
    other = {row["item"]: row for row in _read_jsonl(path)}
    pairs = [(row, other[row["item"]]) for row in rows if row["item"] in other]
    if not pairs or any(a["label"] != b["label"] for a, b in pairs):
        raise UserError(f"{path} does not hold the same items; score both models on the same file")
    result = {"items": len(pairs)}
    for kind in ACCURACIES:
        right = [(a[kind] == a["label"], b[kind] == b["label"]) for a, b in pairs]
        this, that = sum(a and not b for a, b in right), sum(b and not a for a, b in right)
        result[kind] = {"only_this": this, "only_other": that, "p": mcnemar(this, that)}
    return result


def report(cfg, log, scorer, encoded, rows, counted, seconds, device):  # on one rank
    with atomic_open(log.run_dir / "hellaswag.jsonl") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    result, speed = figures(counted), len(rows) / seconds
    log.metric(0, "hellaswag", **result, items_per_sec=speed, seconds=seconds)
    for kind in ACCURACIES:
        low, high = result[f"{kind}_low"], result[f"{kind}_high"]
        log.print(f"{kind:<8} {result[kind]:.4f}   95 % interval {low:.4f} to {high:.4f}")
    log.print(f"{len(rows):,} items, {encoded.cut} contexts cut on the left, {speed:.1f} items/s")
    if cfg.compare:
        result["compare"] = {"run": cfg.compare.name, **compare(rows, cfg.compare)}
        for kind in ACCURACIES:
            c = result["compare"][kind]
            log.print(f"{kind:<8} right here alone {c['only_this']}, there alone {c['only_other']}, p = {c['p']:.3g}")
    if cfg.naive:
        result |= check_naive(scorer, encoded, rows, cfg, device, log)
    log.finish("success", **result, cut=encoded.cut, items_per_sec=speed)


def check(cfg):
    """Refuse what cannot work before anything is loaded."""
    if bool(cfg.model) == bool(cfg.checkpoint):
        raise UserError("name one model: --model FOLDER or --checkpoint RUN")
    if cfg.naive and not cfg.model:
        raise UserError("--naive scores with transformers: it needs --model")
    if cfg.compare and not any(cfg.compare.glob("hellaswag.jsonl*")):
        raise UserError(f"{cfg.compare} holds no hellaswag.jsonl to compare with")


def main():
    cfg = tyro.cli(Config)
    check(cfg)
    items = load_items(cfg.input, cfg.limit, cfg.prompt)
    ranks = Ranks(cfg.device)
    device = ranks.device
    scorer = load_ours(cfg, device) if cfg.checkpoint else load_hf(cfg, device)
    batch_size = cfg.batch_size or (32 if device.type == "cpu" else 128)
    with RunLog(cfg.run_dir, "hellaswag", cfg, enabled=ranks.main) as log:
        started = time.perf_counter()
        encoded = Encoded(items, scorer.encode, scorer.block_size, scorer.prefix, batch_size)
        autocast = nullcontext
        if cfg.dtype != "float32":
            autocast = partial(torch.autocast, device.type, getattr(torch, cfg.dtype))
        rows = evaluate(scorer.logits_of, encoded, device, ranks.rank, ranks.world_size, autocast, progress=True)
        counted = ranks.sum(counts(rows))
        rows = sorted(chain.from_iterable(ranks.gather(rows)), key=lambda row: row["item"])
        seconds = time.perf_counter() - started
        if ranks.main:
            report(cfg, log, scorer, encoded, rows, counted, seconds, device)
    ranks.close()


if __name__ == "__main__":
    cli(main)
