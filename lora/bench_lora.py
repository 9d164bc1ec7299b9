"""Time k adapters at once against the Hugging Face Trainer and a plain loop, which train them one after another.

    python lora/bench_lora.py --run-dir runs/bench_lora          about three minutes on two cores
    python lora/bench_lora.py --device cuda --dtype bfloat16

All contenders train the same adapters from the same initial weights on the same batches in the same order, and have to
end with the same losses. Each runs in a process of its own, for its peak memory and a cold start alike; loading and
set-up are not timed, and of several repeats, in alternation, the fastest counts. Gains are measured apart, because
their product would be nobody's measurement:

    batching    all positions learned, the same activation: only how the adapters are batched differs
    fast gelu   the engine with torch's kernel for BLOOM's and GPT-2's activation, against itself without
    early stop  half of the adapters stopped at a quarter of the steps, half of the rest at the half, against none
    masked      a quarter of the positions learned, eight times the vocabulary, against all logits computed

The size `busy`, where the base alone keeps the machine busy, shows where there is little to gain.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version

import tyro

from runlog import RunLog, UserError, cli

# name -> layers, width, batch size, tokens of a row, optimizer steps
SIZES = {"small": (2, 64, 1, 32, 100), "large": (4, 256, 1, 64, 30), "busy": (4, 256, 8, 128, 4)}
PROCESSES = ("engine", "trainer", "loop", "variants")
VARIANTS = ("plain", "gelu", "stops", "masked", "all_logits")  # of the engine, in one process; `plain` is the engine


@dataclass
class BenchConfig:
    run_dir: str = "runs/bench_lora"  # where the records go
    family: str = "bloom"  # architecture of the random base: bloom, gpt2 or llama
    vocab_size: int = 1024  # tokens
    k: int = 8  # adapters
    repeats: int = 1  # runs of each contender, in alternation
    sizes: str = "small,large,busy"  # which of the sizes
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "float32"  # of the base: float32 or bfloat16
    contender: str = ""  # SIZE/NAME: run this one alone in this process and print its figures as JSON


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


def base_model(cfg, n_layer, width):
    """A random base of the family, the same in every process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lora.generate import pick_device

    sizes = {
        "bloom": {"n_layer": n_layer, "hidden_size": width, "n_head": width // 32},
        "gpt2": {"n_layer": n_layer, "n_embd": width, "n_head": width // 32, "resid_pdrop": 0, "embd_pdrop": 0}
        | {"attn_pdrop": 0},
        "llama": {"num_hidden_layers": n_layer, "hidden_size": width, "num_attention_heads": width // 32}
        | {"intermediate_size": 4 * width},
    }
    if cfg.family not in sizes:
        raise UserError(f"unknown family {cfg.family}; choose from {', '.join(sizes)}")
    torch.manual_seed(0)
    config = AutoConfig.for_model(cfg.family, vocab_size=cfg.vocab_size, **sizes[cfg.family])
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype))
    return model.to(pick_device(cfg.device)).eval()


def adapters(cfg, steps):
    """The grid: ranks, scales and rates in turn; no dropout, so that all contenders can be compared exactly."""
    from lora.multi_lora import AdapterConfig

    grid = [(r, alpha, lr) for lr in (3e-4, 1e-3) for r in (4, 8) for alpha in (1, 8)]
    return [
        AdapterConfig(r=r, lora_alpha=alpha, lr=lr, seed=i, max_steps=steps)
        for i, (r, alpha, lr) in ((i, grid[i % len(grid)]) for i in range(cfg.k))
    ]


def random_rows(cfg, T, learned):
    """64 rows of T random tokens, the last `learned` part of each with labels."""
    import torch

    from lora.tasks import IGNORE

    ids = torch.randint(cfg.vocab_size, (64, T), generator=torch.Generator().manual_seed(0)).tolist()
    masked = round(T * (1 - learned))
    return [{"input_ids": row, "labels": [IGNORE] * masked + row[masked:]} for row in ids]


# ---------------------------------------------------------------------------------------------------------------------
# the contenders: each returns a function that trains and gives the last losses


def engine(cfg, size, contender):
    """The k adapters together."""
    from lora.multi_lora import MultiLora
    from lora.tasks import batch_rows, collate

    n_layer, width, b, T, steps = size
    masked = contender in ("masked", "all_logits")
    cfg = replace(cfg, vocab_size=cfg.vocab_size * 8) if masked else cfg
    rows = random_rows(cfg, T, 0.25 if masked else 1.0)
    trained = MultiLora(base_model(cfg, n_layer, width), adapters(cfg, steps), fast_gelu=contender == "gelu")
    if contender == "all_logits":
        trained.nll = lambda batch: all_logits_nll(trained, batch)

    def train():
        for step in range(steps):
            if contender == "stops" and step in (steps // 4, steps // 2):
                trained.keep(list(range(max(1, trained.k // 2))))
            batch = collate([rows[i] for i in batch_rows(len(rows), b, step, 0)], 0)
            losses, _, _ = trained.step(trained.forward(batch))
        return losses

    return train


def all_logits_nll(trained, batch):
    """The engine's loss the usual way: logits at all positions, the masked ones ignored afterwards."""
    import torch.nn.functional as F

    from lora.tasks import IGNORE

    k = trained.k
    both = (batch["input_ids"], batch["labels"])
    ids, labels = (x.expand(k, *x.shape[-2:]).flatten(0, 1).to(trained.device) for x in both)  # (k*b, T)
    logits = trained.model(ids, use_cache=False).logits[:, :-1].float()  # (k*b, T-1, V)
    nll = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="none")
    return nll.view(k, -1).sum(1), (labels[:, 1:] != IGNORE).view(k, -1).sum(1)


def in_peft(cfg, size):
    """The same adapters as PEFT models with the engine's initial weights, one after another -> (config, model)."""
    from lora.multi_lora import MultiLora
    from lora.train_lora import TrainConfig, add_adapter

    n_layer, width, _, _, steps = size
    configs = adapters(cfg, steps)
    first = MultiLora(base_model(cfg, n_layer, width), configs)
    for i, config in enumerate(configs):
        settings = TrainConfig(
            base="", run_dir="", r=config.r, lora_alpha=config.lora_alpha, lora_dropout=0.0, bias="none"
        )
        model = add_adapter(settings, base_model(cfg, n_layer, width))
        own = dict(model.named_parameters())
        for name, tensor in first.tensors(i).items():
            own[name.replace(".weight", ".default.weight")].data.copy_(tensor)
        yield config, model


def trainer(cfg, size, contender):
    """The stock Trainer, one adapter after another; only the order of the rows is given."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from lora.generate import pick_device
    from lora.tasks import collate, epoch_order

    _, _, b, T, steps = size
    rows, last = random_rows(cfg, T, 1.0), []

    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            return [i for epoch in range(-(-steps * b // len(rows))) for i in epoch_order(len(rows), epoch, 0)]

        def training_step(self, *args, **kwargs):
            self.last = super().training_step(*args, **kwargs)
            return self.last

    trainers = []
    for config, model in in_peft(cfg, size):
        args = TrainingArguments(
            output_dir=tempfile.gettempdir(), max_steps=steps, per_device_train_batch_size=b, learning_rate=config.lr,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=steps, remove_unused_columns=False,
            use_cpu=pick_device(cfg.device) == "cpu", bf16=cfg.dtype == "bfloat16", dataloader_pin_memory=False,
        )  # fmt: skip
        one = Ordered(model=model, args=args, train_dataset=rows, data_collator=lambda rows: collate(rows, 0))
        one.remove_callback(PrinterCallback)
        trainers.append(one)

    def train():
        for one in trainers:
            one.train()
            last.append(one.last.item())
        return last

    return train


def loop(cfg, size, contender):
    """PEFT and a bare loop with torch's AdamW, one adapter after another: the Trainer's work without the Trainer."""
    import torch
    from transformers import get_scheduler

    from lora.tasks import batch_rows, collate

    _, _, b, T, steps = size
    rows, models, last = random_rows(cfg, T, 1.0), list(in_peft(cfg, size)), []

    def train():
        for config, model in models:
            model.train()
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
            schedule = get_scheduler("linear", optimizer, 0, steps)
            for step in range(steps):
                batch = collate([rows[i] for i in batch_rows(len(rows), b, step, 0)], 0)
                loss = model(**{name: x.to(model.device) for name, x in batch.items()}).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            last.append(loss.item())
        return last

    return train


def run_contender(cfg, size, contender):
    """Set up, train, print one JSON line: {contender: seconds, CPU seconds, peak memory, last losses}."""
    from lora.generate import quiet_libraries

    quiet_libraries()
    make = {"trainer": trainer, "loop": loop}.get(contender, engine)
    names = VARIANTS if contender == "variants" else (contender,)
    if contender == "variants":
        engine(cfg, size, "plain")()  # not timed: the first run in a process pays for warming up
    rows = {name: timed(make(cfg, size, name), cfg) for name in names}
    print(json.dumps(rows))


def timed(train, cfg):
    """Call `train` -> its figures."""
    import psutil
    import torch

    cuda = torch.cuda.is_available() and cfg.device in ("auto", "cuda")
    before = time.perf_counter(), time.process_time()
    losses = train()
    if cuda:
        torch.cuda.synchronize()
    seconds, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
    memory = psutil.Process().memory_info()
    peak = torch.cuda.max_memory_allocated() if cuda else getattr(memory, "peak_wset", 0) or peak_rss()
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mb": peak / 2**20, "losses": losses}


def peak_rss():
    """Peak resident memory of this process, in bytes (Linux counts in kB, macOS in bytes)."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def measure(cfg, name, contender):
    """One run of one contender in a process of its own -> its figures."""
    command = [sys.executable, __file__, "--contender", f"{name}/{contender}", "--family", cfg.family]
    command += ["--vocab-size", str(cfg.vocab_size), "--k", str(cfg.k), "--device", cfg.device, "--dtype", cfg.dtype]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{name}/{contender} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_size(cfg, name, log):
    """All contenders at one size, in alternation -> {contender: figures of its fastest run}."""
    best = {}
    for repeat in range(cfg.repeats):
        for process in PROCESSES:
            for contender, row in measure(cfg, name, process).items():
                log.metric(repeat, f"{name}/{contender}", **{k: v for k, v in row.items() if k != "losses"})
                if contender not in best or row["seconds"] < best[contender]["seconds"]:
                    best[contender] = row
    ours, theirs = best["engine"]["losses"], best["trainer"]["losses"] + best["loop"]["losses"]
    apart = max(abs(a - b) for a, b in zip(ours * 2, theirs))
    if cfg.dtype == "float32" and apart > 1e-3:
        raise RuntimeError(f"{name}: the contenders' last losses differ by {apart:.2g}; they did not do the same work")
    return best


def rows_of(cfg, name, best):
    """The figures of one size as rows, each with its ratio and what it is a ratio to."""
    n_layer, width, b, T, steps = SIZES[name]
    about = {"size": name, "layers": n_layer, "width": width, "batch_size": b, "tokens": T, "steps": steps, "k": cfg.k}
    peers = {"trainer": f"transformers {version('transformers')}", "loop": f"peft {version('peft')}"}
    rows = []
    # what is gained, by whom, against whom
    gains = [("batching", "engine", "trainer"), ("batching", "loop", "trainer"), ("batching", "trainer", "trainer")]
    gains += [("fast gelu", "gelu", "plain")] if cfg.family in ("bloom", "gpt2") else []
    gains += [("masked", "masked", "all_logits"), ("early stop", "stops", "plain")]
    for gain, contender, other in gains:
        row = best[contender]
        rows.append({
            "name": f"{name}/{gain}/{contender}", "who": peers.get(contender, "ours"), **about, "gain": gain,
            "vocab_size": cfg.vocab_size * (8 if gain == "masked" else 1),
            "seconds": round(row["seconds"], 3), "cpu_seconds": round(row["cpu_seconds"], 3),
            "peak_mb": round(row["peak_mb"], 1) if gain == "batching" else None,
            "ratio": round(best[other]["seconds"] / row["seconds"], 3), "ratio_to": other,
            "cpu_ratio": round(best[other]["cpu_seconds"] / row["cpu_seconds"], 3),
        })  # fmt: skip
    return rows


def main():
    cfg = tyro.cli(BenchConfig)
    if cfg.contender:
        name, contender = cfg.contender.split("/")
        return run_contender(cfg, SIZES[name], contender)
    names = cfg.sizes.split(",")
    if set(names) - set(SIZES):
        raise UserError(f"unknown size in {cfg.sizes}; choose from {', '.join(SIZES)}")
    import torch  # noqa: F401  so that env.json knows its version and threads

    with RunLog(cfg.run_dir, "bench_lora", cfg) as log:
        rows = []
        for name in names:
            new = rows_of(cfg, name, measure_size(cfg, name, log))
            rows += new
            for row in new:
                figures = f"{row['seconds']:8.2f} s {row['cpu_seconds']:8.2f} s cpu {row['peak_mb'] or 0:8.0f} MB"
                log.print(f"{row['name']:<28} {figures}   {row['ratio']:5.2f}x {row['ratio_to']}")
        log.finish("success", rows=rows)


if __name__ == "__main__":
    cli(main)
