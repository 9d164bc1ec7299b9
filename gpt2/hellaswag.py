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

from common import UsageError, atomic_open, cli, from_hub, open_text
from gpt2.checkpoint import load_model
from gpt2.distributed import Ranks, threads
from gpt2.endings import Encoded, plain, score_endings, shared_gpt, shared_hf
from runlog import RunLog

HUB = ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet")
SEED = 1337  # of the permutation whose first items --limit takes
ACCURACIES = ("acc", "acc_norm", "acc_char")


# ---------------------------------------------------------------------------------------------------------------------
# items


def load_items(file=None, limit=0, prompt="plain", remedy="name a local file with --input"):
    """Read HellaSwag -> list of {"item", "ind", "label", "ctx", "endings"}, "item" being the place in the file.

    file: jsonl as published, or with `ctx` alone, gzipped or not; None: the hub's validation split.
    limit: the first so many of a fixed permutation; 0: all, in the order of the file.
    prompt: "plain" takes `ctx` and the endings as they are (build-nanogpt); "lm-eval" builds them as
    lm-evaluation-harness does, which needs `ctx_a`, `ctx_b` and the markers of the official file.
    remedy: what the message says to do where the hub cannot be reached.
    """
    rows = _read_hub(remedy) if not file else _read_jsonl(Path(file))
    order = np.random.default_rng(SEED).permutation(len(rows))[:limit] if limit else range(len(rows))
    return [_item(int(i), rows[i], prompt, file or HUB[0]) for i in order]


def _read_jsonl(path):
    try:
        with open_text(path) as f:
            rows = [json.loads(line) for line in f if line.strip()]
    except json.JSONDecodeError as e:
        raise UsageError(f"{path} is not a jsonl file of HellaSwag items ({e})") from None
    if not rows:
        raise UsageError(f"{path} holds no items")
    return rows


def _read_hub(remedy):
    import huggingface_hub
    import pyarrow.parquet

    with from_hub(HUB[0], remedy):
        path = huggingface_hub.hf_hub_download(HUB[0], HUB[1], repo_type="dataset")
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
            raise UsageError(
                f"{file} lacks {e.args[0]}, which --prompt lm-eval needs: take the official file"
            ) from None
        raise UsageError(f"{file}, item {number} is not a HellaSwag item with a context and four endings") from None
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
# scores


def evaluate(logits_of, encoded, device="cpu", rank=0, world_size=1, autocast=nullcontext, progress=False):
    """Score the items of one rank -> list of rows, the lines of hellaswag.jsonl. Arguments as for `score_endings`.

    For the figures, sum `counts(rows)` over the ranks, then `figures`.
    A row: {"item", "ind", "label", "logprobs" (4), "tokens" (4), "chars" (4), "acc", "acc_norm", "acc_char"}, the last
    three being the choices.
    """
    sums = dict(score_endings(logits_of, encoded, device, rank, world_size, autocast, progress))
    scored = dict.fromkeys(i for i, _ in sums)
    return [
        score(encoded.items[i], [sums[i, k] for k in range(4)], [len(e) for e in encoded.endings[i]]) for i in scored
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


def rows_at_once(device):
    """Endings in a batch, unless somebody says: what keeps the device busy; it changes no figure."""
    return 32 if device.type == "cpu" else 128


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
# the naive ways, in their most readable form: the oracle, and what batching is measured against


@torch.no_grad()
def one_ending_at_a_time(model, tokenizer, item, device="cpu"):
    """Four summed log-probabilities with a Hugging Face model: a forward pass for each context with its ending."""
    context, sums = tokenizer(item["ctx"]).input_ids, []
    for ending in item["endings"]:
        idx = torch.tensor([tokenizer(item["ctx"] + " " + ending).input_ids], device=device)  # (1, T)
        logprobs = model(idx).logits[0, :-1].float().log_softmax(-1)  # (T - 1, V)
        sums.append(logprobs.gather(1, idx[0, 1:, None])[len(context) - 1 :].sum().item())
    return sums


@torch.no_grad()
def one_item_at_a_time(model, tokenizer, item, device="cpu"):
    """The same with the four rows of an item as one padded batch, as build-nanogpt's hellaswag.py does."""
    context = tokenizer(item["ctx"]).input_ids
    rows = [tokenizer(item["ctx"] + " " + ending).input_ids for ending in item["endings"]]
    idx, mask = torch.zeros(2, 4, max(map(len, rows)), dtype=torch.long, device=device)  # (4, T) each
    for k, row in enumerate(rows):
        idx[k, : len(row)] = torch.tensor(row)
        mask[k, len(context) : len(row)] = 1
    logits = model(idx).logits[:, :-1].float()  # (4, T - 1, V)
    nats = F.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
    return (-nats.view(4, -1) * mask[:, 1:]).sum(1).tolist()


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
    """Also score so many items one at a time with plain transformers, in one process: differences, ratios of speeds."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: cuda, else mps, else cpu."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the matmuls (autocast)."""
    compile: bool = False
    """Compile the model; each ending then carries its context, in few shapes."""
    batch_size: int = 0
    """Endings at once; 0: 32 on a CPU, else 128."""


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
        raise UsageError(f"no causal LM at {cfg.model!r}: {str(e).splitlines()[0]} Give a local folder") from None

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


TURNS = 2  # of each way, in alternation
NAIVE = {"one ending at a time": one_ending_at_a_time, "one item at a time": one_item_at_a_time}


def take_turns(scorer, encoded, items, ranks):
    """Score items batched and in the naive ways -> {way: seconds}, {naive way: four sums of each item, on rank 0}.

    All ways take turns over the same items, so that all meet the same machine; tokenizing counts. Batched, each process
    has its share; the naive ways run in one, which on a CPU gets the threads of all. Collective.
    """
    seconds, sums = dict.fromkeys(["batched", *NAIVE], 0.0), {way: [] for way in NAIVE}
    size = -(-len(items) // TURNS)
    for part in (items[i : i + size] for i in range(0, len(items), size)):
        ranks.wait()
        started = time.perf_counter()
        again = Encoded(part, scorer.encode, scorer.block_size, scorer.prefix, encoded.batch_size)
        evaluate(scorer.logits_of, again, ranks.device, ranks.rank, ranks.world_size)
        ranks.wait()
        seconds["batched"] += time.perf_counter() - started
        with threads(torch.get_num_threads() * ranks.world_size):
            for way, naive in NAIVE.items():
                started = time.perf_counter()
                for item in tqdm(part, way, disable=None if ranks.main else True):
                    if ranks.main:
                        sums[way].append(naive(scorer.model, scorer.tokenizer, item, ranks.device))
                    ranks.wait()  # after each item: waiting for all of them would look like a process that hangs
                seconds[way] += time.perf_counter() - started
    return seconds, sums


def check_naive(scorer, encoded, rows, cfg, ranks, log):
    """Score the first --naive items in the naive ways as well -> the differences, and the ratios of the speeds."""
    items, by_item = encoded.items[: cfg.naive], {row["item"]: row for row in rows}
    rows = [by_item[item["item"]] for item in items]
    seconds, sums = take_turns(scorer, encoded, items, ranks)
    if not ranks.main:
        return {}
    speeds = {way: len(items) / s for way, s in seconds.items()}
    count = torch.get_num_threads()
    log.print(f"in turns, {ranks.world_size} x {count} threads: batched {speeds['batched']:.1f} items/s")
    result = {"naive_items": len(items), "batched_items_per_sec": speeds["batched"], "processes": ranks.world_size}
    for way in NAIVE:
        chosen = [score(item, four, row["tokens"]) for item, four, row in zip(items, sums[way], rows)]
        agree = sum(all(a[kind] == b[kind] for kind in ACCURACIES) for a, b in zip(chosen, rows))
        worst = max(abs(a - b) for four, row in zip(sums[way], rows) for a, b in zip(four, row["logprobs"]))
        ratio = speeds["batched"] / speeds[way]
        log.print(
            f"{way}: {speeds[way]:.1f} items/s, batched is {ratio:.2f}x as fast; {agree} of {len(items)} items "
            f"agree, log-probabilities to {worst:.1e}"
        )
        facts = {"agree": agree, "max_diff": worst, "items_per_sec": speeds[way], "batched_ratio": ratio}
        result[way.replace(" ", "_")] = facts
    return result


def compare(rows, run_dir):
    """Item by item against an earlier run -> {"items", kind: {"only_this", "only_other", "p"}}."""
    path = Path(run_dir) / "hellaswag.jsonl"
    path = path if path.exists() else path.with_name("hellaswag.jsonl.gz")  # gzipped for keeping
    other = {row["item"]: row for row in _read_jsonl(path)}
    pairs = [(row, other[row["item"]]) for row in rows if row["item"] in other]
    if not pairs or any(a["label"] != b["label"] for a, b in pairs):
        raise UsageError(f"{path} does not hold the same items; score both models on the same file")
    result = {"items": len(pairs)}
    for kind in ACCURACIES:
        right = [(a[kind] == a["label"], b[kind] == b["label"]) for a, b in pairs]
        this, that = sum(a and not b for a, b in right), sum(b and not a for a, b in right)
        result[kind] = {"only_this": this, "only_other": that, "p": mcnemar(this, that)}
    return result


def report(cfg, log, encoded, rows, counted, seconds):
    """Write and print what was found -> the figures for result.json. On one rank."""
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
    return result | {"cut": encoded.cut, "items_per_sec": speed}


def check(cfg):
    """Refuse what cannot work before anything is loaded."""
    if bool(cfg.model) == bool(cfg.checkpoint):
        raise UsageError("name one model: --model FOLDER or --checkpoint RUN")
    if cfg.naive and not cfg.model:
        raise UsageError("--naive scores with transformers: it needs --model")
    if cfg.compare and not any(cfg.compare.glob("hellaswag.jsonl*")):
        raise UsageError(f"{cfg.compare} holds no hellaswag.jsonl to compare with")


def main():
    """Score, report, and compare with the naive ways where --naive asks."""
    cfg = tyro.cli(Config)
    check(cfg)
    items = load_items(cfg.input, cfg.limit, cfg.prompt)
    ranks = Ranks(cfg.device)
    device = ranks.device
    scorer = load_ours(cfg, device) if cfg.checkpoint else load_hf(cfg, device)
    batch_size = cfg.batch_size or rows_at_once(device)
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
        result = report(cfg, log, encoded, rows, counted, seconds) if ranks.main else {}
        if cfg.naive:
            result |= check_naive(scorer, encoded, rows, cfg, ranks, log)
        log.finish("success", **result)
    ranks.close()


if __name__ == "__main__":
    cli(main)
