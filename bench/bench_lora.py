"""k adapters trained at once, by the Trainer one after another, and by a plain loop: time and memory.

    python bench/bench_lora.py                                     about four minutes on two cores
    python bench/bench_lora.py --device cuda --dtype bfloat16

All contestants train the same adapters from the same initial weights on the same rows in the same order, and have to
end with the same losses. Each turn is a fresh process, warmed up by a few steps; loading and set-up are not timed.
`small` and `large` read rows of 32 tokens, their -64 twins of 64; in `busy` the base alone keeps the hardware busy, so
that there is little to gain. Gains are measured apart, because nobody measured their product:

    batching    all positions have labels, the same activation: only how the adapters are batched differs
    fast gelu   the engine with torch's kernel for BLOOM's activation, against itself without
    early stop  half of the adapters stopped at a quarter of the steps, half of the rest at the half, against none
    masked      labels at a quarter of the positions, eight times the vocabulary, against all logits computed
"""

import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import cycle, islice, product
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro

from bench.baselines import stock_trainer
from bench.harness import BenchConfig, Contestant, finish, measured, open_log, row, take_turns
from common import ROOT, UsageError, cli, pick_device
from lora.base import add_adapter, quiet_libraries
from lora.multi_lora import AdapterConfig, MultiLora
from lora.tasks import IGNORE, batch_rows, collate, epoch_order
from lora.train_lora import TrainConfig


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
GAINS = [  # (gain, contestant, what its ratio is to)
    *(("batching", who, "trainer") for who in ("engine", "loop", "trainer")),
    *((who, who, "engine") for who in ("fast gelu", "early stop")), ("masked", "masked", "all logits"),
]  # fmt: skip
WARM_UP = 3  # steps before the clock starts


@dataclass(kw_only=True)
class Config(BenchConfig):
    run_dir: Path = ROOT / "runs" / "bench_lora"  # run directory to write: table, picture, result.json
    family: Literal["bloom", "llama"] = "bloom"  # architecture of the random base
    vocab_size: int = 1024  # tokens
    k: int = 8  # adapters
    sizes: str = "small,small-64,large,large-64,busy"  # which of the sizes
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base


# ---------------------------------------------------------------------------------------------------------------------
# what is trained


def base_model(cfg, size):
    """A random base of the family, the same in every process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.width // 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model(cfg.family, vocab_size=cfg.vocab_size, intermediate_size=4 * size.width, **shape)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype))
    return model.to(cfg.device).eval()


def adapters(cfg, steps):
    """The grid: ranks, scales and rates in turn; no dropout, so that all contestants can be compared exactly."""
    grid = islice(cycle(product((3e-4, 1e-3), (4, 8), (1, 8))), cfg.k)
    same = {"lora_dropout": 0.0, "bias": "none", "max_steps": steps}
    return [AdapterConfig(r=r, lora_alpha=alpha, lr=lr, seed=i, **same) for i, (lr, r, alpha) in enumerate(grid)]


def random_rows(cfg, T, labelled):
    """64 rows of T random tokens, the last `labelled` part of each with labels."""
    ids = torch.randint(cfg.vocab_size, (64, T), generator=torch.Generator().manual_seed(0)).tolist()
    masked = round(T * (1 - labelled))
    return [{"input_ids": row, "labels": [IGNORE] * masked + row[masked:]} for row in ids]


# ---------------------------------------------------------------------------------------------------------------------
# the contestants: each returns a function that trains and gives the last losses


def engine(cfg, size, who):
    """The k adapters together."""
    masked = who in ("masked", "all logits")
    cfg = replace(cfg, vocab_size=cfg.vocab_size * 8) if masked else cfg
    rows = random_rows(cfg, size.tokens, 0.25 if masked else 1.0)
    trained = MultiLora(base_model(cfg, size), adapters(cfg, size.steps), fast_gelu=who == "fast gelu")
    if who == "all logits":
        trained.nll = lambda batch: all_logits_nll(trained, batch)

    def train():
        for step in range(size.steps):
            if who == "early stop" and step in (size.steps // 4, size.steps // 2):
                trained.keep(list(range(max(1, trained.k // 2))))
            batch = collate([rows[i] for i in batch_rows(len(rows), size.batch_size, step, 0)], 0)
            losses, _, _ = trained.step(trained.forward(batch))
        return losses

    return train


def all_logits_nll(trained, batch):
    """The engine's loss the usual way: logits at all positions, the masked ones ignored afterwards."""
    k, both = trained.k, (batch["input_ids"], batch["labels"])
    ids, labels = (x.expand(k, *x.shape[-2:]).flatten(0, 1).to(trained.device) for x in both)  # (k*b, T)
    logits = trained.model(ids, use_cache=False).logits[:, :-1].float()  # (k*b, T-1, V)
    options = {"ignore_index": IGNORE, "reduction": "none"}
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), **options)
    return nll.view(k, -1).sum(1), (labels[:, 1:] != IGNORE).view(k, -1).sum(1)


def in_peft(cfg, size):
    """The same adapters as PEFT models with the engine's initial weights, one after another -> (config, model)."""
    configs = adapters(cfg, size.steps)
    first = MultiLora(base_model(cfg, size), configs)
    for i, config in enumerate(configs):
        alike = {"r": config.r, "lora_alpha": config.lora_alpha, "lora_dropout": 0.0, "bias": "none"}
        model = add_adapter(TrainConfig(base="", run_dir="", **alike), base_model(cfg, size))
        own = dict(model.named_parameters())
        for name, tensor in first.tensors(i).items():
            own[name.replace(".weight", ".default.weight")].data.copy_(tensor)
        yield config, model


def trainer(cfg, size, who):
    """The stock Trainer, one adapter after another; only the order of the rows is given."""
    rows, epochs = random_rows(cfg, size.tokens, 1.0), range(-(-size.steps * size.batch_size // 64))
    order = [i for epoch in epochs for i in epoch_order(len(rows), epoch, 0)]
    settings = {
        "max_steps": size.steps,
        "per_device_train_batch_size": size.batch_size,
        "bf16": cfg.dtype == "bfloat16",
    }
    trainers = [
        stock_trainer(
            model, rows, cfg.device, order, lambda rows: collate(rows, 0), learning_rate=config.lr,
            remove_unused_columns=False, **settings,
        )
        for config, model in in_peft(cfg, size)
    ]  # fmt: skip
    return lambda: [(one.train(), one.last.item())[1] for one in trainers]


def loop(cfg, size, who):
    """PEFT and a bare loop with torch's AdamW, one adapter after another: the Trainer's work without the Trainer."""
    from transformers import get_scheduler

    rows, models = random_rows(cfg, size.tokens, 1.0), list(in_peft(cfg, size))

    def train_one(config, model):
        """Train one adapter -> its last loss."""
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
# all of them


def measure(cfg, size, who):
    """Set up and warm up a contestant -> its `turn`; peak_mb is what it takes beyond the libraries."""
    quiet_libraries()
    make = {"trainer": trainer, "loop": loop}.get(who, engine)

    def turn():
        with measured(cfg.device) as whole:
            make(cfg, size._replace(steps=WARM_UP), who)()
            train, cpu = make(cfg, size, who), time.process_time()
            with measured(cfg.device) as timed:
                losses = train()
            cpu = time.process_time() - cpu
        return {"seconds": timed["seconds"], "cpu_seconds": cpu, "peak_mb": whole["peak_mb"], "losses": losses}

    return turn


def measure_size(cfg, name, log):
    """All contestants at one size, in turns -> rows, each with its ratio and what it is a ratio to."""
    size, wanted = SIZES[name], ["trainer", "loop", "engine", "fast gelu", "early stop", "masked", "all logits"]
    if cfg.family == "llama":
        wanted.remove("fast gelu")
    facts = take_turns({who: Contestant(measure, (cfg, size, who)) for who in wanted}, cfg, log, name)
    losses = [facts[who]["losses"] for who in ("engine", "trainer", "loop") if "losses" in facts[who]]
    apart = max(max(same) - min(same) for same in zip(*losses))  # of the same adapter's last loss
    if cfg.dtype == "float32" and not apart < 1e-3:
        raise RuntimeError(f"{name}: the last losses differ by {apart:.2g}; the contestants did not do the same work")
    libraries = {"trainer": f"transformers {version('transformers')}", "loop": f"peft {version('peft')}"}
    rows = []
    for gain, who, other in GAINS:
        if who in facts:
            more = {"size": name, **size._asdict(), "k": cfg.k, "gain": gain, "device": cfg.device}
            more["vocab_size"] = cfg.vocab_size * (8 if gain == "masked" else 1)
            both, label = (facts[who], facts[other]), f"{name}/{gain}/{who}"
            rows.append(row(label, libraries.get(who, "ours"), *both, other, speedup=True, **more))
    return rows


def main():
    """Let all contestants train the same adapters, size by size; table and result.json."""
    cfg = tyro.cli(Config, description=__doc__)
    names = cfg.sizes.split(",")
    if set(names) - set(SIZES):
        raise UsageError(f"unknown size in {cfg.sizes}; choose from {', '.join(SIZES)}")
    cfg.device = pick_device(cfg.device).type
    with open_log(cfg, "bench_lora") as log:
        rows = [r for name in names for r in measure_size(cfg, name, log)]
        finish(log, rows, "ratio", device=cfg.device)


if __name__ == "__main__":
    cli(main)
