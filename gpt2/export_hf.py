"""A checkpoint as a Hugging Face folder.

    python gpt2/export_hf.py --model runs/quickstart --out runs/quickstart/hf

Writes config.json, generation_config.json, model.safetensors, tokenizer.json and tokenizer_config.json, loads them with
transformers and compares the logits before the folder gets its name. The way back needs no conversion: --init of
train_gpt2.py, sample.py and hellaswag.py take a Hugging Face folder where they take a run.
"""

from dataclasses import dataclass

import torch
import tyro

from common import UsageError, atomic_folder, cli
from gpt2 import checkpoint


@dataclass
class ExportConfig:
    model: str  # run directory or checkpoint file to export
    out: str  # folder to write, replaced if it exists


@torch.no_grad()
def export(model, tokenizer, out):
    """Write `model` and `tokenizer` as a Hugging Face folder -> the largest difference of logits, reloaded.

    Raises AssertionError, and leaves nothing behind, if transformers computes something else from it.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    c, eot = model.config, tokenizer.eot_token
    if tokenizer.n_vocab != c.vocab_size:
        raise UsageError(f"the tokenizer has {tokenizer.n_vocab} ids, the model {c.vocab_size}: they do not match")
    config = GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout, bos_token_id=eot, eos_token_id=eot,
    )  # fmt: skip
    hf_model = GPT2LMHeadModel(config)
    missing, unexpected = hf_model.load_state_dict(model.hf_state_dict(), strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)  # lm_head is wte, tied

    with atomic_folder(out) as part:
        hf_model.save_pretrained(part)
        tokenizer.save_huggingface(part)
        reloaded = AutoModelForCausalLM.from_pretrained(part, dtype=torch.float32).eval()
        idx = torch.randint(c.vocab_size, (2, min(64, c.block_size)))  # (2, T)
        difference = float((model.double()(idx)[0] - reloaded.double()(idx).logits).abs().max())
        assert difference < 1e-9, f"transformers computes other logits, by {difference:.2e}"
    return difference


def main():
    """Export a checkpoint."""
    cfg = tyro.cli(ExportConfig, description=__doc__)
    difference = export(*checkpoint.load_model(cfg.model), cfg.out)
    print(f"wrote {cfg.out}: transformers' logits differ by at most {difference:.1e} in float64")


if __name__ == "__main__":
    cli(main)
