"""What bench/bench_gpt2.py measures before and beside the steps: HellaSwag, sampling, the first step, resuming."""

import os
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F

from bench.baselines import first_weights
from bpe.tokenizer import Tokenizer
from common import ROOT, file_sha256
from data.shards import write_meta, write_shard
from gpt2 import hellaswag
from gpt2.sample import generate
from runlog import comparable_metrics


def alternate(ways, rounds):
    """{label: function} -> {label: median seconds}, the functions taking turns after one untimed call each."""
    for function in ways.values():
        function()
    seconds = {label: [] for label in ways}
    for _ in range(rounds):
        for label, function in ways.items():
            started = time.perf_counter()
            function()
            seconds[label].append(time.perf_counter() - started)
    return {label: statistics.median(times) for label, times in seconds.items()}


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag


def words_as_tokens(vocab_size):
    """encode(texts) -> ids, one a word: only lengths matter to the clock, so no tokenizer is needed."""
    return lambda texts: [[zlib.crc32(w.encode()) % vocab_size for w in text.split()] or [0] for text in texts]


def made_up_items(n):
    """n items with the lengths of HellaSwag's: contexts of 5 to 80 words, endings of 5 to 40."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 81, (n, 5), generator=generator).tolist()
    texts = [[" ".join(f"w{k * i % 997}" for k in range(m)) for i, m in enumerate(row, 1)] for row in lengths]
    return [
        {"item": i, "ind": i, "label": 0, "ctx": t[0], "endings": [" ".join(e.split()[: 5 + m % 36]) for e in t[1:]]}
        for i, (t, (m, *_)) in enumerate(zip(texts, lengths))
    ]


@torch.no_grad()
def one_at_a_time(model, encoded, device):
    """HellaSwag as build-nanogpt does it: an item's four endings with their context, padded, as one batch."""
    chosen = []
    for context, endings in zip(encoded.contexts, encoded.endings):
        rows = [context + ending for ending in endings]
        idx = torch.zeros(4, max(map(len, rows)), dtype=torch.long)
        mask = torch.zeros_like(idx)
        for k, row in enumerate(rows):
            idx[k, : len(row)] = torch.tensor(row)
            mask[k, len(context) : len(row)] = 1
        idx, mask = idx.to(device), mask.to(device)[:, 1:]  # (4, T), (4, T - 1)
        logits = model(idx[:, :-1])[0]  # (4, T - 1, V)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), idx[:, 1:].flatten(), reduction="none").view(4, -1)
        chosen.append(int(((nats * mask).sum(1) / mask.sum(1)).argmin()))
    return chosen


def hellaswag_rows(bench):
    """Items a second, batched with shared contexts against one item at a time; their choices have to agree."""
    model = first_weights(bench.shape).to(bench.device).eval()
    items = made_up_items(bench.items)
    if bench.hellaswag_file:
        items = hellaswag.load_items(bench.hellaswag_file, bench.items)
    encoded = hellaswag.Encoded(items, words_as_tokens(bench.shape.vocab_size), bench.shape.block_size)
    found = {}

    def batched():
        rows = hellaswag.evaluate(hellaswag.shared_gpt(model), encoded, bench.device)
        found["ours"] = [row["acc_norm"] for row in sorted(rows, key=lambda row: row["item"])]

    def naive():
        found["naive"] = one_at_a_time(model, encoded, bench.device)

    order = sorted(range(len(items)), key=lambda i: items[i]["item"])
    seconds = alternate({"ours": batched, "one item at a time": naive}, min(3, bench.rounds))
    agree = sum(a == found["naive"][i] for a, i in zip(found["ours"], order))
    return [
        {
            "name": "hellaswag", "who": who, "seconds": took, "items_per_sec": len(items) / took,
            "ratio": took / seconds["ours"], "ratio_to": "seconds of ours", "agree": agree, "items": len(items),
        }
        for who, took in seconds.items()
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# sampling


@torch.no_grad()
def recompute(model, prompt, new_tokens):
    """Greedy sampling without a cache, as nanoGPT's `generate`: the whole context again for every token."""
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    for _ in range(new_tokens):
        logits = model(ids[:, -model.config.block_size :])[0]
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[0, len(prompt) :].tolist()


def sampling_rows(bench):
    """Tokens a second of one greedy continuation, with the KV cache and without; the same tokens have to come out."""
    model = first_weights(bench.shape).to(bench.device).eval()
    new = min(bench.new_tokens, bench.shape.block_size - 4)
    prompt, out = [1, 2, 3, 4], {}
    ways = {
        "ours, KV cache": lambda: out.update(cache=generate(model, [prompt], new, temperature=0)[0]),
        "recomputing": lambda: out.update(naive=recompute(model, prompt, new)),
    }
    seconds = alternate(ways, min(3, bench.rounds))
    return [
        {
            "name": "sampling", "who": who, "seconds": took, "tok_per_sec": new / took,
            "ratio": took / seconds["ours, KV cache"], "ratio_to": "seconds of ours",
            "same_tokens": out["cache"] == out["naive"],
        }
        for who, took in seconds.items()
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# the trainer as a person starts it


def synthetic_corpus(folder, tokens):
    """Shards of skewed random tokens and a small tokenizer, for runs of gpt2/train_gpt2.py that need no corpus."""
    tokenizer = Tokenizer("gpt2")
    tokenizer.train((ROOT / "README.md").read_text(encoding="utf-8"), 320)
    tokenizer.register_special_tokens({"<|endoftext|>": 320})
    tokenizer.save(str(Path(folder) / "tokenizer"))
    generator, shards = torch.Generator().manual_seed(0), []
    for number, split, n in [(0, "val", max(tokens // 8, 2049)), (1, "train", tokens)]:
        ids = (torch.rand(n, generator=generator) ** 3 * 320).long().numpy()
        ids[0] = tokenizer.eot_token
        path = Path(folder) / f"synthetic_{split}_{number:06d}.bin"
        write_shard(path, ids)
        facts = {"documents": 1, "tokens": len(ids), "bytes": len(ids), "sha256": file_sha256(path)}
        shards.append({"file": path.name, "split": split, **facts})
    identity = {"name": "tokenizer.model", "sha256": tokenizer.sha256}
    write_meta(
        folder, name="synthetic", source={}, tokenizer=identity, vocab_size=tokenizer.n_vocab, eot=320, shards=shards
    )


def train_command(bench, folder, run, *flags):
    """The command line of a short run of gpt2/train_gpt2.py with the bench's shape."""
    s = bench.shape
    shape = {"n-layer": s.n_layer, "n-head": s.n_head, "n-embd": s.n_embd, "block-size": s.block_size}
    shape |= {"total-batch-size": s.tokens, "micro-batch-size": s.batch_size, "device": bench.device}
    shape |= {"data-dir": folder, "run-dir": Path(folder) / run, "val-every": 0, "sample-every": 0, "warmup-steps": 2}
    shape |= {"hellaswag-every": 0, "log-every": 1}
    shape |= {"val-tokens": s.block_size, "dtype": bench.dtype}
    command = [sys.executable, str(ROOT / "gpt2" / "train_gpt2.py"), "gpt2-124M", *flags]
    return command + [str(x) for k, v in shape.items() for x in (f"--{k}", v)]


def run(command, env=None):
    """Run a command; its own message explains a failure."""
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env={**os.environ, **(env or {})})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def first_step_rows(bench):
    """Seconds from the command to the first step done: eager, compiled with a cold compile cache, and with a warm one.

    The trainer runs one step and one sequence of validation, imports and setting up included.
    """
    with tempfile.TemporaryDirectory() as folder:
        synthetic_corpus(folder, 10 * bench.shape.tokens)
        cold = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        seconds = {}
        for who, flag in [
            ("eager", "--no-compile"),
            ("compiled, cold cache", "--compile"),
            ("compiled, warm cache", "--compile"),
        ]:
            started = time.perf_counter()
            run(train_command(bench, folder, who.replace(", ", "-").replace(" ", "-"), flag, "--max-steps", "1"), cold)
            seconds[who] = time.perf_counter() - started
    return [
        {
            "name": "first step", "who": f"ours {who}", "seconds": took,
            "ratio": took / seconds["compiled, warm cache"], "ratio_to": "seconds with a warm compile cache",
        }
        for who, took in seconds.items()
    ]  # fmt: skip


def killed_and_resumed(bench, log):
    """One run left alone, one killed after a checkpoint and started again -> rows; RuntimeError if they differ."""
    flags = ["--compile" if bench.compile else "--no-compile", "--deterministic", "--max-steps", str(bench.max_steps)]
    flags += ["--checkpoint-every", str(max(1, bench.max_steps // 4))]
    with tempfile.TemporaryDirectory() as folder:
        synthetic_corpus(folder, 10 * bench.shape.tokens)
        started = time.perf_counter()
        run(train_command(bench, folder, "alone", *flags))
        alone = time.perf_counter() - started
        command, killed = train_command(bench, folder, "killed", *flags), Path(folder) / "killed"
        with open(Path(folder) / "out.txt", "w", encoding="utf-8") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        while process.poll() is None and not list((killed / "ckpt").glob("step_*.pt")):
            time.sleep(0.05)
        process.kill()
        process.wait()
        text = run(command)
        resumed_at = [line for line in text.splitlines() if line.startswith("resumed at")]
        same_metrics = comparable_metrics(Path(folder) / "alone") == comparable_metrics(killed)
        weights = [max((Path(folder) / name / "ckpt").glob("step_*.pt")) for name in ("alone", "killed")]
        a, b = (torch.load(path, map_location="cpu", weights_only=True)["model"] for path in weights)
        same_weights = all(torch.equal(a[k], b[k]) for k in a)
    log.print(f"killed with SIGKILL, {resumed_at[0] if resumed_at else 'not resumed: it had ended'}")
    log.print(f"metrics equal: {same_metrics}, weights equal to the bit: {same_weights}")
    if not (same_metrics and same_weights):
        raise RuntimeError("the resumed run differs from the one left alone")
    return [
        {
            "name": "resume", "who": "ours", "seconds": alone, "resumed": bool(resumed_at),
            "metrics_equal": same_metrics, "weights_equal": same_weights, "ratio": 1.0, "ratio_to": "itself",
        }
    ]  # fmt: skip
