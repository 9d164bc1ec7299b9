"""Our checkpoints as Hugging Face folders, and those loaded back."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bpe import Tokenizer
from common import UsageError
from gpt2 import checkpoint
from gpt2.config import GPTConfig
from gpt2.export_hf import export, main
from gpt2.model import CONV1D, GPT


@pytest.fixture
def pair(corpus):
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(str(corpus / "tokenizer.model"))
    model = GPT(GPTConfig(block_size=32, vocab_size=tokenizer.n_vocab, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model, tokenizer


def test_the_exported_folder_loads_with_the_auto_classes(pair, tmp_path):
    model, tokenizer = pair
    assert export(model, tokenizer, tmp_path / "hf") < 1e-9
    names = {p.name for p in (tmp_path / "hf").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    hf_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "Return the value of x, naïvely 北.\n  <|endoftext|>"
    assert hf_tokenizer.encode(text) == tokenizer.encode(text, allowed_special="all")
    assert hf.config.vocab_size == len(hf_tokenizer) == tokenizer.n_vocab  # no padding to sample from
    assert hf_tokenizer.eos_token_id == tokenizer.eot_token == hf.config.eos_token_id


@pytest.mark.core
def test_an_exported_folder_loads_back_with_the_same_weights(pair, tmp_path):
    model, tokenizer = pair
    export(model, tokenizer, tmp_path / "hf")
    back, back_tokenizer = checkpoint.load_model(tmp_path / "hf")
    V = model.config.vocab_size
    for name, tensor in model.float().state_dict().items():
        assert torch.equal(tensor[:V], back.state_dict()[name][:V]), name
    assert back_tokenizer.merges == tokenizer.merges and back_tokenizer.special_tokens == tokenizer.special_tokens


def test_gradients_are_those_of_transformers_through_export_and_back(pair, tmp_path):
    """In float64: the loss and every gradient of the exported folder, and of what is loaded from it again."""
    model, tokenizer = pair
    export(model, tokenizer, tmp_path / "hf")
    hf = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float64).eval()
    idx = torch.randint(model.config.vocab_size, (2, 33), generator=torch.Generator().manual_seed(0))
    logits = hf(idx[:, :-1]).logits.flatten(0, 1)
    hf_loss = torch.nn.functional.cross_entropy(logits, idx[:, 1:].flatten())
    hf_loss.backward()
    for ours in (model.double().eval(), checkpoint.load_weights(tmp_path / "hf").double()):
        loss = ours(idx[:, :-1], idx[:, 1:])[1]
        ours.zero_grad()
        loss.backward()
        torch.testing.assert_close(loss, hf_loss, rtol=0, atol=1e-12)
        for name, p in hf.named_parameters():
            grad = dict(ours.named_parameters())[name].grad
            grad = grad.t() if name.endswith(CONV1D) else grad[: len(p)]
            torch.testing.assert_close(grad, p.grad, rtol=0, atol=1e-12, msg=name)


def test_an_export_that_computes_something_else_is_refused(pair, tmp_path, monkeypatch):
    model, tokenizer = pair
    exact = model.hf_state_dict()
    exact["transformer.h.1.mlp.c_fc.weight"][0, 0] += 0.1
    monkeypatch.setattr(GPT, "hf_state_dict", lambda self: exact)
    with pytest.raises(AssertionError, match="other logits"):
        export(model, tokenizer, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_wrong_vocabulary_is_refused_and_leaves_nothing(pair, tmp_path):
    _, tokenizer = pair
    model = GPT(GPTConfig(block_size=8, vocab_size=77, n_layer=1, n_head=1, n_embd=8))
    with pytest.raises(UsageError, match="do not match"):
        export(model, tokenizer, tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_the_script_exports(pair, tmp_path, in_process):
    model, tokenizer = pair
    checkpoint.save(tmp_path / "run/ckpt", 7, checkpoint.model_state(model))
    tokenizer.save(str(tmp_path / "run/tokenizer"))
    code, out, _ = in_process(main, "--model", tmp_path / "run", "--out", tmp_path / "hf")
    assert code == 0 and "differ by at most" in out
    assert json.loads((tmp_path / "hf/config.json").read_text())["n_layer"] == 2
    code, _, err = in_process(main, "--model", tmp_path / "nowhere", "--out", tmp_path / "x")
    assert code == 2 and "does not exist" in err and not (tmp_path / "x").exists()
