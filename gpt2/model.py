"""GPT-2, as Radford et al. (2019) published it and Hugging Face names it, on one screen after another.

`GPT(GPTConfig())` is the 124M model with fresh weights, `GPT.from_pretrained("gpt2")` the published one. Shapes in the
comments: B sequences, T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V vocabulary entries.
"""

import functools
import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import UsageError
from gpt2.config import GPTConfig


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what came before."""

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
        self.lm_head.weight = self.transformer.wte.weight  # shared: 30 % of the 124M, and a better model
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

        idx: (B, T) token ids, T <= block_size; targets: (B, T) ids of the next tokens, -1 where none is to be learned.
        cache: a `sample.KVCache` that holds the keys and values of earlier tokens.
        return_logits: False skips the (B, T, V) logits; the loss is then computed in chunks, with less memory.
        reduction: "mean" over the targets that are not -1, or their "sum".

        Returns (logits (B, T, vocab_size) or None, loss in nats or None).
        """
        x = self.hidden(idx, cache)  # (B, T, C)
        V = self.config.vocab_size
        logits = self.lm_head(x)[..., :V] if return_logits else None  # (B, T, V): the padding is cut off
        if targets is None:
            return logits, None
        if return_logits:
            wide = torch.promote_types(logits.dtype, torch.float32)
            loss = F.cross_entropy(
                logits.reshape(-1, V).to(wide), targets.reshape(-1), ignore_index=-1, reduction="sum"
            )
        else:
            x, compiling = x.flatten(0, 1), torch.compiler.is_compiling()  # (B * T, C)
            loss = chunked_cross_entropy(x, self.lm_head.weight, targets.reshape(-1), V, compiling)
        if reduction == "mean":
            loss = loss / (targets >= 0).sum()
        return logits, loss

    def hidden(self, idx, cache=None):
        """What the last norm gives for idx (B, T), before the output projection: (B, T, C)."""
        T = idx.shape[1]
        past = 0 if cache is None else cache.length
        if past + T > self.config.block_size:
            raise UsageError(f"{past + T} tokens do not fit into block_size {self.config.block_size}; shorten the text")
        pos = torch.arange(past, past + T, device=idx.device)  # (T,)
        if cache is not None:
            pos = cache.positions(T)  # (B, T): prompts of a batch begin at their own place
        x = self.transformer.wte(idx) + self.transformer.wpe(pos)  # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            x = block(x, cache)
        return self.transformer.ln_f(x)

    def num_params(self):
        """Parameters, shared ones once, the padding of the vocabulary left out."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(p.numel() for p in self.parameters()) - padding

    def flops_per_token(self):
        """Training FLOPs a token: 6 for each weight of a matmul, and attention's 12 n_layer n_embd T (PaLM, App. B)."""
        c = self.config
        matmul = sum(p.numel() for p in self.parameters() if p.dim() >= 2) - self.transformer.wpe.weight.numel()
        return 6 * matmul + 12 * c.n_layer * c.n_embd * c.block_size

    @classmethod
    def from_pretrained(cls, name_or_folder, dropout=0.0):
        """Published or exported weights: a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl) or a local folder."""
        from transformers import GPT2LMHeadModel

        if str(name_or_folder).count("/") > 1 and not Path(name_or_folder).exists():  # no hub name has two slashes
            raise UsageError(f"{name_or_folder} does not exist; give a folder, or a hub name such as gpt2")
        try:
            hf = GPT2LMHeadModel.from_pretrained(name_or_folder, dtype=torch.float32)
        except (OSError, ValueError) as e:
            first = str(e).splitlines()[0]
            raise UsageError(f"no GPT-2 weights at {name_or_folder!r}: {first} Give a local folder instead") from None
        c = hf.config
        odd = [k for k, v in PLAIN_GPT2.items() if getattr(c, k, v) != v]
        if odd:
            raise UsageError(
                f"{name_or_folder} is not a plain GPT-2: its {', '.join(odd)} differ; no such model is built here"
            )
        config = GPTConfig(
            block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
            dropout=dropout,
        )  # fmt: skip
        model = cls(config)
        model.load_hf_state_dict(hf.state_dict())
        return model

    def load_hf_state_dict(self, state):
        """Copy the tensors of a Hugging Face GPT-2; its Conv1D holds weights transposed, its wte has no padding."""
        ours = self.state_dict()
        with torch.no_grad():
            for name, tensor in ours.items():
                source = state["transformer.wte.weight"] if name == "lm_head.weight" else state[name]
                if name.endswith(CONV1D):
                    source = source.t()  # (in, out) -> (out, in)
                tensor[: source.shape[0]].copy_(source)

    def hf_state_dict(self):
        """The inverse of `load_hf_state_dict`: name -> tensor as Hugging Face has it; lm_head is wte, so left out."""
        V, state = self.config.vocab_size, {}
        for name, tensor in self.state_dict().items():
            if name == "transformer.wte.weight":
                tensor = tensor[:V]
            if name != "lm_head.weight":
                state[name] = (tensor.t() if name.endswith(CONV1D) else tensor).contiguous()
        return state


CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# What this file hard-codes; a folder that says otherwise is refused rather than computed wrongly.
PLAIN_GPT2 = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "n_inner": None,
    "tie_word_embeddings": True,
}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Output projection and cross-entropy in one, a few rows of logits at a time.

    At a vocabulary of 50,304 the logits and their gradient are by far the largest tensors of a step. Here the forward
    pass computes a chunk's logits, its loss and at once the gradients with respect to x and w, so that no more than a
    chunk ever exists; backward only scales them (the idea is Liger Kernel's, Hsu et al. 2024). The chunk is never
    normalised: exp(logits - max) goes through the matmuls as it is, and the sums divide what is (rows, C) narrow.

    forward(x (N, C), w (V_padded, C), targets (N,), vocab_size, compile) -> sum over targets >= 0 of -log p, float32 or
    wider. compile: compile the one pass over a chunk that is no matmul.
    """

    @staticmethod
    def forward(ctx, x, w, targets, vocab_size, compile=False):
        """Sum of the losses; the gradients are made on the way and kept in ctx."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(dtype, torch.float32)  # sums of exponentials need the range
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        rows = max(64, CHUNK_LOGITS.get(device, 2**28) // w.shape[0])  # of logits at once
        exp = _compiled_exp() if compile else _exp
        loss = torch.zeros((), dtype=wide, device=x.device)
        with torch.autocast(device, enabled=False):
            w_, x_ = w.to(dtype), x.to(dtype)
            buffer = x_.new_empty(min(rows, len(x)), len(w))  # one for all chunks: fresh memory costs page faults
            dx, dw = (torch.empty_like(t, dtype=wide) if needs_grad else None for t in (x, w))
            for i in range(0, len(x), rows):
                xc, tc = x_[i : i + rows], targets[i : i + rows]
                logits = torch.mm(xc, w_.t(), out=buffer[: len(xc)])  # (rows, V)
                known, at = (tc >= 0)[:, None], tc.clamp(min=0)  # (rows, 1), (rows,)
                correct = logits.gather(1, at[:, None]).to(wide)  # (rows, 1)
                e, top, total = exp(logits, vocab_size)  # (rows, V), (rows, 1), (rows, 1)
                loss += torch.where(known, total.log() + top - correct, 0.0).sum()
                if needs_grad:
                    # d loss / d logits = e / total - one-hot, and nothing where the target is -1
                    share = torch.where(known, 1 / total, 0.0)  # (rows, 1)
                    torch.mul(e @ w_, share, out=dx[i : i + rows]).sub_(w_[at] * known)  # (rows, C)
                    _add_product(dw, e.t(), (xc * share).to(dtype), first=i == 0)  # (V, C)
                    dw.index_add_(0, at, (xc * known).to(wide), alpha=-1)
        if needs_grad:
            ctx.grads = dx.to(x.dtype), dw.to(w.dtype)
        return loss

    @staticmethod
    def backward(ctx, grad):
        (dx, dw), ctx.grads = ctx.grads, None  # scaled in place, so good for one backward pass
        return dx.mul_(grad), dw.mul_(grad), None, None, None


# Logits in a chunk: fewer chunks read the weights less often, on a CPU 64 MB are enough of that.
CHUNK_LOGITS = {"cpu": 2**24}


def _exp(logits, vocab_size):
    """logits (rows, V) -> exp(logits - max), 0 in the vocabulary's padding; max and the sum of it, (rows, 1), wide."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide[:, vocab_size:] = -math.inf
    top = wide.amax(-1, keepdim=True)
    e = wide.sub_(top).exp_()
    return e.to(logits.dtype), top, e.sum(-1, keepdim=True)


@functools.cache
def _compiled_exp():
    return torch.compile(_exp, dynamic=False)


def _add_product(out, a, b, first):
    """out += a @ b, or out = a @ b for the first; in one pass where the types agree."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
    else:
        out.copy_(a @ b) if first else out.add_(a @ b)


@torch.compiler.disable
def chunked_cross_entropy(x, w, targets, vocab_size, compile):
    """`ChunkedCrossEntropy`, left alone by torch.compile: unrolled into its graph, n chunks compile n times as long."""
    if not torch.is_grad_enabled():  # a Function is asked for gradients all the same, and makes them on the way
        x, w = x.detach(), w.detach()
    return ChunkedCrossEntropy.apply(x, w, targets, vocab_size, compile)
