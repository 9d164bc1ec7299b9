"""How fast GPT-2 trains here: an ablation of our step, other codebases, several ranks; and what else is worth timing.

    python bench/bench_gpt2.py ladder                                     # ablation; minutes on two cores
    python bench/bench_gpt2.py peers --size vocab-50304 --nanogpt ../nanoGPT --build-nanogpt ../build-nanogpt
    torchrun --standalone --nproc_per_node=8 bench/bench_gpt2.py scaling  # tok/s of 1, 2, 4, 8 ranks
    python bench/bench_gpt2.py race --nanogpt ../nanoGPT                  # validation loss by seconds of training
    python bench/bench_gpt2.py hellaswag --model gpt2 --items 200         # batched scoring against naive scoring
    python bench/bench_gpt2.py profile --device cuda                      # the kernels of a step, and a trace
    python bench/bench_gpt2.py resume                                     # kill -9 while compiled, and the same end

Speed is measured on synthetic tokens. Contestants live in processes of their own, start from the same weights and take
turns on the same batches; the median counts, and the losses at the end stand beside the figures. `mfu` is the share of
the GPU's peak in 16 bits, on a CPU the share of the speed of one large matmul, measured in the same run.
"""

import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from bench.baselines import SIZES, Options, Size, everybody, first_weights, karpathy, ours
from bench.harness import BenchConfig, Contestant, finish, measured, medians, open_log, row, take_turns
from common import ROOT, cli, half_type, pick_device
from data.shards import read_meta
from gpt2.config import PRESETS
from gpt2.distributed import Ranks
from gpt2.hellaswag import load_items
from gpt2.loader import Loader
from gpt2.optimizers import lr_at
from gpt2.plan import CPU_MEMORY_SETTINGS, can_keep_memory, peak_flops
from runlog import TIMING_FIELDS, read_metrics, read_run

WARM_UP = 3  # steps that are not timed
SLOW_SECONDS = 3.0  # who needs longer for a step has two steps of warm-up, one timed step and a single turn
GB_PER_SEQUENCE = 3.0  # of gpt2-124M's hungriest contestant: float32, attention matrices and logits in memory


@dataclass(kw_only=True)
class Bench(BenchConfig):
    """What all modes share."""

    run_dir: Path | None = None  # run directory to write; none: runs/bench_gpt2_MODE
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu

    def __post_init__(self):
        self.mode = type(self).__name__.lower()
        self.run_dir = self.run_dir or ROOT / "runs" / f"bench_gpt2_{self.mode}"
        self.device = pick_device(self.device).type
        self.hardware = torch.cuda.get_device_name() if self.device == "cuda" else self.device

    def finish(self, log, rows, key, **more):
        """Table, picture, result.json; every row says on what it was measured."""
        finish(log, [{**r, "device": self.hardware} for r in rows], key, device=self.hardware, **more)


@dataclass(kw_only=True)
class Steps(Bench):
    """What the modes share that time steps on synthetic tokens."""

    size: Literal["auto", *SIZES] = "auto"  # model and batch; auto: gpt2-124M on a GPU, vocab-50304 elsewhere
    batch_size: int = 0  # sequences of a step; 0: the size's own, on a GPU as many of them as its memory holds
    samples: int = 2  # samples of a turn; the median of all samples counts
    steps: int = 4  # steps of a sample
    slow_seconds: float = SLOW_SECONDS  # who needs longer than this for a step has a single turn

    def __post_init__(self):
        super().__post_init__()
        self.size = self.size if self.size != "auto" else "gpt2-124M" if self.device == "cuda" else "vocab-50304"
        batch_size = self.batch_size or SIZES[self.size].batch_size
        if self.device == "cuda" and not self.batch_size:
            fits = torch.cuda.mem_get_info()[0] / 2**30 / GB_PER_SEQUENCE
            batch_size = min(batch_size, 2 ** int(math.log2(max(1, fits))))
        self.shape = replace(SIZES[self.size], batch_size=batch_size)
        # Where no hardware multiplies 16 bits, the baselines' stated type is measured all the same; ours takes float32.
        self.half = half_type(self.device) or "bfloat16"
        self.dtype = half_type(self.device) or "float32"

    def begin(self, log):
        """Say where this runs, and find the peak that shares are taken of."""
        s, on_cpu = self.shape, self.device == "cpu"
        self.flops = first_weights(s).flops_per_token()
        self.peak = matmul_peak(self.dtype) if on_cpu else peak_flops(torch.device(self.device), self.dtype)
        log.print(
            f"{self.size}: {s.n_layer} layers, {s.n_embd} wide, vocabulary {s.vocab_size:,}, {s.batch_size} x "
            f"{s.block_size} tokens a step | {self.hardware}, {torch.get_num_threads()} threads | ours in {self.dtype}"
            + (f" | peak {self.peak / 1e12:.3g} TFLOP/s" if self.peak else "")
        )

    def measure(self, entries, log):
        """{label: (function, size, kwargs, environment)} -> {label: facts}."""
        contestants = {
            label: Contestant(training, (make, size, self.device, kwargs, self.samples, self.steps), env)
            for label, (make, size, kwargs, env) in entries.items()
        }
        return take_turns(contestants, self, log, self.mode, keep=True)

    def row(self, who, facts, other, ratio_to, *, ranks=1, **more):
        """A row with tokens/s and the share of the peak."""
        if "seconds" in facts:
            speed = ranks * self.shape.tokens / facts["seconds"]
            mfu = speed * self.flops / self.peak / ranks if self.peak else None
            more |= {"tok_per_sec": speed, "mfu": mfu, "ranks": ranks}
        return row(self.mode, who, facts, other, ratio_to, batch_size=self.shape.batch_size, **more)


def training(make, size, device, kwargs, samples, steps):
    """Set up a baseline, warm it up, find the memory of a step -> its `turn`."""
    started = time.perf_counter()
    step, model, _ = make(size, device, **kwargs)
    once = {"first_loss": step().item(), "first_step_seconds": time.perf_counter() - started}
    for _ in range(WARM_UP - 1):
        with measured(device) as memory:
            step().item()
        if memory["seconds"] > SLOW_SECONDS:
            samples = steps = 1
            break
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20  # in MB; AdamW holds twice as much
    once["peak_mb"] = None if memory["peak_mb"] is None else 3 * weights + memory["peak_mb"]

    def turn():
        """A few samples of a few steps each."""
        seconds = []
        if device == "cuda":
            step().item()  # takes the memory anew, before the clock starts
        for _ in range(samples):
            started = time.perf_counter()
            for _ in range(steps):
                loss = step()
            loss = loss.item()  # the host waits for the device once, at the end
            seconds.append((time.perf_counter() - started) / steps)
        facts = {**once, "seconds": seconds, "last_loss": loss}
        if device == "cuda":  # memory that torch keeps for later goes back: the others need it in their turns
            torch.cuda.empty_cache()
            facts["free_mb"] = torch.cuda.mem_get_info()[0] / 2**20
        return facts

    return turn


def matmul_peak(dtype, n=2048):
    """FLOP/s of a square matmul on the CPU, the best of several."""
    a, seconds = torch.randn(n, n).to(getattr(torch, dtype)), []
    for _ in range(8):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * n**3 / min(seconds)


# ---------------------------------------------------------------------------------------------------------------------
# speed of a step


@dataclass(kw_only=True)
class Ladder(Steps):
    """Ablation: the usual optimizations one after another, and ours on top; what each of them gains."""

    def changes(self):
        """[(name, changed options, kept, environment)]: the next change leaves out one that is not kept."""
        memory = self.device == "cpu" and can_keep_memory()
        return [
            ("float32, naive attention", {}, True, {}),
            *([("TF32", {"tf32": True}, True, {})] if self.device == "cuda" else []),
            (self.half, {"dtype": self.half}, self.dtype == self.half, {}),
            ("compile", {"compile": True}, True, {}),
            ("flash attention", {"attention": "sdpa"}, True, {}),
            ("vocabulary 50304", {"pad_vocab_to": 128}, True, {}),
            ("fused AdamW", {"fused_adamw": True}, True, {}),
            ("chunked cross-entropy", {"chunked_loss": True}, True, {}),
            ("eager again", {"compile": False}, False, {}),
            *([("memory settings", {}, True, CPU_MEMORY_SETTINGS)] if memory else []),
        ]

    def run(self, log):
        """Measure all changes in turns; a row's ratio is its gain over the last one before it that was kept."""
        self.begin(log)
        # The padded size's vocabulary without its padding: 50257, as GPT-2 has it.
        size = replace(self.shape, vocab_size=self.shape.vocab_size - 47 * (self.shape.vocab_size == 50304))
        options, entries = Options("float32", False, False, "naive", 1, False, False), {}
        for name, change, kept, env in self.changes():
            entries[name] = ours, size, {"options": replace(options, **change)}, env
            options = replace(options, **change) if kept else options
        facts, rows, before = self.measure(entries, log), [], None
        for name, _, kept, _ in self.changes():
            more = {"lever": name, "kept": kept, "before": before, "dtype": entries[name][2]["options"].dtype}
            rows.append(self.row("ours", facts[name], facts[before or name], "speed before", speedup=True, **more))
            before = name if kept and "seconds" in facts[name] else before
        self.finish(log, rows, "tok_per_sec", size=self.size, peak_flops=self.peak)


@dataclass(kw_only=True)
class Peers(Steps):
    """Our step against transformers, its Trainer, nanoGPT and build-nanogpt."""

    nanogpt: str = ""  # checkout of karpathy/nanoGPT; empty: left out
    build_nanogpt: str = ""  # checkout of karpathy/build-nanogpt; empty: left out

    def run(self, log):
        """Measure everybody in turns; a row's ratio is its seconds to ours."""
        who = everybody(self.device, self.half, self.nanogpt, self.build_nanogpt)
        self.begin(log)
        entries = {label: (make, self.shape, kwargs, {}) for label, (make, kwargs) in who.items()}
        if self.device == "cpu" and can_keep_memory():
            entries["ours --cpu-memory-settings"] = (*entries["ours"][:3], CPU_MEMORY_SETTINGS)
        facts = self.measure(entries, log)
        rows = [self.row(label, f, facts["ours"], "seconds of ours") for label, f in facts.items()]
        self.finish(log, rows, "tok_per_sec", size=self.size, peak_flops=self.peak)


@dataclass(kw_only=True)
class Scaling(Steps):
    """Tokens a second of 1, 2, 4, … of torchrun's processes, each with a whole batch; DistributedDataParallel."""

    def run(self, log):
        """Measure 1, 2, 4, … ranks, one count after another; collective, rank 0 reports."""
        import torch.distributed as dist

        self.begin(log)
        rows, world = [], self.ranks.world_size
        for n in sorted({2**k for k in range(world.bit_length())} | {world}):
            group = dist.new_group(list(range(n))) if dist.is_initialized() else None  # every rank has to ask for it
            if self.ranks.rank < n:
                kwargs = {"options": Options(self.dtype), "group": group}
                facts = medians([training(ours, self.shape, self.device, kwargs, self.rounds, self.steps)()])
                one = rows[0] if rows else facts
                rows.append(self.row(f"ours, {n} rank(s)", facts, one, "one rank", speedup=True, ranks=n))
            self.ranks.wait()
        if self.ranks.main:
            self.finish(log, rows, "tok_per_sec", size=self.size)


@dataclass(kw_only=True)
class Profile(Steps):
    """Which kernels a step spends its time in; a trace for chrome://tracing or ui.perfetto.dev."""

    top: int = 15  # kernels listed

    def run(self, log):
        """Profile one turn; the top kernels, trace.json.gz and result.json."""
        from torch.profiler import ProfilerActivity, profile

        self.begin(log)
        turn = training(ours, self.shape, self.device, {"options": Options(self.dtype)}, 1, self.steps)
        cuda = self.device == "cuda"
        with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda) as profiler:
            facts = turn()
        profiler.export_chrome_trace(str(log.run_dir / "trace.json.gz"))
        events, own = profiler.key_averages(), "self_device_time_total" if cuda else "self_cpu_time_total"
        if cuda:  # an operator's time there is that of its kernels, which are events themselves
            on_gpu = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
            events = [e for e in on_gpu if not getattr(e, "is_user_annotation", False)]
        top = sorted(events, key=lambda e: -getattr(e, own))[: self.top]
        whole = {"seconds": sum(getattr(e, own) for e in events) / 1e6}
        rows = [
            row("profile", "ours", {"seconds": getattr(e, own) / 1e6}, whole, "all", kernel=e.key[:80], calls=e.count)
            for e in top
        ]
        self.finish(log, rows, "seconds", size=self.size, steps=self.steps, step_seconds=facts["seconds"][0])


# ---------------------------------------------------------------------------------------------------------------------
# loss by seconds


@dataclass(kw_only=True)
class Race(Bench):
    """Validation loss by seconds of training: our step with AdamW and with Muon against nanoGPT's.

    Everybody takes the quickstart's shape and number of steps on the same batches, with the same schedule and
    validations. Compared are the losses when the first has finished, and the seconds to the worst final loss.
    """

    data_dir: str = str(ROOT / "data/corpora/pydocs")  # token shards
    nanogpt: str = ""  # checkout of karpathy/nanoGPT; empty: left out
    max_steps: int = 300  # optimizer steps of each
    val_every: int = 25  # steps between validations
    val_tokens: int = 65536  # validation tokens: the first so many
    adamw_lr: float = 3e-3  # learning rate of our AdamW run
    nanogpt_lr: tuple[float, ...] = (1e-3, 3e-3)  # learning rates of nanoGPT, each a run; the best one counts
    rounds: int = 1  # turns of each contestant
    limit_seconds: float = 7200.0  # who needs longer than this is stopped

    def run(self, log):
        """Train everybody; the curves in metrics.jsonl, their comparison in result.json."""
        muon, eager = PRESETS["quickstart"], Options(compile=False)
        adamw = replace(muon, optimizer="adamw", max_lr=self.adamw_lr)
        runs = {f"ours {c.optimizer}": (ours, {"options": eager, "cfg": c}) for c in (adamw, muon)}
        for lr in self.nanogpt_lr if self.nanogpt else ():  # beta2 as in nanoGPT's config for Shakespeare
            runs[f"nanoGPT lr {lr:g}"] = karpathy, {"folder": self.nanogpt, "lr": lr, "beta2": 0.99}
        vocab_size = -(-read_meta(self.data_dir)["vocab_size"] // 64) * 64
        T, B = muon.block_size, muon.total_batch_size // muon.block_size
        size = Size(vocab_size, muon.n_layer, muon.n_head, muon.n_embd, T, B, self.data_dir)
        contestants = {who: Contestant(racing, (self, size, *made)) for who, made in runs.items()}
        facts = take_turns(contestants, self, log, self.mode)
        for who, f in facts.items():
            for step, seconds, loss in f.get("curve", []):
                log.metric(step, f"val {who}", seconds=seconds, loss=loss)
        self.finish(log, race_rows(facts), "seconds_to_loss", max_steps=self.max_steps)


def racing(race, size, make, kwargs):
    """A baseline with the quickstart's schedule -> its `turn`; validations count for everybody."""
    (step, model, optimizers), T, B = make(size, race.device, **kwargs), size.block_size, size.batch_size
    loader, warmup = Loader(race.data_dir, "val", T), min(PRESETS["quickstart"].warmup_steps, race.max_steps // 4)
    n = min(loader.n_sequences, race.val_tokens // T) // B * B

    @torch.no_grad()
    def validate():
        batches = [[t.to(race.device) for t in loader.in_order(first, B)] for first in range(0, n, B)]
        return sum(model(*batch)[1].item() for batch in batches) / len(batches)

    def turn():
        """Train; the curve has (step, seconds, loss) of each validation."""
        curve, started = [], time.perf_counter()
        for i in range(race.max_steps + 1):
            if i % race.val_every == 0 or i == race.max_steps:
                loss = validate()
                curve.append((i, time.perf_counter() - started, loss))
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = lr_at(i, group.setdefault("max_lr", group["lr"]), warmup, race.max_steps)
            step()
        return {"seconds": curve[-1][1], "peak_mb": None, "curve": curve}

    return turn


def race_rows(facts):
    """{who: facts with "curve", [(step, seconds, loss)]} -> rows; the ratio is to the best of nanoGPT's."""
    curves = {who: f["curve"] for who, f in facts.items() if "curve" in f}
    first, worst = min(c[-1][1] for c in curves.values()), max(c[-1][2] for c in curves.values())
    for who, curve in curves.items():
        steps, seconds, losses = map(np.array, zip(*curve))
        reached = np.interp(-worst, -np.minimum.accumulate(losses), seconds)  # linear between validations
        facts[who] |= {"steps": int(steps[-1]), "val_loss": losses[-1], "seconds_to_loss": reached, "loss": worst}
        facts[who] |= {"val_loss_at_seconds": np.interp(first, seconds, losses), "at_seconds": first}
    theirs = [facts[who]["seconds_to_loss"] for who in curves if who.startswith("nanoGPT")]
    rows = [row("race", who, f, {}, f"nanoGPT's seconds to a loss of {worst:.3f}") for who, f in facts.items()]
    return [r | {"ratio": r["seconds_to_loss"] / min(theirs)} if theirs and r["who"] in curves else r for r in rows]


# ---------------------------------------------------------------------------------------------------------------------
# HellaSwag


@dataclass(kw_only=True)
class Hellaswag(Bench):
    """gpt2/hellaswag.py against scoring one ending, and one item, at a time with plain transformers."""

    model: str = "gpt2"  # Hugging Face causal LM: a folder or a name on the hub
    input: str = ""  # items: jsonl, gzipped or not; empty: from the hub
    items: int = 100  # the first so many of a fixed permutation; 0: all 10,042
    slow_seconds: float = 300.0  # who needs longer than this has a single turn
    limit_seconds: float = 36000.0  # who needs longer than this for a turn is stopped

    def run(self, log):
        """Score the same items in the three ways, in turns; choices and log-probabilities are compared."""
        items, rows = sorted(load_items(self.input or None, self.items), key=lambda item: item["item"]), []
        ways = {way: Contestant(scoring, (self, items, way)) for way in ("ours", *NAIVE)}
        facts = take_turns(ways, self, log, self.mode, keep=True)
        for way, f in facts.items():
            more = {"items": len(items)}
            if "scores" in f and "scores" in facts["ours"]:
                pairs = list(zip(f["scores"], facts["ours"]["scores"], facts["ours"]["lengths"]))
                more["agree"] = sum(choices(a, by) == choices(b, by) for a, b, by in pairs)
                more["max_diff"] = max(abs(x - y) for a, b, _ in pairs for x, y in zip(a, b))
                more["items_per_sec"] = len(items) / f["seconds"]
                log.print(f"{way}: {more['agree']} of {len(items)} agree, log-probabilities to {more['max_diff']:.1e}")
            rows.append(row("hellaswag", way, f, facts["ours"], "seconds of ours", **more))
        self.finish(log, rows, "items_per_sec", model=self.model)


def choices(scores, lengths):
    """The endings chosen by highest sum, mean a token and mean a character; lengths: tokens and characters of each."""
    return [int(np.argmax(np.divide(scores, by))) for by in ([1], *lengths)]


def scoring(bench, items, way):
    """gpt2/hellaswag.py ("ours") or one of NAIVE with the same model -> its `turn`; loading does not count."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if way != "ours":
        model = AutoModelForCausalLM.from_pretrained(bench.model, dtype=torch.float32).to(bench.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(bench.model)

    def naive():
        with measured(bench.device) as facts, torch.no_grad():
            scores = [NAIVE[way](model, tokenizer, item, bench.device) for item in items]
        return {"seconds": facts["seconds"], "peak_mb": None, "scores": scores}

    def batched():
        """gpt2/hellaswag.py as a user runs it."""
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--model", bench.model, "--limit", bench.items, "--device", bench.device, "--run-dir", folder]
            command(ROOT / "gpt2/hellaswag.py", *flags, *(["--input", bench.input] if bench.input else []))
            lines = (Path(folder) / "hellaswag.jsonl").read_text(encoding="utf-8").splitlines()
            seconds = read_run(folder).rows("hellaswag")[-1]["seconds"]
        rows = [json.loads(line) for line in lines]  # by item, as the items
        lengths = [(r["tokens"], np.maximum(r["chars"], 1)) for r in rows]
        return {"seconds": seconds, "peak_mb": None, "scores": [r["logprobs"] for r in rows], "lengths": lengths}

    return batched if way == "ours" else naive


def one_ending_at_a_time(model, tokenizer, item, device):
    """Four summed log-probabilities: a forward pass for each context with its ending."""
    context, sums = tokenizer(item["ctx"]).input_ids, []
    for ending in item["endings"]:
        idx = torch.tensor([tokenizer(item["ctx"] + " " + ending).input_ids], device=device)  # (1, T)
        logprobs = model(idx).logits[0, :-1].float().log_softmax(-1)  # (T - 1, V)
        sums.append(logprobs.gather(1, idx[0, 1:, None])[len(context) - 1 :].sum().item())
    return sums


def one_item_at_a_time(model, tokenizer, item, device):
    """The same with the four rows of an item as one padded batch, as build-nanogpt's hellaswag.py does."""
    context = tokenizer(item["ctx"]).input_ids
    rows = [tokenizer(item["ctx"] + " " + ending).input_ids for ending in item["endings"]]
    idx, mask = torch.zeros(2, 4, max(map(len, rows)), dtype=torch.long, device=device)  # (4, T) each
    for k, ids in enumerate(rows):
        idx[k, : len(ids)] = torch.tensor(ids)
        mask[k, len(context) : len(ids)] = 1
    logits = model(idx).logits[:, :-1].float()  # (4, T - 1, V)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten(), reduction="none")
    return (-nats.view(4, -1) * mask[:, 1:]).sum(1).tolist()


NAIVE = {"one ending at a time": one_ending_at_a_time, "one item at a time": one_item_at_a_time}


# ---------------------------------------------------------------------------------------------------------------------
# killed and resumed


@dataclass(kw_only=True)
class Resume(Bench):
    """Train compiled, kill -9 after a checkpoint, resume: metrics and weights have to equal those of a quiet run."""

    max_steps: int = 20  # optimizer steps
    compile: bool = True  # compiled, with deterministic kernels

    def run(self, log):
        """Kill, resume and compare; a difference is an error."""
        with tempfile.TemporaryDirectory() as folder:
            facts = killed_and_resumed(self, Path(folder))
        log.print(", ".join(f"{k}: {v}" for k, v in facts.items()))
        if not (facts["metrics_equal"] and facts["weights_equal"]):
            raise RuntimeError("the resumed run differs from the one left alone")
        self.finish(log, [row("resume", "ours", facts, facts, "itself")], "seconds")


def killed_and_resumed(bench, folder):
    """One run left alone, one killed after a checkpoint and started again -> facts; equal means to the bit."""
    tokenizer, (alone, killed) = folder / "tokenizer", (folder / name for name in ("alone", "killed"))
    command(ROOT / "bpe/train_bpe.py", "--input", ROOT / "README.md", "--vocab-size", 512, "--out", tokenizer)
    command(ROOT / "data/prepare.py", "pydocs", "--tokenizer", f"{tokenizer}.model", "--out", folder / "data")
    preset, rows = ("gpt2-124M", 8) if bench.device == "cuda" else ("quickstart", 16)
    settings = {
        "data-dir": folder / "data", "device": bench.device, "max-steps": bench.max_steps, "warmup-steps": 2,
        "total-batch-size": rows * PRESETS[preset].block_size, "micro-batch-size": rows, "log-every": 1, "val-every": 0,
        "val-tokens": 2048, "sample-every": 0, "hellaswag-every": 0, "checkpoint-every": max(1, bench.max_steps // 4),
    }  # fmt: skip
    train = [ROOT / "gpt2/train_gpt2.py", preset, "--compile" if bench.compile else "--no-compile", "--deterministic"]
    train += [text for k, v in settings.items() for text in (f"--{k}", v)]
    with measured() as facts:
        command(*train, "--run-dir", alone)
    process = subprocess.Popen([sys.executable, *map(str, train), "--run-dir", killed], stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((killed / "ckpt").glob("step_*.pt")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    resumed = "resumed at" in command(*train, "--run-dir", killed)
    weights = [max((run / "ckpt").glob("step_*.pt")) for run in (alone, killed)]
    a, b = (torch.load(path, map_location="cpu", weights_only=True)["model"] for path in weights)
    facts |= {
        "metrics_equal": untimed(alone) == untimed(killed),
        "weights_equal": all(torch.equal(a[k], b[k]) for k in a),
    }
    return facts | {"resumed": resumed, "peak_mb": None}  # the memory is that of other processes


def untimed(run):
    """The rows of metrics.jsonl without the fields of time and memory."""
    return [{k: v for k, v in r.items() if k not in TIMING_FIELDS} for r in read_metrics(run)]


def command(*args):
    """Run a script -> what it prints; its own message explains a failure."""
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{Path(args[0]).name} failed: {done.stderr[-3000:]}")
    return done.stdout


def main():
    """Run the benchmark that the command line names, in a run directory of its own."""
    bench = tyro.cli(Ladder | Peers | Scaling | Race | Hellaswag | Profile | Resume, description=__doc__)
    bench.ranks = Ranks(bench.device) if isinstance(bench, Scaling) else None
    with open_log(bench, "bench_gpt2", enabled=bench.ranks is None or bench.ranks.main) as log:
        bench.run(log)
    if bench.ranks:
        bench.ranks.close()


if __name__ == "__main__":
    cli(main)
