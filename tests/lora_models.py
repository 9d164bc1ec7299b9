"""Small models for the tests of lora/: random GPT-2, BLOOM and Llama, and a byte-level tokenizer, as folders."""

import torch

TEXT = "the cat sat on the mat and the dog ran after the cat while the sun was warm and the film was good or bad. " * 4
FAMILIES = ("gpt2", "bloom", "llama")


def tiny_config(family, vocab_size=300, n_layer=2, width=32, block=256):
    """A config of the family, `width` wide, without dropout."""
    from transformers import BloomConfig, GPT2Config, LlamaConfig

    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_layer=n_layer, n_embd=width, n_head=4, n_positions=block,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    if family == "bloom":
        return BloomConfig(vocab_size=vocab_size, hidden_size=width, n_layer=n_layer, n_head=4, eos_token_id=0)
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=n_layer,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=block, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def tiny_model(family, dtype=torch.float32, seed=0, **kwargs):
    """A random model of the family; its biases are random too, so that a test notices when they are lost."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **kwargs)).to(dtype).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(std=0.1)
    return model


def tiny_tokenizer(vocab_size=290):
    """Byte-level BPE, as our exported tokenizers are: `<|endoftext|>` is id 0, end of text and nothing else."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def save_tiny(folder, family="gpt2", **kwargs):
    """A Hugging Face folder -> folder. The model's vocabulary is padded beyond the tokenizer's."""
    tiny_model(family, **kwargs).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
