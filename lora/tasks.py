"""Tasks: rows of a data set -> token ids and labels, a held-out split, and how well an answer matches.

    imdb         reviews (noob123/imdb_review_3000, or a local csv with columns review, sentiment)
    alpaca       instructions (tatsu-lab/alpaca, or a local json/jsonl of instruction, input, output)
    pydocs       "what does this function do" -> its summary, from the docstrings on this machine
    text         your own .txt or .md (documents between blank lines) or .jsonl with a field `text`
    instruction  your own rows in Alpaca's fields, or `prompt` and `response`
    chat         `messages` (role, content) or ShareGPT `conversations` (from, value), in the model's own chat template

Files may be gzipped. Every row becomes an `Example`: segments of text, each learned or masked. Segments are tokenized
one by one, so that in training a prompt has exactly the ids that it has when the model is asked. Two modes:

    faithful   as the common course notebook does it: all of the text is learned, the prompt too, no end-of-text;
               cut only at the model's block (or at --max-length, to make long reviews affordable)
    corrected  (default) loss on the response only; end-of-text is learned, and padding is masked by position, so that
               a pad token equal to end-of-text costs nothing; truncation shortens the prompt and keeps the response

Labels follow Hugging Face: the id where the token is learned, -100 elsewhere; the model shifts them itself.
"""

import csv
import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common import UsageError, from_hub, open_text

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
    """One row as text. segments: ((text, learned), …); asking the model `prompt` should give `answer`."""

    segments: tuple
    prompt: str = ""
    answer: str = ""
    bos: bool = True  # False where the text (a chat template) brings its own first token
    ends_itself: bool = False  # True where the last learned segment ends in the template's end-of-turn


@dataclass
class TaskData:
    """A task, tokenized for one model: rows {"input_ids", "labels"}, the held-out rows as text, and what was cut."""

    task: str
    train: list
    held_out: list
    held_out_examples: list
    report: dict
    stop_ids: list  # generation ends at any of these
    sha256: str = ""


# ---------------------------------------------------------------------------------------------------------------------
# rows


def load_rows(task, data_file=None):
    """Rows (dicts) of a task, from a local file, from the hub, or (pydocs) from this machine's own documentation."""
    if data_file:
        return read_rows(data_file)
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
    path = Path(path)
    with open_text(path, newline="") as f:  # as it stands: a field of a csv may hold line ends
        text = f.read()
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".csv":
        return read_csv(path, text)
    if kind in (".txt", ".md"):
        return [{"text": part} for part in re.split(r"\n\s*\n", text) if part.strip()]
    try:
        if kind == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        elif kind == ".json":
            rows = json.loads(text)
        else:
            raise UsageError(f"{path}: unknown kind of file; use .csv, .json, .jsonl, .txt or .md (each also .gz)")
    except json.JSONDecodeError as e:
        raise UsageError(f"{path} is not valid JSON ({e})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path} should hold a list of objects")
    return rows


def read_csv(path, text):
    """Rows of a csv with a head; a row that does not fit it is refused."""
    csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 kB
    try:
        rows = list(csv.DictReader(io.StringIO(text)))
    except csv.Error as e:
        raise UsageError(f"{path} is not valid csv ({e})") from None
    for number, row in enumerate(rows, 1):
        if None in row:
            raise UsageError(f"{path}, row {number} has more fields than the head; put fields with commas in quotes")
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


# ---------------------------------------------------------------------------------------------------------------------
# rows -> examples


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


def imdb_example(row, tokenizer, mode):
    """A review; corrected mode lets its sentiment follow, so that the model can be asked for it."""
    review = field_of(row, "review", "text").replace("<br />", "\n") if mode == "corrected" else field_of(row, "review")
    if mode == "faithful":
        return Example(((review, True),))
    label = field_of(row, "sentiment", "label").strip().lower()
    if label not in POSITIVE + NEGATIVE:
        raise UsageError(f"the sentiment {label!r} is neither of {', '.join(POSITIVE)} nor of {', '.join(NEGATIVE)}")
    answer = SENTIMENTS[label in POSITIVE]
    return Example(((review, True), (SENTIMENT + answer, True)), prompt=review + SENTIMENT, answer=answer)


def instruction_example(row, tokenizer, mode, preamble=True):
    """A row with instruction, input and output (or the usual other names) -> Example that learns the answer."""
    if "instruction" in row:
        prompt = instruction_prompt(field_of(row, "instruction"), str(row.get("input") or ""), preamble)
    else:
        prompt = field_of(row, "prompt", "instruction", "question")
    answer = field_of(row, "output", "response", "completion", "answer")
    segments = ((prompt + answer, True),) if mode == "faithful" else ((prompt, False), (answer, True))
    return Example(segments, prompt, answer)


def text_example(row, tokenizer, mode):
    """A row with text -> Example that learns all of it."""
    return Example(((field_of(row, "text", "content"), True),))


def chat_example(row, tokenizer, mode):
    """A conversation in the model's own template: each assistant turn is learned, up to and with its end of turn.

    The template is rendered up to every turn; what an assistant turn adds is that turn's text.
    """
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError("this model's tokenizer has no chat template; use an -Instruct model, or task instruction")
    turns = chat_turns(row)
    if not any(turn["role"] == "assistant" for turn in turns):
        raise UsageError("a chat row has no assistant turn (fields: messages, or ShareGPT's conversations)")
    segments, done, prompt, answer = [], "", "", ""
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        try:
            prompt = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
            after = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
        except (ValueError, TemplateError) as e:
            who = " and ".join(str(turn["role"]) for turn in turns[: i + 1])
            raise UsageError(f"this model's chat template takes no conversation of {who} ({e})") from None
        if not (prompt.startswith(done) and after.startswith(prompt)):
            raise UsageError("this model's chat template rewrites earlier turns; split the conversations")
        said = after[len(prompt) :]
        spoken = said.rstrip("\n")  # a newline after the end of turn is never generated, so not learned
        segments += [(prompt[len(done) :], mode == "faithful"), (spoken, True), (said[len(spoken) :], False)]
        done, answer = after, turn["content"]
    return Example(tuple(s for s in segments if s[0]), prompt, answer, bos=False, ends_itself=True)


def chat_turns(row):
    """A chat row -> [{"role", "content"}, …], from `messages` or ShareGPT's `conversations`."""
    roles = {"human": "user", "gpt": "assistant", "bot": "assistant"}
    try:
        turns = row.get("messages") or [
            {"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
            for turn in row.get("conversations") or []
        ]
        if not all(isinstance(turn["content"], str) and turn["role"] for turn in turns):
            raise TypeError
    except (KeyError, TypeError):
        raise UsageError(
            "a chat row's turn lacks role or content (ShareGPT: from or value), or it is no text"
        ) from None
    return turns


def to_example(task, row, tokenizer, mode):
    """One row -> Example."""
    if task == "imdb":
        return imdb_example(row, tokenizer, mode)
    if task == "text":
        return text_example(row, tokenizer, mode)
    if task == "chat":
        return chat_example(row, tokenizer, mode)
    return instruction_example(row, tokenizer, mode, preamble=task != "pydocs")


# ---------------------------------------------------------------------------------------------------------------------
# examples -> ids


def pad_id(tokenizer):
    """The id that fills up a batch. It may be end-of-text: labels are masked by position, never by id."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)


def starting_ids(tokenizer):
    """[bos] where the tokenizer itself starts texts with it (Llama), else []."""
    ids = tokenizer("a").input_ids
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def prompt_ids(tokenizer, text, bos=True):
    """Ids of a prompt, as `encode` gives them to the same text in training."""
    return (starting_ids(tokenizer) if bos else []) + tokenizer(text, add_special_tokens=False).input_ids


def encode(example, tokenizer, max_length, mode="corrected"):
    """Example -> ({"input_ids", "labels"}, cut): equally long lists of at most `max_length`; cut says what was lost.

    cut: None, "prompt" (shortened from the left), "text" (a learned text shortened at its end, so end-of-text is not
    learned there unless a response follows it) or "response" (longer than the block by itself).
    """
    parts = [(tokenizer(text, add_special_tokens=False).input_ids, learned) for text, learned in example.segments]
    end = mode == "corrected" and not example.ends_itself
    if end and tokenizer.eos_token_id is None:
        raise UsageError("this tokenizer has no end-of-text token to learn; use --mode faithful")
    start = starting_ids(tokenizer) if example.bos else []
    over = len(start) + sum(len(ids) for ids, _ in parts) + end - max_length
    cut = None
    if over > 0:  # the first segment gives way: a prompt loses its beginning, a learned text its end
        ids, learned = parts[0]
        cut = "text" if learned else "prompt"
        if learned and len(parts) == 1:  # a text that goes on beyond the cut does not learn to end there
            over, end = over - end, False
        keep = max(len(ids) - over, 0)
        parts[0] = (ids[:keep] if learned else ids[len(ids) - keep :], learned)
    input_ids, labels = list(start), [IGNORE] * len(start)
    for ids, learned in parts:
        input_ids += ids
        labels += ids if learned else [IGNORE] * len(ids)
    if end:
        input_ids.append(tokenizer.eos_token_id)
        labels.append(tokenizer.eos_token_id)
    if len(input_ids) > max_length:
        cut = "response"
    if labels:
        labels[0] = IGNORE  # nothing comes before the first token, so it cannot be learned
    return {"input_ids": input_ids[:max_length], "labels": labels[:max_length]}, cut


def collate(rows, pad):
    """Rows -> {"input_ids", "labels", "attention_mask"}, each (B, T) int64, filled up on the right."""
    import torch

    T = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), T), pad),
        "labels": torch.full((len(rows), T), IGNORE),
        "attention_mask": torch.zeros(len(rows), T, dtype=torch.long),
    }
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        batch["input_ids"][i, :n] = torch.tensor(row["input_ids"])
        batch["labels"][i, :n] = torch.tensor(row["labels"])
        batch["attention_mask"][i, :n] = 1
    return batch


@lru_cache(maxsize=64)  # every adapter of a sweep asks at every step
def epoch_order(n, epoch, seed):
    """The order of `n` rows in an epoch: a function of seed and epoch alone, so resuming needs no loader state."""
    import torch

    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist())


def batch_rows(n, batch_size, step, seed):
    """Indices of the rows of a step (from 0). An epoch's last batch may be smaller, as with the Trainer."""
    epoch, i = divmod(step, -(-n // batch_size))
    return epoch_order(n, epoch, seed)[i * batch_size : (i + 1) * batch_size]


# ---------------------------------------------------------------------------------------------------------------------
# a whole task


def is_held_out(row, fraction):
    """By the row's own content, so that equal rows fall on the same side and new rows move no old one."""
    digest = hashlib.sha256(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_task(task, tokenizer, block_size, *, data_file="", mode="corrected", max_length=0, held_out=0.05, max_rows=0):
    """Load, split and tokenize a task -> TaskData.

    block_size: tokens that the model can read. max_length: tokens of a row; 0: 512 in corrected mode, the block in
    faithful mode. max_rows: rows of each part, 0 for all.
    """
    if task not in TASKS:
        raise UsageError(f"unknown task {task}; choose from {', '.join(TASKS)}")
    if mode not in ("corrected", "faithful"):
        raise UsageError(f"unknown mode {mode}; choose corrected or faithful")
    limit = min(max_length or (block_size if mode == "faithful" else 512), block_size)
    rows = load_rows(task, data_file)
    parts = {"train": [], "held_out": []}
    for row in rows:
        parts["held_out" if is_held_out(row, held_out) else "train"].append(row)
    for name, part in parts.items():
        if not part:
            raise UsageError(f"{len(rows)} rows leave none for the {name} part; give more rows or another --held-out")
    cuts, encoded, examples, digest = Counter(), {}, {}, hashlib.sha256()
    for name, part in parts.items():
        encoded[name], examples[name] = [], []
        for row in part[: max_rows or None]:
            example = to_example(task, row, tokenizer, mode)
            ids, cut = encode(example, tokenizer, limit, mode)
            if all(label == IGNORE for label in ids["labels"]):
                cuts["dropped"] += 1  # nothing to learn: an empty response
                continue
            cuts[cut] += 1
            encoded[name].append(ids)
            examples[name].append(example)
            digest.update(json.dumps(ids, sort_keys=True).encode("utf-8"))
        if not encoded[name]:
            raise UsageError(f"no row of the {name} part has a token to learn")
    report = {
        "rows_train": len(encoded["train"]),
        "rows_held_out": len(encoded["held_out"]),
        "max_length": limit,
        **{f"cut_{what}": n for what, n in sorted(cuts.items(), key=str) if what},
        "tokens_train": sum(len(row["input_ids"]) for row in encoded["train"]),
        "learned_tokens_train": sum(label != IGNORE for row in encoded["train"] for label in row["labels"]),
    }
    stops = stop_ids(tokenizer, examples["train"][0])
    return TaskData(
        task, encoded["train"], encoded["held_out"], examples["held_out"], report, stops, digest.hexdigest()
    )


def stop_ids(tokenizer, example):
    """End-of-text, and for chat the token that ends the template's turns: the last one learned."""
    stops = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if example.ends_itself:
        end = [text for text, learned in example.segments if learned][-1]
        stops.append(tokenizer(end, add_special_tokens=False).input_ids[-1])
    return sorted(set(stops))


def default_prompt(task, data):
    """What to ask before and after training when nobody says: the original's words, or a held-out prompt."""
    if task == "imdb":
        return "I love this movie because"
    if task == "alpaca":
        return instruction_prompt("Give three tips for staying healthy.")
    return data.held_out_examples[0].prompt


def show_batch(rows, tokenizer):
    """A batch as text: one line per run of tokens that are learned or masked."""
    lines = []
    for i, row in enumerate(rows):
        lines.append(f"row {i}: {len(row['input_ids'])} tokens")
        runs = []  # [learned, ids]
        for token, label in zip(row["input_ids"], row["labels"]):
            learned = label != IGNORE
            if runs and runs[-1][0] == learned:
                runs[-1][1].append(token)
            else:
                runs.append([learned, [token]])
        for learned, ids in runs:
            lines.append(f"  {'learned' if learned else 'masked ':<8}| {tokenizer.decode(ids)!r}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# how well an answer matches


def normalized(text):
    """Lower case, punctuation and articles away, much as in SQuAD's evaluation (here a hyphen parts words) -> words."""
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", " ", text.lower())).split()


def exact_match(answer, reference):
    """1.0 or 0.0.  exact_match("The cat.", "cat") -> 1.0"""
    return float(normalized(answer) == normalized(reference))


def token_f1(answer, reference):
    """Harmonic mean of the words' precision and recall.  token_f1("the black cat", "cat") -> 0.667"""
    got, want = normalized(answer), normalized(reference)
    common = sum((Counter(got) & Counter(want)).values())
    if not common:
        return float(got == want)
    precision, recall = common / len(got), common / len(want)
    return 2 * precision * recall / (precision + recall)
