"""Tasks: rows of a data set -> token ids and labels, a held-out split, and how well an answer matches.

    imdb         reviews (noob123/imdb_review_3000, or a local csv with columns review, sentiment)
    alpaca       instructions (tatsu-lab/alpaca, or a local json/jsonl of instruction, input, output)
    pydocs       "what does this function do" -> its summary, from the docstrings of the installed packages
    text         your own .txt or .md (documents between blank lines) or .jsonl with a field `text`
    instruction  your own rows in Alpaca's fields, or `prompt` and `completion` (or `response`), as plain text
    chat         `messages`, ShareGPT's `conversations`, or instruction rows, in the model's own chat template

A row becomes one or more `Example`s: segments of text, each a target or masked. The whole text is tokenized at once, as
TRL does, and a token belongs to the segment that its last character is in. Two modes:

    faithful   as the common course notebook does it: loss on all of the text, the prompt too, no end-of-text;
               cut only at the model's block (or at --max-length, to make long reviews affordable)
    corrected  (default) loss on the response only; end-of-text is a target, and padding is masked by position, so that
               a pad token equal to end-of-text costs nothing

A row that is too long is cut at its end, and dropped if the prompt alone reaches the limit. (An IMDB review is cut
instead, and keeps its sentiment.) A row that cannot be read is skipped. The report counts all of these, and names the
columns that were not read. Labels are Hugging Face's: the id of a target token, else -100; the model shifts them.
"""

import csv
import json
import math
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, groupby
from os.path import commonprefix
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from common import UsageError, from_hub, is_held_out, open_text, read_json, read_jsonl, read_parquet

TASKS = ("imdb", "alpaca", "pydocs", "text", "instruction", "chat")
HUB = {"imdb": "noob123/imdb_review_3000", "alpaca": "tatsu-lab/alpaca"}
IGNORE = -100
SEED_STEP = 1_000_003  # between the data orders of two seeds; those of one seed's epochs are one apart, as accelerate's
SENTIMENT = "\nSentiment:"
ANSWERS = dict.fromkeys(("positive", "pos", "1"), " positive") | dict.fromkeys(("negative", "neg", "0"), " negative")
ANSWER_FIELDS = ("output", "response", "completion", "answer")
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
    prompt: str  # of the samples
    prompt_ids: list


def load_rows(task, data_file="", dataset=""):
    """Rows (dicts) of a task, from a local file, from the hub, or (pydocs) from the installed documentation."""
    if data_file:
        return read_rows(Path(data_file))
    if task == "pydocs" and not dataset:
        from data.sources import docstrings

        return pydocs_rows(docstrings())
    if not (dataset := dataset or HUB.get(task)):
        raise UsageError(f"task {task} needs --data-file or --dataset")
    from datasets import load_dataset

    with from_hub(dataset, "give a local copy with --data-file"):
        return [dict(row) for row in load_dataset(dataset, split="train")]


def rename_columns(rows, columns):
    """Rows with other names of columns. columns: ("FIELD=COLUMN", …); UsageError for a column that no row has."""
    fields = dict(text.partition("=")[::-2] for text in columns)  # {column: field}
    if missing := fields.keys() - set().union(*rows):
        raise UsageError(f"--columns: no row has {', '.join(sorted(missing))}; write FIELD=COLUMN, as output=answer")
    return [{fields.get(k, k): v for k, v in row.items() if k in fields or k not in fields.values()} for row in rows]


def read_rows(path):
    """Rows of a .parquet, .csv, .json, .jsonl, .txt or .md file, all but the first gzipped or not -> list of dicts."""
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if kind == ".json":
        rows = read_json(path)
    elif kind == ".jsonl":
        rows = [row for _, row in read_jsonl(path)]
    elif kind == ".parquet":
        rows = list(read_parquet(path))
    elif kind == ".csv":
        csv.field_size_limit(2**31 - 1)  # a document may be longer than the module's 128 kB
        with open_text(path, newline="") as f:  # unchanged: a field may hold line ends
            rows = list(csv.DictReader(f))
    elif kind in (".txt", ".md"):
        with open_text(path) as f:
            rows = [{"text": part} for part in re.split(r"\n\s*\n", f.read()) if part.strip()]
    else:
        raise UsageError(f"{path}: unknown kind of file; use .parquet, .csv, .json, .jsonl, .txt or .md")
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
        summary = " ".join(re.split(r"\n\s*\n", entry["doc"].strip())[0].split())
        if entry["kind"] != "module" and 20 <= len(summary) <= 300 and summary[-1] in ".:" and " " in summary:
            question = f"What does the {entry['kind']} `{entry['name']}` do?"
            rows.append({"instruction": question, "input": entry["signature"] or "", "output": summary})
    return rows


def field_of(row, *names, default=None):
    """Take the first of the named fields that the row has, as text; a UsageError if it is neither text nor a number."""
    for name in names:
        value = row.pop(name, None)
        if isinstance(value, str | int | float) and not isinstance(value, bool):  # JSON has another "True" than Python
            return str(value)
        if value is not None:
            raise UsageError(f"the field {name} is no text ({type(value).__name__}); conversations are for task chat")
    if default is not None:
        return default
    raise UsageError(f"a row has no field {' or '.join(names)}; else it has {', '.join(map(str, row)) or 'nothing'}")


def instruction_prompt(instruction, context="", preamble=True):
    """The prompt of Stanford Alpaca; `preamble` adds its opening sentence, which a small model need not read."""
    start = PREAMBLE.format(input=", paired with an input that provides further context" if context else "")
    middle = f"### Input:\n{context}\n\n" if context else ""
    return f"{start if preamble else ''}### Instruction:\n{instruction}\n\n{middle}### Response:\n"


PROMPTS = {  # of samples, the original's words; a task that is not here has a held-out prompt
    "imdb": "I love this movie because",
    "alpaca": instruction_prompt("Give three tips for staying healthy."),
}


def chat_examples(row, tokenizer, mode):
    """A conversation in the model's own template -> Examples with loss on each answer and its end of turn.

    Answers are what the template marks with {% generation %}, else what it writes beyond its prompt for each. Where it
    writes earlier turns otherwise once they are past (without their reasoning, say), each answer is an Example.
    """
    template = str(tokenizer.chat_template or "")
    if not template:
        raise UsageError("this model's tokenizer has no chat template; use an -Instruct model, or task instruction")
    turns, given = chat_turns(row)
    tools = row.pop("tools", None) if "tools" in template else None
    ends = turn_ends(tokenizer, template)
    eos = "" if ends else tokenizer.eos_token or ""  # GLM-4's answers are ended by the next turn's header
    doubled = "|".join(map(re.escape, ends or [eos]))
    for turn in turns:
        if turn["role"] == "assistant":
            turn["content"] = re.sub(rf"(\s*({doubled}))+\s*\Z", "", turn["content"])
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= given]
    answers = [i for i in answers if any(turn["role"] != "system" for turn in turns[:i])]
    if not answers:
        raise UsageError("a chat row has no assistant turn that answers another")
    marked, examples, done = (), [], ""
    if mode == "corrected" and not given and re.search(r"\{%-?\s*generation\b", template):
        marked = marked_segments(tokenizer, turns, tools)
    if not any(target and text in ends for text, target in marked):  # marks that leave out the end of turn
        marked = ()
    for i in answers[-1:] if marked else answers:
        prompt = render(tokenizer, turns[:i], tools, add_generation_prompt=True)
        after = render(tokenizer, turns[: i + 1], tools)
        if not after.startswith(prompt):  # it opens a reasoning, say, that this answer does not have
            other = render(tokenizer, [*turns[:i], {**turns[i], "content": "."}], tools)
            prompt = commonprefix([prompt, after, other])  # noqa: RUF071 (characters are meant)
        said = after[len(prompt) :] + eos
        if not all(word in said for word in turns[i]["content"].split()[-1:]):
            raise UsageError("this model's chat template leaves out what a turn says, if that is plain text")
        if examples and prompt.startswith(done):  # one text goes on
            examples.pop()
        else:
            segments, done = (), ""
        segments += ((prompt[len(done) :], mode == "faithful"), (said, True))
        examples.append(Example(marked or segments, prompt, turns[i]["content"], chat=True))
        done = prompt + said
    return examples


def render(tokenizer, turns, tools=None, **options):
    """A conversation in the model's chat template -> what `apply_chat_template` returns; UsageError if it refuses."""
    from jinja2 import TemplateError

    try:
        tools = json.loads(tools) if tools and isinstance(tools, str) else tools or None
        return tokenizer.apply_chat_template(turns, tools=tools, **{"tokenize": False, **options})
    except (ValueError, TypeError, TemplateError) as e:
        who = " and ".join(turn["role"] for turn in turns)
        raise UsageError(f"this model's chat template takes no conversation of {who} ({e})") from None


def marked_segments(tokenizer, turns, tools):
    """A conversation as ((text of a token, is target), ...), by the template's own {% generation %} marks."""
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    tokens = render(tokenizer, turns, tools, **options, tokenizer_kwargs={"return_offsets_mapping": True})
    text, ends = render(tokenizer, turns, tools), [end for _, end in tokens["offset_mapping"]]
    spans = zip([0, *ends], ends, tokens["assistant_masks"])
    return tuple((text[begin:end], bool(target)) for begin, end, target in spans)


@lru_cache(maxsize=8)
def turn_ends(tokenizer, template):
    """The special tokens that a tokenizer's chat template writes after an answer -> tuple of str, maybe empty."""
    text = render(tokenizer, [{"role": role, "content": "."} for role in ("user", "assistant")])
    ids = tokenizer(text.rpartition(".")[2], add_special_tokens=False).input_ids
    known = tokenizer.added_tokens_decoder
    return tuple(known[i].content for i in ids if i in known and known[i].special)


def chat_turns(row):
    """A row -> ([{"role", "content", ...}, ...], the number of turns that are no targets, whoever says them).

    Fields as in TRL and LLaMA-Factory: `messages` (with OpenAI's tool_calls), `prompt` and `completion`, ShareGPT's
    `conversations`, or instruction rows, maybe with `history`; all maybe with `system`.
    """
    roles, given = {"human": "user", "gpt": "assistant", "bot": "assistant", "observation": "tool"}, 0
    turns = row.pop("messages", None) or row.pop("conversations", None)
    if not turns and isinstance(row.get("prompt"), list):
        turns = row.pop("prompt")
        turns, given = [*turns, *(row.pop("completion", None) or [None])], len(turns)
    if not turns:
        asked, context = field_of(row, "instruction", "prompt", "question"), field_of(row, "input", default="")
        said = [text for question, answer in row.pop("history", None) or [] for text in (question, answer)]
        said.append(f"{asked}\n{context}" if context else asked)
        said.append(field_of(row, *ANSWER_FIELDS))
        turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    turns = [{k: v for k, v in turn.items() if v is not None} if isinstance(turn, dict) else {} for turn in turns]
    for turn in turns:
        role, content = turn.pop("from", turn.get("role")), turn.pop("value", turn.get("content"))
        content = "" if content is None and turn.get("tool_calls") else content
        if not (isinstance(role, str) and isinstance(content, str)) or role == "function_call":
            raise UsageError("a chat row's turn lacks role or content (ShareGPT: from or value), or it is not text")
        turn |= {"role": roles.get(role, role), "content": content}
    if turns[0]["role"] != "system" and (system := field_of(row, "system", default="")):
        turns, given = [{"role": "system", "content": system}, *turns], given + bool(given)
    return turns, given


def to_examples(task, row, tokenizer, mode):
    """One row -> [Example], several for some chat templates; pops the columns it reads, so that the unused remain."""
    if task == "chat":
        return chat_examples(row, tokenizer, mode)
    if task == "text" or (task == "imdb" and mode == "faithful"):
        return [Example(((field_of(row, "text", "content", "review"), True),))]
    if task == "imdb":  # the sentiment follows, so that the model can be asked for it
        review, label = field_of(row, "review", "text"), field_of(row, "sentiment", "label").strip().lower()
        if label not in ANSWERS:
            raise UsageError(f"the sentiment {label!r} is none of {', '.join(ANSWERS)}")
        segments = [(review.replace("<br />", "\n"), True), (SENTIMENT, True), (ANSWERS[label], True)]
        return [Example(tuple(segments), segments[0][0] + SENTIMENT, ANSWERS[label], yields=True)]
    if row.get("instruction") is not None:
        asked, context = field_of(row, "instruction"), field_of(row, "input", default="")
        prompt = instruction_prompt(asked, context, preamble=task != "pydocs")
    else:
        prompt = field_of(row, "prompt", "question")
    answer = field_of(row, *ANSWER_FIELDS)
    return [Example(((prompt, mode == "faithful"), (answer, True)), prompt, answer)]


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
    """Rows -> {"input_ids", "labels", "attention_mask", …}, each (B, T) int64, padded on the right."""
    fill = {"input_ids": pad, "labels": IGNORE}  # others: 0
    rows = [{**row, "attention_mask": [1] * len(row["labels"])} for row in rows]
    columns = {name: [torch.tensor(row[name]) for row in rows] for name in rows[0]}
    return {name: pad_sequence(x, batch_first=True, padding_value=fill.get(name, 0)) for name, x in columns.items()}


def pack(rows, k, pad):
    """Rows of k adapters, each adapter's in one packed row -> {"input_ids", "labels", "position_ids"}, (k, 1, T).

    Positions restart in every row, by which transformers masks attention between rows.
    """
    packed = [{"input_ids": [], "labels": [], "position_ids": []} for _ in range(k)]
    for i, row in enumerate(rows):
        columns = (
            row["input_ids"],
            [IGNORE, *row["labels"][1:]],
            range(len(row["labels"])),
        )  # nothing predicts the first
        for name, column in zip(packed[0], columns):
            packed[i // (len(rows) // k)][name] += column
    return {name: x[:, None] for name, x in collate(packed, pad).items()}


def keeps_apart(loss_of, tolerance):
    """Whether a packed row's loss is the same behind any other row. loss_of: rows -> their loss in one packed row."""
    row = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}
    one, other = ([{"input_ids": [token] * 3, "labels": [IGNORE] * 3}] for token in (1, 2))
    alone, behind_one, behind_other = (loss_of([*before, row]) for before in ([], one, other))
    return behind_one == behind_other and abs(alone - behind_one) <= tolerance


@torch.no_grad()
def mean_loss(nll, rows, pad, batch_size=8, rank=0, world_size=1):
    """Mean loss per target token over `rows`, for any batch size and number of processes -> list of k floats.

    nll: batch -> (summed losses (k,), numbers of target tokens (k,)) of k adapters. A non-finite loss counts as inf.
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
    return tuple(torch.randperm(n, generator=torch.Generator().manual_seed(seed * SEED_STEP + epoch)).tolist())


def batch_rows(n, batch_size, step, seed):
    """Indices of the rows of a step (from 0). An epoch's last batch may be smaller, as with the Trainer."""
    epoch, i = divmod(step, -(-n // batch_size))
    return epoch_order(n, epoch, seed)[i * batch_size : (i + 1) * batch_size]


def load_task(cfg, tokenizer, block_size):
    """Load, split and tokenize a task, by the settings of train_lora's TrainConfig -> TaskData."""
    limit = min(cfg.max_length or (block_size if cfg.mode == "faithful" else 512), block_size)
    rows = load_rows(cfg.task, cfg.data_file, cfg.dataset)
    rows = rename_columns(rows, cfg.columns) if cfg.columns else rows
    kept, counts, skipped, unread = {"train": [], "held_out": []}, Counter(), [], set()  # kept: (example, ids)
    for number, row in enumerate(rows, 1):
        try:
            content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
            part, left = "held_out" if is_held_out(content, cfg.held_out) else "train", dict(row)
            examples = to_examples(cfg.task, left, tokenizer, cfg.mode)
            encoded = [(example, *encode(example, tokenizer, limit, cfg.mode)) for example in examples]
        except (UsageError, ValueError, TypeError) as e:  # a ValueError, too, where JSON has half of a surrogate pair
            skipped.append(f"row {number}: {e}")
            continue
        unread |= {name for name, value in left.items() if value not in (None, "", [])}
        counts.update(cut for *_, cut in encoded if cut)
        kept[part] += [(example, ids) for example, ids, cut in encoded if not str(cut).startswith("dropped")]
    for name, part in kept.items():
        if not part:
            why = f"{len(skipped)} skipped, the first {skipped[0]}" if skipped else "check --held-out and --max-length"
            raise UsageError(f"{len(rows)} rows leave no target for the {name} part ({why}); give more")
    (examples, train), (held_out_examples, held_out) = (map(list, zip(*part)) for part in kept.values())
    report = {
        "rows_train": len(train), "rows_held_out": len(held_out), "max_length": limit,
        **dict(sorted(counts.items())), "skipped": len(skipped), "first_skipped": "".join(skipped[:1]),
        "columns_not_used": sorted(unread),
        "tokens_train": sum(len(row["input_ids"]) for row in train),
        "target_tokens_train": sum(label != IGNORE for row in train for label in row["labels"]),
    }  # fmt: skip
    prompt = cfg.prompt or PROMPTS.get(cfg.task) or held_out_examples[0].prompt
    ids = prompt_ids(tokenizer, prompt, chat=examples[0].chat and not cfg.prompt)  # a template begins a text by itself
    stops = stop_ids(tokenizer, examples[0])
    return TaskData(cfg.task, train, held_out, held_out_examples, report, stops, prompt, ids)


def stop_ids(tokenizer, example):
    """End-of-text, and for chat the tokens that end the template's turns."""
    ends = turn_ends(tokenizer, str(tokenizer.chat_template)) if example.chat else ()
    return sorted({*tokenizer.convert_tokens_to_ids(list(ends)), tokenizer.eos_token_id} - {None})


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
    got, want = (re.sub(r"\b(a|an|the)\b|[^\w\s]", " ", text.lower()).split() for text in (answer, reference))
    common = sum((Counter(got) & Counter(want)).values())
    return float(got == want), 2 * common / (len(got) + len(want)) if got or want else 1.0
