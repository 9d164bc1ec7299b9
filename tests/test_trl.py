"""The rows that TRL's SFTTrainer trains on, and ours, in eleven families' chat templates."""

import pytest
from lora_models import tiny_model, tiny_tokenizer

from lora import tasks

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}" + CHATML
SMOLLM3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n<think>\n\n</think>\n"
    "{{ m.content }}<|im_end|>\n{% endgeneration %}{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
FAMILIES = {  # name -> (template, or what TRL calls it; special tokens from the first of a text to the end of one)
    "Qwen3": ("qwen3", "<|im_start|> <|im_end|>"),
    "Llama-3": ("llama3", "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"),
    "Gemma-3": ("gemma3", "<bos> <start_of_turn> <end_of_turn> <eos>"),
    "Phi-3": ("phi3", "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>"),
    "DeepSeek-V3": ("deepseekv3", "<｜begin▁of▁sentence｜> <｜User｜> <｜Assistant｜> <think> <｜end▁of▁sentence｜>"),
    "GLM-4": ("glm4moe", "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <|endoftext|>"),
    "gpt-oss": ("gptoss", "<|start|> <|channel|> <|message|> <|end|> <|call|> <|return|>"),
    "SmolLM2": (SMOLLM2, "<|im_start|> <|im_end|>"),
    "SmolLM3": (SMOLLM3, "<|im_start|> <|im_end|>"),
    "Mistral": (MISTRAL, "<s> [INST] [/INST] </s>"),
    "ChatML": (CHATML, "<|im_start|> <|im_end|>"),
}
HI = [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi there"}]
BYE = [{"role": "user", "content": "now bye"}, {"role": "assistant", "content": "bye, it was good"}]
ASKED = {"instruction": "say hi", "input": 0, "output": "hi there"}
ASKED_TURNS = [{"role": "user", "content": "say hi\n0"}, HI[1]]


def family_tokenizer(family, marked):
    """A tiny tokenizer with a family's special tokens and template; marked: with {% generation %} in it."""
    from trl import chat_template_utils

    (template, special), tokenizer = FAMILIES[family], tiny_tokenizer()
    special = special.split()
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": special[-1]})
    tokenizer.add_special_tokens({"bos_token": special[0], "pad_token": special[-1]})
    plain = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    name = f"{template}_training_chat_template" if marked else f"{template}_chat_template"
    tokenizer.chat_template = getattr(chat_template_utils, name, template if marked else plain)
    return tokenizer


@pytest.mark.slow
@pytest.mark.parametrize(
    "rows, trl_rows, marked",
    [
        (None, [{"prompt": HI[:1], "completion": HI[1:]}, {"prompt": HI + BYE[:1], "completion": BYE[1:]}], False),
        (None, [{"messages": HI}, {"messages": HI + BYE}], True),
        ([ASKED], [{"messages": ASKED_TURNS}], True),
    ],
    ids=["prompt and completion", "messages", "instruction"],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_those_of_trl(family, rows, trl_rows, marked, tmp_path):
    """The same ids and labels. GLM-4's own template writes no end of turn, so that TRL's rows learn none."""
    trl = pytest.importorskip("trl", reason="pip install --no-deps -r requirements-trl.txt")
    from datasets import Dataset

    tokenizer = family_tokenizer(family, marked)
    examples = [e for row in rows or trl_rows for e in tasks.to_examples("chat", dict(row), tokenizer, "corrected")]
    ours = [tasks.encode(example, tokenizer, 400)[0] for example in examples]
    options = {"assistant_only_loss": marked, "completion_only_loss": not marked, "max_length": 400}
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)
    model, rows = tiny_model("llama", vocab_size=len(tokenizer)), Dataset.from_list(trl_rows)
    trainer = trl.SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    theirs = list(trainer.train_dataset.select_columns(["input_ids", "labels"]))
    if family == "GLM-4" and not marked:
        theirs = [{name: [*ids, tokenizer.eos_token_id] for name, ids in row.items()} for row in theirs]
    assert ours == theirs


@pytest.mark.slow
def test_plain_rows_are_those_of_trl(tmp_path):
    trl = pytest.importorskip("trl", reason="pip install --no-deps -r requirements-trl.txt")
    from datasets import Dataset

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"prompt": tasks.instruction_prompt("say hi", "0"), "completion": "hi there"}]
    rows += [{"prompt": "the cat ", "completion": "sat" * n} for n in (1, 300)]  # a space before, and a long one
    ours = [
        tasks.encode(tasks.to_examples("instruction", dict(row), tokenizer, "corrected")[0], tokenizer, 250)[0]
        for row in rows
    ]
    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=250)
    dataset = Dataset.from_list(rows)
    trainer = trl.SFTTrainer(tiny_model("llama"), args, train_dataset=dataset, processing_class=tokenizer)
    assert ours == list(trainer.train_dataset.select_columns(["input_ids", "labels"]))
