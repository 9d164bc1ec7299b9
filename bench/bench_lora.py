"""k adapters trained at once, by the Trainer one after another, and by a plain loop: time and memory.

    python bench/bench_lora.py                                     about four minutes on two cores
    python bench/bench_lora.py --device cuda --dtype bfloat16

All contestants train the same adapters from the same initial weights on the same rows in the same order, and have to
end with the same losses. Each turn is a fresh process, warmed up by a few steps; loading and set-up are not timed.
`small` and `large` read rows of 32 tokens, their -64 twins of 64; in `busy` the base alone keeps the hardware busy, so
that there is little to gain. All have the same activation, so that only how the adapters are batched differs; `fast
gelu` is the engine as a sweep runs it, with torch's kernel for BLOOM's activation.
"""

from collections import namedtuple
from dataclasses import dataclass
from importlib.metadata import version
from itertools import cycle, islice, product
from typing import Literal

import torch
import tyro
from peft import get_peft_model, set_peft_model_state_dict
from transformers import AutoConfig, AutoModelForCausalLM

from bench.baselines import stock_trainer
from bench.harness import BenchConfig, Contestant, finish, open_log, row, take_turns, timed
from common import cli, keep_freed_memory, pick_device
from lora.base import peft_config, quiet_libraries
from lora.multi_lora import AdapterConfig, MultiLora

# What is trained: layers and width of the base, rows of a batch, tokens of a row, optimizer steps.
Size = namedtuple("Size", "layers width batch_size tokens steps")
SIZES = {
    "tiny": Size(1, 32, 2, 8, 4),
    "small": Size(2, 64, 1, 32, 40),
    "small-64": Size(2, 64, 1, 64, 40),
    "large": Size(4, 256, 1, 32, 16),
    "large-64": Size(4, 256, 1, 64, 12),
    "busy": Size(4, 256, 8, 64, 4),
}


@dataclass(kw_only=True)
class Config(BenchConfig):
    family: Literal["bloom", "llama"] = "bloom"  # architecture of the random base
    vocab_size: int = 1024  # tokens
    k: int = 8  # adapters
    sizes: tuple[Literal[*SIZES], ...] = ("small", "small-64", "large", "large-64", "busy")  # what to train
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the base


def base_model(cfg, size):
    """A random base of the family, the same in every process."""
    shape = {"hidden_size": size.width, "num_hidden_layers": size.layers, "num_attention_heads": size.width // 32}
    torch.manual_seed(0)
    config = AutoConfig.for_model(cfg.family, vocab_size=cfg.vocab_size, intermediate_size=4 * size.width, **shape)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, cfg.dtype)).to(cfg.device).eval()


def batches(cfg, size):
    """Random rows for each step, the same in every process, (steps, B, T); all positions are labels."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(cfg.vocab_size, (size.steps, size.batch_size, size.tokens), generator=generator)


def multi_lora(cfg, size, who=""):
    """The engine with ranks, scales and rates in turn; no dropout, so that contestants can be compared exactly."""
    grid = islice(cycle(product((3e-4, 1e-3), (4, 8), (1, 8))), cfg.k)
    same = {"lora_dropout": 0.0, "bias": "none", "lr_scheduler": "constant"}
    configs = [AdapterConfig(r=r, lora_alpha=alpha, lr=lr, seed=i, **same) for i, (lr, r, alpha) in enumerate(grid)]
    return MultiLora(base_model(cfg, size), configs, fast_gelu=who == "fast gelu")


def in_peft(cfg, size):
    """The same adapters as PEFT models with the engine's initial weights, one after another -> (config, model)."""
    first = multi_lora(cfg, size)
    for i, config in enumerate(first.configs):
        model = base_model(cfg, size)
        model = get_peft_model(model, peft_config(config, model))
        set_peft_model_state_dict(model, first.tensors(i))
        yield config, model


def engine(cfg, size, who):
    """The k adapters together -> a function that trains and gives the last losses, as `trainer` and `loop` do."""
    keep_freed_memory(cfg.device)  # as lora/sweep.py does
    trained = multi_lora(cfg, size, who)
    inputs = [{"input_ids": ids, "labels": ids} for ids in batches(cfg, size)]
    return lambda: [trained.step(trained.forward(batch))[0] for batch in inputs][-1]


def trainer(cfg, size, who):
    """The stock Trainer, one adapter after another."""
    rows = [{"input_ids": ids, "labels": ids} for ids in batches(cfg, size).flatten(0, 1)]
    settings = {"max_steps": size.steps, "per_device_train_batch_size": size.batch_size}
    settings |= {"lr_scheduler_type": "constant", "bf16": cfg.dtype == "bfloat16"}
    trainers = [stock_trainer(m, rows, cfg.device, learning_rate=c.lr, **settings) for c, m in in_peft(cfg, size)]
    return lambda: [(one.train(), one.last.item())[1] for one in trainers]


def loop(cfg, size, who):
    """PEFT and a bare loop with torch's AdamW, one adapter after another: the Trainer's work without the Trainer."""

    def train(config, model):
        """One adapter's steps -> its last loss."""
        optimizer = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0)
        for ids in batches(cfg, size).to(cfg.device):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    models = [(config, model.train()) for config, model in in_peft(cfg, size)]
    return lambda: [train(*one) for one in models]


CONTESTANTS = {"trainer": trainer, "loop": loop, "engine": engine, "fast gelu": engine}


def measure(cfg, size, who):
    """Set up and warm up a contestant -> its `turn`; peak_mb is what training takes beyond the models."""
    quiet_libraries()
    CONTESTANTS[who](cfg, size._replace(steps=3), who)()  # a few steps before the clock starts
    return timed(CONTESTANTS[who](cfg, size, who), "losses", cfg.device)


def measure_size(cfg, name, log):
    """All contestants at one size, in turns -> rows; the ratio is their speed over the Trainer's."""
    size, names = SIZES[name], {"trainer": f"transformers {version('transformers')}", "loop": f"peft {version('peft')}"}
    facts = take_turns({who: Contestant(measure, (cfg, size, who)) for who in CONTESTANTS}, cfg, log, name)
    losses = [facts[who]["losses"] for who in ("engine", "trainer", "loop") if "losses" in facts[who]]
    apart = max(max(same) - min(same) for same in zip(*losses))  # of the same adapter's last loss
    if cfg.dtype == "float32" and not apart < 1e-3:
        raise RuntimeError(f"{name}: the last losses differ by {apart:.2g}; the contestants did not do the same work")
    more = {"size": name, **size._asdict(), "k": cfg.k, "vocab_size": cfg.vocab_size, "device": cfg.device}
    more |= {"other": facts["trainer"], "ratio_to": "trainer", "speedup": True}
    return [row(f"{name}/{who}", names.get(who, "ours"), f, **more) for who, f in facts.items()]


def main():
    """Let all contestants train the same adapters, size by size; table and result.json."""
    cfg = tyro.cli(Config, description=__doc__)
    cfg.device = pick_device(cfg.device).type
    with open_log(cfg, "bench_lora") as log:
        rows = [r for name in cfg.sizes for r in measure_size(cfg, name, log)]
        finish(log, rows, "ratio", device=cfg.device)


if __name__ == "__main__":
    cli(main)
