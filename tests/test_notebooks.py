"""The notebooks: executed on records cut off in the middle and on none at all, and the committed ones as they stand."""

import ast
import importlib.util
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

from common import UsageError

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def execute():
    """notebooks/execute.py, which is a script and lies in no package, as a module."""
    spec = importlib.util.spec_from_file_location("execute", ROOT / "notebooks/execute.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_names(file):
    """{name: value} of the first code cell: strings, lists and dicts that hold run directories."""
    first = code_cells(nbformat.read(file, as_version=4))[0]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(first.source).body}


def moved(value, move):
    """`value` with move(run) instead of every run directory in it."""
    if isinstance(value, dict):
        return {k: moved(v, move) for k, v in value.items()}
    if isinstance(value, list):
        return [moved(v, move) for v in value]
    return move(value) if value.startswith("runs/") else value


def records(file):
    """The committed run directories that the notebook names."""
    found = []
    moved(run_names(file), lambda run: found.append(run) or run)
    return [run for run in found if (ROOT / run).exists()]


def cut_off(run, folder):
    """A copy of a record as it stood while the run was going on -> its path; a row of metrics is half-written."""
    copy = folder / Path(run).name
    if (ROOT / run).exists() and not copy.exists():
        shutil.copytree(ROOT / run, copy)
        for metrics in copy.rglob("metrics.jsonl"):
            data = metrics.read_bytes()
            metrics.write_bytes(data[: len(data) * 2 // 3])
        for result in copy.rglob("result.json"):
            kind = json.loads(result.read_text(encoding="utf-8"))["kind"]
            result.write_text(json.dumps({"status": "running", "kind": kind}), encoding="utf-8")
    return str(copy)


def printed(notebook):
    """Everything that the cells printed, stderr apart -> (stdout, stderr)."""
    streams = [o for cell in code_cells(notebook) for o in cell.outputs if o.output_type == "stream"]
    return tuple("".join(o.text for o in streams if o.name == name) for name in ("stdout", "stderr"))


def pictures(notebook):
    return [o for cell in code_cells(notebook) for o in cell.outputs if "image/png" in o.get("data", {})]


@each_notebook
def test_runs_that_are_still_being_written(file, execute, tmp_path):
    values = moved(run_names(file), lambda run: cut_off(run, tmp_path))
    notebook = execute.execute(file, values)
    assert printed(notebook)[1] == ""
    assert pictures(notebook) or not records(file)


@each_notebook
def test_missing_records_are_named_with_the_command_that_makes_them(file, execute, tmp_path):
    missing = []
    values = moved(run_names(file), lambda run: missing.append(f"{tmp_path.name}/{run[5:]}") or f"{tmp_path}/{run[5:]}")
    out, err = printed(execute.execute(file, values))
    assert err == ""
    for run in missing:
        assert re.search(rf"no record yet: python \S+\.py .*{re.escape(run)}", out), f"{run} is not named:\n{out}"


@each_notebook
def test_the_committed_notebook_is_executed_whole_and_names_no_machine(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert 3 <= len(cells) <= 12
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
    assert printed(notebook)[1] == ""
    assert pictures(notebook) or not records(file)
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < 500_000
    assert not re.search(r"[\"' (=](/(home|root|work|tmp|Users|usr)/|[A-Z]:\\\\)", text), "a path of one machine"
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells), "times of execution"


@pytest.mark.slow
@each_notebook
def test_the_committed_text_is_what_the_committed_records_give(file, execute):
    assert printed(execute.execute(file, {})) == printed(nbformat.read(file, as_version=4))


def test_another_run_is_shown_with_set(in_process, execute, tmp_path):
    notebook = nbformat.v4.new_notebook()
    sources = "RUN = 'runs/a'\nB = []", "print(RUN, B)"
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    file = tmp_path / "small.ipynb"
    nbformat.write(notebook, file)
    arguments = (file, "--set", "RUN=runs/b c", "B=['d']", "--out", tmp_path / "out.ipynb")
    assert in_process(execute.main, *arguments)[0] == 0
    shown = nbformat.read(tmp_path / "out.ipynb", as_version=4)
    assert printed(shown) == ("runs/b c ['d']\n", "")
    assert [cell.execution_count for cell in shown.cells] == [1, 2]
    assert shown.cells[1].metadata == {}
    with pytest.raises(UsageError, match="has no C in its first cell; it has B, RUN"):
        execute.execute(file, {"C": 1})
    code, _, err = in_process(execute.main, file, "--set", "RUN=runs/b")
    assert code == 2 and "say with --out where" in err


def test_a_cell_that_fails_is_told_in_a_line_and_nothing_is_written(in_process, execute, tmp_path):
    file = tmp_path / "broken.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("RUN = 1\n1 / 0")]), file)
    before = file.read_bytes()
    code, _, err = in_process(execute.main, file)
    assert code == 2 and "ZeroDivisionError: division by zero" in err and len(err.strip().splitlines()) == 1
    assert file.read_bytes() == before
