import hashlib
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import regex

import bpe.encoder
import bpe.trainer
from bpe import Tokenizer, model_file, reference
from bpe.pretokenizer import GPT4_SPLIT_PATTERN
from bpe.tokenizer import load_tokenizer
from common import UsageError

TEXT = "The cat's 1234 hats\n  don't fit; 北京大学的大学生。😀 naïve\x1c\x1f\r\n\t tab\n\n" * 8


@pytest.fixture(scope="module", params=["none", "gpt2", "gpt4", r"\w+|\s+"])
def tok(request):
    tok = Tokenizer(request.param)
    tok.train(TEXT, 300)
    tok.register_special_tokens({"<|endoftext|>": 300, "<|pad|>": 301})
    return tok


def naive_ids(tok, text):
    return [i for chunk in tok._split(text) for i in reference.encode(chunk.encode(), tok.merges)]


@pytest.mark.core
def test_encoding_equals_applying_the_merges_in_order(tok):
    for text in (TEXT, TEXT[5:33], "", "a", "unseen words, 北北北 aaaa"):
        assert tok.encode(text) == tok.encode(text) == naive_ids(tok, text)
        assert tok.decode(tok.encode(text)) == text


def test_long_texts_encode_the_same(tok, monkeypatch):
    rnd = random.Random(3)
    for few in (0, 2, 48):
        monkeypatch.setattr(bpe.trainer, "FEW", few)
        text = "".join(rnd.choice(TEXT) for _ in range(300)) + "a" * 99 + "\n" * 50
        tok._encoder._idle.clear()
        assert tok.encode(text) == naive_ids(tok, text)


@pytest.mark.core
def test_special_tokens_have_the_semantics_of_tiktoken(tok):
    text = "a<|endoftext|>b"
    a, b = tok.encode("a"), tok.encode("b")
    with pytest.raises(ValueError, match=r"<\|endoftext\|>"):
        tok.encode(text)
    assert tok.encode(text, allowed_special="all") == [*a, 300, *b]
    assert tok.encode(text, allowed_special={"<|endoftext|>"}) == [*a, 300, *b]
    plain = tok.encode(text, allowed_special="none")
    assert 300 not in plain and tok.decode(plain) == text and plain == tok.encode_ordinary(text)
    with pytest.raises(UsageError, match="pad"):
        tok.encode("<|pad|>" + text, allowed_special={"<|endoftext|>"})
    with pytest.raises(UsageError, match="unknown"):
        tok.encode("x<|im_end|>", allowed_special={"<|im_end|>"})
    with pytest.raises(UsageError, match="allowed_special"):
        tok.encode("x", allowed_special="some")
    assert tok.decode([300, 301]) == "<|endoftext|><|pad|>"
    assert tok.eot_token == 300 and tok.n_vocab == 302


def test_decode_names_an_unknown_id(tok):
    for ids in ([97, 999], [-1], np.array([5000])):
        with pytest.raises(ValueError, match=r"id (999|-1|5000) is not in the vocabulary"):
            tok.decode(ids)


def test_decode_replaces_or_raises():
    tok = Tokenizer()
    assert tok.decode([0xE5, 0x8C]) == "\ufffd" and tok.decode_bytes([0xE5, 0x8C]) == b"\xe5\x8c"
    with pytest.raises(UnicodeDecodeError):
        tok.decode([0xE5], errors="strict")
    assert tok.decode(np.array([104, 105], np.uint16)) == "hi"


@pytest.mark.core
def test_a_saved_tokenizer_is_the_same(tok, tmp_path):
    """tokenizers#472: special tokens are lost on save."""
    model, vocab = tok.save(tmp_path / "t")
    assert (tmp_path / "t.model").samefile(model) and (tmp_path / "t.vocab").samefile(vocab)
    for loaded in (Tokenizer.load(model), Tokenizer().load(model), load_tokenizer(model)):
        assert list(loaded.merges.items()) == list(tok.merges.items())
        assert (loaded.vocab, loaded.special_tokens, loaded.pattern) == (tok.vocab, tok.special_tokens, tok.pattern)
        assert loaded.sha256 == tok.sha256 == json.loads((tmp_path / "t.model").read_text())["sha256"]
        assert loaded.encode(TEXT) == tok.encode(TEXT)
    assert len((tmp_path / "t.vocab").read_text(encoding="utf-8").splitlines()) == tok.n_vocab
    other = Tokenizer()
    other.load(model)
    assert other.merges == tok.merges


def test_the_sha256_follows_the_content():
    a, b = Tokenizer("gpt2"), Tokenizer("gpt4")
    assert a.sha256 != b.sha256 and a.sha256 == Tokenizer("gpt2").sha256
    before = a.sha256
    a.register_special_tokens({"<|endoftext|>": 256})
    assert a.sha256 != before


# ----------------------------------------------------------------------------------------------------------------------
# all of Unicode, very long chunks, other processes and threads


@pytest.mark.parametrize("pattern", ["none", "gpt2", "gpt4"])
def test_all_of_unicode_survives(pattern):
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    tok = Tokenizer(pattern)
    tok.train(TEXT, 300)
    assert tok.decode(tok.encode(everything), errors="strict") == everything


@pytest.mark.parametrize("pattern", ["none", "gpt4"])
@pytest.mark.parametrize("kind", ["a", "chinese", "random", "dna"])
def test_a_million_characters_without_a_space(pattern, kind):
    """Quadratic code would take hours here: tiktoken#195, tiktoken#15, and unsplit DNA in tokenizers#1313."""
    rnd = random.Random(1)
    if kind == "a":
        text = "a" * 10**6
    elif kind == "chinese":
        text = "".join(rnd.choices("北京大学研究生手册的论文与是在了和有人这中", k=10**6))
    elif kind == "dna":
        text = "".join(rnd.choices("ACGT", k=10**6))
    else:  # the bytes are random; as text each stands for one Latin-1 character
        text = rnd.randbytes(10**6).decode("latin-1")
    tok = Tokenizer(pattern)
    tok.train(text[: 10**5], 400)
    ids = tok.encode(text)
    assert tok.decode(ids) == text and len(ids) < len(text.encode())
    assert tok.encode(text[:300]) == naive_ids(tok, text[:300])


def test_training_does_not_depend_on_the_number_of_processes():
    rnd = random.Random(2)
    documents = [" ".join(rnd.choices(TEXT.split(), k=2000)) for _ in range(150)]  # several groups of a megabyte
    one, two, streamed = Tokenizer("gpt4"), Tokenizer("gpt4"), Tokenizer("gpt4")
    one.train(documents, 350)
    two.train(iter(documents), 350, num_workers=2)
    streamed.train((d for d in documents), 350)
    assert list(one.merges.items()) == list(two.merges.items()) == list(streamed.merges.items())


def test_what_is_no_text_is_refused():
    for documents in ([None], ["ok", 3], [b"ok", bytearray(b"no")]):
        with pytest.raises(UsageError, match="iterable of them"):
            Tokenizer("gpt2").train(documents, 300)
    for text in (3, None, b"\xff"):
        with pytest.raises(UsageError, match="bytes"):
            Tokenizer().encode(text)


def test_batches(tok):
    texts = [TEXT[i : i + 50] for i in range(0, 400, 7)] + ["", "a<|pad|>"]
    expected = [tok.encode(text, "all") for text in texts]
    assert tok.encode_batch(texts, "all") == expected
    with pytest.raises(UsageError, match="pad"):
        tok.encode_batch(texts)
    assert tok.encode_batch([]) == []


def test_it_works_where_processes_are_spawned(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import multiprocessing\n"
        "from bpe import Tokenizer\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.set_start_method('spawn')\n"
        "    texts = ['the cat sat', 'on the mat'] * 9\n"
        "    tok = Tokenizer('gpt2')\n"
        "    tok.train(texts, 262, num_workers=2)\n"
        "    print(len(tok.merges))\n"
    )
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "6\n", done.stderr


def test_threads_share_a_tokenizer(tok):
    texts = [TEXT[i : i + 200] for i in range(200)]
    expected = [naive_ids(tok, text) for text in texts]
    tok._encoder._idle.clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(tok.encode, texts)) == expected


def test_the_cache_is_bounded(tok, monkeypatch):
    text = " ".join(f"w{k}" for k in range(100))
    expected, table = naive_ids(tok, text), bpe.encoder._Cache().table
    for chunks, ids in ((1, 10**6), (10**6, 5)):
        monkeypatch.setattr(bpe.encoder, "MAX_CHUNKS", chunks)
        monkeypatch.setattr(bpe.encoder, "MAX_POOL", ids)
        assert [tok.encode_to_numpy(text).tolist() for _ in range(2)] == [expected] * 2
        assert len(tok._encoder._idle[-1].table) == len(table) and not tok._encoder._idle[-1].table.long


def test_an_interrupt_leaves_the_cache_sound(tok, monkeypatch):
    if tok.pattern == "none":
        return
    tok._encoder._idle.clear()
    with monkeypatch.context() as m:
        m.setattr(tok._encoder, "merge", lambda *chunks: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tok.encode(TEXT)
    assert tok.encode(TEXT) == naive_ids(tok, TEXT)


def test_verbose_prints_each_merge(capsys):
    Tokenizer().train("ababab\n\n\n\n", 258, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "merge 1/2: (97, 98) -> 256 [ab] had 3 occurrences",
        "merge 2/2: (10, 10) -> 257 [\\u000a\\u000a] had 3 occurrences",
    ]


# ----------------------------------------------------------------------------------------------------------------------
# model files that are not what they should be


def write_model(file, **changes):
    """A model file with a right checksum around wrong content."""
    tok = Tokenizer("gpt2")
    tok.train("abababcabc", 258)
    content = {**model_file._content(tok.__getstate__()), "training": {}, **changes}
    state = {k: v for k, v in content.items() if k != "training"}
    content["sha256"] = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    model = {"format": model_file.FORMAT, "version": 1, **content}
    file.write_text(json.dumps({**model, "checksum": model_file._checksum(content)}), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"merges": [[97, 98], [257, 97]]}, "refer to a token that no merge makes"),
        ({"merges": [[256, 98]]}, "refer to a token that no merge makes"),
        ({"merges": [[97, 98], [97, 98]]}, "merge 1 repeats"),
        ({"merges": [[97]]}, "merge 0 is not 2 ids"),
        ({"merges": [["97", "98"]]}, "merge 0 is not 2 ids"),
        ({"merges": [[97, 98.0]]}, "merge 0 is not 2 ids"),
        ({"merges": "ab"}, "merges are not a list"),
        ({"merges": [[97, 97]] + [[k, k] for k in range(256, 300)]}, "gigabytes"),
        ({"pattern": 5}, "pattern is not a str"),
        ({"pattern": "("}, "valid regular expression"),
        ({"special_tokens": {"<s>": 97}}, "id of another token"),
        ({"added_tokens": {"<s>": 300}, "unmerged_tokens": {"6162": 300}}, "two of its tokens have the same id"),
        ({"added_tokens": {"<s>": 97}}, "two of its tokens have the same id"),
        ({"unmerged_tokens": {"xy": 300}}, "not bytes in hexadecimal"),
        ({"normalizer": ["lower"]}, "normalizer is not known"),
        ({"pattern": ["gpt2", 5]}, "pattern is not a str"),
        ({"special_tokens": ["<s>"]}, "special tokens are not"),
        ({"byte_ids": [1, 2, 3]}, "256 different ids"),
    ],
)
def test_a_model_with_impossible_content_is_refused(tmp_path, changes, says):
    with pytest.raises(UsageError, match=says):
        Tokenizer.load(write_model(tmp_path / "t.model", **changes))
    Tokenizer.load(write_model(tmp_path / "t.model"))


def test_a_damaged_model_is_refused_wherever_the_damage(tmp_path):
    tok = Tokenizer("gpt2")
    tok.train("abababcabc", 258)
    file = Path(tok.save(tmp_path / "t")[0])
    whole = file.read_bytes()
    rnd = random.Random(0)
    for cut in {0, 1, len(whole) // 2, len(whole) - 3}:
        file.write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"t\.model"):
            Tokenizer.load(file)
    for at in rnd.sample(range(len(whole)), 60):
        for flip in (1, 16):
            damaged = bytearray(whole)
            damaged[at] ^= flip
            file.write_bytes(damaged)
            try:
                loaded = Tokenizer.load(file)
            except UsageError as e:
                assert "t.model" in str(e) and "\n" not in str(e)
            else:  # white space between the fields, or a letter of a \u escape in another case
                assert (loaded.merges, loaded.sha256) == (tok.merges, tok.sha256)
    file.write_bytes(whole.replace(b'"version": 1', b'"version": 2'))
    with pytest.raises(UsageError, match="version 2"):
        Tokenizer.load(file)
    file.write_bytes(b"{}")
    with pytest.raises(UsageError, match="not a tokenizer"):
        Tokenizer.load(file)
    with pytest.raises(UsageError, match="does not exist"):
        Tokenizer.load(tmp_path / "none.model")


MINBPE = "minbpe v1\n" + r"\w+| ?[^\w\s]+|\s+" + "\n1\n<|end of text|> 300\n97 98\n256 99\n256 256\n"


@pytest.mark.parametrize("pattern", ["", GPT4_SPLIT_PATTERN, r"\w+| ?[^\w\s]+|\s+"])
def test_a_model_of_minbpe_is_read(tmp_path, pattern):
    lines = MINBPE.split("\n")
    (tmp_path / "m.model").write_text("\n".join([lines[0], pattern, *lines[2:]]), encoding="utf-8")
    tok = load_tokenizer(tmp_path / "m.model")
    assert list(tok.merges.items()) == [((97, 98), 256), ((256, 99), 257), ((256, 256), 258)]
    text = "abcab ababab! abab\n"
    chunks = regex.findall(pattern, text) if pattern else [text]
    assert tok.encode(text) == [i for chunk in chunks for i in reference.encode(chunk.encode(), tok.merges)]
    assert tok.encode("ab<|end of text|>", "all") == [256, 300] and tok.pattern in ("none", "gpt4", pattern)
    assert Tokenizer.load(tok.save(tmp_path / "ours")[0]).sha256 == tok.sha256


@pytest.mark.parametrize(
    "old, new, says",
    [
        ("\n1\n", "\none\n", "damaged model of minbpe"),
        ("> 300", ">", "damaged model of minbpe"),
        ("97 98", "97 b", "damaged model of minbpe"),
        ("97 98", "97", "merge 0 is not 2 ids"),
        ("\n1\n", "\n2\n", "refer to a token that no merge makes"),
        ("97 98", "97 300", "refer to a token that no merge makes"),
        ("256 256\n", "256 25", "last line is not complete"),
        (r"\w+|", "(", "valid regular expression"),
        ("> 300", "> 97", "id of another token"),
    ],
)
def test_a_damaged_model_of_minbpe_is_refused(tmp_path, old, new, says):
    assert old in MINBPE
    (tmp_path / "m.model").write_text(MINBPE.replace(old, new), encoding="utf-8")
    with pytest.raises(UsageError, match=says) as caught:
        Tokenizer.load(tmp_path / "m.model")
    assert "\n" not in str(caught.value)


def test_a_failed_save_leaves_the_old_files(tmp_path, monkeypatch):
    tok = Tokenizer()
    tok.train("abab", 257)
    model, vocab = map(Path, tok.save(tmp_path / "t"))
    before = model.read_bytes(), vocab.read_bytes()
    tok.train("cdcdcd", 257)
    for name in ("render_token", "_checksum"):  # fails while the one file is written, then the other
        with monkeypatch.context() as m:
            m.setattr(model_file, name, lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tok.save(tmp_path / "t")
        vocab.write_bytes(before[1])
    assert (model.read_bytes(), vocab.read_bytes()) == before and len(list(tmp_path.iterdir())) == 2


def test_special_tokens_that_cannot_be_are_refused():
    tok = Tokenizer()
    for wrong in ({"": 300}, {"x": 97}, {"x": -1}, {"x": "300"}, {"x": True}, {5: 300}):
        with pytest.raises(UsageError):
            tok.register_special_tokens(wrong)
    tok.register_special_tokens({"<a>": 256, "<ab>": 257})
    assert tok.encode("<ab><a>", "all") == [257, 256]
    tok.register_special_tokens({"<b>": 256})
    assert tok.special_tokens == {"<b>": 256} and tok.n_vocab == 257


@pytest.mark.core
def test_special_tokens_are_registered_together_or_not_at_all():
    tok = Tokenizer()
    tok.register_special_tokens({"<old>": 300})
    for wrong in ({"<a>": 301, "<b>": 5}, {"<a>": 301, "<b>": 301}, {"<a>": 302, "<b>": 2**31 - 1}):
        with pytest.raises(UsageError, match="<b>"):
            tok.register_special_tokens(wrong)
        assert tok.encode("<old>", "all") == [300] and tok.special_tokens == {"<old>": 300}
        assert tok.n_vocab == 301 and tok.decode([300]) == "<old>" and 301 not in tok.vocab


def test_the_largest_id_of_a_special_token_can_be_saved(tmp_path):
    tok = Tokenizer()
    tok.register_special_tokens({"<s>": 2**31 - 2})
    model, _ = tok.save(tmp_path / "t")
    assert Tokenizer.load(model).special_tokens == {"<s>": 2**31 - 2}


def test_names_are_no_patterns(tmp_path):
    for name in ("gpt-4", "GPT4", "cl100k_base", "None"):
        with pytest.raises(UsageError, match=f"no pattern named {name}"):
            Tokenizer(name)
    tok = Tokenizer(r"\w+|\s")
    tok.pattern = "cl100k_base"  # as a model that was trained before this was refused
    assert Tokenizer.load(tok.save(tmp_path / "t")[0]).pattern == "cl100k_base"


def test_a_failed_load_leaves_the_tokenizer(tmp_path):
    tok = Tokenizer("gpt2")
    tok.train("abababcabc", 258)
    before = tok.sha256
    for changes in ({"pattern": "("}, {"special_tokens": {"": 300}}, {"merges": [[1]]}):
        with pytest.raises(UsageError):
            tok.load(write_model(tmp_path / "t.model", **changes))
        assert tok.sha256 == before and tok.encode("ab") == [256]


# ----------------------------------------------------------------------------------------------------------------------
# interrupted, in the wrong order, of the wrong type


def test_a_signal_handler_and_a_forked_child_may_encode(tok):
    """Neither waits for a lock that the interrupted thread holds."""
    import os
    import signal
    import threading

    expected, seen = naive_ids(tok, TEXT), []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(tok.encode(TEXT)))
    try:
        while len(seen) < 5:
            signal.setitimer(signal.ITIMER_REAL, 0.0005)  # once: on a slow machine handlers would pile up
            assert tok.encode(TEXT) == expected
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert all(ids == expected for ids in seen)
    stop = threading.Event()
    thread = threading.Thread(target=lambda: [tok.encode(TEXT * 9) for _ in iter(stop.is_set, True)])
    thread.start()
    try:
        for _ in range(5):
            if (pid := os.fork()) == 0:
                signal.alarm(20)  # instead of waiting for ever
                os._exit(0 if tok.encode(TEXT) == expected else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        stop.set()
        thread.join()


def test_special_tokens_can_be_allowed_and_disallowed_as_in_tiktoken(tok):
    encoding, names = tok.to_tiktoken(), ["<|endoftext|>", "<|pad|>"]
    text = f"a{names[0]}b{names[1]}c<|other|>"
    subsets = [set(), {names[0]}, {names[1]}, set(names), "all"]
    raised = 0
    for allowed in subsets:
        for disallowed in (*subsets, {"<|other|>"}, "a"[:0]):
            try:
                expected = encoding.encode(text, allowed_special=allowed, disallowed_special=disallowed or ())
            except ValueError:
                raised += 1
                with pytest.raises(UsageError, match="the text contains"):
                    tok.encode(text, allowed, disallowed or ())
            else:
                assert tok.encode(text, allowed, disallowed or ()) == expected
                assert tok.encode_to_numpy(text, allowed, disallowed or ()).tolist() == expected
                assert tok.encode_batch([text], allowed, disallowed or ()) == [expected]
    assert 5 < raised < 30


def test_tokens_are_decoded_one_by_one(tok):
    ids = tok.encode(TEXT)
    pieces = list(tok.decode_stream(iter(ids)))
    assert "".join(pieces) == TEXT and not any("\ufffd" in piece for piece in pieces)
    assert "".join(tok.decode_stream([*ids, 0xE5])) == TEXT + "\ufffd"
    assert tok.decode_with_offsets(ids) == tok.to_tiktoken().decode_with_offsets(ids)


def test_rare_pairs_are_not_merged():
    tok, whole = Tokenizer(), Tokenizer()
    whole.train("abababcd" * 2 + "xyz", 300)
    tok.train("abababcd" * 2 + "xyz", 300, min_frequency=2)
    assert 0 < len(tok.merges) < len(whole.merges)
    assert list(whole.merges.items())[: len(tok.merges)] == list(tok.merges.items())
    assert not any(b"x" in data and len(data) > 1 for data in tok.vocab.values())


def test_numbers_of_numpy_are_numbers():
    tok = Tokenizer()
    tok.train("abab", np.int64(257))
    tok.register_special_tokens({"<s>": np.int64(257)})
    assert tok.encode("ab<s>", "all") == [256, 257] and type(tok.special_tokens["<s>"]) is int


def test_two_special_tokens_of_a_file_may_share_an_id(tmp_path):
    """As in o200k_harmony."""
    tok = Tokenizer.load(write_model(tmp_path / "t.model", special_tokens={"<s>": 300, "<t>": 300}))
    assert tok.encode("<s><t>", "all") == [300, 300] and tok.decode([300]) == "<t>"
    assert Tokenizer.load(tok.save(tmp_path / "u")[0]).sha256 == tok.sha256
    with pytest.warns(UserWarning, match="one token for an id: <s> is lost"):
        tok.save_huggingface(tmp_path)
    assert Tokenizer.from_huggingface(tmp_path / "tokenizer.json").special_tokens == {"<t>": 300}


@pytest.mark.parametrize(
    "mistake",
    [
        lambda tok: tok.register_special_tokens({"<\ud800>": 300}),
        lambda tok: tok.train(None, 300),
        lambda tok: tok.train(Path("text.txt"), 300),
        lambda tok: tok.train("text", None),
        lambda tok: tok.train("text", 300.0),
        lambda tok: tok.decode(104),
        lambda tok: tok.decode([[104]]),
        lambda tok: tok.decode(np.array([[104]])),
        lambda tok: tok.decode(np.array(104)),
        lambda tok: tok.decode(None),
        lambda tok: tok.encode("a", disallowed_special="some"),
        lambda tok: Tokenizer(r"(?x) \w+ | \s  # words"),
        lambda tok: Tokenizer(r"(\w)\1|\s"),
        lambda tok: Tokenizer(5),
        lambda tok: Tokenizer(["gpt2", None]),
        lambda tok: Tokenizer.load(Path(__file__).parent),
        lambda tok: Tokenizer.from_huggingface(Path(__file__).parent),
        lambda tok: Tokenizer.from_tiktoken(Path(__file__).parent),
    ],
)
def test_mistakes_are_usage_errors(mistake):
    with pytest.raises(UsageError):
        mistake(Tokenizer())


def test_threads_save_to_one_place(tmp_path):
    tok = Tokenizer()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: tok.save(tmp_path / "t"), range(30)))
    assert Tokenizer.load(tmp_path / "t.model").sha256 == tok.sha256 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("pattern", ["none", "gpt2", "gpt4", r"[a-z]+(?= )|\s+", ["gpt2", r"\d"]])
def test_short_texts_are_encoded_apart_to_the_same_ids(pattern, monkeypatch):
    rng, tok = random.Random(0), Tokenizer(pattern)
    texts = ["".join(rng.choices("abcXYZ 019\n\t.,'s", k=rng.randrange(60))) for _ in range(400)]
    tok.train(texts[:200], 300)
    monkeypatch.setattr(bpe.encoder, "MAX_SHORT", 50)  # the memory of chunks begins anew, again and again
    for text in texts:
        assert tok.encode(text) == tok.encode_ordinary(text) == tok.encode_to_numpy(text).tolist()


def test_bytes_are_text_in_utf8():
    text, tok, same = "北京大学 is in Běijīng. " * 9, Tokenizer("gpt4"), Tokenizer("gpt4")
    tok.train([text, text], 300)
    same.train(iter([text.encode(), text.encode()]), 300)
    assert same.merges == tok.merges and same.encode(text.encode()) == tok.encode(text)
    assert same.encode_batch([text.encode(), text]) == [tok.encode(text)] * 2
    same.train(text.encode(), 280)
    assert len(same.merges) == 24
    for wrong in (
        lambda: same.train(b"\xff", 300),
        lambda: same.train([b"\xe5\x8c"], 300),
        lambda: same.encode(b"a\xff"),
    ):
        with pytest.raises(UsageError, match="bytes of text are UTF-8, and these are not"):
            wrong()


def test_a_piece_of_a_clause_is_no_chunk(tmp_path):
    """Chunks are cut where no token crosses; one that is a token as a whole is none as such a piece."""
    more = {"merges": [], "ignore_merges": True, "unmerged_tokens": {"北".encode().hex(): 256}}
    tok, data = Tokenizer.load(write_model(tmp_path / "t.model", **more)), list("北".encode())
    assert tok.encode("北") == [256] and tok.encode("北北大") == [*data, *data, *"大".encode()]
    assert tok.encode("北") == [256]
    tok = Tokenizer()
    tok.train("北大 大学北 学", 270)  # its tokens cross some borders, from the second byte of a character, too
    for text in ("北大学", "大学北大北学", "学北大"):
        assert tok.encode(text) == naive_ids(tok, text)
