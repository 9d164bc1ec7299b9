"""Training speed of GPT-2: an ablation of our step, a comparison with other codebases; memory, and other timings.

    python bench/bench_gpt2.py ladder                                     # ablation; minutes on two cores
    python bench/bench_gpt2.py peers --size vocab-50304 --nanogpt ../nanoGPT --build-nanogpt ../build-nanogpt
    python bench/bench_gpt2.py race --recipes --nanogpt ../nanoGPT        # validation loss by seconds and tokens
    python bench/bench_gpt2.py memory --device cpu                        # what the presets need on a GPU, without one
    python bench/bench_gpt2.py hellaswag --model gpt2 --items 200         # batched scoring against naive scoring
    python bench/bench_gpt2.py profile --device cuda                      # the kernels of a step, and a trace
    python bench/bench_gpt2.py resume                                     # kill -9 while compiled, and the same end
    python bench/bench_gpt2.py exact                                      # the cost of --exact-reduction

Speed is measured on synthetic tokens. Contestants live in processes of their own, start from the same weights and take
turns on the same batches; the median counts, and the losses at the end stand beside the figures. `mfu` is the share of
the GPU's peak in 16 bits, on a CPU the share of the speed of one large matmul, measured in the same run.
"""

import functools
import hashlib
import itertools
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch.utils.benchmark import Timer

from bench.baselines import SIZES, TRAIN_CONFIG, Options, Size, everybody, first_weights, karpathy, ours
from bench.harness import BenchConfig, Contestant, finish, measured, open_log, row, take_turns, timed
from common import ROOT, cli, free_memory, half_type, peak_flops, pick_device, synchronize
from data.shards import read_meta
from gpt2.config import PRESETS, GPTConfig
from gpt2.cross_entropy import CHUNK_LOGITS
from gpt2.distributed import autocast
from gpt2.hellaswag import Encoded, evaluate, load_hf, load_items
from gpt2.loader import Loader
from gpt2.model import GPT, meta_model
from gpt2.optimizers import make_optimizers, set_lr
from gpt2.plan import fitting_micro_batch, memory_estimate
from runlog import comparable_metrics, read_run

VAL_TOKENS = 65536  # of the race's validations
RECIPES = {  # rows of the ladder, and with --recipes of the race, where the others come on top of Muon
    "Muon": {"optimizer": "muon"},
    "NorMuon": {"optimizer": "normuon"},
    "cautious decay": {"cautious_decay": True},
    "averaged last weights": {"average_last": 30},
    "linear decay": {"lr_decay": "linear"},
    "late decay": {"lr_decay": "wsd"},
    "aligned documents": {"align_documents": True},
    "16-bit matmuls": {"dtype": "bfloat16"},
    "16-bit residual": {"dtype": "bfloat16", "low_precision_residual": True},
}
GPUS = (80, 40, 24, 16)  # GB of memory; the presets of `memory` run on eight of them
GB_PER_SEQUENCE = 3.0  # of the contestant at gpt2-124M that needs most: float32, attention matrices, all logits


@dataclass(kw_only=True)
class Config(BenchConfig):
    mode: tyro.conf.Positional[Literal["ladder", "peers", "race", "memory", "hellaswag", "profile", "resume", "exact"]]
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    size: Literal["auto", *SIZES] = "auto"  # model and batch; auto: gpt2-124M on a GPU, vocab-50304 elsewhere
    batch_size: int = 0  # sequences of a step; 0: the size's own, on a GPU as many of them as its memory holds
    steps: int = 4  # steps of a turn
    limit_seconds: float = 3600.0  # a turn that takes longer is stopped; those of hellaswag and race are long
    nanogpt: str = ""  # peers, race: checkout of karpathy/nanoGPT; empty: left out
    build_nanogpt: str = ""  # peers: checkout of karpathy/build-nanogpt; empty: left out
    data_dir: Path = ROOT / "data/corpora/pydocs"  # race, resume: token shards
    race_steps: int = 300  # race: optimizer steps of each contestant
    recipes: bool = False  # race: also Muon with each of our options
    model: str = "gpt2"  # hellaswag: Hugging Face causal LM, a folder or a name on the hub
    input: str = ""  # hellaswag: items, jsonl, gzipped or not; empty: from the hub
    items: int = 100  # hellaswag: the first so many of a fixed permutation; 0: all 10,042
    compile: bool = True  # resume: compiled, with deterministic kernels

    def __post_init__(self):
        self.device = pick_device(self.device).type
        self.hardware = torch.cuda.get_device_name() if self.device == "cuda" else self.device
        if self.device == "cpu" and (cap := os.environ.get("ONEDNN_MAX_CPU_ISA")):
            self.hardware = f"cpu capped to {cap}"
        if self.size == "auto":
            self.size = "gpt2-124M" if self.device == "cuda" else "vocab-50304"
        batch_size = self.batch_size or SIZES[self.size].batch_size
        if self.device == "cuda" and not self.batch_size:
            fits = free_memory(torch.device("cuda")) / 2**30 / GB_PER_SEQUENCE
            batch_size = min(batch_size, 2 ** int(math.log2(max(1, fits))))
        self.shape = SIZES[self.size]._replace(batch_size=batch_size)
        # Where no hardware multiplies 16 bits, the baselines' stated type is measured all the same; ours takes float32.
        self.half = half_type(self.device) or "bfloat16"
        self.dtype = half_type(self.device) or "float32"


def measure(cfg, log, size, entries):
    """{label: (function, keyword arguments)} -> {label: facts}, with tokens/s and the share of the peak."""
    flops, peak = first_weights(size).flops_per_token(), peak_flops(torch.device(cfg.device), cfg.dtype)
    peak = matmul_peak(cfg.dtype) if cfg.device == "cpu" else peak
    peak_is = f" | peak {peak / 1e12:.3g} TFLOP/s" if peak else ""
    log.print(f"{cfg.size}: {size} | {cfg.hardware}, {torch.get_num_threads()} threads | ours in {cfg.dtype}{peak_is}")
    contestants = {
        label: Contestant(training, (make, size, cfg.device, kwargs, cfg.steps))
        for label, (make, kwargs) in entries.items()
    }
    facts = take_turns(contestants, cfg, log, cfg.mode, keep=True)
    for f in (f for f in facts.values() if "seconds" in f):
        f["tok_per_sec"] = size.batch_size * size.block_size / f["seconds"]
        f["mfu"] = f["tok_per_sec"] * flops / peak if peak else None
    return facts


def training(make, size, device, kwargs, steps):
    """Set up a baseline, warm it up, find the memory of a step -> its `turn`."""
    step, model, _ = make(size, device, **kwargs)
    once = {"first_loss": step().item()}
    for _ in range(2):  # more steps that are not timed
        with measured(device) as memory:
            step().item()
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20  # in MB; AdamW holds twice as much
    once["peak_mb"] = None if memory["peak_mb"] is None else 3 * weights + memory["peak_mb"]

    def turn():
        """So many steps; the host waits for the device once, at their end."""
        if device == "cuda":
            step().item()  # takes the memory anew, before the clock starts
        started = time.perf_counter()
        for _ in range(steps):
            loss = step()
        facts = {**once, "last_loss": loss.item(), "seconds": (time.perf_counter() - started) / steps}
        if not math.isfinite(facts["last_loss"]):
            raise RuntimeError(f"its loss is {facts['last_loss']}")
        if device == "cuda":  # memory that torch keeps for later goes back: the others need it in their turns
            torch.cuda.empty_cache()
        return facts

    return turn


def matmul_peak(dtype, n=2048):
    """FLOP/s of a square matmul on the CPU, the best of several."""
    a = torch.randn(n, n).to(getattr(torch, dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.timeit(1).median for _ in range(8))


def ladder(cfg, log):
    """Ablation: the usual optimizations one after another, and ours on top; what each of them gains.

    A row's ratio is its speed over that of the last row before it that was kept.
    """
    changes = [  # (name, changed options, kept)
        ("float32, naive attention", {}, True),
        *([("TF32", {"tf32": True}, True)] if cfg.device == "cuda" else []),
        (cfg.half, {"dtype": cfg.half}, cfg.dtype == cfg.half),
        ("compile", {"compile": True}, True),
        ("flash attention", {"flash": True}, True),
        ("vocabulary 50304", {"pad_vocab_to": 128}, True),
        ("fused AdamW", {"fused_adamw": True}, True),
        ("chunked cross-entropy", {"chunked_loss": True}, True),
        ("eager again", {"compile": False}, False),
        *([("freed memory kept", {"keep_memory": True}, True)] if cfg.device == "cpu" else []),
    ]
    # The padded size's vocabulary without its padding: 50257, as GPT-2 has it.
    size = cfg.shape._replace(vocab_size=cfg.shape.vocab_size - 47 * (cfg.shape.vocab_size == 50304))
    options, entries = Options("float32", *[False] * 3, 1, *[False] * 3), {}
    for name, change, kept in changes:
        entries[name] = ours, {"options": replace(options, **change)}
        options = replace(options, **change) if kept else options
    for name in ("Muon", "NorMuon", "cautious decay", "averaged last weights", "16-bit residual"):
        # The others take no time. One step is the whole schedule, so weights are averaged in every step.
        entries[name] = ours, {"options": options, "cfg": replace(TRAIN_CONFIG, max_steps=1, **RECIPES[name])}
        changes.append((name, {}, False))
    facts, rows, before = measure(cfg, log, size, entries), [], None
    for name, _, kept in changes:
        more = {"lever": name, "kept": kept, "before": before, "dtype": entries[name][1]["options"].dtype}
        rows.append(row("ladder", "ours", facts[name], facts[before or name], "speed before", speedup=True, **more))
        before = name if kept and "seconds" in facts[name] else before
    return rows, "tok_per_sec"


def peers(cfg, log):
    """Our step against transformers, its Trainer, nanoGPT and build-nanogpt, on a CPU with bfloat16 in float32 as well.

    A ratio is seconds to ours of the same type.
    """
    dtypes = list(dict.fromkeys([cfg.dtype, cfg.dtype if cfg.device == "cuda" else "float32"]))
    entries = everybody(dtypes, cfg.nanogpt, cfg.build_nanogpt)
    facts, rows = measure(cfg, log, cfg.shape, entries), []
    for label, (_, kwargs) in entries.items():
        dtype = kwargs["options"].dtype if "options" in kwargs else kwargs["dtype"]
        same = "ours" if dtype == cfg.dtype else f"ours {dtype}"
        rows.append(row("peers", label, facts[label], facts[same], f"seconds of {same}", dtype=dtype))
    return rows, "tok_per_sec"


def profile(cfg, log):
    """The 15 kernels in which a step spends most time; a trace for chrome://tracing or ui.perfetto.dev."""
    turn = training(ours, cfg.shape, cfg.device, {"options": Options(cfg.dtype)}, cfg.steps)
    with torch.profiler.profile() as profiler:  # of the CPU and, where there is one, of the GPU
        turn()
    profiler.export_chrome_trace(str(log.run_dir / "trace.json.gz"))
    # On a GPU an operator's time is that of its kernels, which are events themselves.
    kind, own = ("CUDA", "self_device_time_total") if cfg.device == "cuda" else ("CPU", "self_cpu_time_total")
    events = [e for e in profiler.key_averages() if e.device_type.name == kind]
    events = [e for e in events if not getattr(e, "is_user_annotation", False)]
    found = [(e.key[:80], {"seconds": getattr(e, own) / 1e6}) for e in events]
    found, whole = sorted(found, key=lambda x: -x[1]["seconds"]), {"seconds": sum(f["seconds"] for _, f in found)}
    return [row("profile", "ours", f, whole, "all", kernel=kernel) for kernel, f in found[:15]], "seconds"


def race(cfg, log):
    """Validation loss by seconds of training: our step with AdamW, with Muon and its options, and nanoGPT's.

    All have the quickstart's shape and the same number of steps on the same batches, with the same warm-up and
    validations. Compared are the losses when the first has finished, and seconds and tokens to the worst final loss.
    """
    muon = replace(PRESETS["quickstart"], max_steps=cfg.race_steps)
    muon = replace(muon, warmup_steps=min(muon.warmup_steps, cfg.race_steps // 4))
    presets = (replace(muon, optimizer="adamw", max_lr=3e-3), muon)
    recipes = {f"ours {c.optimizer}": c for c in presets}
    if cfg.recipes:
        fast = [name for name, r in RECIPES.items() if name != "Muon" and r.get("dtype") in (None, cfg.dtype)]
        recipes |= {f"ours muon, {name}": replace(muon, **RECIPES[name]) for name in fast}
    runs = {who: (c, ours, {"options": Options(c.dtype, compile=False), "cfg": c}) for who, c in recipes.items()}
    for lr in (1e-3, 3e-3) if cfg.nanogpt else ():  # the better one counts; beta2 as in its config for Shakespeare
        runs[f"nanoGPT lr {lr:g}"] = muon, karpathy, {"folder": cfg.nanogpt, "lr": lr, "beta2": 0.99}
    vocab_size = -(-read_meta(cfg.data_dir)["vocab_size"] // 64) * 64
    T, B = muon.block_size, muon.total_batch_size // muon.block_size
    size = Size(vocab_size, muon.n_layer, muon.n_head, muon.n_embd, T, B, cfg.data_dir)
    contestants = {who: Contestant(racing, (size, cfg.device, *made)) for who, made in runs.items()}
    facts = take_turns(contestants, cfg, log, "race")
    for who, f in facts.items():
        for step, seconds, loss in f.get("curve", []):
            log.metric(step, f"val {who}", seconds=seconds, loss=loss)
    return race_rows(facts, B * T), "seconds_to_loss"


def racing(size, device, cfg, make, kwargs):
    """A baseline with the schedule of a TrainConfig -> its `turn`; the time of a dozen validations counts."""
    step, model, optimizers = make(size, device, **kwargs)
    loader, B, max_steps = Loader(size.data_dir, "val", size.block_size), size.batch_size, cfg.max_steps
    n = min(loader.n_sequences, VAL_TOKENS // size.block_size)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group.setdefault("max_lr", group["lr"])

    @torch.no_grad()
    def validate():
        starts = range(0, n // B * B, B)
        return np.mean([model(*(t.to(device) for t in loader.in_order(i, B)))[1].item() for i in starts])

    def turn():
        """Train; its curve has (step, seconds, loss) of each validation."""
        curve, trained = [], 0.0
        started = resumed = time.perf_counter()
        for i in range(max_steps + 1):
            if i % max(1, max_steps // 12) == 0 or i == max_steps:
                synchronize(device)
                trained += time.perf_counter() - resumed
                loss, resumed = validate(), time.perf_counter()
                curve.append((i, resumed - started, loss))
            set_lr(optimizers, i, cfg)
            step()
        return {"seconds": curve[-1][1], "seconds_per_step": trained / max_steps, "curve": curve}

    return turn


def race_rows(facts, tokens_per_step):
    """{who: facts with "curve", [(step, seconds, loss)]} -> rows; the ratio is to nanoGPT's best, or to the first."""
    curves = {who: f["curve"] for who, f in facts.items() if "curve" in f}
    first, worst = min(c[-1][1] for c in curves.values()), max(c[-1][2] for c in curves.values())
    for who, curve in curves.items():
        steps, seconds, losses = map(np.array, zip(*curve))
        reached = np.interp(-worst, -np.minimum.accumulate(losses), seconds)  # linear between validations
        facts[who] |= {"steps": int(steps[-1]), "val_loss": losses[-1], "seconds_to_loss": reached, "loss": worst}
        facts[who]["steps_to_loss"] = np.interp(-worst, -np.minimum.accumulate(losses), steps)
        facts[who]["tokens_to_loss"] = facts[who]["steps_to_loss"] * tokens_per_step
        facts[who]["val_loss_at_first_end"] = np.interp(first, seconds, losses)
    theirs = [who for who in curves if who.startswith("nanoGPT")] or [*curves][:1]
    best, whose = min(facts[who]["seconds_to_loss"] for who in theirs), theirs[0].split(" lr ")[0]
    rows = [row("race", who, f, {}, f"{whose}'s seconds to a loss of {worst:.3f}") for who, f in facts.items()]
    return [r | {"ratio": r["seconds_to_loss"] / best} if r["who"] in curves else r for r in rows]


def memory(cfg, log):
    """Peak memory of a training step of each gpt2-* preset on GPUs of several sizes, counted on fake tensors.

    An estimate, which needs no GPU: in bfloat16, at the micro-batch that training takes where a process has one of
    eight GPUs. The ratio is to the estimate by which that micro-batch is chosen.
    """
    rows = []
    for name, gb in ((name, gb) for name in PRESETS if name.startswith("gpt2") for gb in GPUS):
        c = replace(PRESETS[name], dtype="bfloat16")
        model = meta_model(c, GPTConfig.vocab_size)
        micro_batch = fitting_micro_batch(c, model, 8, gb * 1e9, "cuda")
        fixed, per_sequence = memory_estimate(model, c, "cuda")
        estimate = (fixed + max(1, micro_batch) * per_sequence) / 2**20
        facts = {"gpu_gb": gb, "micro_batch_size": micro_batch, "estimate_mb": estimate}
        peak = counted_memory(c, micro_batch) / 2**20 if micro_batch else None
        facts |= {"peak_mb": peak} if micro_batch else {"failed": "one sequence does not fit"}
        r = row("memory", f"ours {name}, {gb} GB", facts, {}, "the estimate")
        rows.append({**r, "ratio": peak and peak / estimate})
    return rows, "peak_mb"


@functools.cache
def counted_memory(cfg, micro_batch_size, device_type="cuda"):
    """Peak memory in bytes of a process's training step, counted on fake tensors, which have shapes and no data.

    Of its last micro-batch: the others' gradients and the optimizers' states are there. The tensors are on the CPU,
    whose attention is flash attention, too; logits come in the chunks of `device_type`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode  # both are private
    from torch.distributed._tools.mem_tracker import MemTracker

    with patch.dict(CHUNK_LOGITS, cpu=CHUNK_LOGITS[device_type]), FakeTensorMode():
        model = GPT(GPTConfig(**cfg.shape))
        optimizers, tracker = make_optimizers(model, cfg), MemTracker()
        tracker.track_external(model, *optimizers)
        idx = torch.zeros(micro_batch_size, cfg.block_size, dtype=torch.long)
        with tracker:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            for optimizer in optimizers:
                optimizer.step()  # makes its state
            with autocast(idx.device, cfg.dtype):
                loss = model(idx, idx, return_logits=False)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
    return tracker.get_tracker_snapshot("peak")[idx.device]["Total"]


def hellaswag(cfg, log):
    """gpt2/hellaswag.py's scorer against a forward pass for each ending: seconds, and whether they choose the same."""
    items, rows = load_items(cfg.input or None, cfg.items), []
    ways = {"ours": batched, "one ending at a time": one_ending_at_a_time}
    contestants = {way: Contestant(make, (cfg.model, cfg.device, items)) for way, make in ways.items()}
    facts = take_turns(contestants, cfg, log, "hellaswag", keep=True)
    best = facts["ours"].get("choices", {})
    for way, f in facts.items():
        agree = sum(f.get("choices", {}).get(i) == ending for i, ending in best.items())
        rows.append(row("hellaswag", way, f, facts["ours"], "seconds of ours", items=len(items), agree=agree))
    return rows, "seconds"


def batched(name, device, items):
    """What gpt2/hellaswag.py does -> its `turn`, "choices" being {item: ending}; loading does not count."""
    (logits_of, arguments), device = load_hf(name, device), torch.device(device)

    def choose():
        return {r["item"]: r["acc"] for r in evaluate(logits_of, Encoded(items, *arguments), device)}

    return timed(choose, "choices", device.type)


def one_ending_at_a_time(name, device, items):
    """The same with plain transformers: a forward pass for each context with its ending."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(name)

    @torch.inference_mode()
    def logprob(context, ending):
        idx = torch.tensor([tokenizer(f"{context} {ending}").input_ids], device=device)  # (1, T)
        logprobs = model(idx).logits[0, :-1].log_softmax(-1).gather(1, idx[0, 1:, None])  # (T - 1, 1)
        return logprobs[len(tokenizer(context).input_ids) - 1 :].sum().item()

    def choose():
        return {item["item"]: int(np.argmax([logprob(item["ctx"], e) for e in item["endings"]])) for item in items}

    return timed(choose, "choices", device)


def resume(cfg, log):
    """Train, kill -9 after a checkpoint, resume: metrics and weights have to equal to the bit those left alone."""
    preset, rows = ("gpt2-124M", 8) if cfg.device == "cuda" else ("quickstart", 16)
    train = [sys.executable, "-m", "gpt2.train_gpt2", preset, "--data-dir", cfg.data_dir, "--device", cfg.device]
    flags = (
        f"--max-steps 20 --warmup-steps 2 --deterministic --{'compile' if cfg.compile else 'no-compile'} "
        f"--micro-batch-size {rows} --total-batch-size {rows * PRESETS[preset].block_size} --log-every 1 --val-every 0 "
        f"--val-tokens 2048 --sample-every 0 --hellaswag-every 0 --checkpoint-every 5 --run-dir"
    )
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        with measured() as facts:
            subprocess.run([*train, *flags.split(), alone], check=True)
        process = subprocess.Popen([*train, *flags.split(), killed])
        while process.poll() is None and not list(killed.glob("ckpt/step_*.pt")):
            time.sleep(0.05)
        process.kill()
        process.wait()
        subprocess.run([*train, *flags.split(), killed], check=True)
        facts["resumed"] = "resumed at" in (killed / "log.txt").read_text(encoding="utf-8")
        facts["metrics_equal"] = comparable_metrics(alone) == comparable_metrics(killed)
        a, b = (torch.load(max(run.glob("ckpt/step_*.pt")), map_location="cpu")["model"] for run in (alone, killed))
        facts["weights_equal"] = all(torch.equal(a[k], b[k]) for k in a)
    facts["peak_mb"] = None  # the memory is that of other processes
    log.print(", ".join(f"{k}: {v}" for k, v in facts.items()))
    if not (facts["metrics_equal"] and facts["weights_equal"]):
        raise RuntimeError("the resumed run differs from the one left alone")
    return [row("resume", "ours", facts, facts, "itself")], "seconds"


def exact(cfg, log):
    """--exact-reduction on 1 and 2 processes of one thread each: seconds a step against those without it, and the bits.

    `sha256` is that of the final weights, which with it are the same on both numbers of processes.
    """
    ways = {
        f"{optimizer}, {n} process(es){', exact' * flag}": (optimizer, n, flag)
        for optimizer, n, flag in itertools.product(("adamw", "muon"), (1, 2), (False, True))
    }
    contestants = {who: Contestant(short_run, (cfg.data_dir, *way)) for who, way in ways.items()}
    facts, rows = take_turns(contestants, cfg, log, "exact"), []
    for who, f in facts.items():
        rows.append(row("exact", f"ours {who}", f, facts[who.removesuffix(", exact")], "seconds without it"))
    for optimizer in ("adamw", "muon"):
        if len({facts[who].get("sha256") for who, (name, _, flag) in ways.items() if flag and name == optimizer}) > 1:
            raise RuntimeError(f"{optimizer}: the weights differ between 1 process and 2")
    return rows, "seconds"


def short_run(data_dir, optimizer, nproc, exact, steps=60):
    """A `turn` that trains the quickstart's shape in processes of their own: the median seconds of a step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command += [ROOT / "gpt2/train_gpt2.py", "quickstart", "--data-dir", data_dir, "--optimizer", optimizer]
    command += f"--max-steps {steps} --micro-batch-size 4 --device cpu --log-every 1 --val-every 0".split()
    command += ["--sample-every", "0", *["--exact-reduction"] * exact, "--run-dir"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}

    def turn():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([*command, folder], check=True, capture_output=True, env=env)
            rates = [row["tok_per_sec"] for row in read_run(folder).rows("train")]
            state = torch.load(max(Path(folder).glob("ckpt/step_*.pt")))["model"]
        weights = b"".join(state[name].numpy().tobytes() for name in sorted(state))
        seconds = PRESETS["quickstart"].total_batch_size / float(np.median(rates))
        return {"seconds": seconds, "sha256": hashlib.sha256(weights).hexdigest()}

    return turn


MODES = {mode.__name__: mode for mode in (ladder, peers, race, memory, hellaswag, profile, resume, exact)}


def main():
    """Run the benchmark that the command line names, in a run directory of its own."""
    cfg = tyro.cli(Config, description=__doc__)
    with open_log(cfg, f"bench_gpt2_{cfg.mode}") as log:
        rows, key = MODES[cfg.mode](cfg, log)
        rows = [{**r, "device": cfg.hardware} for r in rows]
        finish(log, rows, key, device=cfg.hardware, size=cfg.size, shape=cfg.shape._asdict())


if __name__ == "__main__":
    cli(main)
