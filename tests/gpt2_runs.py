"""Tiny runs of train_gpt2.py for its tests: fixtures and helpers."""

import subprocess
import sys

import pytest
import torch

from gpt2 import checkpoint
from gpt2.train_gpt2 import main
from runlog import comparable_metrics

TINY = [
    *("quickstart", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "32", "--device", "cpu"),
    *("--total-batch-size", "256", "--micro-batch-size", "8", "--max-steps", "20", "--val-tokens", "1024"),
    *("--val-every", "10", "--sample-every", "0", "--checkpoint-every", "5", "--log-every", "1"),
    *("--optimizer", "adamw"),
]


@pytest.fixture
def train(in_process, corpus):
    """train(run_dir, *flags) -> stdout runs the script's main on the tiny corpus, in this process."""

    def run(run_dir, *flags):
        code, out, err = in_process(main, *TINY, "--data-dir", corpus, "--run-dir", run_dir, *flags)
        assert code == 0, out + err
        return out

    return run


@pytest.fixture
def assert_usage_error(in_process, corpus):
    """assert_usage_error(run_dir, *flags, says=…) asserts one line on stderr, exit status 2 and no traceback."""

    def run(run_dir, *flags, says):
        code, _, err = in_process(main, *TINY, "--data-dir", corpus, "--run-dir", run_dir, *flags)
        lines = [line for line in err.splitlines() if "Loading weights" not in line]  # transformers' progress bar
        assert code == 2 and len([x for x in lines if x.strip()]) == 1, (code, err)
        assert lines[-1].startswith("error: ") and says in lines[-1]

    return run


def torchrun(run_dir, corpus, *flags, nproc=2, ok=True, before=()):
    """The script under torchrun, on `nproc` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", *before, f"--nproc_per_node={nproc}"]
    command += ["gpt2/train_gpt2.py", *TINY, "--data-dir", str(corpus), "--run-dir", str(run_dir), *flags]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=300)
    assert not ok or done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def weights(run_dir):
    return checkpoint.load_newest(run_dir / "ckpt")["model"]


def identical(a, b):
    """Whether two runs are identical: metrics without time and memory, and the final weights."""
    wa, wb = weights(a), weights(b)
    return comparable_metrics(a) == comparable_metrics(b) and all(torch.equal(wa[k], wb[k]) for k in wa)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, corpus):
    """An undisturbed run of one process, float32."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    command = [sys.executable, "gpt2/train_gpt2.py", *TINY, "--data-dir", str(corpus), "--run-dir", str(run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir, done.stdout
