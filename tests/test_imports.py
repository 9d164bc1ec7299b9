"""Imports between the packages, read from the source: allowed directions, no cycle, unique module names."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import ROOT

pytestmark = pytest.mark.core

# What each package may import besides itself; a name stands for the modules in it, too.
ALLOWED = {
    "common": (),
    "runlog": ("common",),
    "bpe": ("common", "runlog"),
    "data": ("common", "bpe"),
    "gpt2": ("common", "runlog", "bpe", "data.shards"),
    "lora": ("common", "runlog", "data.sources"),
    "bench": ("common", "runlog", "bpe", "data", "gpt2", "lora"),
    "doctor": ("common",),
}


def read_modules():
    """The repository's Python outside tests/ -> {dotted name: source}."""
    command = ["git", "ls-files", "*.py", ":!tests"]
    paths = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    names = {path: path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in paths}
    return {name: (ROOT / path).read_text(encoding="utf-8") for path, name in names.items()}


@cache
def import_nodes(source):
    """The import statements of a source -> [(node, whether it stands in a function)]."""
    tree = ast.parse(source)
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    return [(n, id(n) in lazy) for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]


def imports(source, modules, eager=False):
    """The modules among `modules` that a source imports; eager: without those that a function imports when called."""
    found = set()
    for node, lazy in import_nodes(source):
        if lazy and eager:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(full & modules.keys() or {node.module})
            found.update(name for name in full if name.endswith(".main"))
    return {name for name in found if name.split(".")[0] in ALLOWED}


def faults(modules):
    """What breaks the rules in {dotted name: source} -> list of texts."""
    found = []
    for name, source in modules.items():
        own = name.split(".")[0]
        for other in sorted(imports(source, modules)):
            allowed = any(f"{other}.".startswith(f"{a}.") for a in (own, *ALLOWED[own]))
            if not allowed or other.endswith(".main"):
                found.append(f"{name} imports {other}")
    try:
        TopologicalSorter({n: imports(s, modules, eager=True) - {n} for n, s in modules.items()}).prepare()
    except CycleError as e:
        found.append(f"a circle: {' <- '.join(e.args[1])}")
    last = Counter(name.split(".")[-1] for name in modules)
    required = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    taken = sys.stdlib_module_names | {name.replace("-", "_") for name in required} | {"tokenize"}
    found += [f"the name {n} is taken" for n, k in last.items() if n != "__main__" and (k > 1 or n in taken)]
    return found


def test_the_packages_import_one_way_and_in_no_circle():
    modules = read_modules()
    assert len(modules) > 40 and faults(modules) == []


@pytest.mark.parametrize(
    "name, source, says",
    [
        ("runlog.extra", "from gpt2.model import GPT", "runlog.extra imports gpt2.model"),
        ("gpt2.extra", "def f():\n    from lora import base", "gpt2.extra imports lora.base"),
        ("gpt2.extra", "from data import sources", "gpt2.extra imports data.sources"),
        ("lora.extra", "import bench.harness", "lora.extra imports bench.harness"),
        ("lora.extra", "from lora.sweep import main", "lora.extra imports lora.sweep.main"),
        ("common.usage", "from common import files", "a circle"),
        ("data.datasets", "", "the name datasets is taken"),
        ("lora.model", "", "the name model is taken"),
    ],
)
def test_a_violation_is_found(name, source, says):
    assert any(says in fault for fault in faults(read_modules() | {name: source}))
