"""A script that is started outside of .venv goes on inside it, or says in one line what is missing."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPT = """
import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "runlog/venv.py"))
print("it runs")
"""


@pytest.fixture
def bare(tmp_path):
    """bare(*args): run a script of a copied tree with a Python that has no packages at all."""
    for folder in ("runlog", "bpe"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "runlog/venv.py", tmp_path / "runlog")
    (tmp_path / "bpe/script.py").write_text(SCRIPT, encoding="utf-8")

    def run(*args):
        command = [sys.executable, "-I", "-S", tmp_path / "bpe/script.py", *args]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=60)

    return run


@pytest.mark.skipif(os.name == "nt", reason="needs a shell script as a Python")
def test_it_goes_on_in_the_environment_that_make_made(bare, tmp_path):
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "venv: $@"\nexit 3\n', encoding="utf-8")
    python.chmod(0o755)
    done = bare("--flag", "two words")
    assert (done.returncode, done.stdout) == (3, f"venv: -I -S {tmp_path}/bpe/script.py --flag two words\n")


def test_without_one_it_says_what_to_install(bare):
    done = bare()
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "error: torch is not installed; run: pip install -r requirements.txt (make does it)\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a link as a Python")
def test_one_that_lacks_the_same_is_not_started_again_and_again(bare, tmp_path):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    assert bare().returncode == 2


def test_the_doctor_goes_on_and_tells_what_is_missing(bare, tmp_path):
    shutil.copy(ROOT / "doctor.py", tmp_path / "bpe/script.py")
    shutil.copy(ROOT / "requirements.txt", tmp_path / "bpe")
    (tmp_path / "bpe/runlog").symlink_to(tmp_path / "runlog")
    done = bare()
    assert done.returncode == 1 and "MISSING" in done.stdout and "Traceback" not in done.stderr


def test_a_bundle_is_made_where_the_requirements_are(bare, tmp_path):
    shutil.copy(ROOT / "bundle.py", tmp_path / "bpe/script.py")
    (tmp_path / "bpe/runlog").symlink_to(tmp_path / "runlog")
    done = bare("make", tmp_path / "bundle")
    assert done.returncode == 2 and done.stderr.startswith("error: torch is not installed") and not done.stdout
    assert not (tmp_path / "bundle").exists()


def test_where_all_is_installed_nothing_happens(tmp_path, bare):
    script = tmp_path / "bpe/script.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "it runs\n")
