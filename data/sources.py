"""Corpora: a generator of documents for each, and a command line that writes them to a file.

    python data/sources.py pydocs --part train --out data/corpora/pydocs_train.jsonl   # for a tokenizer
    python data/sources.py files --input book.txt notes.md --out mine.jsonl
    python data/sources.py fineweb-edu --max-bytes 1000000 --out sample.jsonl          # streamed, not downloaded
    python data/sources.py shakespeare --out tinyshakespeare.txt                       # as published: sha256 86c4e6aa…
    python data/sources.py hellaswag --out hellaswag_val.jsonl                         # for gpt2/hellaswag.py --input

pydocs       the documentation that comes with Python, numpy and torch: several MB of English prose, without network
shakespeare  Tiny Shakespeare, from the hub or `--input tinyshakespeare.txt`
tinystories  TinyStories, from the hub or local files
fineweb-edu  FineWeb-Edu from the hub, `--subset sample-10BT` (or another, or default: all of it), or local files
files        any UTF-8 text files
jsonl        lines {"text": ...}
hellaswag    the 10,042 validation items, one object per line, from the hub

Local files are parquet, jsonl or text (gzipped too), or folders of them. Text is cut at blank lines into documents of
about 4 kB, or, as TinyStories' files are, at lines `<|endoftext|>`. A validation part is held out by document hash, so
that it never changes; fineweb-edu holds out its first tokens, as llm.c does. `--part train` leaves that part out.
"""

import ast
import importlib.metadata
import importlib.util
import json
import platform
import sysconfig
import warnings
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import Literal

import huggingface_hub
import tyro
from tqdm import tqdm

from common import ROOT, UsageError, atomic_open, cli, file_sha256, from_hub, open_text, read_jsonl
from common.files import is_held_out, read_parquet, read_texts, valid

CACHE = ROOT / "data" / "cache"
DOCUMENT_CHARS = 4000  # a text file is split at the first blank line after this many, at a line end after twice as many
SEPARATOR = "<|endoftext|>"
SourceName = Literal["pydocs", "shakespeare", "tinystories", "fineweb-edu", "files", "jsonl"]
# Held-out share of the documents by hash; None: the first tokens of the corpus.
VAL_SHARE = {"pydocs": 0.08, "shakespeare": 0.08, "files": 0.08, "jsonl": 0.02, "tinystories": 0.01}
PARTS = ("train", "validation", "test")
HUB = {  # (dataset, revision, patterns of its parquet files in the order in which they are read)
    "shakespeare": ("karpathy/tiny_shakespeare", "refs/convert/parquet", [f"default/{p}/*.parquet" for p in PARTS]),
    "tinystories": ("roneneldan/TinyStories", "main", ["data/train-*.parquet", "data/validation-*.parquet"]),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "main", ["{folder}/*.parquet"]),
    "hellaswag": ("Rowan/hellaswag", "main", ["data/validation-*.parquet"]),
}


@dataclass
class Corpus:
    """A corpus, as flags. Its files are located once, when first needed, and downloaded if they are the hub's."""

    source: tyro.conf.Positional[SourceName]
    input: tuple[Path, ...] = ()  # local files or folders (parquet, jsonl, text; gzipped too) instead of the hub's
    subset: str = "sample-10BT"  # of fineweb-edu: sample-10BT, sample-100BT, a crawl (CC-MAIN-2024-10), default: all
    text_field: str = "text"  # column or key that holds the text
    val_share: float | None = None  # share of the documents held out by hash; None: the source's default

    def __post_init__(self):
        if self.val_share is None:
            self.val_share = VAL_SHARE.get(self.source)

    @cached_property
    def located(self):
        """The files in order, and what to record about the hub -> (list of Path, dict)."""
        if self.val_share is not None and not 0 < self.val_share < 1:
            raise UsageError(f"--val-share {self.val_share} is not between 0 and 1")
        if self.source == "pydocs":
            if self.input:
                raise UsageError(
                    "pydocs is the documentation installed here; for --input name the source files or jsonl"
                )
            return [pydocs_rows()], {}
        if self.input:
            return list(chain.from_iterable(_expand(Path(p)) for p in self.input)), {}
        if self.source not in HUB:
            raise UsageError(f"the source {self.source} needs --input FILE…")
        return download(self.source, self.subset)

    def documents(self):
        """Iterate over the documents (str), always in the same order and in constant memory.

        UsageError where a file is not UTF-8, not JSON or without the field that holds the text.
        """
        files, hub = self.located
        texts = chain.from_iterable(map(self._read, files))
        if self.source == "shakespeare" and hub:  # three parts of one text
            texts = cut("".join(texts).splitlines(True))
        return (text for text in texts if text and not text.isspace())

    def _read(self, path):
        if self.source == "pydocs":
            return _pydocs_texts(path)
        kind = path.name.removesuffix(".gz").rpartition(".")[2]
        if kind == "parquet":
            if self.source == "hellaswag":
                return (json.dumps(row, ensure_ascii=False) for row in read_parquet(path))
            return read_parquet(path, self.text_field)
        if self.source == "jsonl" or (kind in ("jsonl", "json") and self.source not in ("files", "shakespeare")):
            return read_texts(path, self.text_field)
        return read_text(path)

    def describe(self):
        """What identifies the corpus, for the record: the files' checksums, or the hub's revision."""
        files, hub = self.located
        rows = [{"file": path.name, "bytes": path.stat().st_size} for path in files]
        if not hub:
            rows = [{**row, "sha256": file_sha256(path)} for row, path in zip(rows, files)]
        return {"source": self.source, **hub, "text_field": self.text_field, "files": rows}

    def text_bytes(self):
        """An estimate of the bytes of text, from the sizes of the files and typical compression."""
        return sum(path.stat().st_size * {".parquet": 2, ".gz": 3}.get(path.suffix, 1) for path in self.located[0])


def documents(source, inputs=(), **options):
    """The documents of a corpus; arguments as the fields of `Corpus`."""
    return Corpus(source, inputs, **options).documents()


# --- files, here or on the hub


def download(source, subset=""):
    """Download a corpus into the hub's cache, resumably -> (list of Path, what to record about the hub)."""
    repo, revision, patterns = HUB[source]
    folder = {"default": "data/*"}.get(subset, f"data/{subset}")
    if subset.startswith("sample-"):
        folder = subset.replace("-", "/", 1)  # sample-10BT lies in sample/10BT
    patterns = [pattern.format(folder=folder) for pattern in patterns]
    with from_hub(repo, "give local files with --input"):
        options = {"repo_type": "dataset", "revision": revision, "allow_patterns": patterns, "max_workers": 4}
        root = Path(huggingface_hub.snapshot_download(repo, **options))
    files = [path for pattern in patterns for path in sorted(root.glob(pattern))]
    if not files:
        raise UsageError(f"{repo} has no files {patterns[0]}; is --subset {subset} right?")
    return files, {"hub": repo, "revision": root.name, "subset": subset if source == "fineweb-edu" else None}


def stream(cfg):
    """Documents read over the network as they are asked for, where the first file alone would be 2 GB."""
    from datasets import load_dataset

    repo, revision, _ = HUB[cfg.source]
    with from_hub(repo, "give local files with --input"):
        for row in load_dataset(repo, cfg.subset, revision=revision, split="train", streaming=True):
            yield row[cfg.text_field]


def _expand(path):
    """A file, or the files in a folder that are not hidden (as .cache/ is, which downloads leave) -> list of Path."""
    files = [path]
    if path.is_dir():
        names = sorted(p.relative_to(path) for p in path.rglob("*") if p.is_file())
        files = [path / name for name in names if not any(part.startswith(".") for part in name.parts)]
    if not files or not files[0].exists():
        raise UsageError(f"{path} holds no files" if path.is_dir() else f"{path} does not exist")
    return files


def _lines(path):
    """Lines of at most 64 Ki characters, so that a file without line ends, too, streams."""
    with open_text(path) as f:
        while line := f.readline(1 << 16):
            yield line


def read_text(path):
    """Documents of a text file: the text between separator lines, or without any, pieces of about 4 kB."""
    if not any(line.strip() == SEPARATOR for line in islice(_lines(path), 10_000)):
        yield from cut(_lines(path))
        return
    for is_separator, lines in groupby(_lines(path), key=lambda line: line.strip() == SEPARATOR):
        if not is_separator:
            yield "".join(lines).strip("\n")


def cut(lines):
    """Join lines into documents, split at the first blank line after about 4 kB, or else at 8 kB."""
    document, size = [], 0
    for line in lines:
        document.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARS and (line.isspace() or size >= 2 * DOCUMENT_CHARS):
            yield "".join(document).strip("\n")
            document, size = [], 0
    yield "".join(document).strip("\n")


# --- pydocs: the documentation that is installed everywhere

PACKAGES = ("numpy", "torch")
# Tests and internal modules.
LEFT_OUT = {"test", "tests", "testing", "idle_test", "_vendor", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT |= {"lib2to3", "idlelib", "_internal", "ntpath.py"}
NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PYDOCS_FORMAT = 1


def docstrings():
    """Iterate over {"name", "kind", "signature", "doc"} of the standard library, numpy and torch.

    name: dotted, as one imports it ("os.path.join"); kind: module, class, function or method; signature: the arguments
    as in the source, "(a, *p)", a class's are its bases, a module's is empty; doc: cleaned as `inspect.cleandoc` does.
    """
    return (row for _, row in read_jsonl(pydocs_rows()) if row["kind"] != "topic")


def _pydocs_texts(path):
    """Documents of about 4 kB in the manner of `help()`: the topics, then module by module the names and docstrings.

    Topics and what is longer than 8 kB are cut at blank lines; shorter entries of a module are joined.
    """
    for module, rows in groupby((row for _, row in read_jsonl(path)), key=lambda row: row["module"]):
        document = ""
        for entry in (f"{_render(row)}\n\n" for row in rows):
            if document and len(document) + len(entry) > DOCUMENT_CHARS * 5 // 4:
                yield document.strip("\n")
                document = ""
            if module == "topics" or len(entry) > 2 * DOCUMENT_CHARS:
                yield from cut(entry.splitlines(True))
            else:
                document += entry
        yield document.strip("\n")


def _render(row):
    if row["kind"] == "topic":
        return row["doc"]
    title = {"module": "module ", "class": "class "}.get(row["kind"], "") + row["name"] + row["signature"]
    return title + "\n" + "\n".join(f"    {line}" if line else "" for line in row["doc"].splitlines())


def pydocs_rows():
    """The jsonl of docstrings, made once per set of versions, which its name says -> its path in data/cache."""
    specs = {name: importlib.util.find_spec(name) for name in PACKAGES}  # does not import a top-level package
    roots = {name: Path(spec.origin).parent for name, spec in specs.items() if spec}
    found = "".join(f"-{name}{importlib.metadata.version(name)}" for name in roots)
    path = CACHE / f"pydocs{PYDOCS_FORMAT}-python{platform.python_version()}{found}.jsonl"
    if not path.exists():
        unique = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the source
            for row in _collect({"": Path(sysconfig.get_paths()["stdlib"]), **roots}):
                unique.setdefault(row["doc"], row)  # without aliases and inherited docstrings
        with atomic_open(path) as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in unique.values())
    return path


def _collect(roots):
    """Rows of the topics and of {package: its folder}. Nothing but pydoc_data is imported: `ast` reads."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield {"module": "topics", "name": name, "kind": "topic", "signature": "", "doc": topics[name].strip()}
    for package, root in roots.items():
        names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
        for name in tqdm(names, desc=f"reading {package or 'the standard library'}", unit="file", disable=None):
            parts = [package, *name.removesuffix(".py").split("/")]
            internal = package == "torch" and any(map(_private, parts))  # numpy's public functions are in _core
            if LEFT_OUT.isdisjoint(name.split("/")) and not internal:
                module = ".".join(p for p in parts if p and p != "__init__").replace("posixpath", "os.path")
                with suppress(SyntaxError, ValueError, OSError):  # skip what does not parse
                    yield from _node_rows(ast.parse((root / name).read_bytes()), "module", module, module)


def _private(name):
    return name.startswith("_") and not name.endswith("__")


def _node_rows(node, kind, name, module):
    """Rows of a module, class or function and its public members."""
    doc = ast.get_docstring(node) or ""
    if doc and valid(doc) == doc:  # a docstring may spell a lone surrogate, which UTF-8 cannot hold
        yield {"module": module, "name": name, "kind": kind, "signature": _signature(node), "doc": doc}
    if kind in ("module", "class"):
        for child in node.body:
            if isinstance(child, NAMED) and not _private(child.name):
                inner = "class" if isinstance(child, ast.ClassDef) else "method" if kind == "class" else "function"
                yield from _node_rows(child, inner, f"{name}.{child.name}", module)


def _signature(node):
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return f"({ast.unparse(node.args)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    bases = getattr(node, "bases", ())  # of a class
    return f"({', '.join(map(ast.unparse, bases))})" if bases else ""


@dataclass(kw_only=True)
class Config(Corpus):
    """Write the documents of a corpus as lines {"text": ...}."""

    source: tyro.conf.Positional[Literal[SourceName, "hellaswag"]]
    out: Path  # the .jsonl file to write; a .txt gets plain text, with a blank line between documents
    part: Literal["all", "train", "val"] = "all"  # train excludes what data/prepare.py holds out for validation
    max_bytes: int | None = None  # stop before the text exceeds this many UTF-8 bytes


def select(cfg):
    """The documents of one part."""
    if cfg.part == "all":
        from_start = cfg.source == "fineweb-edu" and cfg.max_bytes and not cfg.input
        return stream(cfg) if from_start and not huggingface_hub.is_offline_mode() else cfg.documents()
    if cfg.val_share is not None:
        return (text for text in cfg.documents() if is_held_out(text, cfg.val_share) == (cfg.part == "val"))
    if cfg.part == "val":
        raise UsageError(f"{cfg.source} holds out its first tokens, whose end depends on the tokenizer: no --part val")
    # Leave out the first bytes, twice what prepare holds out: 100M tokens, or a tenth of a small corpus.
    lengths = (len(text.encode("utf-8")) for text in islice(cfg.documents(), 10**6))
    passed = list(accumulate(lengths, initial=0))
    return islice(cfg.documents(), bisect_left(passed, min(1 << 30, passed[-1] // 5)), None)


def main():
    """Write a source's documents and print their count, size and sha256."""
    cfg = tyro.cli(Config)
    if cfg.out.suffix in (".gz", ".parquet"):
        raise UsageError(f"{cfg.out}: what is written is neither gzipped nor parquet; name a .jsonl or .txt file")
    count = size = 0
    with atomic_open(cfg.out) as f, tqdm(total=cfg.max_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for text in select(cfg):
            length = len(text.encode("utf-8"))
            if cfg.max_bytes is not None and size + length > cfg.max_bytes:
                break
            if cfg.out.suffix == ".txt":
                f.write("\n" * bool(count) + text + "\n")
            else:
                f.write((text if cfg.source == "hellaswag" else json.dumps({"text": text}, ensure_ascii=False)) + "\n")
            count, size = count + 1, size + length
            bar.update(length)
        if not count:
            raise UsageError(f"{cfg.source} gave no document; nothing was written")
    print(f"{cfg.out}: {count:,} documents, {size:,} bytes of text, sha256 {file_sha256(cfg.out)}")


if __name__ == "__main__":
    cli(main)
