import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lora_models import FAMILIES, tiny_model
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from transformers.pytorch_utils import Conv1D

from bench.bench_families import family_model, outcome
from common import UsageError
from lora import base, multi_lora
from lora.multi_lora import AdapterConfig, MultiLora, memory_per_adapter, pack
from lora.tasks import IGNORE, collate, mean_loss


def plain_adapter(**settings):
    """An AdapterConfig without dropout and trained biases, unless they are given."""
    return AdapterConfig(**{"lora_dropout": 0.0, "bias": "none"} | settings)


MIXED = [
    plain_adapter(r=4, lora_alpha=1, lr=3e-3, seed=1),
    plain_adapter(r=8, lora_alpha=8, lr=3e-4, seed=2, bias="lora_only"),
    plain_adapter(r=1, lora_alpha=4, lr=1e-2, seed=3, use_rslora=True),
    plain_adapter(r=6, lora_alpha=16, lr=3e-3, seed=4, use_rslora=True, bias="lora_only", warmup_steps=4),
    plain_adapter(r=8, lora_alpha=1, lr=3e-2, seed=5, lr_scheduler="cosine"),
    plain_adapter(r=2, lora_alpha=2, lr=3e-3, seed=6, max_grad_norm=0.01),
    plain_adapter(r=5, lora_alpha=8, lr=1e-3, seed=7, weight_decay=0.1, bias="lora_only", loraplus_lr_ratio=4.0),
    plain_adapter(r=3, lora_alpha=3, lr=3e-3, seed=8, init_lora_weights="gaussian", lr_scheduler="constant"),
]
STEPS = 20


def batch(k=None, b=2, T=24, seed=0):
    """Random rows, some filled up on the right, about half of the positions targets; (b, T) or (k, b, T)."""
    g = torch.Generator().manual_seed(seed)
    shape = (b, T) if k is None else (k, b, T)
    ids = torch.randint(1, 290, shape, generator=g)
    labels = torch.where(torch.rand(shape, generator=g) < 0.5, ids, IGNORE)
    labels[..., 0, T - 5 :] = IGNORE  # the first row of each is shorter
    labels[..., 1] = ids[..., 1]
    return {"input_ids": ids, "labels": labels}


def engine_of(family, configs=MIXED, dtype=torch.float64, **kwargs):
    configs = [copy.copy(c) for c in configs]
    for c in configs:
        c.max_steps = STEPS
    return MultiLora(tiny_model(family, dtype), configs, **kwargs)


def peft_twin(family, config, tensors, dtype=torch.float64):
    """A PeftModel with the same settings and the given weights."""
    model = tiny_model(family, dtype)
    conv = any(isinstance(m, Conv1D) for m in model.modules())
    peft = LoraConfig(
        task_type="CAUSAL_LM", r=config.r, lora_alpha=config.lora_alpha, use_rslora=config.use_rslora,
        bias=config.bias, target_modules=base.target_modules(config.target_modules, model), fan_in_fan_out=conv,
    )  # fmt: skip
    model = get_peft_model(model, peft, autocast_adapter_dtype=False)
    own = dict(model.named_parameters())
    for name, tensor in tensors.items():
        own[in_peft(name)].data.copy_(tensor)
    trained = {n for n, p in own.items() if p.requires_grad}
    assert trained == {in_peft(name) for name in tensors}  # the same parameters are trained
    return model


def in_peft(name):
    return name.replace(".weight", ".default.weight") if "lora_" in name else name


def loss_of(model, ids, labels):
    """The library's loss, from its float64 logits (its own loss is computed in float32)."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def gradients(engine, losses):
    """The engine's gradients, for each adapter named and cut to size as `tensors` does with the weights."""
    grad, theta = engine.gradients(losses), engine.theta.clone()
    engine.theta.copy_(grad)
    grads = [{name: tensor.clone() for name, tensor in engine.tensors(i).items()} for i in range(engine.k)]
    engine.theta.copy_(theta)
    return grads


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_pefts_in_float64(family):
    engine = engine_of(family)
    with torch.no_grad():  # B starts at zero, which would leave A without a gradient
        for layer in engine.layers:
            for i, config in enumerate(engine.configs):
                layer.B[i, :, : config.r].normal_(std=0.1)
    data = batch(k=8)
    losses = engine.forward(data)
    grads = gradients(engine, losses)
    for i, config in enumerate(engine.configs):
        twin = peft_twin(family, config, engine.tensors(i))
        loss = loss_of(twin, data["input_ids"][i], data["labels"][i])
        assert abs(loss.item() - losses[i].item()) < 1e-10
        loss.backward()
        own = dict(twin.named_parameters())
        for name, grad in grads[i].items():
            assert own[in_peft(name)].grad.abs().max() > 1e-6
            assert (own[in_peft(name)].grad - grad).abs().max() < 1e-10, name


def train_twin(model, config, batches):
    """AdamW and schedule of torch and transformers, biases without weight decay, as the Trainer groups them."""
    from transformers import get_scheduler

    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=config.lr, loraplus_lr_ratio=config.loraplus_lr_ratio,
        loraplus_weight_decay=config.weight_decay,
    )  # fmt: skip
    schedule = get_scheduler(config.lr_scheduler, optimizer, config.warmup_steps, config.max_steps)
    for ids, labels in batches:
        loss_of(model, ids, labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_twenty_steps_equal_pefts_in_float64(family):
    engine = engine_of(family)
    start = [engine.tensors(i) for i in range(engine.k)]
    start = [{name: tensor.clone() for name, tensor in tensors.items()} for tensors in start]
    batches = [batch(k=8, seed=step) for step in range(STEPS)]
    for data in batches:
        engine.step(engine.forward(data))
    for i, config in enumerate(engine.configs):
        twin = peft_twin(family, config, start[i])
        train_twin(twin, config, [(data["input_ids"][i], data["labels"][i]) for data in batches])
        own = dict(twin.named_parameters())
        for name, tensor in engine.tensors(i).items():
            assert (own[in_peft(name)] - tensor).abs().max() < 1e-7, name
            assert (tensor - start[i][name]).abs().max() > 1e-5, name


def test_accumulated_batches_train_as_one_does_in_peft_in_float64():
    """Three adapters of one engine, with one, two and four batches a step, of which the tokens differ in number."""
    engine = engine_of("llama", [plain_adapter(r=4, lr=3e-3, seed=n, grad_accum_steps=n) for n in (1, 2, 4)])
    start = [{name: tensor.clone() for name, tensor in engine.tensors(i).items()} for i in range(3)]
    batches = [batch(k=3, seed=step) for step in range(8)]
    for data in batches:
        engine.step(engine.forward(data))
    assert engine.steps == [8, 4, 2] and engine.parts == [0, 0, 0]
    for i, config in enumerate(engine.configs):
        n, twin = config.grad_accum_steps, peft_twin("llama", config, start[i])
        whole = [
            [torch.cat([data[name][i] for data in batches[at : at + n]]) for name in batches[0]]
            for at in range(0, 8, n)
        ]
        train_twin(twin, config, whole)
        own = dict(twin.named_parameters())
        for name, tensor in engine.tensors(i).items():
            assert (own[in_peft(name)] - tensor).abs().max() < 1e-7, name
            assert (tensor - start[i][name]).abs().max() > 1e-4, name


@pytest.mark.core
@pytest.mark.parametrize(("family", "few"), [("gpt2", "c_proj"), ("bloom", "dense"), ("llama", "o_proj,up_proj")])
def test_adapters_of_other_layers_train_together_as_in_peft_and_alone(family, few, tmp_path):
    targets = [("auto", "lora_only"), ("all-linear", "none"), (few, "lora_only")]
    configs = [plain_adapter(target_modules=t, bias=bias, seed=i, lr=3e-3) for i, (t, bias) in enumerate(targets)]
    engine = engine_of(family, [*configs, plain_adapter(target_modules=few)], room=configs)
    engine.keep([2, 0, 1])  # and in another order
    start = [{name: tensor.clone() for name, tensor in engine.tensors(i).items()} for i in range(3)]
    batches = [batch(k=3, seed=step) for step in range(6)]
    for data in batches:
        engine.step(engine.forward(data))
    for i, config in enumerate(engine.configs):
        own = [(data["input_ids"][i], data["labels"][i]) for data in batches]
        twin = peft_twin(family, config, start[i])
        train_twin(twin, config, own)
        alone = engine_of(family, [config])
        for ids, labels in own:
            alone.step(alone.forward({"input_ids": ids, "labels": labels}))
        trained, lonely = dict(twin.named_parameters()), alone.tensors(0)
        assert engine.tensors(i).keys() == lonely.keys()
        for name, tensor in engine.tensors(i).items():
            assert (trained[in_peft(name)] - tensor).abs().max() < 1e-9, name
            assert (lonely[name] - tensor).abs().max() < 1e-9, name
        engine.save(i, tmp_path / str(i))
        loaded = PeftModel.from_pretrained(tiny_model(family, torch.float64), tmp_path / str(i))
        ids = batches[0]["input_ids"][i]
        with torch.no_grad(), engine.alone(i) as model:
            assert (loaded(ids).logits - model(ids).logits).abs().max() < 1e-9


def test_padding_of_ranks_stays_zero():
    engine = engine_of("gpt2")
    for step in range(5):
        engine.step(engine.forward(batch(seed=step)))
    for layer in engine.layers:
        for i, config in enumerate(engine.configs):
            assert layer.A[i, : config.r].abs().min() > 0
            assert (layer.A[i, config.r :] == 0).all() and (layer.B[i, :, config.r :] == 0).all()


def test_one_batch_for_all_is_each_its_own_copy():
    data = batch()
    shared = engine_of("llama").forward(data)
    own = engine_of("llama").forward({name: x.expand(8, *x.shape) for name, x in data.items()})
    assert torch.equal(shared, own)


@pytest.mark.core
@pytest.mark.parametrize("family", FAMILIES)
def test_a_nan_adapter_changes_no_bit_of_the_others(family):
    healthy, sick = engine_of(family, dtype=torch.float32), engine_of(family, dtype=torch.float32)
    for step in range(6):
        if step == 2:
            sick.theta[3] = float("nan")
            before = sick.exp_avg[3].clone()
        _, _, fine = sick.step(sick.forward(batch(seed=step)))
        healthy.step(healthy.forward(batch(seed=step)))
        assert fine == [not (i == 3 and step >= 2) for i in range(8)]
    rest = [0, 1, 2, 4, 5, 6, 7]
    for name in ("theta", "exp_avg", "exp_avg_sq"):
        assert torch.equal(getattr(sick, name)[rest], getattr(healthy, name)[rest]), name
    assert torch.equal(sick.exp_avg[3], before) and sick.steps[3] == 2 and sick.steps[0] == 6


def test_complaint_a_step_that_is_not_a_number_leaves_the_last_good_weights_trl_6702():
    """An infinite loss is said to be one, and the weights are those before it."""
    engine = engine_of("gpt2", dtype=torch.float32)
    engine.step(engine.forward(batch()))
    before = engine.theta.clone()
    losses = engine.forward(batch(seed=1))
    losses, _, fine = engine.step(losses * torch.tensor([1, 1, math.inf, 1, 1, 1, 1, 1]))
    assert fine == [True, True, False] + [True] * 5 and losses[2] == math.inf
    assert torch.equal(engine.theta[2], before[2]) and not torch.equal(engine.theta[1], before[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_adapters_load_in_peft_and_merge(family, tmp_path):
    from safetensors.torch import load_file

    engine = engine_of(family)
    for step in range(5):
        engine.step(engine.forward(batch(seed=step)))
    ids = batch()["input_ids"]
    for i, config in enumerate(engine.configs):
        engine.save(i, tmp_path / str(i))
        with engine.alone(i) as model:
            ours = model(ids).logits
        twin = peft_twin(family, config, engine.tensors(i))
        twin.save_pretrained(tmp_path / f"peft{i}")
        theirs = load_file(tmp_path / f"peft{i}" / "adapter_model.safetensors")
        mine = load_file(tmp_path / str(i) / "adapter_model.safetensors")
        assert {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in theirs.items()}
        base = tiny_model(family, torch.float64)
        loaded = PeftModel.from_pretrained(base, tmp_path / str(i), autocast_adapter_dtype=False).eval()
        with torch.no_grad():
            assert (loaded(ids).logits - ours).abs().max() < 1e-10
            assert (loaded.merge_and_unload()(ids).logits - ours).abs().max() < 1e-10


def test_complaint_the_base_is_mutated_in_place_peft_940():
    """With bias="lora_only" trained, the model that comes back is bit for bit the one that went in."""
    engine = engine_of("gpt2")
    before = {n: t.clone() for n, t in tiny_model("gpt2", torch.float64).state_dict().items()}
    for step in range(3):
        engine.step(engine.forward(batch(seed=step)))
    after = engine.unwrap().state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


def test_dropout_does_not_depend_on_company_and_is_off_in_evaluation():
    drop = plain_adapter(r=4, lora_dropout=0.5, seed=3)
    alone = engine_of("gpt2", [drop])
    among = engine_of("gpt2", [MIXED[0], plain_adapter(lora_dropout=0.1, seed=9), drop])
    for step in range(4):
        a, b = alone.forward(batch(seed=step)), among.forward(batch(seed=step))
        assert abs(a[0] - b[2]).item() < 1e-12
        alone.step(a)
        among.step(b)
    with among.alone(2) as model, torch.no_grad():
        assert (model(batch()["input_ids"]).logits - alone.model(batch()["input_ids"]).logits).abs().max() < 1e-10
    short = alone.dropout(torch.ones(1, 2 * 300, 200, dtype=torch.float64), 0).view(1, 2, 300, 200)
    first = alone.dropout(torch.ones(1, 2 * 500, 200, dtype=torch.float64), 0).view(1, 2, 500, 200)
    assert set(first.unique().tolist()) == {0.0, 2.0} and abs(first.mean() - 1) < 0.01
    assert torch.equal(short, first[:, :, :300])  # padding that longer neighbours bring shifts nothing
    alone.steps[0] += 1
    assert not torch.equal(first, alone.dropout(torch.ones(1, 1000, 200), 0).view(1, 2, 500, 200))


def test_dropout_gradients_equal_pefts_under_the_same_mask():
    engine = engine_of("gpt2", [plain_adapter(r=4, lora_dropout=0.3, seed=3)])
    data = batch()
    grads = gradients(engine, engine.forward(data))
    twin = peft_twin("gpt2", engine.configs[0], engine.tensors(0))
    modules = dict(twin.named_modules())
    for layer in engine.layers:
        lora = modules[f"base_model.model.{layer.name}"]
        drop = torch.nn.Module()
        drop.forward = lambda x, name=layer.name: engine.dropout(x.view(1, -1, x.shape[-1]), name).view_as(x)
        lora.lora_dropout["default"] = drop
    loss_of(twin, data["input_ids"], data["labels"]).backward()
    own = dict(twin.named_parameters())
    for name, grad in grads[0].items():
        assert (own[in_peft(name)].grad - grad).abs().max() < 1e-10


def test_gradient_checkpointing_changes_nothing():
    plain = engine_of("llama", [plain_adapter(lora_dropout=0.2), plain_adapter(r=2)])
    spare = engine_of("llama", [plain_adapter(lora_dropout=0.2), plain_adapter(r=2)], gradient_checkpointing=True)
    for step in range(2):
        plain.step(plain.forward(batch(seed=step)))
        spare.step(spare.forward(batch(seed=step)))
    assert (plain.theta - spare.theta).abs().max() < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_the_fast_gelu_is_the_same_function_and_is_taken_out_again(family):
    fast = engine_of(family, dtype=torch.float32)
    slow = engine_of(family, dtype=torch.float32, fast_gelu=False)
    assert len(fast.slow_gelus) == 2 and not slow.slow_gelus
    for step in range(3):
        one, other = (e.step(e.forward(batch(seed=step)))[0] for e in (fast, slow))
        assert one == pytest.approx(other, abs=1e-5)
    names = [type(m).__name__ for m in fast.unwrap().modules()]
    assert "GELU" not in names and names == [type(m).__name__ for m in tiny_model(family).modules()]


def test_loss_in_chunks_is_the_loss(monkeypatch):
    whole, parts = engine_of("bloom"), engine_of("bloom")
    whole.step(whole.forward(batch(T=60)))
    monkeypatch.setattr(multi_lora, "LOSS_CHUNK", 50)
    parts.step(parts.forward(batch(T=60)))
    assert (whole.theta - parts.theta).abs().max() < 1e-12


def test_float32_adapters_on_a_bfloat16_base():
    engine = engine_of("llama", dtype=torch.bfloat16)
    first = engine.forward(batch())
    assert engine.theta.dtype == torch.float32 and first.dtype == torch.float32
    for _ in range(8):
        losses, _, fine = engine.step(engine.forward(batch()))
    assert all(fine) and sum(losses) < first.sum().item()


def test_all_linear_adapts_what_peft_adapts():
    for family in FAMILIES:
        peft = get_peft_model(tiny_model(family), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        theirs = {n.removeprefix("base_model.model.") for n, m in peft.named_modules() if hasattr(m, "lora_A")}
        engine = engine_of(family, [plain_adapter(target_modules="all-linear")])
        assert {layer.name for layer in engine.layers} == theirs


def test_a_slot_is_given_to_the_next_and_slots_are_dropped():
    engine = engine_of("gpt2")
    for step in range(3):
        engine.step(engine.forward(batch(seed=step)))
    fresh = plain_adapter(r=7, lora_alpha=3, seed=11, bias="lora_only", max_steps=STEPS)
    engine.replace(2, fresh)
    engine.keep([2, 5])
    alone = engine_of("gpt2", [fresh])
    for step in range(4):
        engine.step(engine.forward(batch(seed=step)))
        alone.step(alone.forward(batch(seed=step)))
    assert engine.steps == [4, 7] and engine.configs[0] == fresh
    ours, theirs = engine.tensors(0), alone.tensors(0)
    assert ours.keys() == theirs.keys() and all((ours[n] - theirs[n]).abs().max() < 1e-10 for n in ours)
    with pytest.raises(UsageError, match="no room for r 9"):
        engine.replace(0, plain_adapter(r=9))


def test_training_goes_on_from_its_state():
    whole, half = engine_of("llama", dtype=torch.float32), engine_of("llama", dtype=torch.float32)
    for step in range(3):
        half.step(half.forward(batch(seed=step)))
        whole.step(whole.forward(batch(seed=step)))
    again = engine_of("llama", dtype=torch.float32)
    again.state.copy_(half.state)
    again.steps = half.steps
    for step in range(3, 6):
        again.step(again.forward(batch(seed=step)))
        whole.step(whole.forward(batch(seed=step)))
    assert torch.equal(again.theta, whole.theta) and torch.equal(again.exp_avg_sq, whole.exp_avg_sq)


def test_held_out_loss_is_the_one_of_train_lora():
    from lora.train_lora import held_out_loss

    engine = engine_of("bloom")
    for step in range(3):
        engine.step(engine.forward(batch(seed=step)))
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 290, (n,), generator=g).tolist() for n in (5, 30, 17)]
    rows = [{"input_ids": ids, "labels": [IGNORE] * 3 + ids[3:]} for ids in rows]
    ours = mean_loss(engine.nll, rows, 0, batch_size=2)
    for i, config in enumerate(engine.configs):
        theirs = held_out_loss(peft_twin("bloom", config, engine.tensors(i)), rows, 0)
        assert ours[i] == pytest.approx(theirs, abs=1e-6)


def test_complaint_memory_estimate_llama_factory_5717():
    """The estimate before the start counts weights, optimizer state and what autograd keeps."""
    model = tiny_model("gpt2", width=64, n_layer=4)
    weights = 4 * 4 * MultiLora(tiny_model("gpt2", width=64, n_layer=4), MIXED).theta.shape[1]
    once, twice = (memory_per_adapter(model, MIXED, batch(b=b, T=64)) - weights for b in (4, 8))
    hidden = 4 * 64 * 64 * 4  # bytes of one (b, T, C) float32
    assert 4 * 8 * hidden < once < 4 * 40 * hidden  # per layer between 8 and 40 of them
    assert 1.7 * once < twice < 2.1 * once
    assert not any("lora" in name for name, _ in model.named_modules())  # the model is left as it was


def test_a_rank_beyond_the_memory_is_refused_before_it_is_taken():
    with pytest.raises(UsageError, match="1 adapters of r 1000000000 need"):
        engine_of("gpt2", [plain_adapter(r=10**9)])


@pytest.mark.parametrize(
    "wrong, says",
    [({"bias": "all"}, "bias all"), ({"use_dora": True}, "use_dora True"), ({"init_lora_weights": "pissa"}, "pissa")],
)
def test_settings_beyond_the_engine_are_refused(wrong, says):
    with pytest.raises(UsageError, match=says):
        engine_of("gpt2", [AdapterConfig(**wrong)])


def test_targets_that_no_layer_has_are_refused():
    """On the output layer and on embeddings, which PEFT adapts, adapters cannot be trained at once."""
    for names, says in [
        ("c_attn,wte", "cannot have transformer.wte"),
        ("c_attn,c_atn", "no module c_atn"),
        ("c_attn,lm_head", "cannot have lm_head"),
    ]:
        with pytest.raises(UsageError, match=says):
            engine_of("gpt2", [AdapterConfig(target_modules=names)])


def test_a_model_that_bends_its_logits_is_refused():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.01,
    )  # fmt: skip
    with pytest.raises(UsageError, match="use --engine trainer"):
        MultiLora(Gemma2ForCausalLM(config), [AdapterConfig()])


# transformers' family -> which targets adapters at once can have; of the others PEFT adapts fused experts, too
EXACT = {
    "mixtral": "auto", "qwen3_moe": "auto", "glm4_moe": "auto", "minimax": "auto", "deepseek_v3": "", "glm4": "both",
    "gemma3_text": "both", "phi3": "both", "seed_oss": "both", "phimoe": "auto", "opt": "both", "llama4_text": "",
    "gemma2": "", "bert-generation": "", "mamba": "", "bart": "both",
}  # fmt: skip


@pytest.mark.parametrize("targets", ["auto", "all-linear"])
@pytest.mark.parametrize("family", EXACT)
def test_a_family_is_trained_as_peft_does_or_refused(family, targets):
    """As `python bench/bench_families.py` does it for all families."""
    found = outcome(family, targets)
    assert found["outcome"] == ("exact" if EXACT[family] in (targets, "both") else "refused"), found


def uneven_rows(k, b):
    """Rows of three to thirty tokens; all of the first labels are targets, which packing has to leave out."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(1, 290, (n,), generator=g).tolist() for n in torch.randint(3, 30, (k * b,), generator=g)]
    return [
        {"input_ids": ids, "labels": [*ids[:2], *[IGNORE] * (len(ids) % 3), *ids[2 + len(ids) % 3 :]]} for ids in rows
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma3_text"])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(family):
    model = tiny_model(family) if family in FAMILIES else family_model(family)
    engine = MultiLora(model.double(), [plain_adapter(seed=i) for i in range(3)])
    assert engine.packs
    engine.theta.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    rows = uneven_rows(3, 4)
    padded = {name: x.view(3, 4, -1) for name, x in collate(rows, 0).items()}
    both = [engine.forward(data) for data in (padded, pack(rows, 3, 0))]
    assert (both[0] - both[1]).abs().max() < 1e-12
    one, other = map(engine.gradients, both)
    assert one.abs().max() > 1e-3 and (one - other).abs().max() < 1e-12


def test_a_model_that_cannot_keep_packed_rows_apart_is_told():
    """BLOOM takes no positions, and the state of linear attention goes on from row to row."""
    assert not engine_of("bloom").packs
    assert not MultiLora(family_model("minimax").float(), [plain_adapter()]).packs
