"""GPT against transformers' GPT-2, in float64 where figures are compared."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from common import UsageError
from gpt2 import cross_entropy
from gpt2.config import PRESETS, GPTConfig
from gpt2.cross_entropy import ChunkedCrossEntropy
from gpt2.model import GPT


def random_pair(config, seed=0):
    """Our model and transformers' with the same random float64 weights, biases and norms included."""
    torch.manual_seed(seed)
    hf = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0,
        )
    ).double()  # fmt: skip
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model = GPT(config).double()
    model.load_hf_state_dict(hf.state_dict())
    return model, hf


# The four published shapes, each number divided by the same factor.
SCALED = {
    name: {"n_layer": preset.n_layer // 6, "n_head": preset.n_head, "n_embd": preset.n_head * 4}
    for name, preset in PRESETS.items()
    if name.startswith("gpt2")
}


@pytest.mark.core
@pytest.mark.parametrize("shape", SCALED)
@pytest.mark.parametrize("return_logits", [True, False])
def test_logits_loss_and_every_gradient_equal_transformers(shape, return_logits):
    config = GPTConfig(block_size=16, vocab_size=101, pad_vocab_to=64, **SCALED[shape])
    model, hf = random_pair(config)
    idx = torch.randint(101, (3, 16))
    targets = torch.randint(101, (3, 16))
    targets[0, 3:7] = -1
    logits, loss = model(idx, targets, return_logits=return_logits)
    hf_logits = hf(idx).logits
    hf_loss = F.cross_entropy(hf_logits.view(-1, 101), targets.view(-1), ignore_index=-1)
    assert (logits is None) != return_logits
    if return_logits:
        torch.testing.assert_close(logits, hf_logits, rtol=0, atol=1e-11)
    torch.testing.assert_close(loss, hf_loss, rtol=0, atol=1e-12)
    loss.backward()
    hf_loss.backward()
    hf_grads = {name: p.grad for name, p in hf.named_parameters()}
    for name, p in model.named_parameters():
        expected = hf_grads[name]
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            expected = expected.t()
        torch.testing.assert_close(p.grad[: expected.shape[0]], expected, rtol=0, atol=1e-11, msg=name)
        assert not p.grad[expected.shape[0] :].any()  # the padding of the vocabulary learns nothing


def test_state_dict_has_the_names_of_hugging_face():
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=2, n_head=2, n_embd=8))
    hf = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=8, n_embd=8, n_layer=2, n_head=2))
    assert set(model.state_dict()) == set(hf.state_dict())
    back = model.hf_state_dict()
    assert set(back) == set(hf.state_dict()) - {"lm_head.weight"}
    assert all(back[k].shape == hf.state_dict()[k].shape for k in back)


@pytest.mark.core
def test_a_token_does_not_see_the_future():
    model = GPT(GPTConfig(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16)).double()
    idx = torch.randint(50, (1, 12))
    changed = idx.clone()
    changed[0, 7:] = (changed[0, 7:] + 1) % 50
    before, after = model(idx)[0], model(changed)[0]
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_the_initial_loss_is_near_the_logarithm_of_the_vocabulary():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=1000, n_layer=2, n_head=2, n_embd=64))
    idx = torch.randint(1000, (8, 33))
    loss = model(idx[:, :-1], idx[:, 1:])[1].item()
    assert abs(loss - math.log(1000)) < 0.1


def test_initial_weights_have_the_published_spread():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=2000, n_layer=8, n_head=4, n_embd=128))
    block = model.transformer.h[3]
    for weight, std in [
        (model.transformer.wte.weight, 0.02),
        (model.transformer.wpe.weight, 0.02),
        (block.attn.c_attn.weight, 0.02),
        (block.mlp.c_fc.weight, 0.02),
        (block.attn.c_proj.weight, 0.02 / 4),  # 1 / sqrt(2 * 8 layers)
        (block.mlp.c_proj.weight, 0.02 / 4),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not block.attn.c_attn.bias.any()


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(64, (4, 17))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_loss_without_gradients_makes_none(monkeypatch, context):
    """A Function's ctx.needs_input_grad is True under no_grad, too."""
    config = GPTConfig(block_size=16, vocab_size=64, n_layer=1, n_head=2, n_embd=32)
    idx, made = torch.randint(64, (4, 17)), []
    add = cross_entropy._add_product
    monkeypatch.setattr(cross_entropy, "_add_product", lambda *args, **kwargs: (made.append(1), add(*args, **kwargs)))
    model = GPT(config)
    with context():
        loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    assert not made and not loss.requires_grad
    again = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    assert made and again.item() == loss.item()


@pytest.mark.parametrize("rows", [1, 64, 300])
def test_chunked_cross_entropy_equals_the_plain_one(rows):
    torch.manual_seed(0)
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    w = torch.randn(128, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(-1, 100, (rows,))
    loss = ChunkedCrossEntropy.apply(x, w, targets, 100)
    plain = F.cross_entropy((x @ w.t())[:, :100], targets, ignore_index=-1, reduction="sum")
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-10)
    for ours, reference in zip(torch.autograd.grad(3 * loss, (x, w)), torch.autograd.grad(3 * plain, (x, w))):
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-10)


def test_chunked_cross_entropy_cuts_its_rows():
    """More rows than fit into one chunk: 2**24 logits at a vocabulary of 65,536 are 256 rows."""
    torch.manual_seed(0)
    x, w = torch.randn(300, 4, dtype=torch.float64), torch.randn(65536, 4, dtype=torch.float64)
    targets = torch.randint(65536, (300,))
    plain = F.cross_entropy(x @ w.t(), targets, reduction="sum")
    torch.testing.assert_close(ChunkedCrossEntropy.apply(x, w, targets, 65536), plain)


def test_products_of_16_bits_are_summed_in_float32_where_the_device_can(monkeypatch):
    """torch.mm(out_dtype=…) is for GPUs alone, so a tensor that says it is on one and a matmul of float32 stand in."""

    class OnGPU(torch.Tensor):
        is_cuda = True

    torch.manual_seed(0)
    a, b = torch.randn(9, 300).bfloat16(), torch.randn(300, 7).bfloat16()
    out = torch.zeros(9, 7).as_subclass(OnGPU)
    monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: a.to(out_dtype).matmul(b.to(out_dtype)))
    for first in (True, False):
        cross_entropy._add_product(out, a, b, first)
    exact = 2 * (a.double() @ b.double())
    assert (out - exact).abs().max() < 1e-4 < (2 * (a @ b) - exact).abs().max()


def test_chunks_are_of_one_size_so_that_one_shape_is_compiled(monkeypatch):
    rows, exp = [], cross_entropy._exp
    monkeypatch.setattr(cross_entropy, "_exp", lambda logits, V: (rows.append(len(logits)), exp(logits, V))[1])
    ChunkedCrossEntropy.apply(torch.randn(300, 4), torch.randn(65536, 4), torch.randint(65536, (300,)), 65536)
    assert rows == [150, 150]


@pytest.mark.slow
def test_the_compiled_model_computes_the_same_loss_and_gradients():
    """The loss stands outside the compiled graph, its one elementwise pass is compiled by itself."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=1, n_head=2, n_embd=32)).double()
    idx = torch.randint(500, (4, 33))
    plain = model(idx[:, :-1], idx[:, 1:])[1]
    reference = torch.autograd.grad(plain, list(model.parameters()))
    loss = torch.compile(model, dynamic=False)(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    torch.testing.assert_close(loss, plain, rtol=0, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), reference):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_bfloat16_autocast_keeps_the_loss_in_float32():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=2, n_head=2, n_embd=64))
    idx = torch.randint(500, (4, 33))
    exact = model(idx[:, :-1], idx[:, 1:])[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_precision_residual_is_near_float32_and_without_autocast_its_bits(dtype):
    torch.manual_seed(0)
    wide = GPT(GPTConfig(block_size=32, vocab_size=500, n_layer=2, n_head=2, n_embd=64))
    narrow = GPT(replace(wide.config, low_precision_residual=True))
    narrow.load_state_dict(wide.state_dict())
    idx, kinds = torch.randint(500, (4, 33)), set()
    for block in narrow.transformer.h:
        block.register_forward_hook(lambda block, x, y: kinds.update([x[0].dtype, y.dtype]))
    exact = wide(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = narrow(idx[:, :-1], idx[:, 1:], return_logits=False)[1]
    assert kinds == {dtype} and loss.dtype == torch.float32
    far = 0.0 if dtype == torch.float32 else 0.03
    assert abs(loss - exact) <= far
    exact.backward()
    loss.backward()
    for p, q in zip(narrow.parameters(), wide.parameters()):
        assert p.grad.dtype == torch.float32 and (p.grad - q.grad).norm() <= far * q.grad.norm()


@pytest.mark.core
def test_the_published_size_and_its_flops():
    """124,439,808 parameters; 854.7 MFLOP a token at T = 1024, the padded vocabulary's matmul counted."""
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert model.config.padded_vocab_size == 50304
    assert model.num_params() == 124_439_808
    assert model.flops_per_token() == pytest.approx(854.7e6, rel=1e-4)


@pytest.mark.parametrize("shape", SCALED)
def test_from_pretrained_reads_the_four_published_shapes(shape, tmp_path):
    _, hf = random_pair(GPTConfig(block_size=16, vocab_size=101, **SCALED[shape]))
    hf.float().save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert {k: getattr(model.config, k) for k in SCALED[shape]} == SCALED[shape]
    idx = torch.randint(101, (2, 16))
    torch.testing.assert_close(model.double()(idx)[0], hf.double()(idx).logits, rtol=0, atol=1e-11)


def test_from_pretrained_reads_a_local_folder_and_refuses_another_architecture(tmp_path):
    config = GPTConfig(block_size=16, vocab_size=101, n_layer=2, n_head=2, n_embd=16)
    _, hf = random_pair(config)
    hf.save_pretrained(tmp_path / "plain")
    model = GPT.from_pretrained(str(tmp_path / "plain"))
    idx = torch.randint(101, (2, 16))
    torch.testing.assert_close(model(idx)[0], hf.float()(idx).logits, rtol=0, atol=1e-5)
    hf.config.scale_attn_by_inverse_layer_idx = True
    hf.save_pretrained(tmp_path / "odd")
    with pytest.raises(UsageError, match="scale_attn_by_inverse_layer_idx"):
        GPT.from_pretrained(str(tmp_path / "odd"))
    with pytest.raises(UsageError, match="does not exist"):
        GPT.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="no GPT-2 weights"):
        GPT.from_pretrained("nobody/nothing")


def test_a_text_longer_than_the_block_is_refused():
    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=1, n_head=2, n_embd=8))
    with pytest.raises(UsageError, match="block_size 8"):
        model(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(UsageError, match="not a multiple of n_head"):
        GPTConfig(n_embd=10, n_head=3)
