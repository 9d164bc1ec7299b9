import numpy as np
import pytest

from bpe.tokenizer import Tokenizer
from common import UsageError, file_sha256, read_json, write_json
from data import shards
from data.shards import (
    check_folder,
    open_split,
    read_meta,
    read_shard,
    unigram_counts,
    verify,
    write_meta,
    write_shard,
)


@pytest.fixture
def corpus(tmp_path):
    """A folder of three small shards under a vocabulary of 300, id 299 opening every document."""
    rows = []
    for i, split in enumerate(("val", "train", "train")):
        ids = np.random.default_rng(i).integers(0, 299, 50 + i)
        ids[0] = 299
        file = f"tiny_{split}_{i:06d}.bin"
        write_shard(tmp_path / file, ids)
        row = {"file": file, "split": split, "documents": 1, "tokens": len(ids), "bytes": len(ids) - 1}
        rows.append({**row, "sha256": file_sha256(tmp_path / file)})
    saved = Tokenizer()
    saved.save(tmp_path / "tokenizer")
    tokenizer = {"name": "tiny", "sha256": saved.sha256}
    write_meta(tmp_path, name="tiny", source={}, tokenizer=tokenizer, vocab_size=300, eot=299, shards=rows)
    return tmp_path


@pytest.mark.core
def test_the_bytes_are_those_of_llm_c(tmp_path):
    write_shard(tmp_path / "a.bin", [1, 2, 65535])
    raw = (tmp_path / "a.bin").read_bytes()
    assert np.frombuffer(raw[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert raw[1024:] == b"\x01\x00\x02\x00\xff\xff"


def test_chunks_join_and_read_back(tmp_path):
    chunks = [np.arange(5), np.arange(0), np.arange(5, 9, dtype=np.uint16)]
    assert write_shard(tmp_path / "a.bin", iter(chunks)) == 9
    ids = read_shard(tmp_path / "a.bin")
    assert isinstance(ids, np.memmap) and ids.dtype == np.uint16 and ids.tolist() == list(range(9))


@pytest.mark.parametrize("ids", [[65536], [-1]])
def test_an_id_that_does_not_fit_is_refused_and_leaves_no_file(tmp_path, ids):
    with pytest.raises(UsageError, match="65535"):
        write_shard(tmp_path / "a.bin", ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.core
def test_a_folder_opens_by_split(corpus):
    assert [len(ids) for ids in open_split(corpus, "train")] == [51, 52]
    assert [len(ids) for ids in open_split(corpus, "val")] == [50]
    assert verify(corpus) == read_meta(corpus)


def test_headers_are_read_once_where_the_manifest_is_handed_on(corpus, monkeypatch):
    meta = check_folder(corpus)
    monkeypatch.setattr(shards, "read_shard", None)
    assert [len(ids) for ids in open_split(corpus, "train", meta)] == [51, 52]


@pytest.mark.core
def test_unigram_counts_stand_in_the_manifest(corpus, monkeypatch):
    train = np.concatenate(open_split(corpus, "train"))
    counts = unigram_counts(corpus, read_meta(corpus))
    assert counts.dtype == np.int64 and np.array_equal(counts, np.bincount(train, minlength=300))
    monkeypatch.setattr(shards, "count_ids", None)  # nothing is counted again
    assert np.array_equal(unigram_counts(corpus, read_meta(corpus)), counts)


def test_unigram_counts_are_those_of_the_first_tokens(corpus, monkeypatch):
    monkeypatch.setattr(shards, "UNIGRAM_TOKENS", 60)
    older = {key: value for key, value in read_meta(corpus).items() if key != "unigram_counts"}
    first = np.concatenate(open_split(corpus, "train"))[:60]
    assert np.array_equal(unigram_counts(corpus, older), np.bincount(first, minlength=300))


def damage(corpus, how):
    shard = corpus / "tiny_train_000001.bin"
    raw = bytearray(shard.read_bytes())
    if how == "flipped":
        raw[1030] ^= 1
    elif how == "truncated":
        raw = raw[:-1]
    elif how == "cut in the header":
        raw = raw[:301]
    elif how == "another format":
        raw[0] ^= 1
    elif how == "another version":
        raw[4] = 2
    elif how == "another length":
        ids = np.frombuffer(bytes(raw[1024:]), "<u2")
        write_shard(shard, ids[:-1])
        return
    elif how == "missing":
        shard.unlink()
        return
    elif how == "foreign":
        write_shard(corpus / "tiny_train_000009.bin", [1])
        return
    elif how == "lacking field":
        write_json(corpus / "meta.json", {k: v for k, v in read_meta(corpus).items() if k != "shards"})
        return
    elif how == "beyond the vocabulary":
        meta = read_meta(corpus)
        write_json(corpus / "meta.json", {**meta, "vocab_size": 200})
        return
    elif how == "another tokenizer":
        Tokenizer("gpt2").save(corpus / "tokenizer")
        return
    elif how == "altered tokenizer":
        path = corpus / "tokenizer.model"
        path.write_text(path.read_text().replace('"none"', '"gpt2"'))
        return
    shard.write_bytes(bytes(raw))


SEEN_AT_START = {
    "truncated": "promises 51 tokens",
    "cut in the header": "not a token shard",
    "another format": "not a token shard",
    "another version": "version 2",
    "another length": "meta.json says 51",
    "missing": "missing",
    "foreign": "tiny_train_000009.bin is not in meta.json",
    "lacking field": "damaged: it lacks shards",
}
SEEN_BY_VERIFY = {"flipped": "corrupt", "beyond the vocabulary": "vocabulary of 200"}
SEEN_BY_VERIFY |= {"another tokenizer": "not the tokenizer of these shards", "altered tokenizer": "tokenizer.model"}


@pytest.mark.parametrize("how", [*SEEN_AT_START, *SEEN_BY_VERIFY])
def test_damage_is_named(corpus, assert_refuses, how):
    damage(corpus, how)
    if how in SEEN_AT_START:
        with pytest.raises(UsageError, match=SEEN_AT_START[how]):
            open_split(corpus, "train")
    else:
        open_split(corpus, "train")  # checksums are read by verify alone
        with pytest.raises(UsageError, match=SEEN_BY_VERIFY[how]):
            verify(corpus)
    if how == "flipped":
        assert_refuses("data/shards.py", "verify", corpus, says="tiny_train_000001.bin is corrupt")


def test_a_folder_without_manifest_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"make the corpus with data/prepare.py"):
        open_split(tmp_path, "train")
    write_shard(tmp_path / "fineweb_train_000001.bin", [1])
    with pytest.raises(UsageError, match=r"prepare.py adopt"):
        open_split(tmp_path, "train")


def test_a_missing_split_and_another_version_are_named(corpus):
    meta = read_meta(corpus)
    (corpus / meta["shards"][0]["file"]).unlink()
    write_json(corpus / "meta.json", {**meta, "shards": meta["shards"][1:]})
    with pytest.raises(UsageError, match="no val shard"):
        open_split(corpus, "val")
    write_json(corpus / "meta.json", {**read_json(corpus / "meta.json"), "version": 9})
    with pytest.raises(UsageError, match="shards', 9"):
        read_meta(corpus)


def test_verify_prints_the_counts(corpus, script):
    out = script("data/shards.py", "verify", corpus).stdout
    assert "checksums match" in out and "103 tokens" in out
