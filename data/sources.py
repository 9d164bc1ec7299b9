"""Documents: one generator per corpus, and a command line that writes them for whoever wants text.

    python data/sources.py pydocs --out pydocs.jsonl                              # from this very machine, no network
    python data/sources.py pydocs --part train --out data/corpora/pydocs_train.jsonl   # what a tokenizer may see
    python data/sources.py fineweb-edu --subset sample-10BT --max-bytes 1000000000 --out fineweb.jsonl
    python data/sources.py files --input book.txt notes.md --out mine.jsonl

pydocs       the documentation that comes with Python, numpy and torch: several MB of English prose on every machine
shakespeare  Tiny Shakespeare, from the hub or `--input tinyshakespeare.txt`
tinystories  TinyStories, from the hub or local files
fineweb-edu  FineWeb-Edu from the hub, `--subset sample-10BT` (or another, or default: all of it), or local files
files        any UTF-8 text files
jsonl        lines {"text": ...}

Local files are parquet, jsonl or text (gzipped too), or folders of them. Text is cut at blank lines into documents of
about 4 kB; a line `<|endoftext|>`, as TinyStories' files have it, ends a document and then blank lines do not.

A validation part is held out by document hash, so that it never changes and no copy of a document is on both sides;
fineweb-edu holds out its first tokens instead, as llm.c and build-nanogpt do. `--part train` leaves that part out.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import platform
import sysconfig
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from bpe.pretokenizer import valid
from common import ROOT, UsageError, atomic_open, cli, file_sha256, from_hub, open_text

CACHE = ROOT / "data" / "cache"
DOCUMENT_CHARS = 4000  # a text file is cut at the first blank line after this many, at the first line end after twice
SEPARATOR = "<|endoftext|>"
SourceName = Literal["pydocs", "shakespeare", "tinystories", "fineweb-edu", "files", "jsonl"]
# Held-out share of the documents by hash; None: the first tokens of the corpus.
VAL_SHARE = {
    "pydocs": 0.08,
    "shakespeare": 0.08,
    "files": 0.08,
    "jsonl": 0.02,
    "tinystories": 0.01,
    "fineweb-edu": None,
}


def documents(source, inputs=(), subset="sample-10BT", text_field="text"):
    """Iterate over the documents (str) of a corpus, always in the same order, in memory that does not grow.

    inputs: local files or folders instead of the hub's. text_field: the column or key that holds the text.
    UsageError where a file is missing, not UTF-8, not JSON or without the field.
    """
    if source == "pydocs":
        texts = pydocs_documents()
    else:
        files, _ = locate(source, inputs, subset)
        texts = itertools.chain.from_iterable(_read(path, source, text_field) for path in files)
    return (text for text in texts if text and not text.isspace())


def is_validation(text, share):
    """Whether a document is held out, by its hash alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big") < share * 2**64


def describe(source, inputs=(), subset="sample-10BT", text_field="text"):
    """What pins a corpus down, for the record: {"source", and the files' sums, the hub's revision or the versions}."""
    if source == "pydocs":
        path = pydocs_rows()
        return {"source": source, "versions": pydocs_versions(), "sha256": file_sha256(path)}
    files, hub = locate(source, inputs, subset)
    rows = [{"file": p.name, "bytes": p.stat().st_size, "sha256": fingerprint(p)} for p in files]
    return {"source": source, **hub, "text_field": text_field, "files": rows}


def fingerprint(path, window=64 << 20):
    """sha256 of a file; of its size, its first and its last 64 MiB where it is longer than both."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with open(path, "rb") as f:
        if size > 2 * window:
            digest.update(f"{size}\n".encode())
            digest.update(f.read(window))
            f.seek(-window, 2)
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# files, here or on the hub

HUB = {  # (dataset, revision, patterns); the parquet files are read in the order of their names
    "shakespeare": ("karpathy/tiny_shakespeare", "refs/convert/parquet", ["*.parquet"]),
    "tinystories": ("roneneldan/TinyStories", "main", ["data/*.parquet"]),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", "main", ["{subset}/*.parquet"]),
}


def locate(source, inputs=(), subset="sample-10BT"):
    """The files of a corpus, in order, and what to record about the hub -> (list of Path, dict)."""
    if inputs:
        return list(itertools.chain.from_iterable(_expand(Path(p)) for p in inputs)), {}
    if source not in HUB:
        raise UsageError(f"the source {source} needs --input FILE…")
    repo, revision, patterns = HUB[source]
    folder = {"default": "data"}.get(subset, f"data/{subset}")
    if subset.startswith("sample-"):
        folder = subset.replace("-", "/", 1)  # sample-10BT lies in sample/10BT
    root = hub_snapshot(repo, revision, [p.format(subset=folder) for p in patterns])
    names = sorted((p.relative_to(root).as_posix() for p in root.rglob("*.parquet")), key=lambda n: (_split_rank(n), n))
    if source == "fineweb-edu":  # the cache may hold other subsets as well
        names = [name for name in names if name.startswith(f"{folder}/")]
    files = [root / name for name in names]
    if not files:
        raise UsageError(f"{repo} has no files {folder}/*.parquet; is --subset {subset} right?")
    return files, {"hub": repo, "revision": root.name, "subset": subset if source == "fineweb-edu" else None}


def hub_snapshot(repo, revision, patterns):
    """Download files of a dataset into the hub's cache, resumably -> the folder, whose name is the commit."""
    import huggingface_hub

    kind = {"repo_type": "dataset", "revision": revision}
    with from_hub(repo, "give local files with --input"):
        return Path(huggingface_hub.snapshot_download(repo, **kind, allow_patterns=patterns, max_workers=4))


def _split_rank(name):
    """train, then validation, then test: Tiny Shakespeare's three parts in the order of the play."""
    return 2 if "test" in name else 1 if "validation" in name else 0


def _expand(path):
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
        if not files:
            raise UsageError(f"{path} holds no files")
        return files
    if not path.exists():
        raise UsageError(f"{path} does not exist")
    return [path]


def _read(path, source, text_field):
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if source in ("files", "shakespeare") and kind != "parquet":
        return read_text(path)
    if kind == "parquet":
        texts = read_parquet(path, text_field)
        return (
            cut(itertools.chain.from_iterable(t.splitlines(True) for t in texts)) if source == "shakespeare" else texts
        )
    if kind in ("jsonl", "json") or source == "jsonl":
        return read_jsonl(path, text_field)
    return read_text(path)


def _lines(path):
    """Lines of at most 64 Ki characters, so that a file without line ends, too, streams."""
    with open_text(path) as f:
        while line := f.readline(1 << 16):
            yield line


def read_text(path):
    """Documents of a text file: what stands between separator lines where there are any, else pieces of about 4 kB."""
    head = list(itertools.islice(_lines(path), 10_000))
    lines = itertools.chain(head, itertools.islice(_lines(path), len(head), None)) if len(head) == 10_000 else head
    if any(line.strip() == SEPARATOR for line in head):
        return _separated(lines)
    return cut(lines)


def _separated(lines):
    document = []
    for line in lines:
        if line.strip() == SEPARATOR:
            yield "".join(document).strip("\n")
            document = []
        else:
            document.append(line)
    yield "".join(document).strip("\n")


def cut(lines):
    """Join lines into documents, cut at the first blank line after about 4 kB, and never let one grow past 8 kB."""
    document, size = [], 0
    for line in lines:
        document.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARS and (line.isspace() or size >= 2 * DOCUMENT_CHARS):
            yield "".join(document).strip("\n")
            document, size = [], 0
    yield "".join(document).strip("\n")


def read_jsonl(path, text_field="text"):
    """Documents of a jsonl file: one object a line."""
    with open_text(path) as f:
        for i, line in enumerate(f, 1):
            if line.isspace():
                continue
            try:
                text = json.loads(line)[text_field]
                if not isinstance(text, str):
                    raise TypeError
            except (json.JSONDecodeError, KeyError, TypeError):
                raise UsageError(f'{path}, line {i} is not a JSON object with a text "{text_field}"') from None
            yield valid(text) if "\\u" in line else text  # JSON can spell a lone surrogate


def read_parquet(path, text_field="text"):
    """Documents of a parquet file, a few hundred rows in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if text_field not in file.schema_arrow.names:
                raise UsageError(f"{path} has no column {text_field}, but {', '.join(file.schema_arrow.names)}")
            for batch in file.iter_batches(batch_size=256, columns=[text_field]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except pyarrow.ArrowInvalid as e:
        raise UsageError(f"{path} is not a readable parquet file ({str(e).splitlines()[0]})") from None


# ---------------------------------------------------------------------------------------------------------------------
# pydocs: the documentation that every machine has

PACKAGES = ("numpy", "torch")
# Tests, and what is not written for readers of documentation.
LEFT_OUT = {"test", "tests", "testing", "idle_test", "_vendor", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT |= {"lib2to3", "idlelib", "_internal", "ntpath.py"}
NAMED = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PYDOCS_FORMAT = 1


def docstrings():
    """Iterate over {"name", "kind", "signature", "doc"} of the standard library, numpy and torch.

    name: dotted, as one imports it ("os.path.join"); kind: module, class, function or method; signature: the arguments
    as in the source, "(a, *p)", a class's are its bases, a module's is empty; doc: cleaned as `inspect.cleandoc` does.
    """
    return (row for row in _pydocs() if row["kind"] != "topic")


def pydocs_documents():
    """Documents of about 4 kB in the manner of `help()`: the topics, then module by module the names and docstrings."""
    for module, rows in itertools.groupby(_pydocs(), key=lambda row: row["module"]):
        entries = (f"{_render(row)}\n\n".splitlines(True) for row in rows)
        if module == "topics":  # each a document of its own, cut where it is long
            for entry in entries:
                yield from cut(entry)
        else:
            yield from _pack("".join(entry) for entry in entries)


def _pack(entries):
    """Whole entries joined up to about 4 kB; a longer entry is cut at its blank lines."""
    document, size = [], 0
    for entry in entries:
        if document and size + len(entry) > DOCUMENT_CHARS * 5 // 4:
            yield "".join(document).strip("\n")
            document, size = [], 0
        if len(entry) > 2 * DOCUMENT_CHARS:
            yield from cut(entry.splitlines(True))
        else:
            document.append(entry)
            size += len(entry)
    yield "".join(document).strip("\n")


def _render(row):
    if row["kind"] == "topic":
        return row["doc"]
    title = {"module": "module ", "class": "class "}.get(row["kind"], "") + row["name"] + row["signature"]
    return title + "\n" + "\n".join(f"    {line}" if line else "" for line in row["doc"].splitlines())


def _pydocs():
    with open(pydocs_rows(), encoding="utf-8") as f:
        for line in f:
            yield json.loads(line)


def pydocs_versions():
    """The versions that decide what pydocs holds."""
    found = [name for name in PACKAGES if importlib.util.find_spec(name)]
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in found}}


def pydocs_rows():
    """The jsonl of docstrings, made once per set of versions -> its path in data/cache."""
    versions = "-".join(f"{name}{version}" for name, version in pydocs_versions().items())
    path = CACHE / f"pydocs{PYDOCS_FORMAT}-{versions}.jsonl"
    if not path.exists():
        seen = set()
        with atomic_open(path) as f:
            for row in _collect():
                digest = hashlib.sha256(row["doc"].encode("utf-8")).digest()
                if digest not in seen:  # aliases and inherited texts
                    seen.add(digest)
                    f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _collect():
    """Rows of the topics, the standard library and the packages. Nothing but pydoc_data is imported: `ast` reads."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield {"module": "topics", "name": name, "kind": "topic", "signature": "", "doc": topics[name].strip()}
    roots = [(Path(sysconfig.get_paths()["stdlib"]), "")]
    for name in PACKAGES:
        if spec := importlib.util.find_spec(name):  # a top-level package is found without being imported
            roots.append((Path(spec.origin).parent, name))
    for root, package in roots:
        files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
        for name in tqdm(sorted(files), desc=f"reading {package or 'the standard library'}", unit="file", disable=None):
            if LEFT_OUT.isdisjoint(name.split("/")):
                yield from _module_rows(files[name], name, package)


def _module_rows(path, name, package):
    """Rows of one source file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    parts = [package, *name.removesuffix(".py").split("/")]
    if package == "torch" and any(map(_private, parts)):  # the compiler's insides; numpy keeps its public face in _core
        return
    module = ".".join(p for p in parts if p and p != "__init__").replace("posixpath", "os.path")
    yield from _node_rows(tree, module, module)


def _private(name):
    return name.startswith("_") and not name.endswith("__")


def _node_rows(node, name, module):
    kind = _kind(node, is_method=name.rpartition(".")[0] != module)
    doc = ast.get_docstring(node, clean=False)
    if doc and (doc := inspect.cleandoc(doc)) and _encodable(doc):
        yield {"module": module, "name": name, "kind": kind, "signature": _signature(node), "doc": doc}
    if kind in ("module", "class"):
        for child in node.body:
            if isinstance(child, NAMED) and not _private(child.name):
                yield from _node_rows(child, f"{name}.{child.name}", module)


def _kind(node, is_method):
    if isinstance(node, ast.Module):
        return "module"
    if isinstance(node, ast.ClassDef):
        return "class"
    return "method" if is_method else "function"


def _signature(node):
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(map(ast.unparse, node.bases))
        return f"({bases})" if bases else ""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def _encodable(text):
    """A docstring may spell a lone surrogate, which UTF-8 cannot hold."""
    return text.isascii() or not any("\ud800" <= c <= "\udfff" for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# command line


@dataclass
class Config:
    """Write the documents of a corpus as lines {"text": ...}."""

    source: tyro.conf.Positional[SourceName]
    out: Path
    """The .jsonl file to write."""
    input: tuple[Path, ...] = ()
    """Local files or folders (parquet, jsonl, text; gzipped too) instead of the hub's."""
    subset: str = "sample-10BT"
    """Part of fineweb-edu: sample-10BT, sample-100BT, sample-350BT, a crawl such as CC-MAIN-2024-10, or default."""
    text_field: str = "text"
    """Column or key that holds the text."""
    part: Literal["all", "train", "val"] = "all"
    """Which documents: train leaves out what data/prepare.py holds out for validation."""
    val_share: float | None = None
    """Share of the documents held out by hash; the default is the source's own."""
    max_bytes: int | None = None
    """Stop before the text exceeds this many UTF-8 bytes."""


def select(texts, cfg, files):
    """The documents of one part."""
    share = VAL_SHARE[cfg.source] if cfg.val_share is None else cfg.val_share
    if cfg.part == "all":
        return texts
    if share is not None:
        return (text for text in texts if is_validation(text, share) == (cfg.part == "val"))
    if cfg.part == "val":
        raise UsageError(f"{cfg.source} holds out its first tokens, whose end depends on the tokenizer: no --part val")
    return _after(texts, min(1 << 30, sum(map(text_bytes, files)) // 5))


def _after(texts, margin):
    """Drop the first `margin` bytes: twice what prepare holds out (100M tokens, or a tenth of a small corpus)."""
    passed = 0
    for text in texts:
        if passed >= margin:
            yield text
        passed += len(text.encode("utf-8"))


def text_bytes(path):
    """About how much text a file holds, without reading it."""
    if path.suffix != ".parquet":
        return path.stat().st_size
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        meta = file.metadata
        return sum(meta.row_group(i).total_byte_size for i in range(meta.num_row_groups))


def main():
    """Write a source's documents as jsonl, and print what they are."""
    cfg = tyro.cli(Config)
    options = {"inputs": cfg.input, "subset": cfg.subset, "text_field": cfg.text_field}
    files = [] if cfg.source == "pydocs" else locate(cfg.source, cfg.input, cfg.subset)[0]
    count = size = 0
    with atomic_open(cfg.out) as f:
        bar = tqdm(total=cfg.max_bytes, unit="B", unit_scale=True, disable=None)
        for text in select(documents(cfg.source, **options), cfg, files):
            length = len(text.encode("utf-8"))
            if cfg.max_bytes is not None and size + length > cfg.max_bytes:
                break
            f.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            count, size = count + 1, size + length
            bar.update(length)
        bar.close()
        if not count:
            raise UsageError(f"{cfg.source} gave no document; nothing was written")
    print(f"{cfg.out}: {count:,} documents, {size:,} bytes of text, sha256 {file_sha256(cfg.out)}")


if __name__ == "__main__":
    cli(main)
