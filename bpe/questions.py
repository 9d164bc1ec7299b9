"""Ten questions about tokenizers, each with a small example that is computed here.

    python bpe/questions.py --run-dir runs/questions

Each function computes the numbers of one answer, with GPT-2's vocabulary unless it says otherwise; the answers in prose
stand in report.md, and notebooks/01_bpe.ipynb shows the numbers.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

from bpe import reference
from bpe.pretokenizer import Splitter
from bpe.reference import render_token
from bpe.tokenizer import END_OF_TEXT, Tokenizer
from common import ROOT, UsageError, cli
from runlog import RunLog

# The first article of the Universal Declaration of Human Rights
SENTENCES = {
    "English": "All human beings are born free and equal in dignity and rights.",
    "German": "Alle Menschen sind frei und gleich an Würde und Rechten geboren.",
    "Russian": "Все люди рождаются свободными и равными в своем достоинстве и правах.",
    "Chinese": "人人生而自由，在尊严和权利上一律平等。",
    "Hindi": "सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।",
}


@dataclass
class Config:
    run_dir: Path = ROOT / "runs" / "questions"
    """where result.json goes"""


def main():
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    gpt2 = Tokenizer.from_tiktoken("gpt2")
    with RunLog(cfg.run_dir, kind="questions", config=cfg) as log:
        answers = {question.__name__: question(gpt2) for question in QUESTIONS}
        for name, numbers in answers.items():
            log.print(f"{name}: {json.dumps(numbers, ensure_ascii=False)}")
        log.finish("success", **answers)


def code_points(gpt2):
    """1. What do ord and chr say of 北 大 模 型?"""
    rows = []
    for char in "北大模型":
        assert chr(ord(char)) == char
        rows.append(
            {"char": char, "ord": ord(char), "utf8": char.encode().hex(" "), "gpt2_tokens": len(gpt2.encode(char))}
        )
    return rows


def vocabulary_size(gpt2):
    """2. Large or small vocabulary? Trained on the documentation topics of Python, the GPT-4 split."""
    text = python_topics()
    rows = []
    for vocab_size in (512, 1024, 2048, 8192):
        tok = Tokenizer("gpt4")
        tok.train(text, vocab_size)
        ids = tok.encode(text)
        often = sum(n >= 20 for n in Counter(ids).values())
        rows.append(
            {
                "vocab_size": vocab_size,
                "bytes_per_token": round(len(text.encode()) / len(ids), 3),
                "tokens_seen_20_times": round(often / vocab_size, 3),  # share of the vocabulary with something to learn
                "embedding_parameters": vocab_size * 768,
            }
        )
    return rows


def spelling(gpt2):
    """3. Why do language models fail at spelling and at reversing a string?"""
    word = " straightforwardly"
    ids = gpt2.encode(word)
    return {
        "word": word,
        "characters": len(word),
        "tokens": [render_token(gpt2.vocab[i]) for i in ids],
        "tokens_reversed": gpt2.decode(ids[::-1]),
        "string_reversed": word[::-1],
        "string_reversed_in_tokens": [render_token(gpt2.vocab[i]) for i in gpt2.encode(word[::-1])],
    }


def other_languages(gpt2):
    """4. Why are they worse outside English? The same sentence in five languages."""
    rows = []
    for language, text in SENTENCES.items():
        tokens = len(gpt2.encode(text))
        rows.append(
            {"language": language, "characters": len(text), "bytes": len(text.encode()), "tokens": tokens,
             "tokens_per_character": round(tokens / len(text), 3)}
        )  # fmt: skip
    return rows


def arithmetic(gpt2):
    """5. Why is arithmetic hard? How all numbers of four digits are cut."""
    cuts = Counter("+".join(str(len(gpt2.vocab[i])) for i in gpt2.encode(str(n))) for n in range(1000, 10000))
    examples = {str(n): [gpt2.decode([i]) for i in gpt2.encode(str(n))] for n in (1000, 1234, 2026, 6789)}
    return {"digits_per_token": dict(cuts.most_common()), "examples": examples}


def python_code(gpt2):
    """6. Why did GPT-2 struggle with Python? This repository's reference.py, through two split patterns."""
    code = Path(reference.__file__).read_text(encoding="utf-8")
    ids = gpt2.encode(code)
    blank = sum(gpt2.vocab[i].isspace() for i in ids)
    line = " " * 12 + "i += 1"
    return {
        "characters": len(code),
        "gpt2_tokens": len(ids),
        "gpt2_blank_tokens": blank,
        "share_blank": round(blank / len(ids), 3),
        "chunks_gpt2_pattern": len(Splitter("gpt2")(code)),
        "chunks_gpt4_pattern": len(Splitter("gpt4")(code)),
        "indented_line_in_gpt2_tokens": len(gpt2.encode(line)),
        "of_which_blank": sum(gpt2.vocab[i].isspace() for i in gpt2.encode(line)),
    }


def end_of_text(gpt2):
    """7. What does <|endoftext|> in a prompt do?"""
    try:
        gpt2.encode(END_OF_TEXT)
        by_default = "encoded"
    except UsageError:
        by_default = "refused"
    return {
        "allowed_special=all": gpt2.encode(END_OF_TEXT, "all"),
        "allowed_special=none": [render_token(gpt2.vocab[i]) for i in gpt2.encode(END_OF_TEXT, "none")],
        "by_default": by_default,
    }


def unseen_tokens(gpt2):
    """8. Why does SolidGoldMagikarp break a model? A token that the training text never shows is never trained."""
    glitch = " SolidGoldMagikarp"
    text = python_topics()
    counts = Counter(gpt2.encode(text, "none"))
    return {
        "ids": gpt2.encode(glitch),
        "tokens_of_gpt2": gpt2.n_vocab,
        "tokens_that_occur_in_the_python_topics": len(counts),
        "share_never_trained": round(1 - len(counts) / gpt2.n_vocab, 3),
        "occurrences_of_the_glitch": counts[gpt2.encode(glitch)[0]],
    }


def yaml_or_json(gpt2):
    """9. YAML or JSON? The same record, written three ways."""
    record = {"name": "lora", "r": 8, "lora_alpha": 16, "lr": 0.0003, "targets": ["c_attn", "c_proj"]}
    lines = [f"{k}: {v}" for k, v in record.items() if k != "targets"]
    written = {
        "json_indented": json.dumps(record, indent=4),
        "json_compact": json.dumps(record, separators=(",", ":")),
        "yaml": "\n".join([*lines, "targets:", *(f"- {target}" for target in record["targets"])]),
    }
    return {how: {"characters": len(text), "tokens": len(gpt2.encode(text))} for how, text in written.items()}


def not_end_to_end(gpt2):
    """10. Why is an LLM not end-to-end language modelling? One text has many spellings in tokens; it ever sees one."""
    text = " language modelling"
    ids = gpt2.encode(text)
    n = spellings(text.encode(), set(gpt2.vocab.values()))
    return {"text": text, "spellings": n, "the_one": [render_token(gpt2.vocab[i]) for i in ids]}


def spellings(data, tokens):
    """How many sequences of tokens (a set of bytes) spell `data`?"""
    ways = [1] + [0] * len(data)  # ways[k]: those that spell the first k bytes
    for end in range(1, len(data) + 1):
        ways[end] = sum(ways[start] for start in range(end) if data[start:end] in tokens)
    return ways[-1]


QUESTIONS = (
    code_points, vocabulary_size, spelling, other_languages, arithmetic, python_code, end_of_text, unseen_tokens,
    yaml_or_json, not_end_to_end,
)  # fmt: skip


def python_topics():
    """The language reference that every Python carries: half a megabyte of English (the version decides)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


if __name__ == "__main__":
    cli(main)
