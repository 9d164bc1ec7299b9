"""Fused output projection and cross-entropy, a chunk of rows at a time.

At a vocabulary of 50,304 the logits and their gradient are by far the largest tensors of a step: 6.6 GB each for 32 x
1024 positions in float32. Here no more than one chunk of them exists at any time.
"""

import functools
import math

import torch

# Logits in a chunk (elements). Fewer chunks read the weights less often; on a CPU 64 MB are enough.
CHUNK_LOGITS = {"cpu": 2**24, "cuda": 2**28, "mps": 2**28}


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over targets >= 0 of -log softmax(x @ w.T)[target], with both gradients computed in the forward pass.

    For each chunk the forward pass computes the logits, the loss and at once the gradients with respect to x and w, so
    that backward only scales them (the idea is Liger Kernel's, Hsu et al. 2024). Probabilities are never normalised:
    exp(logits - max) goes through the matmuls, and the sums divide the narrow (rows, C) results.
    """

    @staticmethod
    def forward(ctx, x, w, targets, vocab_size, compile=False):
        """x (N, C), w (V_padded, C), targets (N,), -1 to ignore -> summed loss in nats, float32 or wider.

        vocab_size: columns of the logits that count; the padding gets probability 0.
        compile: compile the elementwise pass over a chunk.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        wide = torch.promote_types(dtype, torch.float32)  # sums of exponentials need the range
        needs_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        rows = max(64, CHUNK_LOGITS[device] // w.shape[0])  # of logits in a chunk, at most
        rows = -(-len(x) // -(-len(x) // rows))  # as many in each, so that one shape is compiled
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
                e, (top, total) = logits, exp(logits, vocab_size)  # (rows, V), (rows, 1), (rows, 1)
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


def _exp(logits, vocab_size):
    """Make logits (rows, V) exp(logits - max), 0 in the vocabulary's padding -> max and sum, (rows, 1), wide."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wide[:, vocab_size:] = -math.inf
    top = wide.amax(-1, keepdim=True)
    e = wide.sub_(top).exp_()
    logits.copy_(e)
    return top, e.sum(-1, keepdim=True)


@functools.cache
def _compiled_exp():
    return torch.compile(_exp, dynamic=False)


def _add_product(out, a, b, first):
    """out += a @ b, or out = a @ b for the first chunk; no product is rounded to 16 bits where the device has a way."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=0 if first else 1, out=out)
        return
    product = torch.mm(a, b, out_dtype=out.dtype) if out.is_cuda else a @ b
    out.copy_(product) if first else out.add_(product)


@torch.compiler.disable
def chunked_cross_entropy(x, w, targets, vocab_size, compile):
    """`ChunkedCrossEntropy` outside torch.compile's graph: unrolled in it, n chunks would compile n times as long."""
    if not torch.is_grad_enabled():  # a Function is asked for gradients all the same, and would compute them
        x, w = x.detach(), w.detach()
    return ChunkedCrossEntropy.apply(x, w, targets, vocab_size, compile)
