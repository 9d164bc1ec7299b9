"""Check the installation: one line per check, with the fix. Takes seconds, starts nothing, downloads nothing.

    python doctor.py

Needs only Python, so it also works before anything is installed. Exit status 1 if something is MISSING; a note means
slower runs or a missing option. Memory, hours and disk of a preset: `python gpt2/train_gpt2.py PRESET --plan`.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import sys
import sysconfig
import urllib.request
from pathlib import Path

from common import ROOT, available_cores, has_hidden_gpu

INSTALL = "pip install -r requirements.txt"


def check_python():
    old = sys.version_info < (3, 11)
    return f"{sys.version.split()[0]}, {sys.executable}", "make .venv with Python 3.11 or later" if old else None


def check_environment():
    """A virtual environment, .venv or another, in which the repository itself is installed."""
    if installed("bytes-to-lora"):
        return f"the repository is installed in {sys.prefix}", None
    activate = ".venv\\Scripts\\activate" if os.name == "nt" else ". .venv/bin/activate"
    if (ROOT / ".venv").is_dir() and Path(sys.prefix).resolve() != ROOT / ".venv":
        return ".venv is there but not active", activate
    fix = INSTALL if sys.prefix != sys.base_prefix else f"python3 -m venv .venv, then {activate}, then {INSTALL}"
    return f"the repository is not installed in {sys.prefix}", fix


def check_packages():
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.M)
    if absent := [name for name, _ in pins if installed(name) is None]:
        return f"not installed: {', '.join(absent)}", INSTALL
    if other := [f"{name} {installed(name)} instead of {pin}" for name, pin in pins if installed(name) != pin]:
        return f"not as pinned: {', '.join(other)}", INSTALL
    return f"{len(pins)} are as requirements.txt pins them", None


def installed(name):
    """Version of a package without a build's suffix ("2.13.0+cpu" -> "2.13.0"), or None."""
    elsewhere = [path for path in sys.path if Path(path).resolve() != ROOT]  # a build leaves metadata in ROOT
    found = next(iter(importlib.metadata.distributions(name=name, path=elsewhere)), None)
    return found and found.version.split("+")[0]


def check_torch():
    """torch imports, and its CUDA fits the driver of the GPUs."""
    import torch

    if not has_hidden_gpu():
        return f"{torch.__version__}, on {'the GPU' if torch.cuda.is_available() else 'the CPU (or mps)'}", None
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    text = f"an NVIDIA GPU that this torch, built for {build}, does not see"
    return text, "a newer driver, or another build of torch (README.md, Other drivers)"


def check_compile():
    """A C++ compiler and Python's headers for torch.compile. (Compiling something would take half a minute.)"""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        fix = "apt install g++ (macOS: xcode-select --install; Windows: the Visual Studio build tools)"
        return "no C++ compiler: training runs eager and slower", fix
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "no Python.h: training runs eager and slower", "apt install python3-dev"
    return "a C++ compiler and Python's headers", None


def check_threads():
    import torch

    cores, threads = available_cores(), torch.get_num_threads()
    wrong = threads > cores or (threads < cores and "OMP_NUM_THREADS" in os.environ)
    return f"torch starts {threads} threads on {cores} cores", f"export OMP_NUM_THREADS={cores}" if wrong else None


def check_disk():
    free = shutil.disk_usage(ROOT).free / 2**30
    text = f"{free:.2f} GB free in {ROOT}, the quickstart takes one"
    return text, "free some, or clone onto another disk" if free < 1.0 else None


def check_hub():
    """Where downloads come from. The quickstart needs none."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return "offline, as HF_HUB_OFFLINE says", None
    try:
        urllib.request.urlopen(endpoint, timeout=5).close()
    except OSError as e:
        if not hasattr(e, "code"):  # an HTTP error is an answer, too
            return f"{endpoint} does not answer ({e})", "export HF_ENDPOINT=MIRROR, or HF_HUB_OFFLINE=1 and local files"
    return f"{endpoint} answers", None


# Each check returns what it found, and the fix where that is a problem, else None.
REQUIRED = (check_python, check_environment, check_packages, check_torch, check_disk)
OPTIONAL = (check_compile, check_threads, check_hub)


def main():
    """All checks, a line each; exit status 1 if something is missing."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    missing = 0
    for check in (*REQUIRED, *OPTIONAL):
        try:
            text, fix = check()
        except Exception as e:  # a damaged or absent installation raises anything
            text, fix = f"could not be checked ({type(e).__name__}: {e})", INSTALL
        state = "ok" if not fix else "MISSING" if check in REQUIRED else "note"
        missing += state == "MISSING"
        print(f"{state:<8} {check.__name__[6:]:<12} {text}" + (f"; fix: {fix}" if fix else ""), flush=True)
    print(f"{missing} missing" if missing else "nothing is missing")
    sys.exit(1 if missing else 0)


if __name__ == "__main__":
    main()
