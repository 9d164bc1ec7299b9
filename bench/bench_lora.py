"""k adapters trained at once, by the Trainer one after another, and by a plain loop: time and memory.

    python bench/bench_lora.py                                     about four minutes on two cores
    python bench/bench_lora.py --device cuda --dtype bfloat16

All contenders train the same adapters from the same initial weights on the same rows in the same order, and have to end
with the same losses. Each runs in a process of its own, warmed up by a few steps; loading and set-up are not timed, and
of several repeats, in alternation, the fastest counts. `small` and `large` read rows of 32 tokens, their -64 twins of
64; in `busy` the base alone keeps the machine at work, so that there is little to gain. Gains are measured apart,
because their product would be nobody's measurement:

    batching    all positions learned, the same activation: only how the adapters are batched differs
    fast gelu   the engine with torch's kernel for BLOOM's and GPT-2's activation, against itself without
    early stop  half of the adapters stopped at a quarter of the steps, half of the rest at the half, against none
    masked      a quarter of the positions learned, eight times the vocabulary, against all logits computed

Every measurement stands in metrics.jsonl as soon as it is taken; result.json has the rows with their ratios.
"""

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import NamedTuple

import tyro

from common import UsageError, cli, peak_memory_mb, pick_device
from runlog import RunLog


class Size(NamedTuple):
    """What is trained: layers and width of the base, rows of a batch, tokens of a row, optimizer steps."""

    layers: int
    width: int
    batch_size: int
    tokens: int
    steps: int


SIZES = {
    "small": Size(2, 64, 1, 32, 40),
    "small-64": Size(2, 64, 1, 64, 40),
    "large": Size(4, 256, 1, 32, 16),
    "large-64": Size(4, 256, 1, 64, 12),
    "busy": Size(4, 256, 8, 64, 4),
}
CONTENDERS = ("trainer", "loop", "engine", "fast gelu", "early stop", "masked", "all logits")
WARM_UP = 3  # steps before the clock starts
LIBRARIES = ["torch", "transformers.trainer", "peft", "lora.multi_lora", "runlog"]


@dataclass
class BenchConfig:
    run_dir: str = "runs/bench_lora"  # where the records go
    family: str = "bloom"  # architecture of the random base: bloom, gpt2 or llama
    vocab_size: int = 1024  # tokens
    k: int = 8  # adapters
    repeats: int = 2  # runs of each contender, in alternation
    sizes: str = "small,small-64,large,large-64,busy"  # which of the sizes
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: str = "float32"  # of the base: float32 or bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


def base_model(cfg, size):
    """A random base of the family, the same in every process."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    n_layer, width, n_head = size.layers, size.width, size.width // 32
    shape = {
        "bloom": {"n_layer": n_layer, "hidden_size": width, "n_head": n_head},
        "gpt2": {
            "n_layer": n_layer, "n_embd": width, "n_head": n_head, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0,
        },
        "llama": {
            "num_hidden_layers": n_layer, "hidden_size": width, "num_attention_heads": n_head,
            "intermediate_size": 4 * width,
        },
    }[cfg.family]  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(cfg.family, vocab_size=cfg.vocab_size, **shape)
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

    masked = contender in ("masked", "all logits")
    cfg = replace(cfg, vocab_size=cfg.vocab_size * 8) if masked else cfg
    rows = random_rows(cfg, size.tokens, 0.25 if masked else 1.0)
    trained = MultiLora(base_model(cfg, size), adapters(cfg, size.steps), fast_gelu=contender == "fast gelu")
    if contender == "all logits":
        trained.nll = lambda batch: all_logits_nll(trained, batch)

    def train():
        for step in range(size.steps):
            if contender == "early stop" and step in (size.steps // 4, size.steps // 2):
                trained.keep(list(range(max(1, trained.k // 2))))
            batch = collate([rows[i] for i in batch_rows(len(rows), size.batch_size, step, 0)], 0)
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

    configs = adapters(cfg, size.steps)
    first = MultiLora(base_model(cfg, size), configs)
    for i, config in enumerate(configs):
        alike = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "bias": "none"}
        model = add_adapter(TrainConfig(base="", run_dir="", **alike), base_model(cfg, size))
        own = dict(model.named_parameters())
        for name, tensor in first.tensors(i).items():
            own[name.replace(".weight", ".default.weight")].data.copy_(tensor)
        yield config, model


def trainer(cfg, size, contender):
    """The stock Trainer, one adapter after another; only the order of the rows is given."""
    from transformers import PrinterCallback, Trainer, TrainingArguments

    from lora.tasks import collate, epoch_order

    rows = random_rows(cfg, size.tokens, 1.0)

    class Ordered(Trainer):
        def _get_train_sampler(self, train_dataset=None):
            epochs = -(-size.steps * size.batch_size // len(rows))
            return [i for epoch in range(epochs) for i in epoch_order(len(rows), epoch, 0)]

        def training_step(self, *args, **kwargs):
            self.last = super().training_step(*args, **kwargs)
            return self.last

    trainers = []
    for config, model in in_peft(cfg, size):
        args = TrainingArguments(
            output_dir=tempfile.gettempdir(), max_steps=size.steps, per_device_train_batch_size=size.batch_size,
            learning_rate=config.lr, save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=size.steps,
            remove_unused_columns=False, use_cpu=model.device.type == "cpu", bf16=cfg.dtype == "bfloat16",
            dataloader_pin_memory=False,
        )  # fmt: skip
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs would multiply the batch
        one = Ordered(model=model, args=args, train_dataset=rows, data_collator=lambda rows: collate(rows, 0))
        one.remove_callback(PrinterCallback)
        trainers.append(one)

    def train():
        for one in trainers:
            one.train()
        return [one.last.item() for one in trainers]

    return train


def loop(cfg, size, contender):
    """PEFT and a bare loop with torch's AdamW, one adapter after another: the Trainer's work without the Trainer."""
    import torch
    from transformers import get_scheduler

    from lora.tasks import batch_rows, collate

    rows, models = random_rows(cfg, size.tokens, 1.0), list(in_peft(cfg, size))

    def train_one(config, model):
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0)
        schedule = get_scheduler("linear", optimizer, 0, size.steps)
        for step in range(size.steps):
            batch = collate([rows[i] for i in batch_rows(len(rows), size.batch_size, step, 0)], 0)
            loss = model(**{name: x.to(model.device) for name, x in batch.items()}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        return loss.item()

    return lambda: [train_one(config, model) for config, model in models]


# ---------------------------------------------------------------------------------------------------------------------
# one measurement


def measure(cfg, size, contender):
    """Set up, warm up, train -> {seconds, cpu_seconds, peak_mb, losses}. peak_mb: beyond what the libraries take."""
    import torch

    from lora.generate import quiet_libraries

    quiet_libraries()
    make = {"trainer": trainer, "loop": loop}.get(contender, engine)
    cuda = torch.cuda.is_available() and cfg.device in ("auto", "cuda")
    before_all = peak_memory(cuda)
    make(cfg, size._replace(steps=WARM_UP), contender)()
    train = make(cfg, size, contender)
    wait = torch.cuda.synchronize if cuda else lambda: None
    wait()
    wall, cpu = time.perf_counter(), time.process_time()
    losses = train()
    wait()
    figures = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    return {**figures, "peak_mb": peak_memory(cuda) - before_all, "losses": losses}


def peak_memory(cuda):
    """The most MB that this process has held so far: of the GPU, or resident ones of the machine."""
    if cuda:
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    resident = peak_memory_mb()
    if resident is None:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    return resident


def apart(function, *args):
    """function(*args) in a process of its own -> its result; forked, where possible, from one with libraries loaded."""
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    if "forkserver" in known:
        context.set_forkserver_preload(LIBRARIES)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


# ---------------------------------------------------------------------------------------------------------------------
# all of them


def measure_size(cfg, name, log):
    """All contenders at one size, in alternation -> {contender: figures of its fastest run}."""
    best, size = {}, SIZES[name]
    wanted = [one for one in CONTENDERS if one != "fast gelu" or cfg.family in ("bloom", "gpt2")]
    for repeat in range(cfg.repeats):
        for contender in wanted:
            row = apart(measure, cfg, size, contender)
            log.metric(repeat, f"{name}/{contender}", **{k: v for k, v in row.items() if k != "losses"})
            if contender not in best or row["seconds"] < best[contender]["seconds"]:
                best[contender] = row
    losses = [best[contender]["losses"] for contender in ("engine", "trainer", "loop")]
    spread = max(max(same) - min(same) for same in zip(*losses))  # of the same adapter's last loss
    if cfg.dtype == "float32" and not spread < 1e-3:
        raise RuntimeError(f"{name}: the last losses differ by {spread:.2g}; the contenders did not do the same work")
    return best


def rows_of(cfg, name, best):
    """The figures of one size as rows, each with its ratio and what it is a ratio to."""
    gains = [("batching", one, "trainer") for one in ("engine", "loop", "trainer")]
    gains += [(one, one, "engine") for one in ("fast gelu", "early stop")] + [("masked", "masked", "all logits")]
    peers = {"trainer": f"transformers {version('transformers')}", "loop": f"peft {version('peft')}"}
    rows = []
    for gain, contender, other in gains:
        if contender in best:
            row, base = best[contender], best[other]
            rows.append({
                "name": f"{name}/{gain}/{contender}", "who": peers.get(contender, "ours"), "size": name,
                **SIZES[name]._asdict(), "k": cfg.k, "vocab_size": cfg.vocab_size * (8 if gain == "masked" else 1),
                "gain": gain, "seconds": round(row["seconds"], 4), "cpu_seconds": round(row["cpu_seconds"], 4),
                "peak_mb": round(row["peak_mb"], 1), "ratio": round(base["seconds"] / row["seconds"], 3),
                "cpu_ratio": round(base["cpu_seconds"] / row["cpu_seconds"], 3), "ratio_to": other,
            })  # fmt: skip
    return rows


def main():
    """Let all contenders train the same adapters, size by size; table and result.json."""
    cfg = tyro.cli(BenchConfig)
    names = cfg.sizes.split(",")
    for what, given, known in [("size", names, SIZES), ("family", [cfg.family], ("bloom", "gpt2", "llama"))]:
        if set(given) - set(known):
            raise UsageError(f"unknown {what} in {','.join(given)}; choose from {', '.join(known)}")
    import torch  # noqa: F401  so that env.json knows its version and threads

    with RunLog(cfg.run_dir, "lora_bench", cfg) as log:
        rows = []
        for name in names:
            new = rows_of(cfg, name, measure_size(cfg, name, log))
            rows += new
            for row in new:
                figures = f"{row['seconds']:8.2f} s {row['cpu_seconds']:8.2f} s cpu {row['peak_mb']:7.0f} MB"
                log.print(f"{row['name']:<30} {figures}   {row['ratio']:5.2f}x {row['ratio_to']}")
        log.finish("success", rows=rows)


if __name__ == "__main__":
    cli(main)
