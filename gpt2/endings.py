"""How likely endings are after a context, for many contexts at once: what multiple-choice tasks are scored by.

A context's keys and values are computed once and serve all its endings; logits are computed at the endings alone.
Contexts are sorted by length and taken in batches, the endings of a batch likewise, so that little is padding. Who
computes a batch, and how large it is, changes no figure beyond rounding.

    encoded = Encoded(items, encode, block_size)             # items: [{"ctx": str, "endings": [str, …]}, …]
    sums = dict(score_endings(shared_gpt(model), encoded))        # {(item, ending): summed log-probability}
"""

import copy
import inspect
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from tqdm import tqdm

POOL = 4  # a batch holds so many times `batch_size` contexts: the more endings to sort, the less padding

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
    """B contexts of similar length, and their endings, R rows at a time.

    contexts (B, C): context ids without the last, padded on the right; lengths (B,): how many are not padding.
    """

    contexts: torch.Tensor
    lengths: torch.Tensor
    rows: list


class Encoded:
    """Items {"ctx": str, "endings": [str, …]} as ids, and their batches. Made once, scored as often as one likes.

    encode: list of str -> list of lists of ids, without special tokens.
    block_size: longest row; a longer context loses its left end, and is counted in `cut`.
    prefix: ids in front of every context (the begin-of-text token of models that were trained with one).
    batch_size: R, rows at once; contexts are computed POOL times as many at once.
    """

    def __init__(self, items, encode, block_size, prefix=(), batch_size=32):
        self.items, self.batch_size = items, batch_size
        contexts, endings = _encode_items(items, encode)
        fitted = [_fit(list(prefix), c, e, block_size) for c, e in zip(contexts, endings)]
        self.contexts, self.endings, cut = (list(column) for column in zip(*fitted))
        self.cut = sum(cut)
        order = sorted(range(len(items)), key=lambda i: len(self.contexts[i]))
        self.groups = [order[i : i + POOL * batch_size] for i in range(0, len(order), POOL * batch_size)]

    def batches(self, rank=0, world_size=1, device="cpu"):
        """Batches of one rank; who computes a batch changes nothing in it."""
        R = self.batch_size
        for group in self.groups[rank::world_size]:
            contexts = [self.contexts[i][:-1] for i in group]
            C = max(map(len, contexts))
            padded = torch.tensor([c + [0] * (C - len(c)) for c in contexts], dtype=torch.long)  # (B, C)
            places = [(i, k) for i in group for k in range(len(self.endings[i]))]
            places.sort(key=lambda place: len(self.endings[place[0]][place[1]]))
            chunks = [places[i : i + R] for i in range(0, len(places), R)]
            rows = [self._rows(chunk, group, device) for chunk in chunks]
            yield Batch(padded.to(device), torch.tensor([len(c) for c in contexts]).to(device), rows)

    def _rows(self, places, group, device):
        filled = places + places[:1] * (self.batch_size - len(places))  # always R rows: one shape less to compile
        endings = [self.endings[i][k] for i, k in filled]
        E = max(map(len, endings))
        ids = [self.contexts[i][-1:] + e[:-1] + [0] * (E - len(e)) for (i, _), e in zip(filled, endings)]
        targets = [e + [-1] * (E - len(e)) for e in endings]
        owner = [group.index(i) for i, _ in filled]
        return Rows(*(torch.tensor(t).to(device) for t in (ids, targets, owner)), places)


def _encode_items(items, encode):
    """-> contexts (list of lists of ids), endings (list of lists of lists of ids).

    An ending's ids are those of " " + ending. Tokenizers that put a space of their own in front of a text (Llama's)
    would double it; there the ids of the whole text are taken, as far as they go beyond the context's.
    """
    contexts = encode([item["ctx"] for item in items])
    alone = encode(["x", " x", "x x"])
    if alone[0] + alone[1] == alone[2]:
        flat = iter(encode([" " + ending for item in items for ending in item["endings"]]))
        return contexts, [[next(flat) for _ in item["endings"]] for item in items]
    whole = iter(encode([item["ctx"] + " " + ending for item in items for ending in item["endings"]]))
    return contexts, [[next(whole)[len(c) :] for _ in item["endings"]] for c, item in zip(contexts, items)]


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
    """A cache, as GPT takes it, for one pass over right-padded contexts (B, C): it keeps their keys and values."""

    length = 0  # columns before the ones that come; GPT checks that all fit into block_size

    def __init__(self, lengths, C):
        self.lengths, self.layers = lengths, {}
        self.known = torch.arange(C, device=lengths.device) < lengths[:, None]  # (B, C): False for padding

    def positions(self, T):
        return torch.arange(T, device=self.lengths.device)

    def append(self, layer, k, v):
        self.layers[layer] = k, v  # (B, nh, C, hs)
        return k, v, torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril()  # causal (C, C)


class EndingsAfter:
    """A cache for one pass over rows (R, E) of endings, each after its `owner` (R,) among the contexts."""

    length = 0

    def __init__(self, context, owner, block_size):
        self.context, self.owner, self.block_size = context, owner, block_size

    def positions(self, T):
        start = self.context.lengths[self.owner][:, None]
        return (start + torch.arange(T, device=start.device)).clamp(max=self.block_size - 1)  # (R, E); so may padding

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
        known = (torch.arange(C, device=lengths.device) < lengths[:, None]).long()  # (B, C): 0 for padding
        # The padding stands on the right, where it does no harm before the endings come.
        past = model.base_model(batch.contexts, use_cache=True).past_key_values
        for rows in batch.rows:
            R, E = rows.ids.shape
            cache = copy.copy(past)
            cache.layers = [copy.copy(layer) for layer in past.layers]  # selecting replaces a layer's tensors
            cache.batch_select_indices(rows.owner)
            places = {"attention_mask": torch.cat([known[rows.owner], known.new_ones(R, E)], dim=1)}  # (R, C + E)
            if takes_positions:
                places["position_ids"] = lengths[rows.owner][:, None] + torch.arange(E, device=lengths.device)  # (R, E)
                places["position_ids"].clamp_(max=block_size - 1)  # padding may lie beyond
            yield model(rows.ids, past_key_values=cache, **places).logits

    return logits


# ---------------------------------------------------------------------------------------------------------------------
# scores


@torch.inference_mode()
def score_endings(logits_of, encoded, device="cpu", rank=0, world_size=1, autocast=nullcontext, progress=False):
    """Iterate over ((item, ending), summed log-probability) of one rank's batches.

    logits_of: Batch -> logits of each of its rows: `plain(f, block_size)`, `shared_gpt(model)` or
    `shared_hf(model, block_size)`, the model in eval mode. autocast: makes the context of the forward pass.
    """
    total = sum(map(len, encoded.groups[rank::world_size]))
    with tqdm(total=total, unit="item", desc="scoring", disable=None if progress and not rank else True) as bar:
        for batch in encoded.batches(rank, world_size, device):
            sums = []
            with autocast():
                for rows, logits in zip(batch.rows, logits_of(batch)):
                    logits = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))  # (R * E, V)
                    nats = F.cross_entropy(logits, rows.targets.flatten(), ignore_index=-1, reduction="none")
                    sums.append(-nats.view(rows.targets.shape).cpu().double().sum(-1))  # (R,)
            bar.update(len(batch.lengths))
            for rows, row_sums in zip(batch.rows, sums):
                yield from zip(rows.places, row_sums.tolist())
