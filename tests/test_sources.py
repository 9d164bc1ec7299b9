import gzip
import json
import os
import subprocess
import sys
from collections import Counter

import pytest

from common import UsageError, is_held_out
from data import sources
from data.sources import Corpus, cut, docstrings, documents


def lines_of(path):
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def write_parquet(path, texts, column="text"):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({column: texts}), path, row_group_size=3)


# --- pydocs


@pytest.fixture(scope="module")
def pydocs():
    return list(documents("pydocs"))


def test_pydocs_is_several_megabytes_without_duplicates(pydocs):
    assert sum(map(len, pydocs)) > 4e6
    assert max(Counter(pydocs).values()) == 1
    assert max(map(len, pydocs)) < 9000


def test_pydocs_holds_what_the_modules_say(pydocs):
    """Against `inspect`, which imports the modules that `ast` only reads."""
    import inspect
    import os.path
    import textwrap

    rows = {row["name"]: row for row in docstrings()}
    for name, function in {"os.path.join": os.path.join, "textwrap.fill": textwrap.fill}.items():
        assert rows[name]["kind"] == "function" and rows[name]["doc"] == inspect.getdoc(function)
        assert rows[name]["signature"] == str(inspect.signature(function)).replace(" = ", "=")
    assert rows["collections.OrderedDict.popitem"]["kind"] == "method"
    assert rows["collections.Counter"]["kind"] == "class" and rows["collections.Counter"]["signature"] == "(dict)"
    assert any("os.path.join(a, *p)\n    Join two or more pathname components" in text for text in pydocs)


def test_docstrings_are_unique_and_in_order():
    rows = list(docstrings())
    assert len({row["doc"] for row in rows}) == len(rows) > 8000
    assert {row["kind"] for row in rows} == {"module", "class", "function", "method"}
    assert not any("tests." in row["name"] or ".test." in row["name"] for row in rows)


def test_pydocs_imports_nothing_but_topics(tmp_path):
    """A fresh process that has the cache made anew in another place and then looks at what was imported."""
    code = f"""
import sys
from pathlib import Path
from data import sources
sources.CACHE = Path({str(tmp_path)!r})
sources.PACKAGES = ("numpy",)
before = set(sys.modules)
rows = [row for row in sources.docstrings()]
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
assert "pydoc_data" in sys.modules and "numpy" not in new and "tkinter" not in new and "antigravity" not in new, new
print(sources.file_sha256(sources.pydocs_rows()))
"""
    sums = []
    for seed in "17":
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        sums.append(done.stdout)
        for path in tmp_path.iterdir():
            path.unlink()
    assert sums[0] == sums[1]


# --- text files


@pytest.mark.core
def test_text_is_cut_at_blank_lines_and_loses_nothing_but_them():
    paragraphs = [f"paragraph {i} " + "word " * (i % 90) for i in range(400)]
    text = "\n\n".join(paragraphs)
    pieces = list(cut(text.splitlines(True)))
    assert "\n\n".join(pieces) == text
    assert all(4000 <= len(p) < 4700 for p in pieces[:-1])


def test_text_without_blank_lines_is_cut_at_line_ends():
    lines = [f"line {i}\n" for i in range(3000)]
    pieces = list(cut(lines))
    assert "\n".join(pieces) + "\n" == "".join(lines) and max(map(len, pieces)) < 8100


def test_one_endless_line_streams(tmp_path):
    (tmp_path / "a.txt").write_text("ab" * 200_000)
    assert "".join(documents("files", [tmp_path / "a.txt"])) == "ab" * 200_000


@pytest.mark.core
def test_separators_win_over_blank_lines(tmp_path):
    stories = ["one\n\n" + "x" * 9000, "two", "three\n"]
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories))
    assert list(documents("tinystories", [tmp_path / "stories.txt"])) == [s.strip("\n") for s in stories]


def test_a_real_text_comes_whole(shared_data):
    path = shared_data / "tinyshakespeare.txt"
    pieces = list(documents("shakespeare", [path]))
    text = path.read_text(encoding="utf-8")
    assert "\n\n".join(pieces) == text.strip("\n") and 200 < len(pieces) < 300


# --- local files of other kinds


TEXTS = ["first", "zweite ü", "第三 <|endoftext|>", "fourth\nwith lines", "fifth", "sixth", "seventh"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_local_files_of_every_kind_read_alike(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, TEXTS)
    else:
        raw = "".join(json.dumps({"text": t, "id": 1}) + "\n" for t in TEXTS).encode()
        path.write_bytes(gzip.compress(raw) if kind.endswith("gz") else raw)
    assert list(documents("fineweb-edu", [path])) == TEXTS
    assert list(documents("jsonl", [tmp_path])) == TEXTS  # a folder
    assert list(documents("jsonl", [path, path])) == TEXTS * 2


@pytest.mark.core
def test_half_a_surrogate_pair_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d b\\ud83d\\ude00"}\n')
    assert list(documents("jsonl", [tmp_path / "a.jsonl"])) == ["a\ufffd b😀"]


def test_another_column(tmp_path):
    write_parquet(tmp_path / "a.parquet", TEXTS, column="content")
    assert list(documents("jsonl", [tmp_path / "a.parquet"], text_field="content")) == TEXTS
    with pytest.raises(UsageError, match="no column text of text, but content"):
        list(documents("jsonl", [tmp_path / "a.parquet"]))


def test_a_column_of_numbers_and_a_damaged_page_are_named(tmp_path, assert_refuses):
    path = tmp_path / "a.parquet"
    write_parquet(path, list(range(9)), column="id")
    args = ("data/sources.py", "jsonl", "--input", path, "--out", tmp_path / "out.jsonl")
    assert_refuses(*args, "--text-field", "id", says="no column id of text, but none")
    write_parquet(path, [str(i) * 500 for i in range(100)])
    path.write_bytes(path.read_bytes()[:4] + b"\xff" * 30 + path.read_bytes()[34:])
    assert_refuses(*args, says="is not a readable parquet file")


def test_hidden_files_of_a_folder_are_no_documents(tmp_path):
    """The hub's library leaves .cache/huggingface/download/*.metadata in the folder of a download."""
    for name in ("b/2.txt", "a.txt", ".cache/huggingface/a.metadata", ".hidden.txt"):
        (tmp_path / ".in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".in" / name).write_text(name)
    assert list(documents("files", [tmp_path / ".in"])) == ["a.txt", "b/2.txt"]


def test_pydocs_takes_no_files_and_nothing_is_written_under_a_wrong_name(tmp_path, assert_refuses):
    args = ("data/sources.py", "pydocs", "--input", tmp_path / "book.txt", "--out")
    assert_refuses(*args, tmp_path / "out.jsonl", says="name the source files or jsonl")
    assert_refuses(*args, tmp_path / "out.jsonl.gz", says="name a .jsonl or .txt file")


# --- the hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub's cache, laid out as the hub does: hub(repository, {file: rows}); `hub.asked` records."""
    import huggingface_hub
    import pyarrow
    import pyarrow.parquet

    def folder(repo):
        return tmp_path / "test_hub" / repo.replace("/", "--") / "0123abcd"

    def snapshot(repo, *, repo_type, revision, allow_patterns, max_workers):
        put.asked.append((repo, repo_type, revision, allow_patterns))
        return str(folder(repo))

    def put(repo, files):
        for name, rows in files.items():
            path = folder(repo) / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)

    put.asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return put


@pytest.mark.core
def test_the_hub_files_are_read_in_order(hub):
    fineweb = {"sample/10BT/001_00000": "Y", "sample/10BT/000_00000": "X", "sample/100BT/000_00000": "Z"}
    fineweb["data/CC-MAIN-2024-10/000_00000"] = "W"
    hub("HuggingFaceFW/fineweb-edu", {name: [{"text": text}] for name, text in fineweb.items()})
    corpus = Corpus("fineweb-edu")
    assert list(corpus.documents()) == ["X", "Y"] == list(corpus.documents())
    assert [request[3] for request in hub.asked] == [["sample/10BT/*.parquet"]]  # once
    record = corpus.describe()
    assert record["revision"] == "0123abcd" and record["files"][0]["file"] == "000_00000.parquet"
    assert (
        list(documents("fineweb-edu", subset="CC-MAIN-2024-10"))
        == ["W"]
        == list(documents("fineweb-edu", subset="default"))
    )
    with pytest.raises(UsageError, match="CC-MAIN-2099-01"):
        list(documents("fineweb-edu", subset="CC-MAIN-2099-01"))


def test_shakespeare_comes_as_published(hub, shared_data, in_process, tmp_path):
    """The hub has the play in three parts, cut at nine tenths and again in the middle of the rest, inside of lines."""
    raw = (shared_data / "tinyshakespeare.txt").read_bytes()
    text = raw.decode("utf-8")
    a = int(len(text) * 0.9)
    b = a + int((len(text) - a) * 0.5)
    parts = {"train": text[:a], "validation": text[a:b], "test": text[b:]}
    hub("karpathy/tiny_shakespeare", {f"default/{name}/0000": [{"text": part}] for name, part in parts.items()})
    assert list(documents("shakespeare")) == list(documents("shakespeare", [shared_data / "tinyshakespeare.txt"]))
    code, out, _ = in_process(sources.main, "shakespeare", "--out", tmp_path / "play.txt")
    assert code == 0 and (tmp_path / "play.txt").read_bytes() == raw and "sha256 86c4e6aa" in out


def test_hellaswag_comes_with_all_its_fields(hub, in_process, tmp_path):
    items = [{"ind": i, "ctx_a": "A", "ctx": f"a {i}", "endings": ["b", "c", "d", "é"], "label": "3"} for i in range(3)]
    hub("Rowan/hellaswag", {"data/validation-00000-of-00001": items, "data/train-00000-of-00001": items[:1]})
    assert in_process(sources.main, "hellaswag", "--out", tmp_path / "items.jsonl")[0] == 0
    assert [json.loads(line) for line in (tmp_path / "items.jsonl").read_text("utf-8").splitlines()] == items


def test_a_sample_of_fineweb_edu_is_streamed(monkeypatch, in_process, tmp_path):
    import datasets
    import huggingface_hub

    def load_dataset(*args, **options):
        assert args == ("HuggingFaceFW/fineweb-edu", "sample-10BT") and options["streaming"]
        return ({"text": f"document {i}"} for i in range(10**9))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: False)
    assert in_process(sources.main, "fineweb-edu", "--max-bytes", 25, "--out", tmp_path / "a.jsonl")[0] == 0
    assert lines_of(tmp_path / "a.jsonl") == ["document 0", "document 1"]


def test_without_a_network_the_local_way_is_named(assert_refuses, tmp_path):
    says = "give local files with --input"
    assert_refuses("data/sources.py", "tinystories", "--out", tmp_path / "x.jsonl", says=says)
    assert not list(tmp_path.iterdir())


# --- the command line


def test_the_parts_are_disjoint_and_complete(tmp_path, script, assert_refuses):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(2000)))
    for part in ("all", "train", "val"):
        script("data/sources.py", "jsonl", "--input", tmp_path / "in.jsonl", "--part", part, "--out", tmp_path / part)
    everything, train, val = (lines_of(tmp_path / part) for part in ("all", "train", "val"))
    assert len(everything) == 2000 and sorted(train + val) == sorted(everything) and not set(train) & set(val)
    assert_refuses(
        "data/sources.py", "jsonl", "--part", "val", "--val-share", 2, "--out", tmp_path / "x", says="--val-share 2"
    )
    assert 15 < len(val) < 70 and all(is_held_out(t, 0.02) for t in val)


def test_fineweb_training_text_starts_late(tmp_path, script):
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": f"{i:090d}"}) + "\n" for i in range(1000)))
    args = ("fineweb-edu", "--input", tmp_path / "in.jsonl", "--part", "train", "--out", tmp_path / "out.jsonl")
    script("data/sources.py", *args)
    assert 200 <= int(lines_of(tmp_path / "out.jsonl")[0]) < 300


def test_max_bytes_is_a_limit(tmp_path, script):
    (tmp_path / "in.jsonl").write_text('{"text": "éé"}\n' * 10)
    done = script(
        "data/sources.py", "jsonl", "--input", tmp_path / "in.jsonl", "--max-bytes", 11, "--out", tmp_path / "o.jsonl"
    )
    assert lines_of(tmp_path / "o.jsonl") == ["éé", "éé"] and "8 bytes" in done.stdout and "sha256" in done.stdout


USAGE_ERRORS = {
    "missing": (None, "does not exist"),
    "not UTF-8": (b"fine\nbad \xff\xfe\n", "is not UTF-8"),
    "not JSON": (b'{"text": "a"}\n{"text": \n', "line 2"),
    "no text": (b'{"txt": "a"}\n', "line 1"),
    "text not a string": (b'{"text": 5}\n', "line 1"),
    "too deep": (b"[" * 100_000, "line 1"),
    "empty": (b"", "no document"),
}


@pytest.mark.parametrize("what", USAGE_ERRORS)
def test_usage_errors_are_one_line(tmp_path, assert_refuses, what):
    raw, says = USAGE_ERRORS[what]
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    if raw is not None:
        path.write_bytes(raw)
    source = "files" if what == "not UTF-8" else "jsonl"
    assert_refuses("data/sources.py", source, "--input", path, "--out", tmp_path / "out.jsonl", says=says)
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob(".*"))


def test_a_damaged_gzip_is_named(tmp_path):
    raw = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(raw[:-12])
    with pytest.raises(UsageError, match="damaged gzip"):
        list(documents("jsonl", [tmp_path / "a.jsonl.gz"]))
