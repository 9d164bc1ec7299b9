"""Adapters at once against PEFT on all families of causal LMs that transformers has, each as a tiny random model.

    python bench/bench_families.py              about five minutes on two cores; leaves a run directory, and resumes
    python bench/bench_families.py llama opt    these alone

Each family, with the targets `auto` and `all-linear`, is trained exactly as PEFT does or refused in one line. One that
no small config builds is told apart: nothing was tried.
"""

import multiprocessing
import resource
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
import tyro
from peft import PeftModel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from common import ROOT, UsageError, cli
from lora.base import AdapterConfig, load_base, quiet_libraries, without_noise
from lora.multi_lora import MultiLora
from lora.tasks import IGNORE
from runlog import RunLog, read_run

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "ffn_dim": 64,
    "word_embed_proj_dim": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "d_model": 32,
    "decoder_ffn_dim": 64, "state_size": 8, "sliding_window": 64, "rotary_dim": 8, "mamba_n_heads": 8,
    "mamba_d_head": 8,
}  # fmt: skip


# What some families need besides: the first of these with which a model runs.
BESIDES = (
    {}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4, "num_key_value_heads": 4}, {"head_dim": 16},
    {"num_hidden_layers": 8}, {"num_heads": 8}, {"is_decoder": True, "attention_types": [[["global", "local"], 1]]},
)  # fmt: skip


def family_config(name, **changes):
    """A small config of one of transformers' families: what of SMALL it and its parts know."""

    def has(known, name):
        try:
            return hasattr(known, name) and setattr(known, name, getattr(known, name)) is None
        except Exception:  # refused where it differs from layer to layer, or cannot be set
            return False

    def small(known):
        parts = {part: getattr(known, part, None) for part in known.sub_configs}
        values = {k: v for k, v in {**SMALL, **changes}.items() if has(known, k)}
        return values | {part: small(config) for part, config in parts.items() if hasattr(config, "sub_configs")}

    changes |= {"gemma2": {"final_logit_softcapping": 1.0}}.get(name, {})
    return AutoConfig.for_model(name, **small(AutoConfig.for_model(name)))


def family_model(name):
    """A random float64 model of one of transformers' families, its noise switched off as `load_base` does.

    The first of a few small configs with which it runs; otherwise what the last one raised.
    """
    for changes in BESIDES:
        torch.manual_seed(0)
        try:
            config = without_noise(family_config(name, **changes))
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
            with torch.no_grad():
                for p in model.parameters():  # a router of zeros would choose its experts by rounding
                    if p.ndim > 1 and not p.any():
                        p.normal_(std=0.1)
                model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3).long())
            return model
        except Exception as e:
            error = e
    raise error


# what load_base gets instead of what from_pretrained gives
LOADED = {AutoConfig: lambda name: family_model(name).config, AutoModelForCausalLM: family_model}
TARGETS, STEPS, MEMORY, SECONDS = ("auto", "all-linear"), 6, 10 * 2**30, 300


def batches(vocab_size):
    """Random rows, one of them filled up on the right, half of the positions targets."""
    g = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        ids = torch.randint(1, vocab_size, (3, 12), generator=g)
        labels = torch.where(torch.rand(ids.shape, generator=g) < 0.5, ids, IGNORE)
        labels[0, 7:] = IGNORE
        yield {"input_ids": ids, "labels": labels}


def compare(name, targets):
    """Train two adapters at once, and the first by PEFT -> (largest difference of losses, of logits after reloading).

    UsageError where the engine refuses the family.
    """
    with patch("lora.base.load_pretrained", lambda kind, name, **_: LOADED[kind](name)):
        model = load_base(name, "float64")
    data = list(batches(min(290, model.config.get_text_config(decoder=True).vocab_size)))
    same = {"lora_dropout": 0.0, "bias": "none", "target_modules": targets, "max_steps": 20}
    # At lr 1e-2 AdamW enlarges what gemma4_unified rounds to float32, 1e-9 of a gradient, to 4e-5 of a loss.
    config, other = AdapterConfig(r=3, lora_alpha=6, lr=1e-3, **same), AdapterConfig(r=2, lr=1e-1, seed=4, **same)
    engine = MultiLora(model, [config, other])
    with tempfile.TemporaryDirectory() as folder:
        engine.save(0, f"{folder}/start")
        losses = [engine.step(engine.forward(batch))[0][0] for batch in data]
        engine.save(0, f"{folder}/end")
        trained, loaded = (
            PeftModel.from_pretrained(family_model(name), f"{folder}/{when}", is_trainable=True)
            for when in ("start", "end")
        )
    optimizer = torch.optim.AdamW([p for p in trained.train().parameters() if p.requires_grad], weight_decay=0.0)
    apart = []
    for step, batch in enumerate(data):
        logits = trained(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
        apart.append(abs(loss.item() - losses[step]))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = config.lr_at(step)
        optimizer.step()
        optimizer.zero_grad()
    ids = data[0]["input_ids"]
    with engine.alone(0) as model:
        return max(apart), (model(input_ids=ids).logits - loaded.eval()(input_ids=ids).logits).abs().max().item()


def outcome(name, targets):
    """What became of a family -> {"outcome": exact, refused, wrong, traceback or not built; …}"""
    try:
        family_model(name)
    except Exception as e:
        return {"outcome": "not built", "why": f"{type(e).__name__}: {e}".splitlines()[0][:200]}
    try:
        loss, reload = compare(name, targets)
    except UsageError as e:
        return {"outcome": "wrong" if "\n" in str(e) else "refused", "why": str(e)}
    except Exception:
        return {"outcome": "traceback", "why": traceback.format_exc()[-2000:]}
    return {"outcome": "exact" if max(loss, reload) < 1e-6 else "wrong", "loss_apart": loss, "logits_apart": reload}


def work(name, pipe):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))  # a config that stays large fails by itself
    torch.set_num_threads(1)
    for targets in TARGETS:
        pipe.send(outcome(name, targets))


@dataclass
class Config:
    families: tyro.conf.Positional[tuple[str, ...]] = ()  # of transformers, as its configs call them; none: all
    run_dir: Path = ROOT / "runs/bench_families"  # run directory; what is there already is not done again


def main():
    """All families, each in a process of its own."""
    cfg = tyro.cli(Config, description=__doc__)
    quiet_libraries()
    with RunLog(cfg.run_dir, "bench_families", cfg, resume=True) as log:
        done = {row["kind"] for row in read_run(cfg.run_dir).metrics if row["outcome"] != "no result"}
        for number, name in enumerate(tqdm(cfg.families or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), disable=None)):
            if done.issuperset(f"{name}/{targets}" for targets in TARGETS):
                continue
            here, there = multiprocessing.Pipe()
            process = multiprocessing.get_context("fork").Process(target=work, args=(name, there))
            process.start()
            there.close()
            for targets in TARGETS:
                lost = {"outcome": "no result", "why": f"more than {SECONDS} s, or than {MEMORY / 2**30:.0f} GB"}
                try:
                    row = here.recv() if here.poll(SECONDS) else lost
                except EOFError:
                    row = lost
                log.metric(number, f"{name}/{targets}", **row)
                why = row.get("why", "").splitlines() or [""]
                log.print(f"{name:24} {targets:10} {row['outcome']:9} {why[-1]}")
            process.kill()
            process.join()
        rows = read_run(cfg.run_dir).metrics
        counts = {t: Counter(row["outcome"] for row in rows if row["kind"].endswith(f"/{t}")) for t in TARGETS}
        log.print(str(counts))
        log.finish("success", **counts)


if __name__ == "__main__":
    cli(main)
