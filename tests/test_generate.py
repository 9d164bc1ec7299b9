from types import SimpleNamespace

import pytest
import torch
from lora_models import save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoTokenizer

from bench.bench_families import family_config
from common import UsageError
from lora import base as bases
from lora import generate
from lora.base import load_adapter, load_base
from lora.generate import save_merged


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "bloom", "bloom")


def adapter(model, strength=0.5, bias="lora_only"):
    """A PeftModel with random weights, as if trained."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, bias=bias))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=strength)
    return model.eval()


def test_padded_vocabulary_is_never_generated():
    model, tokenizer = tiny_model("gpt2", vocab_size=2000), tiny_tokenizer()
    ids = [5, 6, 7]
    plain = model.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=True, pad_token_id=0)
    assert plain.max() >= len(tokenizer)  # left alone, the random model picks ids that no tokenizer knows
    for temperature in (0.0, 1.0):
        seen = []
        tokenizer.decode = lambda new, seen=seen: seen.extend(new) or ""
        generate.generate(model, tokenizer, ids, stop_ids=[], max_new_tokens=20, temperature=temperature)
        assert len(seen) == 3 + (3 + 20) and max(seen) < len(tokenizer)  # the prompt, and all of it


def test_the_vocabulary_of_a_nested_config_is_read():
    """A model that also reads images keeps the settings of its text model one level down."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = family_config("gemma3_text").to_dict()
    model = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config={"num_hidden_layers": 1}))
    assert not hasattr(model.config, "vocab_size")
    assert len(generate.generate(model, tiny_tokenizer(), [5, 6], stop_ids=[], max_new_tokens=2)) == 1


def test_a_continuation_keeps_the_space_that_it_begins_with(shared_data):
    """A Llama tokenizer (SentencePiece) drops the space of what comes first in a text."""
    base = shared_data / "stories260K"
    model, tokenizer = load_base(base, "float32", torch.device("cpu")), AutoTokenizer.from_pretrained(base)
    ids = tokenizer("Once upon a time, there").input_ids
    [text] = generate.generate(model, tokenizer, ids, stop_ids=[], max_new_tokens=4)
    assert text.startswith(" was") and tokenizer.decode(tokenizer("was").input_ids[1:]).startswith("was")


def test_complaint_generation_that_does_not_stop_llama_factory_5593_6020():
    """Generation ends at any of the stop ids, which are not part of the text."""
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    whole = model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False, pad_token_id=0)[0, 2:].tolist()
    [text] = generate.generate(
        model, tokenizer, [5, 6], stop_ids=[0, whole[3]], max_new_tokens=9, repetition_penalty=1.0
    )
    assert text == tokenizer.decode(whole[: whole.index(whole[3])])


def test_a_chat_prompt_is_as_in_training():
    """--chat: the user's turn in the template, with the assistant's begun, and its end of turn among the stops."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids, stops = generate.encode_prompt(tokenizer, "the cat", chat=True)
    assert tokenizer.decode(ids) == "user: the cat<|end|>assistant: "
    assert stops == sorted([tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")])
    plain = generate.encode_prompt(tokenizer, "the cat")
    assert tokenizer.decode(plain[0]) == "the cat" and plain[1] == [tokenizer.eos_token_id]


def test_a_prompt_longer_than_the_block_keeps_its_end():
    model, tokenizer = tiny_model("gpt2", block=32), tiny_tokenizer()
    ids = torch.randint(1, 290, (100,)).tolist()
    long = generate.generate(model, tokenizer, ids, stop_ids=[], max_new_tokens=8)
    assert long == generate.generate(model, tokenizer, ids[-24:], stop_ids=[], max_new_tokens=8)


def test_complaint_lost_precision_on_merge_peft_1388(base, tmp_path):
    """Merged in float32, the folder's model gives the adapter's logits, though the base is loaded in bfloat16."""
    from transformers import AutoModelForCausalLM

    ids = torch.arange(1, 40)[None]
    model = adapter(load_base(str(base)))
    with torch.no_grad():
        wanted = model(ids).logits
        plain = load_base(str(base))(ids).logits
    save_merged(model, AutoTokenizer.from_pretrained(str(base)), tmp_path / "merged", "float32")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        assert (merged(ids).logits - wanted).abs().max() < 1e-4 < (plain - wanted).abs().max()
    assert len(AutoTokenizer.from_pretrained(str(tmp_path / "merged"))) == 290


@pytest.mark.core
def test_an_adapter_with_weights_that_are_not_finite_is_refused(base, tmp_path):
    model = adapter(load_base(str(base)))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n)[0] = float("nan")
    model.save_pretrained(tmp_path / "ckpt/adapter")
    with pytest.raises(UsageError, match="non-finite weights"):
        load_adapter(load_base(str(base)), tmp_path)
    with pytest.raises(UsageError, match="holds no adapter"):
        load_adapter(load_base(str(base)), tmp_path / "ckpt")


def test_a_truncated_adapter_is_refused(base, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter(load_base(str(base))).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    tensors.pop(next(name for name in tensors if "lora_B" in name))
    save_file(tensors, file)
    with pytest.raises(UsageError, match="damaged or does not fit"):
        load_adapter(load_base(str(base)), tmp_path)
    file.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="damaged or does not fit"):
        load_adapter(load_base(str(base)), tmp_path)


def test_a_model_that_sees_what_it_predicts_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_config(family_config("bert-generation")).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="it is no causal LM"):
        load_base(str(tmp_path))


def test_the_models_own_noise_is_off():
    from lora.base import without_noise

    config = without_noise(family_config("seed_oss", residual_dropout=0.5, attention_dropout=0.5))
    assert config.residual_dropout == config.attention_dropout == 0.0
    assert without_noise(family_config("phimoe", router_jitter_noise=0.1)).router_jitter_noise == 0.0


def test_merging_writes_a_folder_whole_or_not_at_all(base, tmp_path):
    class Failing:
        def save_pretrained(self, folder):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        save_merged(adapter(load_base(str(base))), Failing(), tmp_path / "merged", "float32")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "mine.txt").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        save_merged(load_base(str(base)), AutoTokenizer.from_pretrained(str(base)), tmp_path / "merged", "float32")


def test_from_the_command_line(script, base, tmp_path):
    adapter(load_base(str(base))).save_pretrained(tmp_path / "run" / "ckpt" / "adapter")
    args = ("--base", base, "--adapter", tmp_path / "run", "--prompt", "the cat", "--max-new-tokens", "5")
    done = script("lora/generate.py", *args, "--merge", tmp_path / "merged", "--device", "cpu")
    assert "wrote" in done.stdout and "the cat" in done.stdout
    assert (tmp_path / "merged" / "config.json").is_file()


def test_the_models_own_dropout_is_off(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=50)).save_pretrained(tmp_path)
    model = load_base(str(tmp_path)).train()
    assert torch.equal(model(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)


@pytest.mark.parametrize(
    "base, says", [("./no", "does not exist"), ("a/b/c", "does not exist"), (".", "no config.json")]
)
def test_a_base_that_is_none_is_named(base, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=says):
        load_base(base)


def test_a_base_read_from_gguf_can_be_trained(base, tmp_path, monkeypatch):
    """SmolLM2 is dequantized when it is read, yet keeps marks of quantization, for which the Trainer refuses models."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

    def without_gguf(load, **marks):
        def read(folder, gguf_file=None, **options):
            loaded = load(folder, **options)
            for name, value in marks.items():
                setattr(loaded, name, value)
            return loaded

        return read

    gguf = SimpleNamespace(quant_method="gguf")
    quantizer = SimpleNamespace(is_trainable=False, is_qat_trainable=False, quantization_config=gguf)
    marked = without_gguf(AutoModelForCausalLM.from_pretrained, is_quantized=True, hf_quantizer=quantizer)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", marked)
    monkeypatch.setattr(AutoConfig, "from_pretrained", without_gguf(AutoConfig.from_pretrained))
    monkeypatch.setattr(bases, "locate", lambda name: (str(base), {"gguf_file": "model.gguf"}))
    arguments = TrainingArguments(output_dir=tmp_path, use_cpu=True, report_to=[])
    adapter = LoraConfig(target_modules="all-linear")
    with pytest.raises(ValueError, match="quantized"):
        Trainer(get_peft_model(marked(base, "model.gguf"), adapter), arguments)
    model = get_peft_model(load_base("smollm2"), adapter)
    assert Trainer(model, arguments).model is model and model.base_model.model.name_or_path == "smollm2"
