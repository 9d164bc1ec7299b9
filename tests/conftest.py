"""What every test shares: no network, one thread a process (so that bits repeat), scripts run as a person runs them."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture
def shared_data():
    """The folder of real corpora beside the project; tests that need it skip, saying so, where it is not."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture
def script():
    """run(path, *args, ok=True) -> CompletedProcess of `python path args`, from the repository's root."""

    def run(path, *args, ok=True, timeout=300, cwd=ROOT, env=None):
        command = [sys.executable, str(ROOT / path), *map(str, args)]
        done = subprocess.run(
            command, capture_output=True, text=True, encoding="utf-8", timeout=timeout, cwd=cwd,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        if ok:
            assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done

    return run


@pytest.fixture
def refuses(script):
    """check(path, *args, says=...) asserts a person's mistake: one line on stderr, exit status 2, no traceback."""

    def check(path, *args, says):
        done = script(path, *args, ok=False)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0], done.stderr
        return lines[0]

    return check
