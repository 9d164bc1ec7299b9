"""Sampling: the KV cache against the full forward pass, and what the flags promise."""

import pytest
import torch

from common import UsageError
from gpt2 import checkpoint
from gpt2.config import GPTConfig
from gpt2.model import GPT
from gpt2.sample import KVCache, generate, pick

CONFIG = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(CONFIG).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.core
def test_logits_with_the_cache_equal_the_full_forward_pass(model):
    idx = torch.randint(50, (3, 16))
    full = model(idx)[0]
    cache, at = KVCache(CONFIG, [16] * 3, idx.device), 0
    for T in (5, 1, 1, 4, 1, 4):
        logits = model(idx[:, at : at + T], cache=cache)[0]
        torch.testing.assert_close(logits, full[:, at : at + T], rtol=0, atol=1e-12)
        at += T


def test_prompts_of_different_lengths_in_one_batch_do_not_see_each_other(model):
    prompts = [[7], [3, 9, 4, 1, 2], [5, 5]]
    together = generate(model, prompts, 8, temperature=0)
    alone = [generate(model, [p], 8, temperature=0)[0] for p in prompts]
    assert together == alone


@pytest.mark.core
def test_greedy_generation_equals_recomputing_everything(model):
    ids = [3, 1, 4]
    for _ in range(13):  # up to the block
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    assert generate(model, [[3, 1, 4]], 13, temperature=0)[0] == ids[3:]


def test_generation_goes_on_past_the_block(model):
    new = generate(model, [[3, 1, 4], [2]], 40, temperature=0)
    assert [len(n) for n in new] == [40, 40]
    assert generate(model, [list(range(30))], 3, temperature=0)[0]  # a prompt longer than the block is cut on the left


def test_a_seed_repeats_and_another_differs(model):
    def run(seed):
        return generate(model, [[1]] * 2, 12, seed=seed)

    assert run(1) == run(1) != run(2)
    assert run(1)[0] != run(1)[1]  # the samples of one prompt are different draws


def test_end_of_text_ends_a_sample(model):
    free = generate(model, [[1]], 12, seed=3)[0]
    cut = generate(model, [[1]], 12, seed=3, eot=free[4])[0]
    assert cut == free[: free.index(free[4])]


def test_padding_of_the_vocabulary_is_never_sampled():
    """karpathy/build-nanogpt#81: ids from the padding crash the decoder. Here they have no logits at all."""
    model = GPT(GPTConfig(block_size=8, vocab_size=50, pad_vocab_to=128, n_layer=1, n_head=1, n_embd=8))
    assert model.transformer.wte.weight.shape[0] == 128
    assert model(torch.zeros(1, 8, dtype=torch.long))[0].shape[-1] == 50
    with torch.no_grad():
        model.transformer.wte.weight[50:] = 100.0  # would win every draw
    assert max(generate(model, [[1]] * 20, 8, temperature=5.0, top_k=0)[0]) < 50


def test_top_k_and_temperature_choose_among_the_right_tokens():
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    generator = torch.Generator().manual_seed(0)

    def seen(**kwargs):
        settings = {"temperature": 1.0, "top_k": 0, **kwargs}
        return {pick(p.log(), **settings, generator=generator).item() for _ in range(200)}

    assert seen() == {0, 1, 2, 3}
    assert seen(top_k=2) == {0, 1} and seen(top_k=9) == {0, 1, 2, 3}
    assert seen(temperature=0) == {0} == seen(temperature=0.01)


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(UsageError, match="empty"):
        generate(model, [[1], []], 3)


def test_the_script_samples_from_a_run_and_a_folder(tmp_path, corpus, in_process):
    from bpe import Tokenizer
    from gpt2.export_hf import export
    from gpt2.sample import main

    tokenizer = Tokenizer.load(str(corpus / "tokenizer.model"))
    model = GPT(GPTConfig(block_size=32, vocab_size=tokenizer.n_vocab, n_layer=1, n_head=2, n_embd=16))
    checkpoint.save(tmp_path / "run/ckpt", 1, checkpoint.model_state(model))
    tokenizer.save(str(tmp_path / "run/tokenizer"))
    export(model, tokenizer, tmp_path / "hf")

    def sample(name, *flags):
        settings = ["--max-new-tokens", 12, "--seed", 3, "--device", "cpu"]
        code, out, err = in_process(main, "--model", tmp_path / name, *settings, *flags)
        assert code == 0, err
        return out

    from_run = sample("run", "--prompt", "Return the")
    assert from_run.startswith("Return the") and from_run == sample("hf", "--prompt", "Return the")
    several = sample("run", "--prompt", "a", "bc", "--num-samples", 2)
    assert several.startswith("a") and several.count("\n\n") >= 4
    code, _, err = in_process(main, "--model", tmp_path / "nowhere")
    assert code == 2 and err.startswith("error: ") and "does not exist" in err
