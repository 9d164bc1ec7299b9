"""The tokenizer: text to ids and back, trained, saved and loaded.

    from bpe import Tokenizer

    tok = Tokenizer(pattern="gpt4")
    tok.train(open("book.txt", encoding="utf-8").read(), vocab_size=4096)
    tok.register_special_tokens({"<|endoftext|>": 4096})
    assert tok.decode(tok.encode("hello world")) == "hello world"
    tok.save("book")                      # book.model, book.vocab
    tok = Tokenizer.load("book.model")

Any text survives the round trip, since the base vocabulary is the 256 bytes. The one exception is a lone surrogate,
which is not valid text: it becomes U+FFFD.
"""

import codecs
import math
import operator
import sys
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import regex
from tqdm import tqdm

from bpe import interop
from bpe.encoder import Encoder
from bpe.model_file import END_OF_TEXT, empty_state, in_order, is_id, read_model, state_sha256, write_model, write_vocab
from bpe.pretokenizer import STABLE, Splitter, SplitterSequence, check_pattern, count_chunks, valid
from bpe.reference import render_token
from bpe.trainer import check_size, learn_merges
from common import UsageError

SHORT_TEXT = 1000  # characters


class Tokenizer:
    """Byte-level BPE.

    pattern: how text is split before merging: "none" (not at all), "gpt2", "gpt4", or a regular expression; a list of
        them is applied one after the other, each to the chunks of the one before, as Hugging Face's `Sequence` is.
        The well-known patterns use the character classes of Unicode 16.0, as tiktoken does; others those of the
        installed `regex` (see pretokenizer.py).

    merges: {(int, int): int}, in order of rank.
    vocab: {int: bytes}, special tokens included.
    special_tokens: {str: int}.
    n_vocab: rows that an embedding needs: the highest id + 1 (256 + merges + special tokens if no id is skipped).
    name: for display.
    """

    def __init__(self, pattern="none"):
        for each in pattern if isinstance(pattern, list) else [pattern]:
            check_pattern(each)
        self.__setstate__({"pattern": pattern})

    def __getstate__(self):
        return {key: getattr(self, key) for key in empty_state()}

    def __setstate__(self, state):
        """Set all attributes from a state (see model_file.py): of a pickle, a file or a training."""
        vars(self).update(empty_state() | state)
        self._split = (Splitter if isinstance(self.pattern, str) else SplitterSequence)(self.pattern)
        self.vocab = {token: bytes([b]) for b, token in enumerate(self.byte_ids) if token >= 0}
        for p, q, token in in_order(self.merges, self.byte_ids):
            data = self.vocab[p] + self.vocab[q]
            if self.vocab.setdefault(token, data) != data:
                raise UsageError(f"two merges make token {token}, but of different bytes")
        self.vocab |= {token: data for data, token in self.unmerged_tokens.items()}
        whole = {data: token for token, data in self.vocab.items()} if self.ignore_merges else {}
        self._encoder = Encoder(self.merges, self.byte_ids, self.vocab, whole)
        self.vocab |= {token: text.encode("utf-8") for text, token in self.added_tokens.items()}
        specials, self.special_tokens = self.special_tokens, {}
        self._set_special_tokens(specials)

    def __repr__(self):
        return f"Tokenizer({self.name!r}, pattern={self.pattern!r}, n_vocab={self.n_vocab})"

    @property
    def eot_token(self):
        """Id of <|endoftext|>, or None."""
        return self.special_tokens.get(END_OF_TEXT)

    @property
    def sha256(self):
        """Hex digest of what determines the ids: pattern, merges, special tokens."""
        return state_sha256(self.__getstate__())

    def byte_lengths(self):
        """Bytes of text of each id, a list of n_vocab; 0 for special tokens."""
        special = set(self.special_tokens.values())
        return [0 if i in special else len(self.vocab.get(i, b"")) for i in range(self.n_vocab)]

    def register_special_tokens(self, special_tokens):
        """Replace the special tokens by {str: int}. Ids must be free, and at most 2**31 - 2.

        On a UsageError nothing changes.
        """
        if len(set(special_tokens.values())) < len(special_tokens):
            raise UsageError(f"two special tokens have the same id: {special_tokens}")
        self._set_special_tokens(special_tokens)

    def _set_special_tokens(self, special_tokens):
        """The same, but two may share an id, as in o200k_harmony; it decodes to the last of them."""
        earlier = set(self.special_tokens.values())
        vocab = {token: data for token, data in self.vocab.items() if token not in earlier}
        specials = {text: _whole_number(token) for text, token in special_tokens.items()}
        for text, token in specials.items():
            if not isinstance(text, str) or not text or valid(text) != text or not is_id(token):
                raise UsageError(f"a special token is a text with an id from 0 to 2**31 - 2, not {text!r}: {token!r}")
            if token in vocab or text in self.added_tokens:
                raise UsageError(f"special token {text!r} cannot have id {token}: it is taken")
        vocab |= {token: text.encode("utf-8") for text, token in specials.items()}
        self.vocab, self.special_tokens = vocab, specials
        self.n_vocab = max(vocab) + 1

    def train(
        self, text_or_iterable, vocab_size, verbose=False, *, num_workers=1, min_frequency=1, max_token_length=None,
        init=None,
    ):  # fmt: skip
        """Learn merges from a str, or from an iterable of str (documents; no merge crosses their borders).

        Here and wherever text is encoded, bytes are text in UTF-8; others are a UsageError.

        vocab_size: the 256 bytes and the merges; special tokens come on top, and earlier ones are dropped.
        verbose: print each merge with its token and count.
        num_workers: processes that split the text into chunks. The merges do not depend on it.
        min_frequency: a pair that occurs less often is not merged.
        max_token_length: bytes; a pair whose token would be longer is not merged.
        init: Tokenizer to continue: its merges keep their order and ids, new ones follow. No special token is kept.

        Memory is bounded by the different chunks, not by the length of an iterable. Fewer merges are learned, with a
        message, when no pair is left. On a terminal there are progress bars.
        """
        vocab_size = _whole_number(vocab_size)
        if type(vocab_size) is not int:
            raise UsageError(f"vocab_size is a whole number, not {vocab_size!r}")
        check_size(vocab_size, 0)
        max_token_length = math.inf if max_token_length is None else max_token_length
        if max_token_length < 2:
            raise UsageError(f"max_token_length {max_token_length} is too small: a merge makes 2 bytes or more")
        base = _from_state({"pattern": self.pattern}) if init is None else init
        vocab = _vocab_to_continue(base, self.pattern, vocab_size)
        is_documents = isinstance(text_or_iterable, Iterable) and not isinstance(text_or_iterable, str | bytes)
        documents = text_or_iterable if is_documents else [text_or_iterable]
        size = len(text_or_iterable) if isinstance(text_or_iterable, str) else None
        with tqdm(total=size, unit="char", unit_scale=True, desc="split", disable=None) as bar:
            counts = count_chunks(self._split, documents, num_workers, bar.update)
        wanted, merges, token_lengths = vocab_size - 256, dict(base.merges), [*map(len, vocab.values())]
        learned = learn_merges(counts, vocab_size, max_token_length, token_lengths, init and init._encoder.merge)
        with tqdm(total=vocab_size - len(vocab), unit="merge", desc="merge", disable=None) as bar:
            for (p, q), token, count in learned:
                if count < min_frequency:  # the counts never rise
                    break
                merges[p, q] = token
                vocab[token] = vocab[p] + vocab[q]
                bar.update()
                if verbose:
                    shown = f"({p}, {q}) -> {token} [{render_token(vocab[token])}]"
                    tqdm.write(f"merge {len(merges)}/{wanted}: {shown} had {count} occurrences")
        if len(merges) < wanted:
            outcome = f"the vocabulary has {len(vocab)} tokens, not {vocab_size}"
            tqdm.write(f"no pair is left after {len(merges)} merges: {outcome}", file=sys.stderr)
        self.__setstate__({"pattern": self.pattern, "merges": merges, "byte_ids": base.byte_ids})

    def encode(self, text, allowed_special="none_raise", disallowed_special=None):
        """str -> list of ids.

        allowed_special: which special tokens in the text become their id.
            "none_raise"  none; one in the text is a UsageError (the default: untrusted text must not end a document)
            "none"        none; they are encoded like any other text
            "all"         all of them
            a set         these; any other one in the text is a UsageError
        disallowed_special: as in tiktoken, "all" that are not allowed, or a set of str: one in the text is a
            UsageError, and what is neither allowed nor disallowed is encoded like any other text.
        """
        special = self._allowed(text := valid(text), allowed_special, disallowed_special)
        return self._encode_one(text, special)

    def _allowed(self, text, allowed_special, disallowed_special):
        """The special tokens to look for; UsageError if the text has a disallowed one."""
        known = frozenset(self.special_tokens)
        names = {"all": known, "none": frozenset(), "none_raise": frozenset()}
        allowed, refused = (
            names.get(given) if isinstance(given, str) else frozenset(given or ())
            for given in (allowed_special, disallowed_special)
        )
        if allowed is None or refused is None:
            raise UsageError(f"allowed_special is 'all', 'none', 'none_raise' or a set, not {allowed_special!r}")
        if disallowed_special == "all":
            refused = known - allowed
        elif disallowed_special is None and allowed_special != "none":
            refused = known ^ allowed  # known but not allowed, or the reverse
        if refused and (found := _any_of(refused).search(text)):
            how = "pass allowed_special='all' to encode it as one, or 'none' to encode it as text"
            how = how if found.group() in known else "which is allowed, but unknown here"
            raise UsageError(f"the text contains the special token {found.group()!r}; {how}")
        return known & allowed

    def encode_ordinary(self, text):
        """str -> list of ids; special tokens are encoded like any other text."""
        return self._encode_one(valid(text), ())

    def _encode_one(self, text, special):
        """str -> list of ids; short texts, such as single lines, without setting up arrays."""
        if len(text) <= SHORT_TEXT and STABLE.fullmatch(text) and not (special or self.added_tokens or self.normalizer):
            return self._encoder.encode_short(self._split, text)
        return self._encode([text], special)[0].tolist()

    def encode_to_numpy(self, text, allowed_special="none_raise", disallowed_special=None):
        """`encode`, but -> array of uint32, as in tiktoken."""
        special = self._allowed(text := valid(text), allowed_special, disallowed_special)
        return self._encode([text], special)[0].astype(np.uint32)

    def encode_documents(self, texts):
        """List of str -> (their ids concatenated (n,) int32, how many each has), by `encode_ordinary`."""
        return self._encode(list(map(valid, texts)), ())

    def _encode(self, texts, special):
        """The same, but the special tokens in `special` become their id, as added tokens always do."""
        tokens = {text: self.special_tokens[text] for text in special} | self.added_tokens
        if not tokens:
            return self._encoder.encode(self._split, list(map(self.normalize, texts)))
        ids, lengths = [], []
        for text in texts:
            parts = _any_of(frozenset(tokens)).split(text)  # alternately ordinary text and a token
            found, counts = self._encoder.encode(self._split, list(map(self.normalize, parts[::2])))
            between = [tokens[part] for part in parts[1::2]]
            ids.append(np.insert(found, counts.cumsum()[:-1], between))
            lengths.append(len(ids[-1]))
        return np.concatenate(ids or [np.zeros(0, np.int32)]), np.array(lengths, np.int64)

    def normalize(self, text):
        """Text as it is encoded, and as `decode` returns it; most vocabularies do not change it."""
        for name in self.normalizer:
            if name != "prefix_space":
                text = unicodedata.normalize(name, text)
            elif text and not text.startswith(" "):
                text = f" {text}"
        return text

    def encode_batch(self, texts, allowed_special="none_raise", disallowed_special=None):
        """Iterable of str -> list of lists of ids."""
        texts, special = list(map(valid, texts)), ()
        for text in texts:
            special = self._allowed(text, allowed_special, disallowed_special)
        ids, lengths = self._encode(texts, special)
        return [part.tolist() for part in np.split(ids, lengths.cumsum()[:-1])] if texts else []

    def decode(self, ids, errors="replace"):
        """Ids -> str. errors: "replace" puts U+FFFD for invalid UTF-8, "strict" raises UnicodeDecodeError."""
        return self.decode_bytes(ids).decode("utf-8", errors=errors)

    def decode_bytes(self, ids):
        """Ids -> bytes. An id outside the vocabulary is a UsageError that names it."""
        if hasattr(ids, "tolist"):  # arrays and tensors
            ids = ids.tolist()
        try:
            return b"".join(map(self.vocab.__getitem__, ids))
        except KeyError as e:
            raise UsageError(f"id {e.args[0]} is not in the vocabulary of {self.n_vocab:,} ids") from None
        except TypeError:
            raise UsageError(f"ids are a list or a flat array, [id] for a single one, not {ids!r:.60}") from None

    def decode_with_offsets(self, ids):
        """Ids -> (str, the character offset of each token; a token that starts inside a character has its offset)."""
        tokens = [self.decode_bytes([token]) for token in ids]
        starts = accumulate((sum(not 0x80 <= b < 0xC0 for b in token) for token in tokens), initial=0)
        offsets = [max(0, at - (0x80 <= token[0] < 0xC0)) for at, token in zip(starts, tokens)]
        return b"".join(tokens).decode("utf-8"), offsets

    def decode_stream(self, ids, errors="replace"):
        """Iterable of ids -> generator of str; a character is yielded once all its bytes have come."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        for token in ids:
            if text := decoder.decode(self.decode_bytes([token])):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def save(self, file_prefix):
        """Write PREFIX.model, which `load` reads, and PREFIX.vocab, for display -> (model_file, vocab_file)."""
        model_file, vocab_file = f"{file_prefix}.model", f"{file_prefix}.vocab"
        write_vocab(vocab_file, self.vocab, self.merges)
        write_model(model_file, self.__getstate__())
        return model_file, vocab_file

    def load(self, model_file=None):
        """Read PREFIX.model: `Tokenizer.load(file)` -> new Tokenizer; `tok.load(file)` makes `tok` the one in the file.

        A .model of karpathy/minbpe is read, too. A damaged, edited or foreign file is a UsageError.
        """
        if model_file is None:  # called on the class
            return _from_state(read_model(self))
        self.__dict__ = _from_state(read_model(model_file)).__dict__
        return self

    # to other libraries, with the same ids
    save_tiktoken = interop.save_tiktoken
    save_huggingface = interop.save_huggingface
    to_tiktoken = interop.to_tiktoken

    @staticmethod
    def from_tiktoken(name_or_file, pattern=None, special_tokens=None):
        """Recover the merges of a tiktoken vocabulary: "gpt2", "cl100k_base", …, or a rank file.

        pattern, special_tokens: for a rank file, which knows neither (default: "none", {}).
        """
        return _from_state(interop.read_tiktoken(name_or_file, pattern, special_tokens))

    @staticmethod
    def from_huggingface(file):
        """Read a tokenizer.json of a byte-level BPE tokenizer."""
        return _from_state(interop.read_huggingface(file))


def _from_state(state):
    tok = Tokenizer()
    tok.__setstate__(state)
    return tok


def _vocab_to_continue(tok, pattern, vocab_size):
    """{id: bytes}, in ascending order, of a tokenizer that training may extend; else UsageError."""
    if not isinstance(tok, Tokenizer):
        raise UsageError(f"init is a Tokenizer, not {tok!r:.60}")
    if tok.pattern != pattern:
        raise UsageError(f"init splits text by the pattern {tok.pattern!r}, not by {pattern!r}")
    ids = sorted(tok.vocab.keys() - tok.special_tokens.values())
    if ids != [*range(256 + len(tok.merges))] or tok.normalizer or tok.ignore_merges:
        raise UsageError("init cannot be continued: its tokens are not the 256 bytes and one for each merge")
    if vocab_size < len(ids):
        raise UsageError(f"vocab_size {vocab_size} is too small: init has {len(ids)} tokens")
    return {token: tok.vocab[token] for token in ids}


def load_tokenizer(name_or_file):
    """A PREFIX.model, a tokenizer.json, a tiktoken rank file, or a tiktoken name ("gpt2", …) -> Tokenizer."""
    readers = {".model": Tokenizer.load, ".json": Tokenizer.from_huggingface}
    return readers.get(Path(name_or_file).suffix, Tokenizer.from_tiktoken)(name_or_file)


def _whole_number(value):
    """An int for an integer of numpy or torch; anything else unchanged."""
    is_number = hasattr(value, "__index__") and not isinstance(value, bool | np.bool)
    return operator.index(value) if is_number else value


@lru_cache(maxsize=64)
def _any_of(texts):
    """frozenset of str -> regex that finds any of them, the longest if one is a prefix of another."""
    return regex.compile(f"({'|'.join(map(regex.escape, sorted(texts, key=len, reverse=True)))})")
