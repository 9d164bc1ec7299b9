"""Execute the notebooks in place, from the records in runs/ alone: `make notebooks`.

    python notebooks/execute.py                                                    # all of them, in a minute or so
    python notebooks/execute.py notebooks/02_gpt2.ipynb --set RUN=runs/mine --out mine.ipynb

`--set` replaces names of the first cell, where each notebook names its run directories; values are Python literals, or
else text. What is written holds no times of execution, so the same records give the same file.
"""

import ast
import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import ROOT, UsageError, atomic_open, cli, portable


@dataclass
class Config:
    notebooks: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Notebooks to execute; none: all that lie beside this script."""
    set: tuple[str, ...] = ()
    """NAME=VALUE for names of the first code cell."""
    out: Path | None = None
    """Where to write the executed notebook; none: in place."""
    timeout: int = 300
    """Seconds that one cell may take."""


def main():
    """Execute the named notebooks, or all, in place or into --out."""
    cfg = tyro.cli(Config, description=__doc__.split("\n")[0])
    files = cfg.notebooks or sorted((ROOT / "notebooks").glob("*.ipynb"))
    if cfg.out and len(files) != 1:
        raise UsageError("--out takes one notebook; name it")
    if cfg.set and not cfg.out:
        raise UsageError("with --set the notebook shows other runs than its own; say with --out where to write it")
    for file in files:
        notebook = execute(file, dict(map(assignment, cfg.set)), cfg.timeout)
        write(notebook, cfg.out or file)
        print(f"{portable(str(cfg.out or file))}: {sum(c.cell_type == 'code' for c in notebook.cells)} cells executed")


def assignment(text):
    """ "NAME=VALUE" -> (name, value): assignment("RUN=runs/mine") == ("RUN", "runs/mine")"""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--set {text} should be NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def execute(file, values, timeout=300):
    """Run a notebook in a fresh kernel, in its own folder -> the notebook with its outputs."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    try:
        notebook = nbformat.read(file, as_version=4)
    except FileNotFoundError:
        raise UsageError(f"{file} does not exist") from None
    set_names(notebook, values, file)
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # pictures go into the notebook
    os.environ["HF_HUB_OFFLINE"] = "1"  # records alone
    quiet = ["--log-level=ERROR"]  # else the kernel warns that it talks over TCP, on this machine alone
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        extra_arguments=quiet,
        resources={"metadata": {"path": str(Path(file).parent)}},
    )
    try:
        client.execute()
    except CellExecutionError as e:
        raise UsageError(f"{file} has a cell that fails: {e.ename}: {e.evalue}") from None
    return tidy(notebook)


def set_names(notebook, values, file="the notebook"):
    """Let the first code cell end with other values for names that it assigns."""
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    names = {
        target.id for node in ast.parse(first.source).body if isinstance(node, ast.Assign) for target in node.targets
    }
    for name, value in values.items():
        if name not in names:
            raise UsageError(f"{file} has no {name} in its first cell; it has {', '.join(sorted(names))}")
        first.source += f"\n{name} = {value!r}"


def tidy(notebook):
    """Drop what differs from one execution to the next, and the names of this machine's software."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = in_few_colors(output.data["image/png"])
    return notebook


def in_few_colors(png):
    """A picture, as base64, with a palette instead of 24 bits a point: a third of the size, the same to the eye."""
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(png)))
    small = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True, dpi=picture.info.get("dpi", (160, 160))
    )
    return base64.b64encode(small.getvalue()).decode("ascii")


def write(notebook, file):
    """Write a notebook whole or not at all."""
    import nbformat

    with atomic_open(file) as f:
        f.write(nbformat.writes(notebook) + "\n")


if __name__ == "__main__":
    cli(main)
