"""The job scripts: their syntax, and what train.sbatch decides, with stand-ins for Slurm's commands."""

import os
import re
import shutil
import signal
import subprocess
import time

import pytest
from conftest import ROOT

from gpt2.train_gpt2 import parse

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

SCONTROL = """#!/bin/bash
case $1 in show) echo node7; echo node8;; *) echo "$*" >>"$SLURM_SUBMIT_DIR/scontrol.txt";; esac
"""
# What a training does, as far as the job sees it: STATUS goes into result.json, unless it is empty; CODE is its end.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$SLURM_SUBMIT_DIR/srun.txt"
end() { if [[ -n $STATUS ]]; then printf '{\\n  "status": "%s",\\n  "seconds": 2.0\\n}\\n' "$STATUS" >"$RUN_DIR/result.json"; fi; exit "$CODE"; }
trap 'STATUS=preempted CODE=1 end' TERM
if [[ -n ${WAIT:-} ]]; then touch "$SLURM_SUBMIT_DIR/waiting"; for i in {1..600}; do sleep 0.05; done; fi
end
"""  # noqa: E501


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "slurm").glob("*.sbatch")))
def test_the_syntax(script):
    subprocess.run(["bash", "-n", ROOT / "slurm" / script], check=True)


@pytest.fixture
def job(tmp_path):
    """job(*arguments, status=…, code=…, before=…) starts the job with the stand-ins -> its process."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()

    def start(*arguments, status="", code=0, before="", **more):
        if before:
            (tmp_path / "run/result.json").write_text(f'{{\n  "status": "{before}",\n  "seconds": 1.0\n}}\n')
        slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2"}
        slurm |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "32", **more}
        env = {**os.environ, **slurm, "RUN_DIR": "run", "STATUS": status, "CODE": str(code)}
        env["PATH"] = f"{tmp_path}{os.pathsep}{env['PATH']}"
        command = ["bash", str(ROOT / "slurm/train.sbatch"), *arguments]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    return start


def requeued(tmp_path):
    return (tmp_path / "scontrol.txt").exists() and (tmp_path / "scontrol.txt").read_text() == "requeue 41234\n"


@pytest.mark.parametrize(
    "status, code, before, again",
    [
        ("preempted", 0, "", True),  # --stop-after-minutes
        ("preempted", 1, "", True),  # torchrun, told to end, exits 1
        ("preempted", 0, "preempted", True),
        ("success", 0, "preempted", False),
        ("diverged", 0, "preempted", False),
        ("failed", 2, "preempted", False),
        ("", 2, "preempted", False),  # it failed before it wrote anything: what an earlier start left decides nothing
        ("", 1, "", False),
    ],
)
def test_a_job_is_requeued_if_its_training_was_preempted(job, tmp_path, status, code, before, again):
    """karpathy/nanochat#114, #511."""
    process = job(status=status, code=code, before=before)
    out = process.communicate(timeout=60)[0]
    assert requeued(tmp_path) == again and process.returncode == (0 if again else code), out
    assert f"exit code {code}, status {status or 'unknown'}" in out


def test_slurms_warning_is_handed_on_to_the_training(job, tmp_path):
    process = job(WAIT="1")
    while not (tmp_path / "waiting").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "exit code 1, status preempted" in process.communicate(timeout=60)[0]
    assert process.returncode == 0 and requeued(tmp_path)


@pytest.mark.parametrize(
    "arguments, n_layer", [([], 12), (["gpt2-350M", "--max-lr", "2e-4"], 24), (["--seed", "1"], 12)]
)
def test_the_command_is_one_that_torchrun_and_the_trainer_understand(job, tmp_path, arguments, n_layer):
    end = str(int(time.time()) + 4 * 3600)
    job(*arguments, status="success", SLURM_JOB_END_TIME=end).communicate(timeout=60)
    command = (tmp_path / "srun.txt").read_text(encoding="utf-8").splitlines()
    assert "--cpus-per-task=32" in command[: command.index(".venv/bin/torchrun")]
    at = command.index("gpt2/train_gpt2.py")
    launcher, flags = command[command.index(".venv/bin/torchrun") + 1 : at], command[at + 1 :]
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args([*launcher, "script"])
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("2", "4", 3)
    assert re.fullmatch(r"node7:2\d{4}", args.rdzv_endpoint) and args.rdzv_id == "41234"
    cfg = parse(flags)
    assert cfg.run_dir == "run" and cfg.n_layer == n_layer and 228 <= cfg.stop_after_minutes <= 230


@pytest.mark.parametrize("stop, code", [(False, 0), (False, 2), (True, 0)])
def test_an_array_job_takes_its_shard_and_comes_back_when_its_time_is_up(tmp_path, stop, code):
    """Success and mistakes end the job with the sweep's own exit status; a stop puts it back into the queue."""
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    wait = "touch waiting; for i in {1..600}; do sleep 0.05; done" if stop else f"exit {code}"
    python.write_text(f"#!/bin/bash\nprintf '%s\\n' \"$@\" >arguments.txt\n{wait}\n", encoding="utf-8")
    (tmp_path / "scontrol").write_text(SCONTROL, encoding="utf-8")
    for file in (python, tmp_path / "scontrol"):
        file.chmod(0o755)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41234"}
    slurm |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"}
    command = ["bash", str(ROOT / "slurm/sweep.sbatch"), "grid.json", "runs/s", "--halving"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    started = subprocess.Popen(command, env={**os.environ, **slurm, "PATH": path})
    while stop and not (tmp_path / "waiting").exists():
        time.sleep(0.02)
    if stop:
        started.send_signal(signal.SIGTERM)
    assert started.wait(30) == code and requeued(tmp_path) == stop
    wanted = ["lora/sweep.py", "grid.json", "--run-dir", "runs/s", "--shard", "3/16", "--halving"]
    assert (tmp_path / "arguments.txt").read_text().split() == wanted
