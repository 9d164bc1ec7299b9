import gzip
import json
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.stats import norm

from bpe.tokenizer import Tokenizer
from common import UsageError
from gpt2 import checkpoint, hellaswag
from gpt2.config import GPTConfig
from gpt2.hellaswag import Encoded, evaluate, figures, gpt_logits, hf_logits, load_items
from gpt2.model import GPT
from runlog import read_run

WORDS = [
    "the", "man", "then", "sits", "down", "and", "plays", "a", "piano", "in",
    "front", "of", "an", "audience", "while", "two", "dogs", "run", "past", "him",
]  # fmt: skip


def make_items(n=23, seed=0):
    """Items of very different lengths."""
    rng = np.random.default_rng(seed)

    def text(low, high):
        return " ".join(rng.choice(WORDS, rng.integers(low, high)))

    items = []
    for i in range(n):
        ctx, endings = text(1, 30), [text(1, 12) for _ in range(4)]
        items.append({"item": i, "ind": 100 + i, "label": int(rng.integers(4)), "ctx": ctx, "endings": endings})
    return items


CPU = torch.device("cpu")


def ours(model):
    return partial(gpt_logits, model)


def byte_encode(texts):
    return [list(text.encode()) for text in texts]


@pytest.fixture(scope="module")
def gpt():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=300, n_layer=2, n_head=2, n_embd=16, dropout=0.5)).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(20)  # far from uniform
    return model


def by_hand(logits_of, context, ending):
    """Summed log-probability of one ending, token by token, from whole prefixes."""
    total = 0.0
    for t in range(len(ending)):
        logits = logits_of(torch.tensor([context + ending[:t]]))[0, -1]
        total += logits.log_softmax(-1)[ending[t]].item()
    return total


def assert_same_rows(a, b, tolerance):
    assert [row["item"] for row in a] == [row["item"] for row in b]
    for x, y in zip(a, b):
        assert np.allclose(x["logprobs"], y["logprobs"], rtol=0, atol=tolerance)
        assert {k: v for k, v in x.items() if k != "logprobs"} == {k: v for k, v in y.items() if k != "logprobs"}


def plain_sums(logits_of, encoded):
    """What `evaluate` computes, without batches, caches or padding: [four summed log-probabilities] of every item."""
    return [[by_hand(logits_of, c, e) for e in endings] for c, endings in zip(encoded.contexts, encoded.endings)]


def in_order(rows):
    return sorted(rows, key=lambda row: row["item"])


# --- scores


@torch.no_grad()
def test_our_model_against_scoring_by_hand(gpt):
    items = make_items(6)
    rows = in_order(evaluate(ours(gpt), Encoded(items, byte_encode, 256, batch_size=4), CPU))
    for item, row in zip(items, rows):
        for ending, logprob, tokens in zip(item["endings"], row["logprobs"], row["tokens"]):
            ids = list(f" {ending}".encode())
            assert tokens == len(ids)
            assert math.isclose(
                by_hand(lambda idx: gpt(idx)[0], list(item["ctx"].encode()), ids), logprob, abs_tol=1e-4
            )
        assert row["acc"] == int(np.argmax(row["logprobs"]))
        assert row["acc_norm"] == int(np.argmax(np.array(row["logprobs"]) / row["tokens"]))
        assert row["acc_char"] == int(np.argmax(np.array(row["logprobs"]) / row["chars"]))
        assert row["chars"] == [len(e) for e in item["endings"]] and row["ind"] == 100 + item["item"]


@torch.no_grad()
def test_batch_sizes_change_no_figure(gpt):
    items = make_items()
    reference = in_order(evaluate(ours(gpt), Encoded(items, byte_encode, 256, batch_size=4), CPU))
    for batch_size in (1, 7, 64):
        encoded = Encoded(items, byte_encode, 256, batch_size=batch_size)
        assert_same_rows(in_order(evaluate(ours(gpt), encoded, CPU)), reference, 2e-5)


def test_on_a_gpu_there_are_few_shapes_and_the_same_figures(gpt, monkeypatch):
    """cuDNN builds a kernel for each: 163 of them for HellaSwag."""
    gpu = torch.device("cuda")
    assert [hellaswag.bucket(n, gpu, 40) for n in (0, 1, 16, 17, 33)] == [0, 16, 16, 32, 40]
    encoded, shapes = Encoded(make_items(), byte_encode, 256, batch_size=2), {}

    def logits_of(kind, contexts, ids):
        C = hellaswag.bucket(max(map(len, contexts)), CPU, 256)
        shapes.setdefault(kind, set()).add((len(ids), C, ids.shape[1]))
        return gpt_logits(gpt, contexts, ids)

    plain = evaluate(partial(logits_of, "cpu"), encoded, CPU)
    bucket = hellaswag.bucket
    monkeypatch.setattr(hellaswag, "bucket", lambda n, device, most: bucket(n, gpu, most))
    assert_same_rows(plain, evaluate(partial(logits_of, "gpu"), encoded, CPU), 2e-5)
    assert len(shapes["gpu"]) < len(shapes["cpu"])


def test_any_number_of_ranks_gives_the_same_rows(gpt):
    encoded = Encoded(make_items(), byte_encode, 256, batch_size=3)
    alone = in_order(evaluate(ours(gpt), encoded, CPU))
    for world_size in (2, 3, 5, 16):
        parts = [evaluate(ours(gpt), encoded, CPU, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert in_order(row for part in parts for row in part) == alone


@torch.no_grad()
def test_a_long_context_is_cut_on_the_left_and_counted(gpt):
    items = make_items(12)
    block_size = 80
    encoded = Encoded(items, byte_encode, block_size, batch_size=5)
    longest = [max(len(e) + 1 for e in item["endings"]) for item in items]
    assert encoded.cut == sum(len(i["ctx"]) + n > block_size + 1 for i, n in zip(items, longest)) > 0
    small = GPT(GPTConfig(block_size=block_size, vocab_size=300, n_layer=1, n_head=2, n_embd=8)).double().eval()
    rows = in_order(evaluate(ours(small), encoded, CPU))
    for item, n, row in zip(items, longest, rows):
        context = list(item["ctx"].encode())[-(block_size + 1 - n) :]
        ids = list(f" {item['endings'][0]}".encode())
        assert math.isclose(by_hand(lambda idx: small(idx)[0], context, ids), row["logprobs"][0], abs_tol=1e-4)


def test_a_block_shorter_than_an_ending_still_scores(gpt):
    encoded = Encoded(make_items(5), byte_encode, 16)
    assert encoded.cut == 5 and len(evaluate(ours(gpt), encoded, CPU)) == 5


@pytest.mark.core
def test_a_reason_to_stop_ends_the_scoring_between_batches(gpt):
    encoded, asked = Encoded(make_items(), byte_encode, 256, batch_size=1), []
    rows = evaluate(ours(gpt), encoded, CPU, stop=lambda: asked.append(1) or len(asked) > 2)
    assert len(rows) == 2 < len(encoded.items)


# --- Hugging Face models


@pytest.fixture(scope="module")
def stories():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ROOT.parent / "shared/data/stories260K"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return folder, model, AutoTokenizer.from_pretrained(folder)


@torch.no_grad()
def test_the_first_200_items_against_one_at_a_time_with_transformers(stories, shared_data):
    """Batched, shared contexts against a loop that knows none of this: every item, every ending."""
    folder, model, tokenizer = stories
    items = load_items(shared_data / "hellaswag_val.jsonl.gz")[:200]
    logits_of, (encode, block_size, prefix) = hellaswag.load_hf(str(folder), CPU)
    assert prefix == [1]
    rows = in_order(evaluate(logits_of, Encoded(items, encode, block_size, prefix), CPU))
    for item, row in zip(items, rows):
        context = tokenizer(item["ctx"]).input_ids
        logprobs, tokens = [], []
        for ending in item["endings"]:
            idx = torch.tensor([tokenizer(f"{item['ctx']} {ending}").input_ids])  # (1, T)
            nats = model(idx).logits[0, :-1].log_softmax(-1).gather(1, idx[0, 1:, None])  # (T - 1, 1)
            logprobs.append(nats[len(context) - 1 :].sum().item())
            tokens.append(idx.shape[1] - len(context))
        assert tokens == row["tokens"]
        assert np.allclose(logprobs, row["logprobs"], rtol=1e-4, atol=1e-3)
        assert (int(np.argmax(logprobs)), int(np.argmax(np.divide(logprobs, tokens)))) == (row["acc"], row["acc_norm"])


@pytest.mark.parametrize("kind", ["gpt2", "bloom"])
@torch.no_grad()
def test_other_architectures(kind):
    """GPT-2 with learned positions; BLOOM, whose positions come from the mask."""
    from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    if kind == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=256, n_layer=2, n_head=2, n_embd=16))
    else:
        model = BloomForCausalLM(BloomConfig(vocab_size=300, hidden_size=16, n_layer=2, n_head=2))
    model = model.double().eval()
    for p in model.parameters():
        p.mul_(5)
    encoded = Encoded(make_items(9), byte_encode, 256, batch_size=6)
    rows = in_order(evaluate(partial(hf_logits, model, 256), encoded, CPU))
    for row, sums in zip(rows, plain_sums(lambda idx: model(idx).logits, encoded)):
        assert np.allclose(row["logprobs"], sums, rtol=0, atol=2e-5)


def test_a_model_without_the_usual_cache_is_refused():
    """Silently wrong figures would be worse: some models keep a state instead of keys and values."""
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=16, state_size=4, num_hidden_layers=1)).eval()
    with pytest.raises(UsageError, match="cannot share"):
        evaluate(partial(hf_logits, model, 256), Encoded(make_items(2), byte_encode, 256), CPU)


def test_gpt2s_endings_are_encoded_as_build_nanogpt_does(shared_data):
    tokenizer = Tokenizer.from_tiktoken("gpt2")
    items = load_items(shared_data / "hellaswag_val.jsonl.gz", limit=30)
    encoded = Encoded(items, tokenizer.to_tiktoken().encode_ordinary_batch, 1024)
    for item, context, endings in zip(items, encoded.contexts, encoded.endings):
        assert context == tokenizer.encode(item["ctx"])
        assert endings == [tokenizer.encode(" " + ending) for ending in item["endings"]]


# --- items


OFFICIAL = {
    "ind": 24,
    "activity_label": "Roof [x] removal",
    "ctx_a": "A man is  sitting [header] Roof. [title] Look",
    "ctx_b": "he IS",
    "ctx": "A man is sitting on a roof. he",
    "label": "3",
    "endings": [" is [substeps] up. ", "b [title] c", "c", "d"],
}


def write_items(path, rows):
    raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_limit_takes_the_first_of_a_fixed_permutation(tmp_path):
    path = write_items(tmp_path / "a.jsonl.gz", [{**OFFICIAL, "ind": i} for i in range(50)])
    assert [item["ind"] for item in load_items(path)] == list(range(50))
    few, more = load_items(path, 5), load_items(path, 20)
    assert more[:5] == few and few != load_items(path)[:5] and len({i["item"] for i in load_items(path, 50)}) == 50


BROKEN = {
    "three endings": {**OFFICIAL, "endings": ["a", "b", "c"]},
    "no label": {k: v for k, v in OFFICIAL.items() if k != "label"},
    "label out of range": {**OFFICIAL, "label": 4},
    "empty context": {**OFFICIAL, "ctx": " "},
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_items_are_named(tmp_path, what):
    with pytest.raises(UsageError, match="item 1 is not"):
        load_items(write_items(tmp_path / "a.jsonl", [OFFICIAL, BROKEN[what]]))


# --- statistics


def test_wilsons_interval_solves_its_equation():
    for k, n in ((0, 10), (1, 10), (2955, 10042), (10, 10)):
        row = figures([{"label": 0, "acc": int(i >= k), "acc_norm": 0, "acc_char": 0} for i in range(n)])
        low, high = row["acc_low"], row["acc_high"]
        assert 0 <= low <= k / n + 1e-12 and k / n - 1e-12 <= high <= 1
        for p in (low, high):
            assert math.isclose((k / n - p) ** 2, norm.ppf(0.975) ** 2 * p * (1 - p) / n, rel_tol=1e-9, abs_tol=1e-15)


@pytest.mark.core
def test_figures_are_shares_of_the_items():
    result = figures([{"label": 0, "acc": i % 4, "acc_norm": i % 2, "acc_char": 0} for i in range(8)])
    assert (result["items"], result["acc"], result["acc_norm"], result["acc_char"]) == (8, 0.25, 0.5, 1.0)
    assert result["acc_low"] < 0.25 < result["acc_high"]


# --- the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run directory with a checkpoint, as the trainer leaves it."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = Tokenizer(pattern="gpt2")
    tokenizer.train(" ".join(WORDS) * 20, 270)
    tokenizer.save(folder / "tokenizer")
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=16))
    checkpoint.save(folder / "ckpt", 7, checkpoint.model_state(model))
    return folder


@pytest.fixture(scope="module")
def items_file(tmp_path_factory):
    rows = [{**item, "label": str(item["label"])} for item in make_items(50)]
    return write_items(tmp_path_factory.mktemp("items") / "items.jsonl.gz", rows)


def test_a_run_directory_comes_out(trained, items_file, script, tmp_path):
    args = ("gpt2/hellaswag.py", "--checkpoint", trained, "--input", items_file, "--device", "cpu")
    out = script(*args, "--run-dir", tmp_path / "a").stdout
    run = read_run(tmp_path / "a")
    row = run.rows("hellaswag")[-1]
    assert run.result["status"] == "success" and row["items"] == 50 and run.result["cut"] > 0
    assert row["acc_norm_low"] < row["acc_norm"] < row["acc_norm_high"] and f"{row['acc_norm']:.4f}" in out
    lines = [json.loads(line) for line in (tmp_path / "a/hellaswag.jsonl").read_text().splitlines()]
    assert [x["item"] for x in lines] == list(range(50))
    assert sum(x["acc"] == x["label"] for x in lines) / 50 == row["acc"]


def two_processes(*args):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, *map(str, args)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_two_processes_write_the_same(trained, items_file, tmp_path, script):
    args = ["gpt2/hellaswag.py", "--checkpoint", trained, "--input", items_file, "--device", "cpu", "--batch-size", "4"]
    script(*args, "--run-dir", tmp_path / "one")
    two_processes(*args, "--run-dir", tmp_path / "two")
    assert (tmp_path / "one/hellaswag.jsonl").read_bytes() == (tmp_path / "two/hellaswag.jsonl").read_bytes()
    one, two = (read_run(tmp_path / name).rows("hellaswag")[-1] for name in ("one", "two"))
    assert one["acc"] == two["acc"] and read_run(tmp_path / "two").env["world_size"] == 2


def test_usage_errors_are_one_line(trained, items_file, assert_refuses, tmp_path, monkeypatch):
    run = ["--run-dir", str(tmp_path / "x")]
    ours = [*run, "--checkpoint", str(trained)]
    errors = {
        "--model FOLDER or --checkpoint RUN": run,
        "nowhere.jsonl does not exist": [*ours, "--input", "nowhere.jsonl"],
        "name a local file": ours,
        "no causal LM": [*run, "--model", "nowhere", "--input", str(items_file)],
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))  # one's own may hold the items
    for says, args in errors.items():
        monkeypatch.setattr(sys, "argv", ["gpt2/hellaswag.py", *args])
        with pytest.raises(UsageError, match=says):
            hellaswag.main()
    assert_refuses("gpt2/hellaswag.py", *ours, "--input", "nowhere.jsonl", says="nowhere.jsonl does not exist")
    assert not (tmp_path / "x").exists()
