import copy
import gzip
import json
from itertools import chain
from types import SimpleNamespace

import pandas as pd
import pytest
from lora_models import tiny_tokenizer

from common import UsageError
from lora import tasks
from lora.tasks import IGNORE, collate, encode


def load_task(task, tokenizer, block_size, **settings):
    """`tasks.load_task` with the defaults of the settings that are not given."""
    defaults = {"data_file": "", "dataset": "", "columns": (), "mode": "corrected", "max_length": 0}
    defaults |= {"held_out": 0.05, "prompt": ""}
    return tasks.load_task(SimpleNamespace(task=task, **defaults | settings), tokenizer, block_size)


def to_example(task, row, *args):
    """The one Example of a row, which stays as it is."""
    [example] = tasks.to_examples(task, dict(row), *args)
    return example


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def parts(row, tokenizer):
    """What of an encoded row is masked and what is a target, as text."""
    masked = [t for t, label in zip(row["input_ids"], row["labels"]) if label == IGNORE]
    targets = [t for t, label in zip(row["input_ids"], row["labels"]) if label != IGNORE]
    assert targets == [label for label in row["labels"] if label != IGNORE]
    return tokenizer.decode(masked), tokenizer.decode(targets)


@pytest.mark.core
def test_only_the_response_and_the_end_are_targets(tokenizer):
    row = {"instruction": "Name a cat.", "input": "", "output": "Tom"}
    encoded, cut = encode(to_example("alpaca", row, tokenizer, "corrected"), tokenizer, 400)
    masked, targets = parts(encoded, tokenizer)
    assert masked.endswith("### Response:\n") and "Name a cat." in masked
    assert targets == "Tom<|endoftext|>" and cut is None


def test_faithful_learns_the_prompt_and_no_end(tokenizer):
    row = {"instruction": "Name a cat.", "input": "a list", "output": "Tom"}
    example = to_example("alpaca", row, tokenizer, "faithful")
    encoded, _ = encode(example, tokenizer, 400, "faithful")
    _, targets = parts(encoded, tokenizer)
    assert targets.endswith("### Input:\na list\n\n### Response:\nTom")
    assert tokenizer.eos_token_id not in encoded["input_ids"]
    whole = tokenizer("".join(text for text, _ in example.segments)).input_ids
    assert encoded["input_ids"] == whole and encoded["labels"][1:] == whole[1:]


def test_a_prompt_is_tokenized_in_training_as_when_asking(tokenizer):
    row = {"prompt": "the cat", "response": "sat on the mat"}
    example = to_example("instruction", row, tokenizer, "corrected")
    encoded, _ = encode(example, tokenizer, 100)
    ids = tasks.prompt_ids(tokenizer, example.prompt)
    assert encoded["input_ids"][: len(ids)] == ids and encoded["labels"][len(ids)] != IGNORE


@pytest.mark.core
def test_complaint_truncation_removes_the_response_llama_cookbook_215(tokenizer):
    """A row is cut at its end; where nothing of the response would be left, the row is dropped, and counted."""
    row = {"prompt": "x" * 50 + " the end of the question", "response": "the film was good"}
    example = to_example("instruction", row, tokenizer, "corrected")
    whole, _ = encode(example, tokenizer, 400)
    n = len(tasks.prompt_ids(tokenizer, example.prompt))
    cut, what = encode(example, tokenizer, n + 2)
    assert what == "cut_response" and cut == {name: column[: n + 2] for name, column in whole.items()}
    assert parts(cut, tokenizer)[0] == row["prompt"] and sum(label != IGNORE for label in cut["labels"]) == 2
    assert encode(example, tokenizer, n)[1] == "dropped_long_prompt"


def test_a_response_longer_than_the_block_is_cut_and_counted(tokenizer):
    row = {"prompt": "question", "response": "y" * 500}
    encoded, cut = encode(to_example("instruction", row, tokenizer, "corrected"), tokenizer, 64)
    assert cut == "cut_response" and len(encoded["input_ids"]) == 64
    assert tokenizer.eos_token_id not in encoded["labels"]  # it did not end here


def test_a_cut_text_does_not_learn_to_end_there(tokenizer):
    short, _ = encode(to_example("text", {"text": "the cat"}, tokenizer, "corrected"), tokenizer, 64)
    long, cut = encode(to_example("text", {"text": "z" * 500}, tokenizer, "corrected"), tokenizer, 64)
    assert short["labels"][-1] == tokenizer.eos_token_id
    assert cut == "cut_text" and len(long["labels"]) == 64 and tokenizer.eos_token_id not in long["labels"]


def test_a_long_review_keeps_its_sentiment(tokenizer):
    row = {"review": "it goes on " * 100, "sentiment": "positive"}
    encoded, cut = encode(to_example("imdb", row, tokenizer, "corrected"), tokenizer, 64)
    assert tokenizer.decode(encoded["input_ids"]).endswith("\nSentiment: positive<|endoftext|>") and cut == "cut_text"


@pytest.mark.core
def test_complaint_pad_is_eos_so_generation_never_stops_llm_course_33(tokenizer):
    """Padding with the end-of-text id masks the padding and still learns the end of every row."""
    assert tokenizer.pad_token_id is None
    pad = tasks.pad_id(tokenizer)
    assert pad == tokenizer.eos_token_id
    rows = [
        encode(to_example("instruction", {"prompt": "q", "response": text}, tokenizer, "corrected"), tokenizer, 64)[0]
        for text in ("good", "the film was very good and long")
    ]
    batch = collate(rows, pad)
    for i, row in enumerate(rows):
        n = len(row["input_ids"])
        assert batch["labels"][i, n - 1] == pad  # the end is a target
        assert (batch["labels"][i, n:] == IGNORE).all() and (batch["attention_mask"][i, n:] == 0).all()


@pytest.mark.core
def test_complaint_chat_templates_and_assistant_loss_llama_factory_2154_5707(chat_tokenizer):
    """`messages` and ShareGPT rows: the assistant's turns are targets with their end of turn, and nothing else."""
    messages = [
        {"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"}, {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "see you"},
    ]  # fmt: skip
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[m["role"]], "value": m["content"]} for m in messages]
    for row in ({"messages": messages}, {"conversations": sharegpt}):
        example = to_example("chat", row, chat_tokenizer, "corrected")
        encoded, _ = encode(example, chat_tokenizer, 400)
        whole = chat_tokenizer.apply_chat_template(messages, tokenize=False)
        assert chat_tokenizer.decode(encoded["input_ids"]) == whole
        assert parts(encoded, chat_tokenizer)[1] == "hello<|im_end|>\nsee you<|im_end|>\n"
    end = chat_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in tasks.stop_ids(chat_tokenizer, example)  # LLaMA-Factory#5593, #6020: generation stops at it


REWRITING = (  # as Qwen3 does it: the last answer has its reasoning, earlier ones have none
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>{{ m.why }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENING = CHATML[: CHATML.rindex("{% endif %}")] + "<think>\n{% endif %}"  # as DeepSeek's asks for reasoning
ENDLESS = CHATML.replace("<|im_end|>", "")  # as GLM-4, where the next turn's header ends the one before
MARKED = CHATML.replace(
    "{{ m.content }}<|im_end|>\n",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n",
)
TALK = [
    {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello<|im_end|>\n", "why": "polite"},
    {"role": "user", "content": "bye"}, {"role": "assistant", "content": "see you", "why": "late"},
]  # fmt: skip


@pytest.mark.core
@pytest.mark.parametrize(
    "template, learned",
    [
        (CHATML, ["hello<|im_end|>\nsee you<|im_end|>\n"]),  # once, though the first answer has an end of its own
        (MARKED, ["hello<|im_end|>see you<|im_end|>"]),
        (REWRITING, ["<think>polite</think>hello<|im_end|>\n", "<think>late</think>see you<|im_end|>\n"]),
        (OPENING, ["hello<|im_end|>\nsee you<|im_end|>\n"]),
        (ENDLESS, ["hello<|im_end|>\n\n<|endoftext|>", "see you\n<|endoftext|>"]),
    ],
    ids=["chatml", "marked", "rewriting", "opening", "endless"],
)
def test_each_answer_is_learned_as_the_template_writes_it_then(chat_tokenizer, template, learned):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = template
    examples = tasks.to_examples("chat", {"messages": TALK}, tokenizer, "corrected")
    rows = [encode(example, tokenizer, 400)[0] for example in examples]
    assert [parts(row, tokenizer)[1] for row in rows] == learned
    asked = tokenizer.apply_chat_template(TALK[:3], tokenize=False, add_generation_prompt=True).split("hello")[-1]
    assert asked.removesuffix("<think>\n").endswith(examples[-1].prompt.split("hello")[-1].removesuffix("<think>\n"))
    assert tasks.stop_ids(tokenizer, examples[0])


@pytest.mark.parametrize(
    "row, roles, masked",
    [
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s"}, "sua", 0),
        ({"instruction": "a", "input": 0, "output": "b", "system": "s", "history": [["c", "d"]]}, "suaua", 0),
        ({"prompt": TALK[:3], "completion": TALK[3:], "system": "s"}, "suaua", 4),
        ({"prompt": "a", "completion": "b", "system": ""}, "ua", 0),
        ({"messages": [*TALK[:1], {"role": "assistant", "tool_calls": [{}], "content": None}]}, "ua", 0),
    ],
)
def test_conversations_are_read_in_every_shape(row, roles, masked):
    turns, given = tasks.chat_turns(dict(row))
    assert "".join(turn["role"][0] for turn in turns) == roles and given == masked
    assert "instruction" not in row or turns[-2]["content"] == "a\n0"


def test_a_template_for_lists_of_parts_is_refused(chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = CHATML.replace("m.content", "m.content[0].text")
    with pytest.raises(UsageError, match="leaves out what a turn says"):
        to_example("chat", {"messages": TALK}, tokenizer, "corrected")


def test_tools_go_to_the_template_that_reads_them(chat_tokenizer):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"messages": TALK, "tools": json.dumps(tools)}
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = "{% if tools %}{{ tools[0].function.name }}\n{% endif %}" + CHATML
    assert to_example("chat", row, tokenizer, "corrected").prompt.startswith("look\n")
    with pytest.raises(UsageError, match="takes no conversation"):
        to_example("chat", row | {"tools": "["}, tokenizer, "corrected")


@pytest.mark.core
def test_a_bad_row_is_named_and_the_others_are_trained(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}", "response": "t", "why": None, "source": "web"} for i in range(40)]
    rows[6]["response"], rows[8]["prompt"], rows[9]["prompt"] = ["a", "b"], "\ud800", {"a": 1}
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    data = load_task("instruction", tokenizer, 128, data_file=tmp_path / "a.json", held_out=0.2)
    assert data.report["skipped"] == 3 and len(data.train) + len(data.held_out) == 37
    assert data.report["first_skipped"].startswith("row 7: the field response is no text (list)")
    assert data.report["columns_not_used"] == ["source"]
    (tmp_path / "b.json").write_text(json.dumps(rows[8:10]), encoding="utf-8")
    with pytest.raises(
        UsageError, match=r"2 rows leave no target for the train part .2 skipped, the first row 1: .*surrogates"
    ):
        load_task("instruction", tokenizer, 128, data_file=tmp_path / "b.json")


@pytest.mark.parametrize("history", [5, ["ab", 3], [["a"]]])
def test_a_row_of_the_wrong_shape_is_skipped(tmp_path, chat_tokenizer, history):
    rows = [{"instruction": f"{i}", "output": "t"} for i in range(40)] + [{"instruction": "a", "history": history}]
    rows += [{"messages": history}, {"messages": [history]}, {"messages": [{"role": history, "content": "a"}]}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    report = load_task("chat", chat_tokenizer, 128, data_file=tmp_path / "a.json").report
    assert report["skipped"] == 4 and report["first_skipped"].startswith("row 41: ")


def test_zero_is_an_input_and_truth_is_no_text(tokenizer):
    row = {"instruction": "double it", "input": 0, "output": 0.5}
    example = to_example("instruction", row, tokenizer, "corrected")
    assert "### Input:\n0\n" in example.prompt and example.answer == "0.5"
    with pytest.raises(UsageError, match=r"output is no text \(bool\)"):
        to_example("instruction", row | {"output": True}, tokenizer, "corrected")


def test_a_base_without_chat_template_says_so(tokenizer):
    with pytest.raises(UsageError, match="no chat template"):
        to_example("chat", {"messages": [{"role": "assistant", "content": "a"}]}, tokenizer, "corrected")


@pytest.mark.parametrize(
    "row, says",
    [
        ({"conversations": [{"value": "hi"}, {"from": "gpt", "value": "a"}]}, "lacks role or content"),
        ({"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "a"}]}, "lacks role"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn"),
        (
            {"messages": [{"role": "judge", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "of judge",
        ),
    ],
)
def test_a_conversation_without_targets_is_one_line(chat_tokenizer, row, says):
    strict = copy.deepcopy(chat_tokenizer)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    with pytest.raises(UsageError, match=says):
        to_example("chat", row, strict, "corrected")


def test_a_review_of_unknown_sentiment_is_refused(tokenizer):
    with pytest.raises(UsageError, match="'4 stars' is none of positive"):
        to_example("imdb", {"review": "good", "sentiment": "4 stars"}, tokenizer, "corrected")
    answers = [
        to_example("imdb", {"review": "x", "label": label}, tokenizer, "corrected").answer for label in (1, "neg")
    ]
    assert answers == [" positive", " negative"]


def test_a_long_field_of_a_csv_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + 200_000 * "a" + "\n", encoding="utf-8")
    assert len(tasks.read_rows(tmp_path / "a.csv")[0]["text"]) == 200_000


def test_files_of_every_kind_give_the_same_rows(tmp_path):
    rows = [{"review": "good, “fine”", "sentiment": "positive"}, {"review": "b\u2028d", "sentiment": "negative"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    (tmp_path / "a.csv").write_text('review,sentiment\n"good, “fine”",positive\nb\u2028d,negative\n', encoding="utf-8")
    for name in ("a.json", "a.jsonl", "a.csv"):
        packed = tmp_path / (name + ".gz")
        packed.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        assert tasks.read_rows(tmp_path / name) == tasks.read_rows(packed) == rows
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    assert tasks.read_rows(tmp_path / "a.parquet") == rows


def test_columns_of_any_name_of_any_hub_data_set(tmp_path, tokenizer, monkeypatch):
    rows = [{"ask": f"what of {i}", "say": f"this {i}", "output": "unused", "level": i} for i in range(60)]
    columns = ("prompt=ask", "output=say")
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    here = load_task("instruction", tokenizer, 128, data_file=tmp_path / "a.json", columns=columns)
    assert here.report["columns_not_used"] == ["level"] and here.report["skipped"] == 0
    assert "this " in tokenizer.decode(here.train[1]["input_ids"])
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, split: asked.append((name, split)) or rows)
    hub = load_task("instruction", tokenizer, 128, dataset="someone/questions", columns=columns)
    assert asked == [("someone/questions", "train")] and hub.train == here.train
    with pytest.raises(UsageError, match="no row has sya; write FIELD=COLUMN"):
        load_task("instruction", tokenizer, 128, data_file=tmp_path / "a.json", columns=("output=sya",))
    with pytest.raises(UsageError, match="needs --data-file or --dataset"):
        load_task("instruction", tokenizer, 128)


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.json", b'{"a": 1}', "list of objects"),
        ("a.csv", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"review,sentiment\ngood, fine,positive\n", "row 1 has more fields than the header"),
        ("a.xls", b"a", "unknown kind"),
        ("a.csv.gz", b"plain", "gzip"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=says) as e:
        tasks.read_rows(tmp_path / name)
    assert name in str(e.value)


def write_rows(path, n):
    rows = [{"prompt": f"question {i}", "response": f"answer {i}"} for i in range(n)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.mark.core
def test_the_held_out_split_does_not_move_when_rows_are_added(tmp_path, tokenizer):
    few = load_task("instruction", tokenizer, 128, data_file=write_rows(tmp_path / "a.jsonl", 200), held_out=0.2)
    many = load_task("instruction", tokenizer, 128, data_file=write_rows(tmp_path / "b.jsonl", 400), held_out=0.2)
    assert 15 <= len(few.held_out) <= 70
    assert many.held_out[: len(few.held_out)] == few.held_out
    train = {tuple(row["input_ids"]) for row in many.train}
    assert not any(tuple(row["input_ids"]) in train for row in many.held_out)


def test_cuts_are_reported(tmp_path, tokenizer):
    rows = [{"prompt": "p" * n, "response": "r"} for n in (1, 100, 200)] + [{"prompt": "q", "response": "s" * 99}]
    rows += [{"prompt": f"{i}", "response": "t"} for i in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    report = load_task("instruction", tokenizer, 128, data_file=tmp_path / "a.json", max_length=32).report
    assert report["dropped_long_prompt"] == 2 and report["cut_response"] == 1 and report["max_length"] == 32


def test_max_length_defaults_by_mode(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i} " + "the cat " * 900}) for i in range(40)), encoding="utf-8")

    def longest(mode, **changes):
        return load_task("text", tokenizer, 800, data_file=path, mode=mode, **changes).report["max_length"]

    assert (longest("faithful"), longest("corrected")) == (800, 512)
    assert longest("faithful", max_length=64) == longest("corrected", max_length=64) == 64
    assert longest("corrected", max_length=900) == 800


@pytest.mark.core
def test_every_row_is_seen_once_an_epoch_and_order_is_a_function():
    steps = [tasks.batch_rows(10, 4, step, seed=3) for step in range(6)]
    assert [len(s) for s in steps] == [4, 4, 2] * 2
    assert sorted(chain(*steps[:3])) == sorted(chain(*steps[3:])) == list(range(10))
    assert steps[:3] != steps[3:] and tasks.batch_rows(10, 4, 4, seed=3) == steps[4]
    assert tasks.batch_rows(10, 4, 4, seed=4) != steps[4]


def test_show_batch_tells_targets_and_masked_apart(tokenizer):
    row = {"prompt": "the cat", "response": "sat"}
    encoded, _ = encode(to_example("instruction", row, tokenizer, "corrected"), tokenizer, 64)
    assert tasks.show_batch([encoded], tokenizer).splitlines()[1:] == [
        "  masked | 'the cat'",
        "  target | 'sat<|endoftext|>'",
    ]


def test_answers_are_scored_by_words():
    assert tasks.answer_scores("The cat.", "cat") == (1.0, 1.0) and tasks.answer_scores("dog", "cat") == (0.0, 0.0)
    assert tasks.answer_scores("the black cat", "cat") == (0.0, pytest.approx(2 / 3))
    assert tasks.answer_scores("", "cat") == (0.0, 0.0) and tasks.answer_scores("", "") == (1.0, 1.0)


def test_pydocs_rows_ask_for_the_summary():
    entries = [
        {"name": "os.getcwd", "kind": "function", "signature": "()", "doc": "Return the current\ndirectory.\n\nMore."},
        {"name": "os.x", "kind": "function", "signature": "()", "doc": "short"},
        {"name": "os", "kind": "module", "signature": "", "doc": "OS routines for all of the systems."},
    ]
    rows = tasks.pydocs_rows(entries)
    assert rows == [
        {
            "instruction": "What does the function `os.getcwd` do?",
            "input": "()",
            "output": "Return the current directory.",
        }
    ]
