"""Go on under .venv where this Python lacks the requirements: `make` made it, and nobody has activated it.

Run by its path, as the first act of every script and before anything is imported that Python does not bring along:

    if __name__ == "__main__":
        runpy.run_path(str(Path(__file__).resolve().parents[1] / "runlog/venv.py"))

`python -m runlog` imports it. doctor.py runs it under its own name, to go on and tell what .venv lacks.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = "Scripts/python.exe" if os.name == "nt" else "bin/python"
PYTHON = Path(__file__).resolve().parents[1] / ".venv" / SCRIPTS
MISSING = [name for name in ("torch", "tyro", "runlog") if importlib.util.find_spec(name) is None]

if MISSING and PYTHON.exists() and Path(sys.executable) != PYTHON:
    command = [str(PYTHON), *sys.orig_argv[1:]]
    if os.name == "nt":  # whose exec would give the prompt back at once
        sys.exit(subprocess.run(command).returncode)
    os.execv(PYTHON, command)
if MISSING and __name__ != "doctor":
    print(f"error: {MISSING[0]} is not installed; run: pip install -r requirements.txt (make does it)", file=sys.stderr)
    sys.exit(2)
