"""AdamW as GPT-2 and GPT-3 were trained, or Muon or NorMuon on the hidden matrices; one schedule for all."""

import math

import torch
import torch.distributed as dist


def lr_at(step, max_lr, warmup_steps, max_steps, cooldown=None):
    """Learning rate of a step: linear warmup, then a cosine to a tenth of the peak. A function of the step alone.

    cooldown: falls to 0 instead in this last share of the steps after the warmup (WSD, Hu et al. 2024); 1.0: linear.
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    if cooldown:
        return max_lr * min(1.0, (1 - progress) / cooldown)
    return max_lr * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(model, cfg):
    """The optimizers of a run, as a list; each group remembers its peak in `max_lr`.

    Weight decay is for matrices and embeddings alone: one-dimensional biases and norms have no scale to keep small.
    fused: one kernel for all parameters instead of several for each; the same figures, faster on every device.
    """
    hidden = [p for p in model.transformer.h.parameters() if p.dim() >= 2] if cfg.optimizer != "adamw" else []
    ids = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in ids]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": cfg.weight_decay, "max_lr": cfg.max_lr},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "max_lr": cfg.max_lr},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=cfg.max_lr, betas=(0.9, 0.95), eps=1e-8, fused=True)]
    if hidden:
        group = {"params": hidden, "max_lr": cfg.muon_lr}
        options = {"sharded": not cfg.exact_reduction, "even_rows": cfg.optimizer == "normuon"}
        optimizers.append(Muon([group], cfg.muon_lr, cfg.weight_decay, **options))
    for optimizer in optimizers if cfg.cautious_decay else ():
        decay_cautiously(optimizer)
    return optimizers


def decay_cautiously(optimizer):
    """Apply an optimizer's weight decay only where its update u also shrinks the weight.

    p - lr * (u + decay * p where u * p >= 0): Cautious Weight Decay (Chen et al. 2025). A step copies the weights.
    """
    before = {}
    for group in optimizer.param_groups:
        group["cautious_decay"], group["weight_decay"] = group["weight_decay"], 0.0

    def remember(optimizer, *_):
        before.update((p, p.detach().clone()) for group in optimizer.param_groups for p in group["params"])

    @torch.no_grad()
    def decay(optimizer, *_):
        for group in optimizer.param_groups:
            for p in group["params"]:
                old = before.pop(p)
                p.sub_(old * ((old - p) * old >= 0), alpha=group["lr"] * group["cautious_decay"])

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(decay)


def set_lr(optimizers, step, cfg):
    """Set every group's learning rate for this step -> AdamW's, for the log."""
    cooldown = {"cosine": None, "linear": 1.0, "wsd": cfg.cooldown_share}[cfg.lr_decay]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, group["max_lr"], cfg.warmup_steps, cfg.max_steps, cooldown)
    return optimizers[0].param_groups[0]["lr"]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every direction of a matrix's update gets the same length (Jordan et al. 2024).

    For matrices only. The step is scaled to the RMS of AdamW's (Liu et al. 2025, Muon is Scalable), so that one weight
    decay suits both. It computes what torch.optim.Muon(adjust_lr_fn="match_rms_adamw") does, with two differences:
    matrices of one shape are orthogonalised together in one batched product, and on a CPU in float32, since few CPUs
    multiply bfloat16 natively and the others take ten times as long.
    sharded: each rank computes some of the matrices; the rounding of a batched product may depend on how many it has.
    even_rows: NorMuon, see `with_even_rows`.
    """

    def __init__(self, params, lr, weight_decay=0.1, momentum=0.95, sharded=True, even_rows=False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.even_rows = even_rows
        self.orthogonalise = orthogonalise_on_all_ranks if sharded else orthogonalise

    @torch.no_grad()
    def step(self):
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for shape, params in by_shape.items():
                update = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    update.append(p.grad.lerp(state["momentum"], group["momentum"]))  # Nesterov momentum
                update = self.orthogonalise(torch.stack(update))  # (n, out, in)
                update = with_even_rows(update, [self.state[p] for p in params]) if self.even_rows else update
                scale = 0.2 * math.sqrt(max(shape))
                for p, u in zip(params, update):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * scale)


def with_even_rows(update, states, beta=0.95):
    """Divide the rows of updates (n, out, in), one an output neuron, by the root of their running mean square.

    A matrix keeps its norm, so that one learning rate suits Muon and NorMuon (Li et al. 2025). states: n dicts; the
    mean, (out, 1), begins at 0, which makes all rows of the first steps too long alike: the norm undoes that.
    """
    update = update.float()
    for state, square in zip(states, update.square().mean(2, keepdim=True)):
        state.setdefault("mean_square", torch.zeros_like(square)).lerp_(square, 1 - beta)
    even = update / torch.stack([state["mean_square"] for state in states]).sqrt().clamp(min=1e-10)
    norm, even_norm = (x.norm(dim=(1, 2), keepdim=True) for x in (update, even))  # (n, 1, 1)
    return even * (norm / even_norm.clamp(min=1e-10))


def orthogonalise_on_all_ranks(x):
    """`orthogonalise`, each rank computing its share of the n matrices and gathering the others'; the same result.

    x (n, out, in) is the same on every rank. Repeated on all of eight GPUs it would be a few percent of a step.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return orthogonalise(x)
    n, share = len(x), -(-len(x) // world_size)  # the last ranks' shares are filled up with zeros
    padded = torch.cat([x, x.new_zeros(share * world_size - n, *x.shape[1:])])
    mine = orthogonalise(padded[dist.get_rank() * share :][:share]).contiguous()
    everyone = mine.new_empty(padded.shape)
    dist.all_gather_into_tensor(everyone, mine)
    return everyone[:n]


def orthogonalise(x, steps=5):
    """Matrices (n, out, in) -> about U V^T of their singular value decompositions, singular values within 0.7 … 1.2.

    A quintic Newton-Schulz iteration with coefficients tuned for a steep start (Jordan et al. 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[1] > x.shape[2]
    x = x.to(torch.float32 if x.device.type == "cpu" else torch.bfloat16)
    x = x.mT if tall else x  # the small side first: the Gram matrices are then the smaller ones
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values at most 1
    for _ in range(steps):
        gram = x @ x.mT  # (n, small, small)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
