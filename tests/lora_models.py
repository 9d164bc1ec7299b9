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


SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "n_shared_experts": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "ffn_dim": 64,
    "word_embed_proj_dim": 32, "decoder_layers": 2, "encoder_layers": 2, "decoder_attention_heads": 4, "d_model": 32,
    "decoder_ffn_dim": 64, "state_size": 8, "sliding_window": 64, "rotary_dim": 8, "mamba_n_heads": 8,
    "mamba_d_head": 8,
}  # fmt: skip


# What some families need besides: the first of these with which a model runs.
BESIDES = (
    {}, {"num_key_value_heads": 4}, {"num_hidden_layers": 4, "num_key_value_heads": 4}, {"head_dim": 16},
    {"num_hidden_layers": 8}, {"num_heads": 8}, {"is_decoder": True, "attention_types": [[["global", "local"], 1]]},
)  # fmt: skip


def family_config(name, **changes):
    """A small config of one of transformers' families: what of SMALL it and its parts know."""
    from transformers import AutoConfig

    def has(known, name):
        try:
            return hasattr(known, name) and setattr(known, name, getattr(known, name)) is None
        except Exception:  # refused where it differs from layer to layer, or cannot be set
            return False

    def small(known):
        parts = {part: getattr(known, part, None) for part in known.sub_configs}
        values = {k: v for k, v in {**SMALL, **changes}.items() if has(known, k)}
        return values | {part: small(config) for part, config in parts.items() if hasattr(config, "sub_configs")}

    changes |= {"gemma2": {"final_logit_softcapping": 1.0}}.get(name, {})
    return AutoConfig.for_model(name, **small(AutoConfig.for_model(name)))


def family_model(name):
    """A random float64 model of one of transformers' families, its noise switched off as `load_base` does.

    The first of a few small configs with which it runs; otherwise what the last one raised.
    """
    from transformers import AutoModelForCausalLM

    from lora.base import without_noise

    for changes in BESIDES:
        torch.manual_seed(0)
        try:
            config = without_noise(family_config(name, **changes))
            model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
            with torch.no_grad():
                for p in model.parameters():  # a router of zeros would choose its experts by rounding
                    if p.ndim > 1 and not p.any():
                        p.normal_(std=0.1)
                model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=torch.ones(1, 3).long())
            return model
        except Exception as e:
            error = e
    raise error


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
