"""The notebooks: as committed, their numbers against the records, and run.ipynb on all kinds of runs."""

import ast
import contextlib
import io
import platform
import re
import subprocess
import sys
import threading

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

from runlog import RunLog

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
REPORT = sorted((ROOT / "notebooks").glob("0*.ipynb"))
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def read(file):
    return nbformat.read(file, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def texts(notebook):
    """What the cells print and the tables that they show, in plain text; pictures and HTML apart."""
    shown = [o.text if o.output_type == "stream" else o.data["text/plain"] for o in outputs(notebook)]
    return [line for text in shown for line in text.splitlines() if not re.match(r"<(Figure|IPython)", line)]


@pytest.mark.core
@each
def test_committed_executed_and_small(file):
    notebook = read(file)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert 3 <= len(cells) <= 12
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    assert [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    text = file.read_text(encoding="utf-8")
    assert len(text.encode()) < 500_000
    assert not re.search(r"[\"' (=](/(home|root|work|tmp|Users|usr)/|[A-Z]:\\\\)", text), "a path of one machine"
    assert not any(cell.metadata for cell in notebook.cells), "times of execution"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.language_info) == {"name"}, "the Python version"


@pytest.fixture
def run_here(monkeypatch):
    """run(file) -> (lines that the cells print or show, their names); in this process, and no picture is rendered."""
    import IPython.display
    import pandas as pd
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    shown = io.StringIO()

    def show(value, display_id=None):
        if isinstance(value, pd.DataFrame):
            print(value.to_string(line_width=80), file=shown)
        elif not isinstance(value, IPython.display.DisplayObject | Figure):
            print(repr(value), file=shown)

    monkeypatch.setattr(IPython.display, "display", show)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(ROOT / "notebooks")

    def run(file):
        names = {"__name__": "notebook"}
        shown.truncate(0)
        with (
            contextlib.redirect_stdout(shown),
            plt.rc_context({"backend": "agg"}),
            pd.option_context("display.max_colwidth", 50),
        ):
            for cell in code_cells(read(file)):
                tree = ast.parse(cell.source.replace("%matplotlib inline", ""))
                last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
                exec(compile(tree, file.name, "exec"), names)
                if "RECORD" in names:  # run.ipynb, whatever lies in runs/
                    names["RUN"] = names["RECORD"]
                value = eval(compile(ast.Expression(last.value), file.name, "eval"), names) if last else None
                if value is not None:
                    show(value)
        return shown.getvalue().splitlines(), names

    return run


@each
def test_what_a_notebook_says_is_what_the_records_give(file, run_here):
    committed = texts(read(file))
    version = re.search(r"Python (\d+\.\d+\.\d+)", "\n".join(committed))
    if version and version[1] != platform.python_version():
        pytest.skip(f"counts the words of Python {version[1]}'s own documentation")
    assert run_here(file)[0] == committed


@pytest.mark.slow
def test_make_notebooks_gives_the_committed_ones_again(tmp_path):
    command = [sys.executable, "-m", "nbconvert", "--config", str(ROOT / "notebooks/nbconvert.json")]
    command += ["--to", "notebook", "--execute", "--output-dir", str(tmp_path)]
    subprocess.run([*command, *map(str, REPORT)], check=True)
    for file in REPORT:
        again = read(tmp_path / file.name)
        assert again.metadata == read(file).metadata
        assert not any(cell.metadata for cell in again.cells)
        if "Python" not in "\n".join(texts(again)):  # else it depends on the Python version
            assert texts(again) == texts(read(file))


def execute(first_cell, before_last=None):
    """run.ipynb in a kernel of its own, its first cell followed by `first_cell` -> the notebook with its outputs."""
    notebook = read(ROOT / "notebooks/run.ipynb")
    code_cells(notebook)[0].source += f"\n{first_cell}"

    def started(cell, cell_index):
        if before_last and cell is notebook.cells[-1]:
            before_last()

    NotebookClient(notebook, timeout=60, kernel_name="python3", on_cell_execute=started).execute()
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    return notebook


def html(notebook):
    return "\n".join(o.data["text/html"] for o in outputs(notebook) if "text/html" in o.get("data", {}))


def add_steps(log, steps):
    """Rows as the trainer of GPT-2 writes them."""
    for step in steps:
        row = {"loss": 5 - step / 10, "grad_norm": 1.5, "lr": 1e-3, "ms": 10.0, "tok_per_sec": 6400.0, "mfu": 0.4}
        log.metric(step, "train", **row)
    log.metric(step + 1, "val", loss=5 - step / 10, bits_per_byte=2.0)
    log.metric(step + 1, "hellaswag", items=300, acc_norm=0.26, acc_norm_low=0.21, acc_norm_high=0.31)
    log.sample(step + 1, f"<sample> of step {step + 1}")


def test_run_is_redrawn_until_it_ends(tmp_path):
    settings = {"data_dir": "data/corpora/pydocs", "max_steps": 20, "grad_clip": 1.0, "tokenizer_sha256": "0" * 64}
    with RunLog(tmp_path / "mine", "gpt2", settings) as log:
        add_steps(log, range(10))

        def go_on():
            add_steps(log, range(10, 20))
            log.finish("success", step=20, peak_mb=100, unigram_entropy=6.5)

        timer = threading.Timer(1.0, go_on)
        notebook = execute(f"RUN, EVERY = {str(tmp_path / 'mine')!r}, 0.5", before_last=timer.start)
        timer.join()
    assert "status: success" in texts(notebook)
    assert [row for row in texts(notebook) if re.search(r"mine +success +20 +20", row)], "the table is not up to date"
    assert "<sample>" not in html(notebook) and "&lt;sample&gt; of step 20" in html(notebook)
    assert "40.0%" in html(notebook) and "6,400" in html(notebook) and ">0.260<" in html(notebook)


def test_a_running_run_beside_a_record_with_another_tokenizer(tmp_path):
    with RunLog(tmp_path / "mine", "gpt2", {"max_steps": 20, "max_lr": 0.02, "tokenizer_sha256": "0" * 64}) as log:
        add_steps(log, range(10))
        runs = [str(tmp_path / "mine"), "records/quickstart"]
        notebook = execute(f"RUN, MINUTES = {runs}, 0")  # redrawing is bounded
    assert "status: running, success" in texts(notebook)
    assert "lowest validation loss (bits per byte)" in html(notebook) and ">1.8136<" in html(notebook)
    assert "max_lr" in html(notebook)


def test_a_sweep_is_shown_by_its_adapters():
    notebook = execute("RUN = 'records/lora-alpaca-smollm2'")
    assert "status: success" in texts(notebook)
    assert html(notebook).count("_r8_") >= 4  # a row of the status an adapter
    assert ">2.2272<" in html(notebook)
    assert "r 8, alpha 1, dropout 0.1, lr 3e-05, step 80" not in html(notebook)  # four samples at most
    assert "r 4, alpha 1, dropout 0.05, lr 0.0003, step 80" in html(notebook)


def test_the_newest_run_is_taken_and_a_record_where_there_is_none(run_here, tmp_path):
    for name, time in (("new", 2), ("old", 1), ("new/adapters/000", 3)):
        with RunLog(tmp_path / "runs" / name, "gpt2", {}) as log:
            log.metric(0, "train", loss=1.0)
        metrics = tmp_path / "runs" / name / "metrics.jsonl"
        metrics.write_text(re.sub(r'"time": [\d.]+', f'"time": {time}', metrics.read_text()))
    _, names = run_here(ROOT / "notebooks/run.ipynb")
    names["ROOT"] = tmp_path
    assert names["newest"]() == tmp_path / "runs/new"
    names["ROOT"] = tmp_path / "none"
    assert names["newest"]() == "records/quickstart"
