"""Compare tokenizers on texts: the type / length / result table, in colour, on the terminal or as a page.

    python bpe/compare.py --texts passages.json --tokenizers gpt2 runs/handbook/tokenizer.model
    python bpe/compare.py --texts book.txt --html compare.html

A tokenizer is a tiktoken name (gpt2, cl100k_base, …), a PREFIX.model, a .tiktoken rank file, a tokenizer.json, or what
`AutoTokenizer` loads: a Hugging Face folder or hub name. A text is a file; a .json file holds several, {name: text}.

"Length" counts tokens. "Result" shows them, one colour after another; a token that is not valid UTF-8 by itself (part
of a Chinese character, say) is shown as �.
"""

import html
import os
import shutil
import sys
import unicodedata
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import tyro

from bpe.reference import render_token, replace_control_character
from bpe.tokenizer import Tokenizer
from bpe.train_bpe import read_documents
from common import UsageError, atomic_open, cli, from_hub, read_json
from runlog import RunLog

ANSI = 153, 223, 157, 218, 189  # pastels of the 256 colours, with black text on them
HTML = "#a8d8ff", "#ffd9a0", "#a9f0b5", "#ffb8d8", "#d5d0ff"
HEAD = """<!doctype html><meta charset=utf-8><title>Tokenizers compared</title><style>
body { font: 15px system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em }
td, th { text-align: left; vertical-align: top; padding: .4em .8em; border-top: 1px solid #ddd }
td:last-child { font: 14px ui-monospace, monospace; line-height: 1.7 }
span { white-space: pre-wrap; border-radius: 3px }
</style><h1>Tokenizers compared</h1>
"""


@dataclass
class Config:
    texts: tuple[Path, ...]  # text files, or .json files of {name: text}
    tokenizers: tuple[str, ...] = ("gpt2",)  # tiktoken names, .model, .tiktoken, tokenizer.json, Hugging Face names
    max_tokens: int = 120  # tokens of each result to show on the terminal; 0 shows all
    color: Literal["auto", "always", "never"] = "auto"  # colours in the output; auto: where it is a terminal
    html: Path | None = None  # also write a page with every token
    run_dir: Path | None = None  # also write a run directory there


@dataclass
class Result:
    """What one tokenizer makes of one text."""

    text_name: str
    type: str  # the tokenizer
    length: int  # tokens
    bytes_per_token: float
    chars_per_token: float
    vocab_used: float  # share of the vocabulary that occurs in the text
    tokens: list  # as text, for people


def main():
    """Print each text as each tokenizer cuts it; with --html and --run-dir write it, too."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    texts = [named for file in cfg.texts for named in read_texts(file)]
    tokenizers = [load_any(name) for name in cfg.tokenizers]
    results = [compare(name, text, *tokenizer) for name, text in texts for tokenizer in tokenizers]
    color = cfg.color == "always" or (cfg.color == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    with RunLog(cfg.run_dir or ".", kind="compare", config=cfg, enabled=cfg.run_dir is not None) as log:
        print(table(results, cfg.max_tokens, color))
        if cfg.html:
            with atomic_open(cfg.html) as f:
                f.write(page(results))
            print(f"wrote {cfg.html}")
        if log.enabled:
            log.sample(0, table(results, 0, False))
            log.finish("success", rows=[{k: v for k, v in vars(r).items() if k != "tokens"} for r in results])


def read_texts(file):
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

    path = Path(name)
    if path.suffix == ".model" and path.is_file():
        tok = Tokenizer.load(path)
    elif path.suffix == ".json" and path.is_file():
        tok = Tokenizer.from_huggingface(path)
    elif path.is_file() or name in tiktoken.list_encoding_names():
        tok = Tokenizer.from_tiktoken(name)
    else:
        return _transformers(name)
    return tok.name, lambda text: [(i, render_token(tok.vocab[i])) for i in tok.encode_ordinary(text)], tok.n_vocab


def _transformers(name):
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer

    folder, files = name, ["*.json", "*.txt", "*.model"]
    with from_hub(name, "give a file, a tiktoken name or a Hugging Face folder"):
        if not os.path.isdir(name):
            folder = snapshot_download(name, allow_patterns=files)  # one request, then from its cache
        hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def encode(text):
        out = hf(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        spans = out["offset_mapping"]
        shown = [replace_control_character(text[start:end]) for start, end in spans]
        for k in range(1, len(spans)):
            if spans[k] == spans[k - 1]:  # parts of one character
                shown[k - 1] = shown[k] = "�"
        return list(zip(out["input_ids"], shown))

    return Path(name).name, encode, len(hf)


def compare(text_name, text, label, encode, n_vocab):
    """Encode a text -> Result."""
    encoded = encode(text)
    n = max(len(encoded), 1)
    return Result(
        text_name, label, len(encoded), round(len(text.encode("utf-8")) / n, 3), round(len(text) / n, 3),
        round(len({i for i, _ in encoded}) / n_vocab, 5), [shown for _, shown in encoded],
    )  # fmt: skip


def table(results, max_tokens, color):
    """Results -> the type / length / result table as text."""
    width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 160))
    first = max(len("type"), *(len(r.type) for r in results))
    lines = []
    for name, of_text in groupby(results, key=lambda r: r.text_name):
        lines += [name, f"{'type':<{first}} {'length':>8} {'bytes/tok':>9} {'chars/tok':>9} {'used':>6}   result"]
        for r in of_text:
            head = f"{r.type:<{first}} {r.length:>8,} {r.bytes_per_token:>9.2f} {r.chars_per_token:>9.2f}"
            head = f"{head} {r.vocab_used:>6.1%}   "
            shown = r.tokens[: max_tokens or None]
            rows = _wrap(shown, width - len(head), color)
            if len(shown) < r.length:
                rows.append(f"… {r.length - len(shown):,} more")
            lines += [f"{start}{row}" for start, row in zip([head, *[" " * len(head)] * len(rows)], rows)]
        lines.append("")
    return "\n".join(lines[:-1])


def _wrap(tokens, width, color):
    """Tokens -> lines of at most `width` terminal columns, coloured in turn, or with a bar between them."""
    lines, used = [""], 0
    for k, token in enumerate(tokens):
        columns = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in token) + (not color)
        if used + columns > width and used:
            lines.append("")
            used = 0
        lines[-1] += f"\x1b[30;48;5;{ANSI[k % len(ANSI)]}m{token}\x1b[0m" if color else f"{token}|"
        used += columns
    return lines


def page(results):
    """Results -> one HTML page without scripts or links."""
    parts = [HEAD]
    for name, of_text in groupby(results, key=lambda r: r.text_name):
        parts.append(f"<h2>{html.escape(name)}</h2><table><tr><th>type<th>length<th>bytes per token<th>result</tr>\n")
        for r in of_text:
            parts.append(f"<tr><td>{html.escape(r.type)}<td>{r.length:,}<td>{r.bytes_per_token:.2f}<td>")
            for k, token in enumerate(r.tokens):
                parts.append(f'<span style="background:{HTML[k % len(HTML)]}">{html.escape(token)}</span>')
            parts.append("</tr>\n")
        parts.append("</table>\n")
    return "".join(parts)


if __name__ == "__main__":
    cli(main)
