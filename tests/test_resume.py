"""Real training processes are killed, stopped and restarted; what they end with is identical to an undisturbed run."""

import contextlib
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from lingering_train_gpt2 import LINGER_FROM

from gpt2 import checkpoint
from runlog import comparable_metrics, read_run

MAX_STEPS = 240
FLAGS = [
    *("quickstart", "--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "32", "--device", "cpu"),
    *("--total-batch-size", "512", "--micro-batch-size", "4", "--max-steps", str(MAX_STEPS), "--val-tokens", "1024"),
    *("--val-every", "40", "--sample-every", "0", "--checkpoint-every", "20", "--log-every", "3", "--dropout", "0.1"),
]


def command(corpus, run_dir, *flags, nproc=1, restarts=0, lingering=False):
    script = ["tests/lingering_train_gpt2.py" if lingering else "gpt2/train_gpt2.py", *FLAGS]
    script += ["--data-dir", str(corpus), "--run-dir", str(run_dir), *flags]
    if nproc == 1:
        return [sys.executable, *script]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"]
    return [*launcher, f"--max-restarts={restarts}", *script]


def start(command):
    """Start a training in a process group of its own, so that a kill reaches all that it starts."""
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8", start_new_session=True
    )


def workers(process):
    """Process ids of torchrun's workers."""
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(pid) for pid in children.stdout.split()]


def kill(process):
    """Kill -9 a training whole. torchrun's workers have process groups of their own, so each gets a kill of its own."""
    for pid in [process.pid, *workers(process)]:
        with contextlib.suppress(ProcessLookupError):  # a child in the first one's group
            os.killpg(pid, signal.SIGKILL)
    process.communicate()


def finish(process, timeout=900):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, out[-4000:]
    return out


def last_step(run_dir):
    """The newest training step that a run has recorded, or -1."""
    started = (run_dir / "metrics.jsonl").exists()
    return max((row["step"] for row in read_run(run_dir).rows("train")), default=-1) if started else -1


def wait_for(condition, process, what, timeout=600):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, f"ended before {what}:\n{process.communicate()[0][-4000:]}"
        assert time.monotonic() < deadline, f"no {what} in {timeout} s"
        time.sleep(0.01)


def assert_identical(a, b):
    """Metrics without the fields of time and memory, and the final weights, are equal to the bit."""
    assert comparable_metrics(a) == comparable_metrics(b)
    ours, theirs = (checkpoint.load_newest(run_dir / "ckpt")["model"] for run_dir in (a, b))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def undisturbed(corpus, run_dir, *flags, nproc=1):
    """Run to the end without a kill -> the run directory."""
    finish(start(command(corpus, run_dir, *flags, nproc=nproc)))
    return run_dir


def kill_and_resume(corpus, run_dir, kills, seed, *flags, nproc=1):
    """Kill -9 so many times, each a random moment further into the run, then let the last start end -> its output.

    nproc: processes of every start, or of one start after another.
    The moments follow the steps that the run has recorded, not a clock, so that every kill falls inside training on a
    computer of any speed: within it, a pause of a random length decides what the process is doing when it dies.
    """
    random_moment = random.Random(seed)
    *killed, last = nproc if isinstance(nproc, tuple) else (nproc,) * (kills + 1)
    for i, n in enumerate(killed):
        process = start(command(corpus, run_dir, *flags, nproc=n, lingering=True))
        target = int(LINGER_FROM * (i + random_moment.uniform(0.2, 0.8)) / kills)
        wait_for(lambda target=target: last_step(run_dir) >= target, process, f"step {target}")
        time.sleep(random_moment.uniform(0, 0.1))
        kill(process)
        assert last_step(run_dir) < MAX_STEPS - 1
    return finish(start(command(corpus, run_dir, *flags, nproc=last)))


@pytest.fixture(scope="module")
def reference(tmp_path_factory, corpus):
    """The directory of an undisturbed run of one process."""
    return undisturbed(corpus, tmp_path_factory.mktemp("reference") / "run")


def test_killed_three_times_the_run_ends_identical(reference, corpus, tmp_path):
    """karpathy/build-nanogpt#83 (no resume), nanoGPT#467 (a resume that replays data)."""
    out = kill_and_resume(corpus, tmp_path / "run", 3, seed=0)
    assert "resumed at step" in out
    assert_identical(reference, tmp_path / "run")


def test_sigterm_saves_and_the_next_start_ends_identical(reference, corpus, tmp_path):
    process = start(command(corpus, tmp_path / "run", lingering=True))
    wait_for(lambda: last_step(tmp_path / "run") >= 30, process, "step 30")
    process.send_signal(signal.SIGTERM)
    out = finish(process)
    assert out.splitlines()[-1].startswith("preempted: received SIGTERM")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["status"] == "preempted" and 30 < result["step"] < 240
    assert checkpoint.load_newest(tmp_path / "run/ckpt")["step"] == result["step"]
    finish(start(command(corpus, tmp_path / "run")))
    assert_identical(reference, tmp_path / "run")


def test_a_killed_rank_leads_to_a_restart_that_resumes(corpus, tmp_path):
    """torchrun --max-restarts; and the file STOP stops both ranks, which then resume where they saved."""
    undisturbed(corpus, tmp_path / "reference", nproc=2)
    a, b = (rng["torch"] for rng in checkpoint.load_newest(tmp_path / "reference/ckpt")["rng"])
    assert not torch.equal(a, b)  # ranks draw different dropout masks
    run_dir = tmp_path / "run"
    process = start(command(corpus, run_dir, nproc=2, restarts=2, lingering=True))
    wait_for(lambda: last_step(run_dir) >= 45, process, "step 45")
    os.kill(workers(process)[-1], signal.SIGKILL)
    wait_for(lambda: "resumed at step" in (run_dir / "log.txt").read_text(encoding="utf-8"), process, "the restart")
    wait_for(lambda: last_step(run_dir) >= 60, process, "step 60")
    (run_dir / "STOP").touch()
    finish(process)
    result = json.loads((run_dir / "result.json").read_text())
    assert result["status"] == "preempted" and "STOP" in result["reason"] and not (run_dir / "STOP").exists()
    finish(start(command(corpus, run_dir, nproc=2)))
    assert_identical(tmp_path / "reference", run_dir)


def test_two_nodes_and_another_number_of_processes_on_resume(reference, corpus, tmp_path):
    """Two torchrun agents over a c10d rendezvous stand in for two nodes; one process then finishes their run."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    run_dir = tmp_path / "run"
    flags = ["--dropout", "0"]  # whose masks would depend on the number of processes
    undisturbed(corpus, tmp_path / "reference", *flags)
    script = command(corpus, run_dir, *flags, lingering=True)[1:]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv-backend=c10d"]
    nodes = [start([*agent, f"--rdzv-endpoint=localhost:{port}", "--rdzv-id=test", *script]) for _ in range(2)]
    wait_for(lambda: last_step(run_dir) >= 60, nodes[0], "step 60")
    (run_dir / "STOP").touch()
    for node in nodes:
        finish(node)
    env = read_run(run_dir).env
    assert (env["world_size"], env["nodes"], env["job_id"]) == (2, "2", "test")
    assert "resumed at step" in finish(start(command(corpus, run_dir, *flags)))
    ours, theirs = comparable_metrics(tmp_path / "reference"), comparable_metrics(run_dir)
    assert [(row["step"], row["kind"]) for row in ours] == [(row["step"], row["kind"]) for row in theirs]
    # Muon amplifies rounding: equal to 1e-3 where AdamW would be to 1e-5
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs)) < 2e-3


def test_two_trainers_on_one_run_directory_are_not_let_in_and_ranks_outlive_no_torchrun(corpus, tmp_path):
    """The second is refused, under torchrun too; ranks whose torchrun was killed save and stop by themselves."""
    run_dir, longer = tmp_path / "run", ["--max-steps", "100000"]
    process = start(command(corpus, run_dir, *longer, nproc=2))
    wait_for(lambda: last_step(run_dir) >= 3, process, "step 3")
    for nproc in (1, 2):
        second = subprocess.run(command(corpus, run_dir, *longer, nproc=nproc), capture_output=True, text=True)
        assert second.returncode == (2 if nproc == 1 else 1) and "is being written by another process" in second.stderr
        assert second.stderr.count("\n") == 1 or (nproc == 2 and "RuntimeError" not in second.stderr)
    os.kill(process.pid, signal.SIGKILL)
    out = process.communicate(timeout=60)[0]  # its pipe is open until the ranks have ended
    assert "preempted: torchrun is gone" in out
    result = read_run(run_dir).result
    assert result["status"] == "preempted" and checkpoint.load_newest(run_dir / "ckpt")["step"] == result["step"]


EXACT = ["--exact-reduction", "--micro-batch-size", "2"]  # 8 micro-batches a step


def sha256_of_weights(run_dir):
    model = checkpoint.load_newest(run_dir / "ckpt")["model"]
    return hashlib.sha256(b"".join(model[name].numpy().tobytes() for name in sorted(model))).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_exact_reduction_on_1_2_and_4_processes_killed_and_resumed_on_others(corpus, tmp_path, dtype, optimizer):
    flags = [*EXACT, "--dtype", dtype, "--optimizer", optimizer]
    runs = [undisturbed(corpus, tmp_path / str(n), *flags, nproc=n) for n in (1, 2, 4)]
    for starts in [(1, 2), (2, 4), (4, 1), (2, 1, 4)]:
        runs.append(tmp_path / "-".join(map(str, starts)))
        kill_and_resume(corpus, runs[-1], len(starts) - 1, 0, *flags, nproc=starts)
    assert len({sha256_of_weights(run_dir) for run_dir in runs}) == 1
    assert all(comparable_metrics(run_dir) == comparable_metrics(runs[0]) for run_dir in runs)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ten_kills(corpus, tmp_path, dtype, nproc, compiled):
    flags = ["--dtype", dtype, *(["--compile", "--deterministic"] if compiled else [])]
    undisturbed(corpus, tmp_path / "reference", *flags, nproc=nproc)
    kill_and_resume(corpus, tmp_path / "run", 10, nproc, *flags, nproc=nproc)
    assert_identical(tmp_path / "reference", tmp_path / "run")
