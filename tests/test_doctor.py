"""doctor.py: ok where all is well, and each simulated failure named exactly, with its fix."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

import doctor


def test_a_run_has_a_line_for_each_check(in_process, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = in_process(doctor.main)
    lines = out.splitlines()
    assert err == "" and len(lines) == len(doctor.REQUIRED + doctor.OPTIONAL) + 1
    assert all(line.split()[0] in ("ok", "note", "MISSING") for line in lines[:-1])
    missing = [line for line in lines if line.startswith("MISSING")]
    assert code == bool(missing) and all("; fix: " in line for line in missing)
    assert not any(line.split()[1] in ("python", "packages", "torch") for line in missing)


def test_it_runs_where_nothing_is_installed():
    """Without site-packages every check that needs one says so, and none is a traceback."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-E", "-S", ROOT / "doctor.py"], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and done.stderr == ""
    assert "MISSING  environment" in done.stdout and "not installed: torch, " in done.stdout
    assert "MISSING  torch        could not be checked (ModuleNotFoundError" in done.stdout


@pytest.fixture
def nothing_installed(monkeypatch, tmp_path):
    """A checkout in which nothing is installed, seen from the system's Python."""
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(doctor, "installed", lambda name: None)
    monkeypatch.setattr(sys, "prefix", "/usr")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    return tmp_path


def test_an_environment_that_is_not_made_not_active_or_empty(nothing_installed, monkeypatch):
    text, fix = doctor.check_environment()
    assert text == "the repository is not installed in /usr" and fix.startswith(
        "python3 -m venv .venv, then . .venv/bin/activate"
    )
    (nothing_installed / ".venv").mkdir()
    assert doctor.check_environment() == (".venv is there but not active", ". .venv/bin/activate")
    monkeypatch.setattr(sys, "prefix", str(nothing_installed / ".venv"))
    text, fix = doctor.check_environment()
    assert text.startswith("the repository is not installed in") and fix == doctor.INSTALL


def test_packages_that_are_missing_or_of_another_version(nothing_installed, monkeypatch):
    (nothing_installed / "requirements.txt").write_text("torch==2.13.0\nnumpy==9.9\n", encoding="utf-8")
    monkeypatch.setattr(doctor, "installed", {"numpy": "1.26.4"}.get)
    assert doctor.check_packages() == ("not installed: torch", doctor.INSTALL)
    monkeypatch.setattr(doctor, "installed", {"numpy": "1.26.4", "torch": "2.13.0"}.get)
    assert doctor.check_packages() == ("not as pinned: numpy 1.26.4 instead of 9.9", doctor.INSTALL)


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 2))
    assert doctor.check_python()[1] == "make .venv with Python 3.11 or later"


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    text, fix = doctor.check_compile()
    assert text.startswith("no C++ compiler") and "apt install g++" in fix


def test_a_full_disk(monkeypatch):
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100 << 20))
    text, fix = doctor.check_disk()
    assert "0.10 GB free" in text and fix.startswith("free some")


def test_a_hub_that_does_not_answer(monkeypatch):
    def refuse(url, timeout):
        raise OSError("refused")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(doctor.urllib.request, "urlopen", refuse)
    text, fix = doctor.check_hub()
    assert text == "https://mirror.example does not answer (refused)" and fix.startswith("export HF_ENDPOINT=")
    monkeypatch.setattr(doctor.urllib.request, "urlopen", lambda url, timeout: SimpleNamespace(close=lambda: None))
    assert doctor.check_hub() == ("https://mirror.example answers", None)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.check_hub()[1] is None


@pytest.mark.parametrize("cuda, build", [("13.0", "CUDA 13.0"), (None, "the CPU")])
def test_torch_that_does_not_see_the_gpu(monkeypatch, cuda, build):
    import torch

    monkeypatch.setattr(doctor, "has_hidden_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    text, fix = doctor.check_torch()
    assert text == f"an NVIDIA GPU that this torch, built for {build}, does not see"
    assert "another build of torch" in fix
    monkeypatch.setattr(doctor, "has_hidden_gpu", lambda: False)
    assert doctor.check_torch()[1] is None


def test_threads_beyond_the_cores_and_idle_cores(monkeypatch):
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert doctor.check_threads() == ("torch starts 64 threads on 2 cores", "export OMP_NUM_THREADS=2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert doctor.check_threads()[1] == "export OMP_NUM_THREADS=2"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert doctor.check_threads()[1] is None
