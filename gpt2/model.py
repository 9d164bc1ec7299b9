"""GPT-2 (Radford et al. 2019), with the parameter names of Hugging Face.

`GPT(GPTConfig())` is the 124M model with fresh weights, `GPT.from_pretrained("gpt2")` the published one. Shapes in the
comments: B sequences, T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V vocabulary entries.
"""

import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UsageError
from gpt2.config import GPTConfig
from gpt2.cross_entropy import chunked_cross_entropy

# What this file hard-codes; a Hugging Face model that differs is refused rather than computed wrongly.
PLAIN_GPT2 = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "n_inner": None, "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # weights that Hugging Face's GPT-2 stores transposed


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # q, k, v of all heads in one matmul
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C); with a cache, x continues the columns that it holds."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # 3 x (B, T, C)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        dropout = self.dropout if self.training else 0.0
        if cache is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)  # (B, nh, T, hs)
        else:
            k, v, mask = cache.append(self, k, v)  # (B, nh, S, hs) with S >= T: the past as well; mask (B, 1, T, S)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Four times wider, GELU (GPT-2's tanh approximation), and back."""

    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), each position by itself."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    """Pre-norm residual block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        """x (B, T, C) -> (B, T, C): both parts add to the residual stream."""
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. Its state dict has the names of Hugging Face's GPT2LMHeadModel."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # weight tying: 30 % of the 124M's parameters
        self.apply(self._init_weights)

    def _init_weights(self, module):
        """Normal with std 0.02, zero biases; projections into the residual stream scaled by 1/sqrt(2 n_layer).

        Each block adds two terms to the stream, so its variance would otherwise grow with depth (GPT-2 paper, 2.3).
        """
        if isinstance(module, nn.Linear | nn.Embedding) and module is not self.lm_head:  # lm_head is wte, done once
            nn.init.normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, CausalSelfAttention | MLP):  # children come first in apply, so this has the last word
            nn.init.normal_(module.c_proj.weight, std=0.02 / math.sqrt(2 * self.config.n_layer))

    def forward(self, idx, targets=None, *, cache=None, return_logits=True, reduction="mean"):
        """Predict the next token at every position.

        idx: (B, T) token ids, T <= block_size; targets: (B, T) ids of the next tokens, -1 to ignore a position.
        cache: a `sample.KVCache` with the keys and values of earlier tokens.
        return_logits: False skips the (B, T, V) logits; the loss is then computed in chunks, with less memory.
        reduction: "mean" over the targets that are not -1, or their "sum".

        Returns (logits (B, T, vocab_size) or None, loss in nats or None).
        """
        T, V, block_size = idx.shape[1], self.config.vocab_size, self.config.block_size
        if block_size < T:
            raise UsageError(f"{T} tokens do not fit into block_size {block_size}; shorten the text")
        # (T,), or with a cache (B, T): each prompt of a batch begins at its own column
        pos = torch.arange(T, device=idx.device) if cache is None else cache.positions(T)
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        if self.config.low_precision_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # what the blocks add to it has that type already
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
        x = self.transformer.ln_f(x)
        logits = self.lm_head(x)[..., :V] if return_logits else None  # (B, T, V): the padding is cut off
        if targets is None:
            return logits, None
        if return_logits:
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(logits.flatten(0, 1).to(wide), targets.flatten(), ignore_index=-1, reduction="sum")
        else:
            x, compiling = x.flatten(0, 1), torch.compiler.is_compiling()  # (B * T, C)
            loss = chunked_cross_entropy(x, self.lm_head.weight, targets.flatten(), V, compiling)
        if reduction == "mean":
            loss = loss / (targets >= 0).sum()
        return logits, loss

    def num_params(self):
        """Number of parameters, shared ones counted once, without the padding of the vocabulary."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self):
        """Training FLOPs a token, 6 N + 12 n_layer n_embd T (PaLM, appendix B): 854.7 million for GPT-2 124M.

        N: weights of matmuls, the vocabulary with its padding: no biases, norms or position embeddings.
        """
        c = self.config
        N = sum(p.numel() for p in self.parameters() if p.dim() >= 2) - self.transformer.wpe.weight.numel()
        return 6 * N + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """Published or exported weights: a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a local folder."""
        from transformers import GPT2LMHeadModel

        if str(name_or_folder).count("/") > 1 and not Path(name_or_folder).exists():  # no hub name has two slashes
            raise UsageError(f"{name_or_folder} does not exist; give a folder, or a hub name such as gpt2")
        try:
            hf = GPT2LMHeadModel.from_pretrained(name_or_folder, dtype=torch.float32)
        except (OSError, ValueError) as e:
            why = str(e).splitlines()[0]
            raise UsageError(f"no GPT-2 weights at {name_or_folder!r}: {why} Give a local folder instead") from None
        c = hf.config
        if odd := [k for k, v in PLAIN_GPT2.items() if getattr(c, k, v) != v]:
            raise UsageError(f"{name_or_folder} is not a plain GPT-2: its {', '.join(odd)} differ")
        shape = {"block_size": c.n_positions, "n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.n_embd}
        model = cls(GPTConfig(vocab_size=c.vocab_size, dropout=dropout, **shape))
        model.load_hf_state_dict(hf.state_dict())
        return model

    def load_hf_state_dict(self, state):
        """Copy the tensors of a Hugging Face GPT-2; its Conv1D holds weights transposed, its wte has no padding."""
        with torch.no_grad():
            for name, p in self.named_parameters():  # lm_head is wte, so not among them
                source = state[name].t() if name.endswith(CONV1D) else state[name]  # (in, out) -> (out, in)
                p[: len(source)].copy_(source)

    def hf_state_dict(self):
        """The inverse of `load_hf_state_dict`: name -> tensor as Hugging Face has it; lm_head is wte, so left out."""
        state = {name: p.detach() for name, p in self.named_parameters()}
        state["transformer.wte.weight"] = state["transformer.wte.weight"][: self.config.vocab_size]
        return {name: (t.t() if name.endswith(CONV1D) else t).contiguous() for name, t in state.items()}


def meta_model(cfg, vocab_size):
    """The model of a TrainConfig on the meta device: shapes without memory, however large it is."""
    with torch.device("meta"):
        return GPT(GPTConfig(vocab_size=vocab_size, **cfg.shape))
