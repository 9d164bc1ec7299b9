"""Tasks: rows of a data set -> token ids and labels, a held-out split, and how well an answer matches.

    imdb         reviews (noob123/imdb_review_3000, or a local csv with columns review, sentiment)
    alpaca       instructions (tatsu-lab/alpaca, or a local json/jsonl of instruction, input, output)
    pydocs       "what does this function do" -> its summary, from the docstrings of the installed packages
    text         your own .txt or .md (documents between blank lines) or .jsonl with a field `text`
    instruction  your own rows in Alpaca's fields, or `prompt` and `response`
    chat         `messages` (role, content) or ShareGPT `conversations` (from, value), in the model's own chat template

Files may be gzipped. Every row becomes an `Example`: segments of text, each a target or masked. The whole text is
tokenized at once, as TRL does, and a token belongs to the segment that its last character is in. Two modes:

    faithful   as the common course notebook does it: loss on all of the text, the prompt too, no end-of-text;
               cut only at the model's block (or at --max-length, to make long reviews affordable)
    corrected  (default) loss on the response only; end-of-text is a target, and padding is masked by position, so that
               a pad token equal to end-of-text costs nothing

A row that is too long loses its end, so that no answer is learned without its question; where the prompt alone fills
the limit, the row is dropped. (An IMDB review is shortened instead, and keeps its sentiment.) The report counts both.

Labels follow Hugging Face: the id where the token is a target, -100 elsewhere; the model shifts them itself.
"""

import csv
import hashlib
import json
import math
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from common import UsageError, from_hub, open_text, read_json, read_jsonl

TASKS = ("imdb", "alpaca", "pydocs", "text", "instruction", "chat")
HUB = {"imdb": "noob123/imdb_review_3000", "alpaca": "tatsu-lab/alpaca"}
IGNORE = -100
SENTIMENT = "\nSentiment:"
SENTIMENTS = (" negative", " positive")
POSITIVE, NEGATIVE = ("positive", "pos", "1"), ("negative", "neg", "0")  # how data sets write them
PREAMBLE = (
    "Below is an instruction that describes a task{input}. "
    "Write a response that appropriately completes the request.\n\n"
)


@dataclass(frozen=True)
class Example:
    """One row as text. segments: ((text, is target), …); after `prompt` the model should generate `answer`."""

    segments: tuple
    prompt: str = ""
    answer: str = ""
    chat: bool = False  # True where a chat template brings the first token, and its end of turn ends the last target
    yields: bool = False  # True where the first segment is shortened, not the last, if the row is too long


@dataclass
class TaskData:
    """A task, tokenized for one model: rows {"input_ids", "labels"}, the held-out rows as text, and what was cut."""

    task: str
    train: list
    held_out: list
    held_out_examples: list
    report: dict
    stop_ids: list  # generation ends at any of these


def load_rows(task, data_file=None):
    """Rows (dicts) of a task, from a local file, from the hub, or (pydocs) from the installed documentation."""
    if data_file:
        return read_rows(Path(data_file))
    if task == "pydocs":
        from data.sources import docstrings

        return pydocs_rows(docstrings())
    if task not in HUB:
        raise UsageError(f"task {task} needs --data-file")
    from datasets import load_dataset

    with from_hub(HUB[task], "give a local copy with --data-file"):
        return [dict(row) for row in load_dataset(HUB[task], split="train")]


def read_rows(path):
    """Rows of a .csv, .json, .jsonl, .txt or .md file, gzipped or not -> list of dicts."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind not in (".csv", ".json", ".jsonl", ".txt", ".md"):
        raise UsageError(f"{path}: unknown kind of file; use .csv, .json, .jsonl, .txt or .md (each also .gz)")
    if kind == ".json":
        rows = read_json(path)
    elif kind == ".jsonl":
        rows = [row for _, row in read_jsonl(path)]
    else:
        with open_text(path, newline="") as f:  # unchanged: a field of a csv may hold line ends
            if kind == ".csv":
                csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 kB
                rows = list(csv.DictReader(f))
            else:
                rows = [{"text": part} for part in re.split(r"\n\s*\n", f.read()) if part.strip()]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} should hold a list of objects")
    for number, row in enumerate(rows, 1):
        if None in row:  # so says the csv module
            raise UsageError(f"{path}, row {number} has more fields than the header; quote fields with commas")
    return rows


def pydocs_rows(docstrings):
    """{name, kind, signature, doc} of functions and classes -> Alpaca-shaped rows: what does it do -> its summary."""
    rows = []
    for entry in docstrings:
        if entry["kind"] == "module":
            continue
        summary = " ".join(re.split(r"\n\s*\n", entry["doc"].strip())[0].split())
        if 20 <= len(summary) <= 300 and summary[-1] in ".:" and " " in summary:
            question = f"What does the {entry['kind']} `{entry['name']}` do?"
            rows.append({"instruction": question, "input": entry["signature"] or "", "output": summary})
    return rows


def field_of(row, *names):
    """The first of the named fields that the row has, as text; UsageError lists what it has instead."""
    for name in names:
        if row.get(name) is not None:
            return str(row[name])
    raise UsageError(f"a row has no field {' or '.join(names)}; it has {', '.join(map(str, row)) or 'nothing'}")


def instruction_prompt(instruction, context="", preamble=True):
    """The prompt of Stanford Alpaca; `preamble` adds its opening sentence, which a small model need not read."""
    start = PREAMBLE.format(input=", paired with an input that provides further context" if context else "")
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"{start if preamble else ''}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def imdb_example(row, mode):
    """A review; corrected mode lets its sentiment follow, so that the model can be asked for it."""
    if mode == "faithful":
        return Example(((field_of(row, "review"), True),))
    review = field_of(row, "review", "text").replace("<br />", "\n")
    label = field_of(row, "sentiment", "label").strip().lower()
    if label not in POSITIVE + NEGATIVE:
        raise UsageError(f"the sentiment {label!r} is neither of {', '.join(POSITIVE)} nor of {', '.join(NEGATIVE)}")
    answer = SENTIMENTS[label in POSITIVE]
    segments = ((review, True), (SENTIMENT, True), (answer, True))
    return Example(segments, prompt=review + SENTIMENT, answer=answer, yields=True)


def instruction_example(row, mode, preamble=True):
    """A row with instruction, input and output (or the usual other names) -> Example with loss on the answer."""
    if "instruction" in row:
        prompt = instruction_prompt(field_of(row, "instruction"), str(row.get("input") or ""), preamble)
    else:
        prompt = field_of(row, "prompt", "instruction", "question")
    answer = field_of(row, "output", "response", "completion", "answer")
    segments = ((prompt + answer, True),) if mode == "faithful" else ((prompt, False), (answer, True))
    return Example(segments, prompt, answer)


def chat_example(row, tokenizer, mode):
    """A conversation in the model's own template: loss on each assistant turn, up to and with its end of turn.

    The template is rendered up to every turn; what an assistant turn adds is that turn's text.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError("this model's tokenizer has no chat template; use an -Instruct model, or task instruction")
    turns = chat_turns(row)
    segments, done, prompt, answer = [], "", "", ""
    for i in [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]:
        try:
            prompt = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
        except (ValueError, TemplateError) as e:
            who = " and ".join(str(turn["role"]) for turn in turns[: i + 1])
            raise UsageError(f"this model's chat template takes no conversation of {who} ({e})") from None
        if not (prompt.startswith(done) and after.startswith(prompt)):
            raise UsageError("this model's chat template rewrites earlier turns; split the conversations")
        said = after[len(prompt) :]
        spoken = said.rstrip("\n")  # a newline after the end of turn is never generated, so it is no target
        segments += [(prompt[len(done) :], mode == "faithful"), (spoken, True), (said[len(spoken) :], False)]
        done, answer = after, turns[i]["content"]
    return Example(tuple(s for s in segments if s[0]), prompt, answer, chat=True)


def chat_turns(row):
    """A chat row -> [{"role", "content"}, …], from `messages` or ShareGPT's `conversations`."""
    roles = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    turns = []
    for turn in row.get("messages") or row.get("conversations") or []:
        turn = turn if isinstance(turn, dict) else {}
        role, content = (turn.get(name, turn.get(other)) for name, other in (("role", "from"), ("content", "value")))
        if not (role and isinstance(role, str) and isinstance(content, str)):
            raise UsageError("a chat row's turn lacks role or content (ShareGPT: from or value), or it is not text")
        turns.append({"role": roles.get(role, role), "content": content})
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UsageError("a chat row has no assistant turn (fields: messages, or ShareGPT's conversations)")
    return turns


def to_example(task, row, tokenizer, mode):
    """One row -> Example."""
    if task == "imdb":
        return imdb_example(row, mode)
    if task == "text":
        return Example(((field_of(row, "text", "content"), True),))
    if task == "chat":
        return chat_example(row, tokenizer, mode)
    return instruction_example(row, mode, preamble=task != "pydocs")


def pad_id(tokenizer):
    """The id that fills up a batch. It may be end-of-text: labels are masked by position, never by id."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def starting_ids(tokenizer):
    """[bos] where the tokenizer itself starts texts with it (Llama), else []."""
    ids = tokenizer("a").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def prompt_ids(tokenizer, text, chat=False):
    """Ids of a prompt, as `encode` gives them to the same text in training."""
    return ([] if chat else starting_ids(tokenizer)) + tokenizer(text, add_special_tokens=False).input_ids


def encode(example, tokenizer, max_length, mode="corrected"):
    """Example -> ({"input_ids", "labels"}, cut): equally long lists of at most `max_length`; cut says what was lost.

    cut: None, "cut_text" or "cut_response" (the end is gone, so it does not learn to end there), "dropped_long_prompt"
    (it fills the limit by itself) or "dropped_no_answer", where nothing is left to learn.
    """
    end = mode == "corrected" and not example.chat
    if end and tokenizer.eos_token_id is None:
        raise UsageError("this tokenizer has no end-of-text token to learn; use --mode faithful")
    if not tokenizer.is_fast:
        raise UsageError("this model's tokenizer does not say where its tokens come from (it is no fast tokenizer)")
    text = "".join(text for text, _ in example.segments)
    bounds = list(accumulate(len(text) for text, _ in example.segments))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token's end decides whose it is: where one starts with a space, some tokenizers' offsets leave that out.
    owners = [bisect_left(bounds, stop) for _, stop in tokens.offset_mapping]
    start = [] if example.chat else starting_ids(tokenizer)
    input_ids = start + tokens.input_ids
    labels = [IGNORE] * len(start)
    labels += [token if example.segments[owner][1] else IGNORE for token, owner in zip(tokens.input_ids, owners)]
    if end and input_ids[-1:] != [tokenizer.eos_token_id]:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    labels[:1] = [IGNORE]  # nothing comes before the first token, so nothing predicts it
    cut, over = None, len(input_ids) - max_length
    if over > 0:
        cut = "cut_text" if example.segments[0][1] else "cut_response"
        stop = len(start) + owners.count(0) if example.yields else len(input_ids)
        for column in (input_ids, labels):
            del column[max(stop - over, len(start)) : stop]
            del column[max_length:]
    if all(label == IGNORE for label in labels):
        cut = "dropped_long_prompt" if cut else "dropped_no_answer"
    return {"input_ids": input_ids, "labels": labels}, cut


def collate(rows, pad):
    """Rows -> {"input_ids", "labels", "attention_mask"}, each (B, T) int64, padded on the right."""
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    fill = {"input_ids": pad, "labels": IGNORE, "attention_mask": 0}
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in fill}
    return {name: pad_sequence(column, batch_first=True, padding_value=fill[name]) for name, column in columns.items()}


def mean_loss(nll, rows, pad, batch_size=8, rank=0, world_size=1):
    """Mean loss per target token over `rows`, whatever the batch size and the number of processes -> list of k floats.

    nll: batch -> (summed losses (k,), numbers of target tokens (k,)) of the k adapters that are asked. A loss that is
    not finite counts as infinite.
    """
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))  # similar lengths together: little padding
    total = torch.zeros(2, 1, dtype=torch.float64)  # becomes (2, k)
    for i in range(rank * batch_size, len(rows), world_size * batch_size):
        sums, counts = nll(collate(rows[i : i + batch_size], pad))
        total = total + torch.stack([sums.cpu().double(), counts.cpu().double()])
    if world_size > 1:
        total = total.cuda() if torch.distributed.get_backend() == "nccl" else total
        torch.distributed.all_reduce(total)
    return (total[0] / total[1]).nan_to_num(nan=math.inf, posinf=math.inf).tolist()


@lru_cache(maxsize=64)  # every adapter of a sweep asks at every step
def epoch_order(n, epoch, seed):
    """The order of `n` rows in an epoch: a function of seed and epoch alone, so resuming needs no loader state."""
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist())


def batch_rows(n, batch_size, step, seed):
    """Indices of the rows of a step (from 0). An epoch's last batch may be smaller, as with the Trainer."""
    epoch, i = divmod(step, -(-n // batch_size))
    return epoch_order(n, epoch, seed)[i * batch_size : (i + 1) * batch_size]


def is_held_out(row, fraction):
    """By the row's own content, so that equal rows fall on the same side and new rows move no old one."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_task(cfg, tokenizer, block_size):
    """Load, split and tokenize a task -> TaskData.

    cfg: settings with task, data_file, mode, max_length, held_out and max_rows, as in train_lora's TrainConfig.
    block_size: tokens that the model can read.
    """
    limit = min(cfg.max_length or (block_size if cfg.mode == "faithful" else 512), block_size)
    rows = load_rows(cfg.task, cfg.data_file)
    parts = {"train": [], "held_out": []}
    for row in rows:
        parts["held_out" if is_held_out(row, cfg.held_out) else "train"].append(row)
    counts, kept = Counter(), {}
    for name, part in parts.items():
        kept[name] = []  # (example, ids)
        for row in part[: cfg.max_rows or None]:
            example = to_example(cfg.task, row, tokenizer, cfg.mode)
            ids, cut = encode(example, tokenizer, limit, cfg.mode)
            counts.update([cut] if cut else [])
            kept[name] += [] if str(cut).startswith("dropped") else [(example, ids)]
        if not kept[name]:
            raise UsageError(f"{len(rows)} rows leave no target for the {name} part; give more, or another --held-out")
    (examples, train), (held_out_examples, held_out) = (map(list, zip(*part)) for part in kept.values())
    report = {
        "rows_train": len(train), "rows_held_out": len(held_out), "max_length": limit,
        **dict(sorted(counts.items())),
        "tokens_train": sum(len(row["input_ids"]) for row in train),
        "target_tokens_train": sum(label != IGNORE for row in train for label in row["labels"]),
    }  # fmt: skip
    return TaskData(cfg.task, train, held_out, held_out_examples, report, stop_ids(tokenizer, examples[0]))


def stop_ids(tokenizer, example):
    """End-of-text, and for chat the token that ends the template's turns: the last target."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if example.chat:
        end = [text for text, target in example.segments if target][-1]
        stops.append(tokenizer(end, add_special_tokens=False).input_ids[-1])
    return sorted(set(stops))


def default_prompt(data):
    """The prompt of the samples where none is given: the original's words, or a held-out prompt."""
    if data.task == "imdb":
        return "I love this movie because"
    if data.task == "alpaca":
        return instruction_prompt("Give three tips for staying healthy.")
    return data.held_out_examples[0].prompt


def show_batch(rows, tokenizer):
    """A batch as text: one line per run of tokens that are targets or masked."""
    lines = []
    for i, row in enumerate(rows):
        lines.append(f"row {i}: {len(row['input_ids'])} tokens")
        pairs = zip(row["input_ids"], row["labels"])
        for masked, run in groupby(pairs, key=lambda pair: pair[1] == IGNORE):
            lines.append(f"  {'masked' if masked else 'target'} | {tokenizer.decode([token for token, _ in run])!r}")
    return "\n".join(lines)


def answer_scores(answer, reference):
    """Exact match and F1 of the words, much as SQuAD's evaluation.  ("the black cat", "cat") -> (0.0, 0.667)

    Case, punctuation and articles do not count; unlike SQuAD's, a hyphen parts words.
    """
    got, want = (
        re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", " ", text.lower())).split() for text in (answer, reference)
    )
    common = sum((Counter(got) & Counter(want)).values())
    return float(got == want), 2 * common / (len(got) + len(want)) if got or want else 1.0
