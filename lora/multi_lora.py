"""Train k LoRA adapters together on one frozen base, with r, alpha, layers, dropout, lr and seed of their own.

    from lora.multi_lora import AdapterConfig, MultiLora
    engine = MultiLora(model, [AdapterConfig(r=4, lr=3e-4), AdapterConfig(r=8, lr=3e-3)])
    losses = engine.forward(batch)        # (k,), batch: input_ids and labels, (b, T) for all or (k, b, T)
    engine.step(losses)                   # backward, clip, AdamW and schedule, each adapter by itself
    engine.save(0, "adapter")             # as PEFT saves it

The rows of all adapters form one batch, (k·b, T, C), so the base's matmuls run once, on k times as many rows. In each
adapted layer the k updates are two batched matmuls with stacked A (k, r_max, in) and B (k, out, r_max). Smaller ranks
are padded with zeros, whose gradient is exactly zero; in layers that an adapter does not target its A and B stay zero.
The base is frozen and works row by row, so nothing of one adapter reaches another, not even a NaN: gradients are those
of k separate runs. All weights are views of one tensor (k, P), and so are gradients: clipping takes a norm over rows,
AdamW a few operations however many layers there are.

Supports causal LMs whose adapted layers are nn.Linear or GPT-2's Conv1D with the batch as leading dimension, and whose
logits are the output layer of the last hidden states. PEFT names the layers, and every engine first compares its loss
with that of PEFT's model: what it cannot train exactly (fused experts, say) is refused by name.

Dropout masks are a function of an adapter's seed, its step and the layer, so an adapter trains alike in any group. The
speedup (bench/bench_lora.py) is largest for small bases and short batches.
"""

import math
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import chain

import torch
import torch.nn.functional as F
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from common import UsageError, atomic_folder, free_memory
from lora.base import AdapterConfig, check_adapter, one_line, peft_config, wrap
from lora.tasks import IGNORE, keeps_apart, pack

__all__ = ["AdapterConfig", "MultiLora"]
# Only layers and losses are compared with PEFT's, so the rank is small.
CHECK = AdapterConfig(r=2, lora_alpha=2, lora_dropout=0.0, bias="none")
BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW's, as the Trainer has them
LOSS_CHUNK = 4096  # target positions whose logits are in memory at once


def unsupported(config):
    """The setting of an AdapterConfig that the engine does not support, as text, or None."""
    known = {"bias": ("none", "lora_only"), "init_lora_weights": ("default", "gaussian"), "use_dora": (False,)}
    known |= {"modules_to_save": ("",)}
    wrong = [f"{name} {getattr(config, name)}" for name in known if getattr(config, name) not in known[name]]
    wrong += ["load_in_4bit"] * getattr(config, "load_in_4bit", False)
    return wrong[0] if wrong else None


class AdaptedLinear(nn.Module):
    """A frozen layer plus k low-rank updates, each for its own part of the rows.

    A (k, r_max, in), B (k, out, r_max), bias (k, out) or None: parameters that are views of the engine's one tensor.
    """

    def __init__(self, base, engine, name):
        super().__init__()
        self.base, self.name = base, name
        self._engine = [engine]  # in a list, so that torch does not take it for a submodule
        conv = not isinstance(base, nn.Linear)
        self.n_in, self.n_out = base.weight.shape if conv else (base.in_features, base.out_features)
        self.A = self.B = self.bias = None

    def forward(self, x):
        """x (k*b, T, in), the k adapters' rows one after another -> (k*b, T, out)."""
        engine = self._engine[0]
        A, B, bias, scaling = self.A, self.B, self.bias, engine.scaling
        if engine.only is not None:  # one adapter alone, for evaluation
            A, B, bias, scaling = (None if x is None else x[engine.only] for x in (A, B, bias, scaling))
        k, y = len(A), self.base(x)  # (k*b, T, out)
        z = engine.dropout(x.reshape(k, -1, self.n_in).to(A.dtype), self.name)  # (k, b*T, in)
        h = (z @ A.mT) * scaling  # (k, b*T, r_max)
        if y.dtype == A.dtype:
            y = torch.baddbmm(y.reshape(k, -1, self.n_out), h, B.mT)  # (k, b*T, out)
        else:  # float32 adapters on a half-precision base, as PEFT has them
            y = y.reshape(k, -1, self.n_out) + (h @ B.mT).to(y.dtype)
        if bias is not None:
            y = y + (bias - self.base.bias).to(y.dtype)[:, None]
        return y.reshape(*x.shape[:-1], self.n_out)


def check_batch(model):
    """Two rows, one of them padded on the right, on which an engine is compared with PEFT."""
    ids = torch.arange(1, 17).view(2, 8) % model.config.get_text_config(decoder=True).vocab_size
    labels = ids.clone()
    labels[1, 5:] = IGNORE
    return {"input_ids": ids, "labels": labels}


def ask_peft(model, targets):
    """The layers that PEFT adapts for `target_modules` -> ({name: random (A, B)}, PEFT's loss on `check_batch`).

    In training mode, as under the Trainer; the model is restored. UsageError names a layer of an unsupported kind.
    """
    batch, g = check_batch(model), torch.Generator(model.device).manual_seed(0)
    wrapped = wrap(model, peft_config(replace(CHECK, target_modules=targets), model)).train()
    weights = {}
    try:
        for name, layer in ((n, m) for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)):
            name, base = name.removeprefix("base_model.model."), layer.get_base_layer()
            head = layer is model.get_output_embeddings()
            if head or isinstance(layer, ParamWrapper) or not isinstance(base, nn.Linear | Conv1D):
                raise UsageError(f"concurrent training cannot have {name}, which PEFT adapts: use --engine trainer")
            A, B = layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data
            weights[name] = A, B.normal_(std=0.1, generator=g)
        state = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        if lost := [n for n in set_peft_model_state_dict(wrapped, state).missing_keys if "lora_" in n]:
            raise UsageError(f"PEFT does not find {lost[0]} again in an adapter it saved: choose --target-modules")
        ids, mask = batch["input_ids"].to(model.device), (batch["labels"] != IGNORE).to(model.device)
        with torch.no_grad(), one_line(model, "PEFT's adapters"):
            logits = wrapped(input_ids=ids, attention_mask=mask.long()).logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1).cpu(), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)
        return weights, loss.item()
    finally:
        wrapped.unload()
        model.eval()


class MultiLora:
    """k adapters on one frozen model, which is changed in place until `unwrap`.

    Training resumes from `state`, the tensor of weights and moments (3, k, P), and `steps`, a list.
    room: configs that slots will hold later (`replace`): the largest rank and trained biases among them fit.
    fast_gelu: let one kernel of torch do what BLOOM's and GPT-2's activation does in eight; equal but for rounding.
    """

    def __init__(self, model, configs, room=(), gradient_checkpointing=False, fast_gelu=True):
        every = [*configs, *room]
        self.model = model
        with one_line(model, "concurrent training"):
            self.body, self.head = getattr(model, model.base_model_prefix), model.get_output_embeddings()
        self.device, self.n_rows = next(model.parameters()).device, 1  # rows of an adapter's batch
        self.dtype = torch.float64 if model.dtype == torch.float64 else torch.float32  # of the adapters
        asked = {targets: ask_peft(model, targets) for targets in dict.fromkeys(c.target_modules for c in every)}
        self.targets = {targets: weights.keys() for targets, (weights, _) in asked.items()}  # names of the layers
        model.requires_grad_(False).eval()
        slow = ("BloomGelu", "NewGELUActivation") if fast_gelu and model.dtype != torch.float64 else ()
        self.slow_gelus = {name: module for name, module in model.named_modules() if type(module).__name__ in slow}
        for name in self.slow_gelus:
            model.set_submodule(name, nn.GELU(approximate="tanh"))
        self.layers = []
        for name in dict.fromkeys(chain.from_iterable(self.targets.values())):
            self.layers.append(AdaptedLinear(model.get_submodule(name), self, name))
            model.set_submodule(name, self.layers[-1])
        self.generator = torch.Generator(self.device)
        for weights, loss in asked.values():
            self._check(weights, loss)
        self.r_max, self.accumulates = max(c.r for c in every), any(c.grad_accum_steps > 1 for c in every)
        self.with_bias = any(c.bias == "lora_only" for c in every)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        self._allocate(len(configs))
        for i, config in enumerate(configs):
            self.replace(i, config)

    def _check(self, weights, expected):
        """Refuse a model on which these weights {name: (A, B)}, next to another adapter, do not give PEFT's loss."""
        self.r_max, self.with_bias, self.accumulates = CHECK.r, False, False
        self._allocate(2)
        self.configs, self.scaling = [CHECK] * 2, self.scaling + 1
        for layer in (layer for layer in self.layers if layer.name in weights):
            layer.A.data[0], layer.B.data[0] = weights[layer.name]
        with one_line(self.model, "concurrent training"):
            losses = self.forward(check_batch(self.model))
        loss, name = losses[0].item(), type(self.model).__name__
        if not losses.requires_grad:  # only layers for pictures have these names, say
            raise UsageError(f"no layer that {name} applies to text has an adapter; choose --target-modules")
        tolerance = {2: 3e-2, 4: 1e-5, 8: 1e-9}[self.model.dtype.itemsize] * expected
        if not abs(loss - expected) <= tolerance:
            raise UsageError(f"{name} has loss {loss:.6f} here, {expected:.6f} with PEFT: use --engine trainer")
        self.packs = False
        with torch.no_grad(), suppress(UsageError), one_line(self.model, "packed rows"):
            self.packs = keeps_apart(lambda rows: self.forward(pack(rows * 2, 2, 0))[0].item(), tolerance)

    def _allocate(self, k):
        """Lay out k slots: weights and AdamW's moments are tensors (k, P); the layers hold views of the weights."""
        sizes = []  # (layer, attribute, shape of one adapter's part)
        for layer in self.layers:
            sizes += [(layer, "A", (self.r_max, layer.n_in)), (layer, "B", (layer.n_out, self.r_max))]
            if self.with_bias and layer.base.bias is not None:
                sizes.append((layer, "bias", (layer.n_out,)))
        lengths = [math.prod(shape) for _, _, shape in sizes]
        copies = 4 + 2 * self.accumulates  # as in memory_per_adapter
        needed = copies * k * sum(lengths) * self.dtype.itemsize / 2**30  # GB
        if needed > (free := free_memory(self.device) / 2**30):
            raise UsageError(f"lower r: {k} adapters of r {self.r_max} need {needed:,.1f} GB, {free:,.1f} are free")
        self.state = torch.zeros(3, k, sum(lengths), dtype=self.dtype, device=self.device)
        self.theta, self.exp_avg, self.exp_avg_sq = self.state  # (k, P) each
        # (k, P + 2): a step's gradient, loss and tokens so far, the first two summed over tokens
        self.pending = torch.zeros(k, (sum(lengths) + 2) * self.accumulates, dtype=self.dtype, device=self.device)
        self.pieces = [(layer, attribute, n) for (layer, attribute, _), n in zip(sizes, lengths)]
        # A has a learning rate of its own; biases are never decayed
        self.is_A, self.is_bias = self.columns(lambda _, a: a == "A"), self.columns(lambda _, a: a == "bias")
        # (k, P), where there are any: weights that an adapter does not train
        frozen = torch.zeros(k, sum(lengths) * (self.with_bias or len(self.targets) > 1), dtype=torch.bool)
        self.frozen = frozen.to(self.device)
        self.parameters = []
        for (layer, attribute, shape), part in zip(sizes, self.theta.split(lengths, dim=1)):
            self.parameters.append(nn.Parameter(part.view(k, *shape)))
            setattr(layer, attribute, self.parameters[-1])
        self.k, self.only = k, None
        self.configs, self.steps, self.parts = [None] * k, [0] * k, [0] * k
        self.scaling = torch.zeros(k, 1, 1, dtype=self.dtype, device=self.device)

    def columns(self, holds):
        """(P,): holds(layer, attribute) of the part of `theta` that each weight is in."""
        return torch.cat([torch.full((n,), holds(layer, a)) for layer, a, n in self.pieces]).to(self.device)

    def replace(self, i, config):
        """Put a fresh adapter into slot i: A random by its seed, B zero, biases the base's, optimizer at its start."""
        if wrong := unsupported(config):
            raise UsageError(f"concurrent training cannot have {wrong}; use lora/train_lora.py")
        if config.r > self.r_max or (config.bias == "lora_only" and not self.with_bias):
            raise UsageError(f"slot {i} has no room for r {config.r} with bias {config.bias}; name it in `room` first")
        g, no_bias = torch.Generator().manual_seed(config.seed), config.bias == "none"
        self.configs[i], self.steps[i], self.parts[i] = config, 0, 0
        self.state[:, i], own = 0, self.layers_of(i)
        if self.frozen.numel():
            self.frozen[i] = self.columns(lambda layer, a: layer not in own or (a == "bias" and no_bias))
        for layer in own:
            A = torch.empty(config.r, layer.n_in, dtype=self.dtype)
            if config.init_lora_weights == "gaussian":
                A.normal_(std=1 / config.r, generator=g)
            else:  # Kaiming uniform with a=sqrt(5), which is this
                A.uniform_(-1 / math.sqrt(layer.n_in), 1 / math.sqrt(layer.n_in), generator=g)
            layer.A.data[i, : config.r] = A.to(self.device)
        for layer in (layer for layer in self.layers if layer.bias is not None):
            layer.bias.data[i] = layer.base.bias
        self.scaling[i] = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)

    def keep(self, slots):
        """Keep only these slots, in this order, and free the memory of the others."""
        state, tensors = self.state[:, slots], (self.pending[slots], self.scaling[slots], self.frozen[slots])
        lists = [[values[i] for i in slots] for values in (self.configs, self.steps, self.parts)]
        self._allocate(len(slots))
        self.state.copy_(state)
        self.pending, self.scaling, self.frozen = tensors
        self.configs, self.steps, self.parts = lists

    def unwrap(self):
        """Give the model its own layers back -> the model, as it was."""
        for name, module in {**{layer.name: layer.base for layer in self.layers}, **self.slow_gelus}.items():
            self.model.set_submodule(name, module)
        return self.model

    def dropout(self, z, layer):
        """Dropout with each adapter's own probability, while gradients are recorded. z: (k, b*T, in); layer: its name.

        Drawn position by position, so that padding to the longest row of the batch comes last and shifts nothing, and
        for all rows of a step, so that it does not matter in how many parts they come.
        """
        if not torch.is_grad_enabled() or not any(c.lora_dropout for c in self.configs):
            return z
        mask = torch.ones_like(z)
        for i, config in enumerate(self.configs):
            if config.lora_dropout:
                seed = zlib.crc32(f"{config.seed}/{self.steps[i]}/{layer}".encode())
                keep = 1 - config.lora_dropout
                b, part = self.n_rows, self.parts[i]
                kept = z.new_empty(z.shape[1] // b, b * config.grad_accum_steps, z.shape[2])  # (T, rows, in)
                kept.bernoulli_(keep, generator=self.generator.manual_seed(seed))
                mask[i] = kept[:, part * b : (part + 1) * b].div_(keep).transpose(0, 1).flatten(0, 1)
        return z * mask

    @contextmanager
    def alone(self, i):
        """Within the block `model` is the base with adapter i only, k = 1; for evaluation."""
        self.only = slice(i, i + 1)
        try:
            with torch.no_grad():
                yield self.model
        finally:
            self.only = None

    def nll(self, batch):
        """Summed loss at the target positions -> (sums (k,), their numbers (k,) on the CPU).

        batch: "input_ids" and "labels", (b, T) read by every adapter or (k, b, T) with each its own; rows padded on
        the right, so no attention mask is needed: a causal model does not see the padding from the left. Or of `pack`.
        """
        k = 1 if self.only else self.k
        both = batch["input_ids"], batch["labels"]
        ids, labels = (x.expand(k, *x.shape[-2:]).reshape(-1, x.shape[-1]) for x in both)  # (k*b, T)
        self.n_rows = len(ids) // k
        positions = {name: x.flatten(0, 1).to(self.device) for name, x in batch.items() if name == "position_ids"}
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position t predicts token t + 1; (k*b, T)
        where = (labels != IGNORE).flatten().nonzero()[:, 0]  # the target positions; adapter by adapter
        counts = (labels != IGNORE).view(k, -1).sum(1)  # (k,)
        hidden = self.body(ids.to(self.device), use_cache=False, **positions).last_hidden_state  # (k*b, T, C)
        hidden = hidden.flatten(0, 1).index_select(0, where.to(self.device))  # (targets, C)
        nll = token_nll(hidden, self.head, labels.flatten()[where].to(self.device))
        return torch.stack([part.sum() for part in nll.split(counts.tolist())]), counts

    def forward(self, batch):
        """Mean loss per target token of each adapter -> (k,)."""
        sums, self.tokens = self.nll(batch)
        return sums / self.tokens.clamp(min=1).to(sums)

    def gradients(self, losses):
        """Gradient of each loss by its own adapter's weights -> (k, P), laid out as `theta`."""
        # the adapters share no row and no weight, so the gradient of the sum is that of each
        grads = torch.autograd.grad(losses.sum(), self.parameters, materialize_grads=True)
        grad = torch.cat([g.reshape(self.k, -1) for g in grads], dim=1)
        return grad.masked_fill_(self.frozen, 0) if self.frozen.numel() else grad

    def step(self, losses):
        """One AdamW step of every adapter -> (losses, gradient norms, whether finite): three lists of k.

        An adapter whose loss or gradient is not finite keeps its weights and optimizer state. With grad_accum_steps one
        takes its step with the last of so many batches, for the mean over all of their target tokens; `parts` counts
        the batches since the last step, and losses and norms are of these.
        """
        grad, losses = self.gradients(losses), losses.detach()
        if self.accumulates:
            self.pending[[part == 0 for part in self.parts]] = 0
            tokens = self.tokens.to(grad)[:, None]
            self.pending += torch.cat([grad, losses.to(grad)[:, None], torch.ones_like(tokens)], dim=1) * tokens
            mean = self.pending / self.pending[:, -1:].clamp(min=1)
            grad, losses = mean[:, :-2], mean[:, -2]
        losses, norms = torch.stack([losses.to(grad), grad.norm(dim=1)]).tolist()
        fine = [math.isfinite(loss) and math.isfinite(norm) for loss, norm in zip(losses, norms)]
        full = [part + 1 == config.grad_accum_steps for part, config in zip(self.parts, self.configs)]
        stay = [i for i in range(self.k) if not (fine[i] and full[i])]
        kept = self.state[:, stay]
        self._adamw(grad, norms)
        self.state[:, stay] = kept
        self.steps = [step + (i not in stay) for i, step in enumerate(self.steps)]
        self.parts = [0 if full[i] or not fine[i] else part + 1 for i, part in enumerate(self.parts)]
        return losses, norms, fine

    def _adamw(self, grad, norms):
        """AdamW of torch, over rows; clipping as clip_grad_norm_. A column holds one number an adapter, (k, 1)."""
        rows, configs = range(self.k), self.configs

        def column(values):
            return torch.tensor(list(values), dtype=self.dtype, device=self.device)[:, None]

        limits = [c.max_grad_norm or math.inf for c in configs]
        lr = [c.lr_at(step) for c, step in zip(configs, self.steps)]
        clip = column(min(1.0, limits[i] / (norms[i] + 1e-6)) for i in rows)
        shrink = column(lr[i] * configs[i].weight_decay for i in rows)
        size = column(lr[i] / (1 - BETAS[0] ** (self.steps[i] + 1)) for i in rows)
        root = column(math.sqrt(1 - BETAS[1] ** (self.steps[i] + 1)) for i in rows)
        if any(c.loraplus_lr_ratio != 1 for c in configs):  # as PEFT's create_loraplus_optimizer groups parameters
            ratio = torch.where(self.is_A, 1, column(c.loraplus_lr_ratio for c in configs))  # (k, P)
            shrink, size = shrink * ratio, size * ratio
        grad.mul_(clip)
        if any(c.weight_decay for c in configs):
            self.theta.mul_(1 - shrink * ~self.is_bias)
        self.exp_avg.lerp_(grad, 1 - BETAS[0])
        self.exp_avg_sq.mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
        self.theta.sub_(size * self.exp_avg / (self.exp_avg_sq.sqrt().div_(root).add_(EPS)))

    def layers_of(self, i):
        """The layers that adapter i has a part in, in PEFT's order, whatever other adapters there are."""
        layers = {layer.name: layer for layer in self.layers}
        return [layers[name] for name in self.targets[self.configs[i].target_modules]]

    def tensors(self, i):
        """Adapter i as PEFT names and shapes it: {"base_model.model.NAME.lora_A.weight": (r, in), …}."""
        r, out = self.configs[i].r, {}
        for layer in self.layers_of(i):
            prefix = f"base_model.model.{layer.name}"
            out[f"{prefix}.lora_A.weight"] = layer.A.data[i, :r].cpu().contiguous()
            out[f"{prefix}.lora_B.weight"] = layer.B.data[i, :, :r].cpu().contiguous()
            if self.configs[i].bias == "lora_only" and layer.bias is not None:
                out[f"{prefix}.base_layer.bias"] = layer.bias.data[i].cpu().clone()
        return out

    def save(self, i, folder):
        """Write adapter i atomically as a PEFT folder; a non-finite or empty one is refused."""
        tensors, name = self.tensors(i), self.model.config.name_or_path
        check_adapter(tensors, folder)
        with atomic_folder(folder) as part:
            config = peft_config(self.configs[i], self.model, inference_mode=True, base_model_name_or_path=name)
            config.target_modules = [layer.name for layer in self.layers_of(i)]
            config.save_pretrained(part)
            save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})


def token_nll(hidden, head, targets):
    """Cross-entropy of each position -> (n,). hidden (n, C), targets (n,).

    Long inputs are split into chunks whose logits are recomputed in the backward pass: (n, V) is never in memory.
    """

    def part(hidden, targets):
        logits = head(hidden)  # (chunk, V)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, reduction="none")

    if len(hidden) <= LOSS_CHUNK:
        return part(hidden, targets)
    chunks = zip(hidden.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    return torch.cat([checkpoint(part, h, t, use_reentrant=False) for h, t in chunks])


def memory_per_adapter(model, configs, batch, gradient_checkpointing=False):
    """Bytes per adapter: weights, gradient, moments, and what autograd saves in one forward pass of a batch (b, T)."""
    engine = MultiLora(model, configs[:1], configs, gradient_checkpointing)
    saved = {}  # address of a storage -> its bytes

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = engine.forward(batch)  # holds what is saved, so that no address is used twice
    for own in [*model.parameters(), engine.theta]:
        saved.pop(own.untyped_storage().data_ptr(), None)
    del losses
    engine.unwrap()
    return 4 * engine.theta[0].nbytes + 2 * engine.pending[0].nbytes + sum(saved.values())
