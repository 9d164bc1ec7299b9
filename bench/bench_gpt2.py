"""How fast GPT-2 trains here: lever by lever, against the peers, over ranks, and from the start.

    python bench/bench_gpt2.py ladder                                     # each lever's gain; minutes on two cores
    python bench/bench_gpt2.py peers --size vocab-50304 --nanogpt ../nanoGPT --build-nanogpt ../build-nanogpt
    python bench/bench_gpt2.py start                                      # HellaSwag, sampling, the first step
    torchrun --standalone --nproc_per_node=8 bench/bench_gpt2.py scaling  # tok/s and efficiency of 1, 2, 4, 8 ranks
    python bench/bench_gpt2.py race --nanogpt ../nanoGPT                  # validation loss after two minutes
    python bench/bench_gpt2.py profile                                    # the kernels of a step, and a trace
    python bench/bench_gpt2.py resume                                     # kill -9, compiled, and the same end

Tokens are synthetic. Contestants live in processes of their own, start from the same weights and take turns on the same
batches; the median turn counts, and the losses at the end stand beside the figures. `mfu` is the share of the GPU's
bfloat16 peak, on a CPU the share of the speed of one large matmul, measured in the same run.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import torch
import tyro

from bench import harness as contest
from bench import race, starting
from bench.baselines import SIZES, Levers, contestants, first_weights, ours
from common import ROOT, UsageError, cli, portable
from gpt2.config import PRESETS
from gpt2.distributed import Ranks, pick_device
from gpt2.machine import CPU_MEMORY_SETTINGS, can_keep_memory, half_type, matmul_peak, sdpa_backend
from gpt2.plan import peak_flops
from runlog import RunLog, read_metrics


def beside(file):
    """The folder of `file` in the folder above this one, where it is there; else an empty text."""
    return (Path("..") / file).parent.as_posix() if (Path("..") / file).is_file() else ""


@dataclass
class Bench:
    """What all measurements share."""

    run_dir: str = ""
    """Run directory; empty: runs/bench_gpt2_… after the measurement."""
    size: Literal["auto", *SIZES] = "auto"
    """Shape of the model and the batch; auto: gpt2-124M on a GPU, vocab-50304 elsewhere."""
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    """auto: cuda, else mps, else cpu."""
    batch_size: int = 0
    """Sequences of a step; 0: the size's own."""
    rounds: int = 5
    """Turns of each contestant; the median counts."""
    steps: int = 4
    """Steps of a turn."""
    own_process: bool = True
    """Each contestant in a process of its own; together in this one they start faster but share its settings."""

    def __post_init__(self):
        self.device = pick_device(self.device).type
        self.size = self.size if self.size != "auto" else "gpt2-124M" if self.device == "cuda" else "vocab-50304"
        self.run_dir = self.run_dir or str(ROOT / "runs" / f"bench_gpt2_{type(self).__name__.lower()}")
        self.shape = SIZES[self.size]
        if self.batch_size:
            self.shape = replace(self.shape, batch_size=self.batch_size)
        # Where no hardware multiplies 16 bits, the peers' stated type is measured all the same; ours takes float32.
        self.half = half_type(self.device) or "bfloat16"
        self.dtype = half_type(self.device) or "float32"
        self.peak, self.share = None, "of peak" if self.device == "cpu" else "MFU"

    def begin(self, log):
        """Say where this runs, and find the peak that shares are taken of."""
        s = self.shape
        if self.device == "cpu":
            self.peak = matmul_peak("cpu", self.dtype, n=2048 if s.n_embd >= 64 else 64)
        else:
            self.peak = peak_flops(torch.device(self.device), self.dtype)
        heads = torch.empty(s.batch_size, s.n_head, s.block_size, s.n_embd // s.n_head, device=self.device)
        log.print(
            f"{self.size}: {s.n_layer} layers, {s.n_embd} wide, vocabulary {s.vocab_size:,}, {s.batch_size} x "
            f"{s.block_size} tokens a step | {self.device}, {torch.get_num_threads()} threads | attention: "
            f"{sdpa_backend(heads.to(getattr(torch, self.dtype)))}"
        )
        log.print(
            f"16-bit matmuls in hardware: {half_type(self.device) or 'none, so ours trains in float32'}"
            + (f" | peak {self.peak / 1e9:,.0f} GFLOP/s" if self.peak else "")
        )

    def compare(self, entrants, log):
        """Turns for everybody -> {label: facts}, and the FLOPs of a token."""
        facts = contest.contest(entrants, self.device, self.rounds, self.steps, log, self.own_process)
        return facts, first_weights(self.shape).flops_per_token()

    def show(self, rows, title, log, **more):
        """Table, picture, result.json."""
        log.print(contest.table(rows, self.share))
        contest.draw(rows, title, log.run_dir / "bench.png")
        log.finish("success", rows=rows, peak_flops=self.peak, size=self.size, **more)


# ---------------------------------------------------------------------------------------------------------------------
# the ladder


@dataclass
class Ladder(Bench):
    """The original's levers one after another, and ours on top: what each of them gains."""

    def rungs(self):
        """[(name, changed levers, kept, environment)]: a rung that is not kept is measured, and the next one leaves it
        out again."""
        cuda, linux_cpu = self.device == "cuda", self.device == "cpu" and can_keep_memory()
        rungs = [("float32, naive attention", {}, True, {})]
        rungs += [("TF32", {"tf32": True}, True, {})] if cuda else []
        rungs += [(self.half, {"dtype": self.half}, self.dtype == self.half, {})]
        rungs += [
            ("compile", {"compile": True}, True, {}),
            ("flash attention", {"attention": "sdpa"}, True, {}),
            ("vocabulary 50304", {"pad_vocab_to": 128}, True, {}),
            ("fused AdamW", {"fused_adamw": True}, True, {}),
        ]
        if hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
            rungs += [("the library's linear_cross_entropy", {"loss": "library"}, False, {})]
        rungs += [("chunked cross-entropy", {"loss": "chunked"}, True, {})]
        rungs += [("eager again", {"compile": False}, False, {})]
        rungs += [("memory settings", {}, True, CPU_MEMORY_SETTINGS)] if linux_cpu else []
        return rungs

    def run(self, log):
        """Measure all rungs in turns; table, picture and result.json."""
        self.begin(log)
        # The padded size's vocabulary without its padding: 50257, as GPT-2 has it.
        size = replace(self.shape, vocab_size=self.shape.vocab_size - 47 * (self.shape.vocab_size == 50304))
        levers = Levers("float32", False, False, "naive", 1, False, "plain")
        rungs, entrants = self.rungs(), {}
        for name, change, kept, env in rungs:
            tried = replace(levers, **change)
            entrants[name] = (ours, size, {"levers": tried}, env)
            levers = tried if kept else levers
        facts, flops = self.compare(entrants, log)
        rungs = [rung for rung in rungs if rung[0] in facts]
        rows, before = [], rungs[0][0]
        for name, _, kept, _ in rungs:
            ratio = facts[before]["seconds"] / facts[name]["seconds"]
            row = contest.row(
                "ladder", "ours", facts[name], size, flops, self.peak, ratio, "the speed of the rung before"
            )
            rows.append({**row, "lever": name, "kept": kept, "before": before})
            before = name if kept else before
        whole = rows[0]["seconds"] / facts[before]["seconds"]
        self.show(rows, f"Speed ladder, {self.size} on {self.device}", log, whole=whole)
        log.print(f"from the first rung to the last: {whole:.2f}x (rungs in grey are measured, but not climbed)")


# ---------------------------------------------------------------------------------------------------------------------
# the peers


@dataclass
class Peers(Bench):
    """Our step against transformers, its Trainer, nanoGPT and build-nanogpt, in turns."""

    nanogpt: str = field(default_factory=lambda: beside("nanoGPT/model.py"))
    """Checkout of karpathy/nanoGPT; empty: left out. One in the folder above is found by itself."""
    build_nanogpt: str = field(default_factory=lambda: beside("build-nanogpt/train_gpt2.py"))
    """Checkout of karpathy/build-nanogpt; empty: left out. One in the folder above is found by itself."""
    memory_settings: bool = False
    """Start every contestant, ours and theirs, with the memory settings of --cpu-memory-settings."""

    def run(self, log):
        """Measure everybody in turns; table, picture and result.json."""
        self.begin(log)
        env = CPU_MEMORY_SETTINGS if self.memory_settings else {}
        who = contestants(self.device, self.half, self.nanogpt, self.build_nanogpt)
        entrants = {label: (make, self.shape, kwargs, env) for label, (make, kwargs) in who.items()}
        if self.device == "cpu" and can_keep_memory() and not self.memory_settings and self.own_process:
            entrants["ours --cpu-memory-settings"] = (*entrants["ours"][:3], CPU_MEMORY_SETTINGS)
        facts, flops = self.compare(entrants, log)
        if "ours" not in facts:
            raise UsageError("our own step could not start, so there is nothing to compare with")
        mine = facts["ours"]["seconds"]
        rows = []
        for label, fact in facts.items():
            row = contest.row(
                "peers", label, fact, self.shape, flops, self.peak, fact["seconds"] / mine, "seconds of ours"
            )
            rows.append({**row, "memory_settings": bool(entrants[label][3])})
        self.show(rows, f"{self.size} on {self.device}", log, memory_settings=self.memory_settings)


# ---------------------------------------------------------------------------------------------------------------------
# ranks


@dataclass
class Scaling(Bench):
    """Tokens a second of 1, 2, 4, … of torchrun's processes, each with a whole batch; DistributedDataParallel."""

    def run(self, log):
        """Measure 1, 2, 4, … ranks, one count after another; collective, rank 0 reports."""
        ranks = self.ranks
        import torch.distributed as dist

        counts = sorted({2**k for k in range(ranks.world_size.bit_length()) if 2**k <= ranks.world_size})
        rows = []
        for n in sorted({*counts, ranks.world_size}):
            group = dist.new_group(list(range(n))) if dist.is_initialized() else None  # every rank has to ask for it
            if ranks.rank < n:
                one = contest.Here(ours, self.shape, self.device, {"levers": Levers(self.dtype), "group": group})
                took = sorted(one.turn(self.steps)[0] for _ in range(self.rounds))[self.rounds // 2]
                rows.append((n, took, one.facts))
            ranks.any(False)  # the others wait here
        flops = first_weights(self.shape).flops_per_token()
        for i, (n, took, facts) in enumerate(rows):
            facts |= {"seconds": took, "spread": 0.0, "turns": self.rounds, "last_loss": facts["first_loss"]}
            ratio = rows[0][1] / took  # of the time with one rank: 1.0 is perfect
            row = contest.row(
                "scaling", f"ours, {n} rank(s)", facts, self.shape, flops, self.peak, ratio, "one rank's speed a rank"
            )
            rows[i] = {**row, "ranks": n, "tok_per_sec": row["tok_per_sec"] * n, "efficiency": row["ratio"]}
        if ranks.main:
            self.show(rows, f"Scaling of {self.size} on {self.device}", log)


# ---------------------------------------------------------------------------------------------------------------------
# before and beside the steps


@dataclass
class Start(Bench):
    """HellaSwag against one item at a time, sampling against recomputing, the first step with and without a cache."""

    items: int = 64
    """HellaSwag items, of the lengths of real ones."""
    hellaswag_file: str = ""
    """Take the items' texts from here (.jsonl, .jsonl.gz); words stand for tokens. Empty: made-up lengths."""
    new_tokens: int = 48
    """Tokens to generate."""

    def run(self, log):
        """Measure the three pairs; a line each, and result.json."""
        self.begin(log)
        rows = starting.hellaswag_rows(self) + starting.sampling_rows(self) + starting.first_step_rows(self)
        for r in rows:
            speed = next((f"{r[k]:9.1f} {k.replace('_per_sec', '/s')}" for k in r if k.endswith("_per_sec")), "")
            log.print(
                f"{r['name']:<12} {r['who']:<28} {r['seconds']:8.2f} s {speed:<20} {r['ratio']:5.2f}x {r['ratio_to']}"
            )
        log.finish("success", rows=rows, size=self.size)


@dataclass
class Race(Bench):
    """Validation loss after so many seconds of wall time: the quickstart preset against nanoGPT's loop."""

    data_dir: str = str(ROOT / "data/corpora/pydocs")
    """Token shards."""
    nanogpt: str = field(default_factory=lambda: beside("nanoGPT/model.py"))
    """Checkout of karpathy/nanoGPT; empty: left out. One in the folder above is found by itself."""
    seconds: float = 120.0
    """Wall time of each, from the start of its process."""
    only: str = ""
    """Race those alone whose names contain this, and keep the others' figures that the run directory has."""
    adamw_lr: float = 3e-3
    """Learning rate of our AdamW run."""
    muon_adamw_lr: float = PRESETS["quickstart"].max_lr
    """AdamW's learning rate in our Muon run."""
    muon_lr: float = PRESETS["quickstart"].muon_lr
    """Muon's learning rate in our Muon run."""
    nanogpt_lr: tuple[float, ...] = (1e-3, 3e-3)
    """Learning rates of nanoGPT; the best one counts."""
    val_tokens: int = 65536
    """Validation tokens: the first so many."""
    seed: int = 1337
    """Seed of nanoGPT's weights and batches."""
    cpu_memory_settings: bool = False
    """Let ours train with --cpu-memory-settings."""

    def run(self, log):
        """Race one after another, or those of --only; a line each, and result.json."""
        done = {row["kind"]: row["figures"] for row in read_metrics(log.run_dir)} if self.only else {}
        for who, race_one in race.entrants(self).items():
            if self.only in who:
                done[who] = race_one()
                log.print(f"{who}: validation loss {done[who]['val_loss']:.4f} after {done[who]['seconds']:.0f} s")
            if who in done:
                log.metric(0, who, figures=done[who])
        rows = race.rows_of(done)
        for r in rows:
            ahead = f", {r['nats_ahead']:+.3f} nats ahead of nanoGPT" if r["nats_ahead"] is not None else ""
            log.print(f"{r['who']:<20} {r['val_loss']:.4f} | {r['steps']:>5} steps in {r['seconds']:.1f} s{ahead}")
        log.finish("success", rows=rows)


@dataclass
class Profile(Bench):
    """Which kernels a step spends its time in; a trace for chrome://tracing or ui.perfetto.dev."""

    top: int = 15
    """Kernels listed."""

    def run(self, log):
        """Profile one turn; the top kernels, trace.json.gz and result.json."""
        from torch.profiler import ProfilerActivity, profile

        self.begin(log)
        one = contest.Here(ours, self.shape, self.device, {"levers": Levers(self.dtype)})
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with profile(activities=activities) as profiler:
            seconds, loss = one.turn(self.steps)
        profiler.export_chrome_trace(str(log.run_dir / "trace.json.gz"))
        own = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        events = profiler.key_averages()
        if self.device == "cuda":  # an operator's time there is that of its kernels, which are events themselves
            on_gpu = torch.autograd.DeviceType.CUDA
            events = [e for e in events if e.device_type == on_gpu and not getattr(e, "is_user_annotation", False)]
        kernels = sorted(events, key=lambda e: -getattr(e, own))
        whole = sum(getattr(e, own) for e in kernels)
        rows = [
            {
                "name": "profile", "who": "ours", "kernel": e.key[:120], "calls": e.count,
                "seconds": getattr(e, own) / 1e6 / self.steps,
                "ratio": getattr(e, own) / whole, "ratio_to": "all kernels",
            }
            for e in kernels[: self.top]
        ]  # fmt: skip
        for r in rows:
            log.print(f"{r['seconds'] * 1e3:9.2f} ms {r['ratio']:6.1%} {r['calls']:>6} x {r['kernel'][:80]}")
        log.print(f"a step takes {seconds * 1e3:.1f} ms under the profiler; wrote trace.json.gz")
        log.finish("success", rows=rows, step_seconds=seconds, last_loss=loss, size=self.size)


@dataclass
class Resume(Bench):
    """Train compiled, kill -9 after a checkpoint, go on: metrics and weights have to equal those of a quiet run."""

    max_steps: int = 20
    """Optimizer steps."""
    compile: bool = True
    """Compiled, with deterministic kernels."""

    def run(self, log):
        """Kill, resume and compare; a difference is an error."""
        rows = starting.killed_and_resumed(self, log)
        log.finish("success", rows=rows, size=self.size)


def main():
    """Run the benchmark that the command line names, in a run directory of its own."""
    bench = tyro.cli(Ladder | Peers | Scaling | Start | Race | Profile | Resume, description=__doc__)
    bench.ranks = Ranks(bench.device) if isinstance(bench, Scaling) else None
    enabled, resume = bench.ranks is None or bench.ranks.main, bool(getattr(bench, "only", ""))
    settings = {f.name: portable(getattr(bench, f.name)) for f in fields(bench)}
    with RunLog(bench.run_dir, "bench_gpt2", settings, resume=resume, enabled=enabled) as log:
        bench.run(log)
    if bench.ranks:
        bench.ranks.close()


if __name__ == "__main__":
    cli(main)
