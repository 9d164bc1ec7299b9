"""The tokenizer: text to ids and back, trained, saved and loaded.

    from bpe import Tokenizer

    tok = Tokenizer(pattern="gpt4")
    tok.train(open("book.txt", encoding="utf-8").read(), vocab_size=4096)
    tok.register_special_tokens({"<|endoftext|>": 4096})
    assert tok.decode(tok.encode("hello world")) == "hello world"
    tok.save("book")                      # book.model, book.vocab
    tok = Tokenizer.load("book.model")

Any text survives the round trip, since the alphabet is the 256 bytes. The one exception is a lone surrogate, which is
not text: it becomes U+FFFD.
"""

import hashlib
import json
import multiprocessing
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import regex
from tqdm import tqdm

from bpe.encoder import Encoder
from bpe.pretokenizer import Splitter, utf8, valid
from bpe.reference import render_token
from bpe.trainer import check_size, learn_merges
from common import UsageError, atomic_open, read_json

FORMAT, VERSION = "byte-level-bpe", 1
END_OF_TEXT = "<|endoftext|>"
MAX_VOCAB_BYTES = 1 << 31  # a hundred merges can describe a token of 2**100 bytes
CACHE_CHUNKS = 1 << 18  # different chunks remembered, some 70 MB at most
CACHE_CHUNK_LENGTH = 256  # characters; longer chunks are not remembered


class _ChunkCache(dict):
    """chunk -> its ids. An unknown chunk gets an empty list at once and is noted in `pending`, to be filled later."""

    def __init__(self):
        self.pending = []

    def __missing__(self, chunk):
        ids = self[chunk] = []
        self.pending.append(chunk)
        return ids


class _Load:
    """`Tokenizer.load(file)` makes a tokenizer; `tok.load(file)` turns `tok` into the one in the file, as in minbpe."""

    def __get__(self, tok, cls):
        def load(model_file):
            """Read PREFIX.model -> Tokenizer. A damaged, edited or foreign file is a UsageError."""
            target = cls.__new__(cls) if tok is None else tok
            target.__setstate__(_read_model(model_file))
            target.name = Path(model_file).stem
            return target

        return load


class Tokenizer:
    """Byte-level BPE.

    pattern: how text is cut before merging: "none" (not at all), "gpt2", "gpt4", or a regular expression.

    merges: {(int, int): int}, in the order in which they were learned.
    vocab: {int: bytes}, special tokens included.
    special_tokens: {str: int}.
    name: where it comes from, for people.
    """

    def __init__(self, pattern="none"):
        self.__setstate__({"pattern": pattern, "merges": {}, "byte_ids": list(range(256)), "special_tokens": {}})

    def __getstate__(self):
        keys = ("pattern", "merges", "byte_ids", "special_tokens", "name", "training")
        return {key: getattr(self, key) for key in keys}

    def __setstate__(self, state):
        self.pattern = state["pattern"]
        self.merges = state["merges"]
        self.byte_ids = state["byte_ids"]  # the id of each byte: GPT-2 has its own order
        self.name = state.get("name", "untitled")
        self.training = state.get("training", {})  # what `bpe/train_bpe.py` notes about where it comes from
        self._split = Splitter(self.pattern)
        self._encoder = Encoder(self.merges, self.byte_ids)
        self._cache = _ChunkCache()
        self._lock = threading.Lock()  # one thread at a time fills the cache
        self.vocab = {token: bytes([b]) for b, token in enumerate(self.byte_ids)}
        for (p, q), token in self.merges.items():
            data = self.vocab[p] + self.vocab[q]
            if self.vocab.setdefault(token, data) != data:
                raise UsageError(f"two merges make token {token}, but of different bytes")
        self.special_tokens = {}
        self._special_regex = None
        self.register_special_tokens(state["special_tokens"])

    def __repr__(self):
        return f"Tokenizer({self.name!r}, pattern={self.pattern!r}, n_vocab={self.n_vocab})"

    @property
    def n_vocab(self):
        """Rows that an embedding needs: the highest id + 1 (256 + merges + special tokens where no id is left out)."""
        return self._n_vocab

    @property
    def eot_token(self):
        """Id of <|endoftext|>, or None."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def sha256(self):
        """Hex digest of what decides the ids: pattern, merges, special tokens."""
        return hashlib.sha256(json.dumps(_content(self), ensure_ascii=True).encode("ascii")).hexdigest()

    def byte_lengths(self):
        """Bytes of text that each id stands for, a list of n_vocab; special tokens stand for none."""
        special = set(self.special_tokens.values())
        return [0 if i in special else len(self.vocab.get(i, b"")) for i in range(self.n_vocab)]

    def register_special_tokens(self, special_tokens):
        """Set the special tokens, {str: int}, in place of earlier ones. Their ids must be free, and no id negative."""
        for token in self.special_tokens.values():
            del self.vocab[token]
        self.special_tokens = {}
        for text, token in special_tokens.items():
            if not isinstance(text, str) or not text or not isinstance(token, int) or isinstance(token, bool):
                raise UsageError(f"a special token is a non-empty text with a whole number, not {text!r}: {token!r}")
            if token in self.vocab or token < 0:
                raise UsageError(f"special token {text!r} cannot have id {token}: it is taken or negative")
            self.vocab[token] = text.encode("utf-8")
            self.special_tokens[text] = token
        self._n_vocab = max(self.vocab) + 1
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special_regex = regex.compile("|".join(map(regex.escape, longest_first))) if longest_first else None

    # ------------------------------------------------------------------------------------------------------------------
    # training

    def train(self, text_or_iterable, vocab_size, verbose=False, *, num_workers=1, progress=False):
        """Learn merges from a str, or from an iterable of str (documents; no merge crosses their borders).

        vocab_size: the 256 bytes and the merges; special tokens come on top, and earlier ones are dropped.
        verbose: print each merge with its token and count.
        num_workers: processes that cut the text into chunks. The merges do not depend on it.
        progress: show a progress bar on a terminal.

        Memory is bounded by the different chunks, not by the length of an iterable. Fewer merges are learned, with a
        line that says so, when no pair is left.
        """
        if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
            raise UsageError(f"vocab_size is a whole number, not {vocab_size!r}")
        check_size(vocab_size, 0)
        whole = isinstance(text_or_iterable, str)
        documents, size = ([text_or_iterable], len(text_or_iterable)) if whole else (text_or_iterable, None)
        quiet = None if progress else True  # None: no bar where stderr is not a terminal
        with tqdm(total=size, unit="char", unit_scale=True, desc="split", disable=quiet) as bar:
            counts = _count_chunks(self._split, documents, num_workers, bar)
        merges, vocab = {}, {b: bytes([b]) for b in range(256)}
        with tqdm(total=vocab_size - 256, unit="merge", desc="merge", disable=quiet) as bar:
            for (p, q), token, count in learn_merges(counts, vocab_size):
                merges[p, q] = token
                vocab[token] = vocab[p] + vocab[q]
                bar.update()
                if verbose:
                    n, shown = token - 255, render_token(vocab[token])
                    tqdm.write(f"merge {n}/{vocab_size - 256}: ({p}, {q}) -> {token} [{shown}] had {count} occurrences")
        if len(merges) < vocab_size - 256:
            tqdm.write(
                f"no pair is left after {len(merges)} merges: the vocabulary has {256 + len(merges)} tokens, "
                f"not {vocab_size}",
                file=sys.stderr,
            )
        self.__setstate__(
            {"pattern": self.pattern, "merges": merges, "byte_ids": list(range(256)), "special_tokens": {}}
        )

    # ------------------------------------------------------------------------------------------------------------------
    # text -> ids

    def encode(self, text, allowed_special="none_raise"):
        """str -> list of ids.

        allowed_special: which special tokens in the text become their id.
            "none_raise"  none; one that stands in the text is a UsageError (the default: text from outside must not
                          be able to end a document)
            "none"        none; they are encoded like any other text
            "all"         all of them
            a set         these; any other special token in the text is a UsageError
        """
        self._check_text(text)
        allowed = self._allowed(text, allowed_special)
        if not allowed:
            return self._encode_ordinary(text)
        between = self._special_regex if len(allowed) == len(self.special_tokens) else _any_of(allowed)
        ids, start = [], 0
        for match in between.finditer(text):
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self.special_tokens[match.group()])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def encode_ordinary(self, text):
        """str -> list of ids, special tokens taken for ordinary text."""
        self._check_text(text)
        return self._encode_ordinary(text)

    def encode_batch(self, texts, allowed_special="none_raise", *, num_workers=1):
        """list of str -> list of lists of ids, over `num_workers` processes.

        With more than one, call it under `if __name__ == "__main__":`, as always where processes are started.
        """
        texts = list(texts)
        if num_workers <= 1 or len(texts) < 2:
            return [self.encode(text, allowed_special) for text in texts]
        work = partial(_encode_in_worker, allowed_special=allowed_special)
        size = max(1, min(256, len(texts) // (4 * num_workers)))
        with multiprocessing.Pool(num_workers, _start_worker, (self,)) as pool:
            return pool.map(work, texts, chunksize=size)

    def _check_text(self, text):
        if not isinstance(text, str):
            raise UsageError(f"encode takes a str, not {type(text).__name__}")

    def _allowed(self, text, allowed_special):
        """The special tokens to look for; UsageError where one stands in the text that must not."""
        if allowed_special == "none":
            return set()
        if allowed_special == "all":
            return set(self.special_tokens)
        if allowed_special == "none_raise":
            allowed_special = ()
        elif not isinstance(allowed_special, set | frozenset | list | tuple):
            raise UsageError(f"allowed_special is 'all', 'none', 'none_raise' or a set, not {allowed_special!r}")
        for special in allowed_special:
            if special not in self.special_tokens and special in text:
                raise UsageError(
                    f"{special!r} is allowed as a special token and stands in the text, but is unknown here"
                )
        forbidden = self.special_tokens.keys() - set(allowed_special)
        found = _any_of(forbidden).search(text) if forbidden else None
        if found:
            raise UsageError(
                f"the text holds the special token {found.group()!r}; pass allowed_special='all' to encode it as one, "
                "or 'none' to encode it as text"
            )
        return self.special_tokens.keys() & set(allowed_special)

    def _encode_ordinary(self, text):
        text = valid(text)
        if self.pattern == "none":
            return self._encoder.encode(text.encode("utf-8"))
        cache, ids_of_chunks = self._cache, []
        with self._lock:
            try:
                for block in self._split.blocks(text):
                    ids_of_chunks += map(cache.__getitem__, self._split.split_block(block))
                    if len(cache) > CACHE_CHUNKS:
                        self._fill_cache()
                        cache.clear()
                self._fill_cache()
            except BaseException:  # an interrupt must leave no empty entry behind
                cache.clear()
                cache.pending.clear()
                raise
        return list(chain.from_iterable(ids_of_chunks))

    def _fill_cache(self):
        """Encode the chunks that were met for the first time, all at once."""
        cache = self._cache
        if cache.pending:
            for chunk, ids in zip(cache.pending, self._encoder.encode_all([c.encode("utf-8") for c in cache.pending])):
                cache[chunk].extend(ids)
                if len(chunk) > CACHE_CHUNK_LENGTH:
                    del cache[chunk]
            cache.pending.clear()

    # ------------------------------------------------------------------------------------------------------------------
    # ids -> text

    def decode(self, ids, errors="replace"):
        """Ids -> str. errors: "replace" puts U+FFFD for what is not UTF-8, "strict" raises UnicodeDecodeError."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decode_bytes(self, ids):
        """Ids -> bytes. An id outside the vocabulary is a UsageError that names it."""
        if hasattr(ids, "tolist"):  # arrays and tensors
            ids = ids.tolist()
        try:
            return b"".join(map(self.vocab.__getitem__, ids))
        except KeyError as e:
            raise UsageError(
                f"id {e.args[0]} is not in the vocabulary (its highest id is {self.n_vocab - 1})"
            ) from None

    # ------------------------------------------------------------------------------------------------------------------
    # files

    def save(self, file_prefix):
        """Write PREFIX.model, which `load` reads, and PREFIX.vocab, for people -> (model_file, vocab_file)."""
        model_file, vocab_file = f"{file_prefix}.model", f"{file_prefix}.vocab"
        with atomic_open(vocab_file) as f:
            f.writelines(f"{line}\n" for line in _vocab_lines(self))
        content = {**_content(self), "sha256": self.sha256, "training": self.training}
        with atomic_open(model_file) as f:
            f.write(_model_text({"format": FORMAT, "version": VERSION, **content, "checksum": _checksum(content)}))
        return model_file, vocab_file

    load = _Load()

    def save_tiktoken(self, file):
        """Write a tiktoken rank file: one line of base64 bytes and rank for each token, without special tokens."""
        from bpe.interop import save_tiktoken

        save_tiktoken(self, file)

    def save_huggingface(self, folder):
        """Write tokenizer.json and tokenizer_config.json, from which AutoTokenizer gives the same ids."""
        from bpe.interop import save_huggingface

        save_huggingface(self, folder)

    def to_tiktoken(self):
        """-> tiktoken.Encoding with the same ids, for speed on many threads."""
        from bpe.interop import to_tiktoken

        return to_tiktoken(self)

    @classmethod
    def from_tiktoken(cls, name_or_file, pattern=None, special_tokens=None):
        """Recover the merges of a tiktoken vocabulary: "gpt2", "cl100k_base", …, or a rank file.

        pattern, special_tokens: for a rank file, which knows neither (default: "none", {}).
        """
        from bpe.interop import read_tiktoken

        return cls._of(read_tiktoken(name_or_file, pattern, special_tokens))

    @classmethod
    def from_huggingface(cls, file):
        """Read a tokenizer.json of a byte-level BPE tokenizer."""
        from bpe.interop import read_huggingface

        return cls._of(read_huggingface(file))

    @classmethod
    def _of(cls, state):
        tok = cls.__new__(cls)
        tok.__setstate__(state)
        return tok


def load_tokenizer(name_or_file):
    """ "gpt2" or another tiktoken name, or a PREFIX.model file -> Tokenizer."""
    if Path(name_or_file).suffix == ".model":
        return Tokenizer.load(name_or_file)
    return Tokenizer.from_tiktoken(name_or_file)


# ----------------------------------------------------------------------------------------------------------------------
# work in other processes


def _start_worker(tok):
    global _tokenizer  # one per worker process, set before its first task
    _tokenizer = tok


def _encode_in_worker(text, allowed_special):
    return _tokenizer.encode(text, allowed_special)


def _count_chunks(split, documents, num_workers, bar):
    """Iterable of str -> {chunk in UTF-8: how often}, in order of first appearance."""

    def groups():
        group, size = [], 0
        for document in documents:
            if not isinstance(document, str):
                raise UsageError(
                    f"the text to train on is a str or an iterable of str, not of {type(document).__name__}"
                )
            for block in split.blocks(valid(document), size=1 << 20):
                group.append(block)
                size += len(block)
                bar.update(len(block))
                if size >= 1 << 20:
                    yield group
                    group, size = [], 0
        yield group

    if num_workers <= 1:
        return _add_counters(map(split.count, groups()))
    with ProcessPoolExecutor(num_workers) as pool:
        return _add_counters(_in_order(pool, split.count, groups(), ahead=2 * num_workers))


def _in_order(pool, function, items, ahead):
    """pool.map that reads only `ahead` items ahead, so that an endless iterable is no memory hog.

    In order, so that first appearances keep theirs.
    """
    running = deque()
    for item in items:
        running.append(pool.submit(function, item))
        if len(running) > ahead:
            yield running.popleft().result()
    while running:
        yield running.popleft().result()


def _add_counters(counters):
    total = Counter()
    for counter in counters:
        for chunk, n in counter.items():
            total[chunk] += n
    return {utf8(chunk): n for chunk, n in total.items()}


# ----------------------------------------------------------------------------------------------------------------------
# the model file


def _any_of(texts):
    return regex.compile("|".join(map(regex.escape, sorted(texts, key=len, reverse=True))))


def _content(tok):
    """What decides the ids, as plain JSON. `byte_ids` and the third number of a merge appear only where needed."""
    content = {"pattern": tok.pattern, "special_tokens": dict(sorted(tok.special_tokens.items(), key=lambda s: s[1]))}
    usual = tok.byte_ids == list(range(256)) and list(tok.merges.values()) == list(range(256, 256 + len(tok.merges)))
    if not usual:
        content["byte_ids"] = tok.byte_ids
    content["merges"] = [[p, q] if usual else [p, q, token] for (p, q), token in tok.merges.items()]
    return content


def _checksum(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode("ascii")).hexdigest()


def _model_text(model):
    """JSON with one merge a line."""
    merges = ",\n  ".join(map(json.dumps, model["merges"]))
    fields = [
        f'"merges": [\n  {merges}\n ]' if key == "merges" else f"{json.dumps(key)}: {json.dumps(value)}"
        for key, value in model.items()
    ]
    return "{\n " + ",\n ".join(fields) + "\n}\n"


def _vocab_lines(tok):
    """`[left][right] -> [token] id` for a merge, `[token] id` for the rest, by id."""
    made_of = {token: pair for pair, token in reversed(tok.merges.items())}
    for token, data in sorted(tok.vocab.items()):
        parts = "".join(f"[{render_token(tok.vocab[part])}]" for part in made_of.get(token, ()))
        yield f"{parts} -> [{render_token(data)}] {token}" if parts else f"[{render_token(data)}] {token}"


def _read_model(file):
    """Read and check a model file -> the state of a tokenizer. Nothing in it is executed."""
    model = read_json(file)

    def check(holds, what):
        if not holds:
            raise UsageError(f"{file} cannot be used: {what}")

    check(isinstance(model, dict) and model.get("format") == FORMAT, "it is not a tokenizer of this repository")
    version = model.get("version")
    check(version == VERSION, f"it has format version {version!r}, this code reads version {VERSION}; train it again")
    content = {k: v for k, v in model.items() if k not in ("format", "version", "checksum")}
    check(_checksum(content) == model.get("checksum"), "its checksum does not match; it was edited or damaged")
    state = check_state(content, check)
    check(Tokenizer._of(state).sha256 == content.get("sha256"), "its sha256 does not match its content")
    return state


def check_state(content, check):
    """Check the fields of a model -> the state of a tokenizer. `check(holds, what is wrong)` raises."""

    def is_id(x):
        return type(x) is int and 0 <= x < 2**31 - 1

    pattern, specials, merges = (content.get(key) for key in ("pattern", "special_tokens", "merges"))
    check(isinstance(pattern, str), "its pattern is not a text")
    check(isinstance(specials, dict) and all(map(is_id, specials.values())), "its special tokens are not {text: id}")
    check(isinstance(merges, list), "its merges are not a list")
    byte_ids = content.get("byte_ids", list(range(256)))
    check(isinstance(byte_ids, list) and all(map(is_id, byte_ids)), "its byte_ids are not ids")
    check(len(byte_ids) == len(set(byte_ids)) == 256, "its byte_ids are not 256 different ids")
    known, used, table = dict.fromkeys(byte_ids, 1), set(), {}  # known: {id: length in bytes}
    length = 3 if "byte_ids" in content else 2
    for rank, merge in enumerate(merges):
        shape = isinstance(merge, list) and len(merge) == length and all(map(is_id, merge))
        check(shape, f"merge {rank} is not {length} ids")
        p, q, token = (*merge, 256 + rank)[:3]
        check(p in known and q in known, f"merge {rank} refers to a token that is made later, or never")
        check((p, q) not in table, f"merge {rank} repeats an earlier one")
        # the encoder relies on a token being complete before it is merged on
        check(token not in used and known.get(token, 2) > 1, f"merge {rank} makes a token that is in use already")
        table[p, q] = token
        known[token] = known[p] + known[q]
        used |= {p, q}
    check(sum(known.values()) < MAX_VOCAB_BYTES, "its tokens are gigabytes long")
    ids = set(specials.values())
    check(len(ids) == len(specials) and not ids & known.keys(), "a special token has the id of another token")
    training = content.get("training", {})
    return {
        "pattern": pattern, "merges": table, "byte_ids": byte_ids, "special_tokens": specials, "training": training,
    }  # fmt: skip
