"""The model file: PREFIX.model is versioned JSON; PREFIX.vocab lists the tokens as readable text.

Here and in interop.py a tokenizer is its state, a dict with the keys of `empty_state`.
"""

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from bpe.pretokenizer import PATTERNS
from bpe.reference import render_token
from common import UsageError, atomic_open, open_text, read_json

FORMAT, VERSION = "byte-level-bpe", 1
MINBPE = "minbpe v1\n"  # the first line of a .model of karpathy/minbpe
END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_BYTES = 1 << 31  # a hundred merges can describe a token of 2**100 bytes
NORMALIZERS = "NFC", "NFD", "NFKC", "NFKD", "prefix_space"


def empty_state():
    """The state of an untrained tokenizer."""
    return {
        "pattern": "none",  # how text is split before merging; a list: each splits the chunks of the one before
        "merges": {},  # {(int, int): int} in order of rank
        "byte_ids": [*range(256)],  # the id of each byte (GPT-2 has its own order), -1 - byte for one without a token
        "special_tokens": {},  # {str: int}
        "name": "untitled",  # for display
        "training": {},  # what `bpe/train_bpe.py` records about its input
        # only in imported vocabularies
        "normalizer": [],  # of NORMALIZERS, applied to text before it is split
        "added_tokens": {},  # {str: int}, found in any text, as special tokens are where they are allowed
        "unmerged_tokens": {},  # {bytes: int}, which no merge makes
        "ignore_merges": False,  # a chunk that is a token becomes that token regardless of the merges
    }


def require(source, holds, what):
    """UsageError that names the source (a file or a vocabulary) and what is wrong with it, unless `holds`."""
    if not holds:
        raise UsageError(f"{source} cannot be used: {what}")


def is_id(value):
    """Whether a value can be a token id: an int from 0 to 2**31 - 2."""
    return type(value) is int and 0 <= value < 2**31 - 1


def _content(state):
    """What determines the ids, as JSON values. `byte_ids` and the third number of a merge only where needed."""
    merges = state["merges"]
    specials = sorted(state["special_tokens"].items(), key=lambda s: (s[1], s[0]))
    content = {"pattern": state["pattern"], "special_tokens": dict(specials)}
    usual = state["byte_ids"] == list(range(256)) and list(merges.values()) == list(range(256, 256 + len(merges)))
    if not usual:
        content["byte_ids"] = state["byte_ids"]
    content["merges"] = [[p, q] if usual else [p, q, token] for (p, q), token in merges.items()]
    optional = {key: state[key] for key in ("normalizer", "added_tokens", "ignore_merges")}
    optional["unmerged_tokens"] = {data.hex(): token for data, token in state["unmerged_tokens"].items()}
    return content | {key: value for key, value in optional.items() if value}


def state_sha256(state):
    """Hex digest of what determines the ids: pattern, merges, special tokens."""
    return hashlib.sha256(json.dumps(_content(state)).encode("ascii")).hexdigest()


def _checksum(fields):
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode("ascii")).hexdigest()


def write_model(file, state):
    """State -> model file: JSON with one merge a line and a checksum over all fields."""
    fields = {**_content(state), "sha256": state_sha256(state), "training": state["training"]}
    fields = {"format": FORMAT, "version": VERSION, **fields, "checksum": _checksum(fields)}
    lines = {key: json.dumps(value) for key, value in fields.items()}
    lines["merges"] = "[\n  " + ",\n  ".join(map(json.dumps, fields["merges"])) + "\n ]"
    with atomic_open(file) as f:
        f.write("{\n " + ",\n ".join(f'"{key}": {line}' for key, line in lines.items()) + "\n}\n")


def write_vocab(file, vocab, merges):
    """Write `[left][right] -> [token] id` for a merge and `[token] id` for any other token, sorted by id."""
    made_of = {token: pair for pair, token in reversed(merges.items())}
    with atomic_open(file) as f:
        for token, data in sorted(vocab.items()):
            parts = "".join(f"[{render_token(vocab[part])}]" for part in made_of.get(token, ()))
            f.write(f"{parts} -> [{render_token(data)}] {token}\n" if parts else f"[{render_token(data)}] {token}\n")


def read_model(file):
    """Read and check a model file -> state. Nothing in it is executed; a damaged or edited file is a UsageError."""
    with open_text(file) as f:
        if f.readline() == MINBPE:
            return _read_minbpe(file, f.read().split("\n"))
    model, check = read_json(file), partial(require, file)
    check(isinstance(model, dict) and model.get("format") == FORMAT, "it is not a tokenizer of this repository")
    version = model.get("version")
    check(version == VERSION, f"it has format version {version!r}, this code reads version {VERSION}; train it again")
    fields = {key: value for key, value in model.items() if key not in ("format", "version", "checksum")}
    check(_checksum(fields) == model.get("checksum"), "its checksum does not match; it was edited or damaged")
    state = checked_state(fields, file, name=Path(file).stem)
    check(state_sha256(state) == fields.get("sha256"), "its sha256 does not match its content")
    return state


def _read_minbpe(file, lines):
    """The lines after the first of minbpe's format -> state: pattern, number of special tokens, those, and merges."""
    try:
        pattern, n, *rest, end = lines
        special = [line.rsplit(" ", 1) for line in rest[: int(n)]]
        fields = {"special_tokens": {text: int(token) for text, token in special}}
        fields["merges"] = [[*map(int, line.split())] for line in rest[int(n) :]]
    except ValueError as e:
        raise UsageError(f"{file} cannot be used: it is a damaged model of minbpe ({e})") from None
    require(file, not end, "its last line is not complete")
    names = {source: name for name, source in PATTERNS.items()} | {"": "none"}
    return checked_state(fields | {"pattern": names.get(pattern, pattern)}, file, Path(file).stem)


def in_order(merges, byte_ids):
    """Yield each merge (p, q, token) once its parts are made, by merges that may have a higher rank (as in Llama 3)."""
    made, waiting = set(byte_ids), {}  # waiting: {missing part: merges}
    for (p, q), token in merges.items():
        ready = [(p, q, token)]
        while ready:
            merge = p, q, token = ready.pop()
            if p in made and q in made:
                yield merge
                made.add(token)
                ready += waiting.pop(token, [])
            else:
                waiting.setdefault(q if p in made else p, []).append(merge)


def checked_state(fields, source, name):
    """Check the fields of a model file -> state. `source` is named in errors."""
    check, state = partial(require, source), {**empty_state(), **fields, "name": name}
    state = {key: state[key] for key in empty_state()}
    patterns = [state["pattern"]] if isinstance(state["pattern"], str) else state["pattern"]
    check(isinstance(patterns, list) and all(isinstance(p, str) for p in patterns), "its pattern is not a str")
    for key in ("special_tokens", "added_tokens", "unmerged_tokens"):
        holds = isinstance(state[key], dict) and all(map(is_id, state[key].values()))
        check(holds, f"its {key.replace('_', ' ')} are not {{text: id}}")
    with_bytes = all(re.fullmatch("([0-9a-f]{2})+", token) for token in state["unmerged_tokens"])
    check(with_bytes, "its unmerged tokens are not bytes in hexadecimal")
    normalizer, byte_ids, merges = state["normalizer"], state["byte_ids"], fields.get("merges")
    check(isinstance(normalizer, list) and all(n in NORMALIZERS for n in normalizer), "its normalizer is not known")
    check(isinstance(merges, list), "its merges are not a list")
    of_bytes = isinstance(byte_ids, list) and all(is_id(i) or i == -1 - b for b, i in enumerate(byte_ids))
    check(of_bytes and len(byte_ids) == len(set(byte_ids)) == 256, "its byte_ids are not 256 different ids")
    known, table, length = dict.fromkeys(byte_ids, 1), {}, 3 if "byte_ids" in fields else 2  # known: {id: bytes}
    for rank, merge in enumerate(merges):
        shape = isinstance(merge, list) and len(merge) == length and all(map(is_id, merge))
        check(shape, f"merge {rank} is not {length} ids")
        p, q, token = (*merge, 256 + rank)[:3]
        check((p, q) not in table, f"merge {rank} repeats an earlier one")
        check(token not in known, f"merge {rank} makes the token of a byte")
        table[p, q] = token
    for p, q, token in in_order(table, known):
        known[token] = known[p] + known[q]
    check(known.keys() >= {*table.values()}, "its merges refer to a token that no merge makes")
    check(sum(known.values()) < MAX_VOCAB_BYTES, "its tokens are gigabytes long")
    ids = [*known, *state["added_tokens"].values(), *state["unmerged_tokens"].values()]
    check(len(ids) == len(set(ids)), "two of its tokens have the same id")
    check(set(ids).isdisjoint(state["special_tokens"].values()), "a special token has the id of another token")
    unmerged = {bytes.fromhex(data): token for data, token in state["unmerged_tokens"].items()}
    return {**state, "merges": table, "unmerged_tokens": unmerged, "ignore_merges": bool(state["ignore_merges"])}
