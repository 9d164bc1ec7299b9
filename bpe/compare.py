"""Compare tokenizers on texts: the type / length / result table, in colour.

    python bpe/compare.py --texts passages.json --tokenizers gpt2 runs/handbook/tokenizer.model

A tokenizer is a tiktoken name (gpt2, cl100k_base, …), a PREFIX.model, a .tiktoken rank file, a tokenizer.json, or
anything that `AutoTokenizer` loads: a Hugging Face folder or hub name. A text is a file; a .json file holds several,
{name: text}. "Result" shows the tokens in alternating colours; bytes that are not valid UTF-8 by themselves, as in a
part of a Chinese character, are shown as �.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from bpe.reference import render_token, replace_control_character
from bpe.tokenizer import load_tokenizer
from common import UsageError, cli, from_hub, read_documents, read_json
from runlog import RunLog

ANSI = 153, 223, 157, 218, 189  # light background colours of the 256, for black text


@dataclass
class Config:
    texts: tuple[Path, ...]  # text files, or .json files of {name: text}
    tokenizers: tuple[str, ...] = ("gpt2",)  # tiktoken names, .model, .tiktoken, tokenizer.json, Hugging Face names
    max_tokens: int = 120  # tokens of each result to show on the terminal; 0 shows all
    color: Literal["auto", "always", "never"] = "auto"  # colours in the output; auto: where it is a terminal
    run_dir: Path | None = None  # also write a run directory there


def main():
    """Print how each tokenizer splits each text; with --run-dir also record it."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    texts = [named for file in cfg.texts for named in named_texts(file)]
    tokenizers = [load_any(name) for name in cfg.tokenizers]
    rows = [compare(name, text, *tokenizer) for name, text in texts for tokenizer in tokenizers]
    color = cfg.color == "always" or (cfg.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    with RunLog(cfg.run_dir or ".", kind="compare", config=cfg, enabled=cfg.run_dir is not None) as log:
        print(table(rows, cfg.max_tokens, color))
        log.sample(0, table(rows, 0, color=False))
        log.finish("success", rows=[{k: v for k, v in row.items() if k != "tokens"} for row in rows])


def named_texts(file):
    """Yield (name, text) from a file."""
    if file.suffix == ".json":
        texts = read_json(file)
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise UsageError(f"{file} is not JSON of the form {{name: text}}")
        yield from texts.items()
    else:
        yield file.stem, "".join(read_documents([file]))


def load_any(name):
    """Name or path of a tokenizer -> (label, function from text to [(id, the token as text)], n_vocab)."""
    import tiktoken

    if Path(name).is_file() or name in tiktoken.list_encoding_names():
        tok = load_tokenizer(name)
        return tok.name, lambda text: [(i, render_token(tok.vocab[i])) for i in tok.encode_ordinary(text)], tok.n_vocab
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    with from_hub(name, "give a file, a tiktoken name or a Hugging Face folder"):
        if not os.path.isdir(folder := name):  # one request, then its cache; from_pretrained would retry for each file
            folder = snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model"])
        hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text):
        ids = hf(text, add_special_tokens=False, verbose=False)["input_ids"]
        return [(i, replace_control_character(hf.decode([i]))) for i in ids]

    return Path(name).name, encode, len(hf)


def compare(text_name, text, label, encode, n_vocab):
    """Encode a text -> a row of the table."""
    encoded = encode(text)
    n = max(len(encoded), 1)
    return {
        "text_name": text_name,
        "type": label,  # the tokenizer
        "length": len(encoded),  # tokens
        "bytes_per_token": round(len(text.encode("utf-8")) / n, 3),
        "chars_per_token": round(len(text) / n, 3),
        "vocab_used": round(len({i for i, _ in encoded}) / n_vocab, 5),  # share of the vocabulary that occurs
        "tokens": [shown for _, shown in encoded],  # as text
    }


def table(rows, max_tokens, color):
    """Rows -> the type / length / result table as text; tokens in alternating colours, or with a bar between them."""
    text, kind = (max(4, *(len(row[key]) for row in rows)) for key in ("text_name", "type"))  # widths of the columns
    lines = [f"{'text':<{text}}  {'type':<{kind}} {'length':>8} {'bytes/tok':>9} {'chars/tok':>9} {'used':>6}  result"]
    for row in rows:
        shown = row["tokens"][: max_tokens or None]
        if color:
            result = "".join(f"\x1b[30;48;5;{ANSI[k % len(ANSI)]}m{token}\x1b[0m" for k, token in enumerate(shown))
        else:
            result = "|".join(shown)
        more = f" … {row['length'] - len(shown):,} more" if len(shown) < row["length"] else ""
        numbers = f"{row['length']:>8,} {row['bytes_per_token']:>9.2f} {row['chars_per_token']:>9.2f}"
        names = f"{row['text_name']:<{text}}  {row['type']:<{kind}}"
        lines.append(f"{names} {numbers} {row['vocab_used']:>6.1%}  {result}{more}")
    return "\n".join(lines)


if __name__ == "__main__":
    cli(main)
