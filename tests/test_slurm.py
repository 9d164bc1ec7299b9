"""The job scripts: their syntax, and what train.sbatch decides, with stand-ins for Slurm's commands."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from gpt2.train_gpt2 import parse

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

SCONTROL = """#!/bin/bash
case $1 in show) echo node7; echo node8;; *) echo "$*" >>"$SLURM_SUBMIT_DIR/scontrol.txt";; esac
"""
# The end of the job as `squeue --format=%e` prints it, in ISO 8601 or N/A.
SQUEUE = """#!/bin/bash
echo "${END_TIME:-N/A}"
"""
# A training as far as the job sees it: STATUS goes into result.json, unless it is empty; CODE is its exit status. It
# saves on SIGTERM. As the real one does, srun answers a SIGTERM of its own by killing its task with SIGKILL.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$SLURM_SUBMIT_DIR/srun.txt"
echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" >"$SLURM_SUBMIT_DIR/timeout.txt"
task() {
  end() {
    if [[ -n $STATUS ]]; then printf '{\\n  "status": "%s",\\n  "x": 2\\n}\\n' "$STATUS" >"$RUN_DIR/result.json"; fi
    exit "$CODE"
  }
  trap 'STATUS=preempted CODE=1 end' TERM
  if [[ -n ${WAIT:-} ]]; then touch "$SLURM_SUBMIT_DIR/waiting"; for i in {1..600}; do sleep 0.05; done; fi
  end
}
task &
echo $! >"$SLURM_SUBMIT_DIR/task.pid"
trap 'kill -KILL $!; exit 143' TERM
wait $!
"""
# scancel without --batch signals the tasks of the job's steps, not the batch script.
SCANCEL = """#!/bin/bash
[[ $* == "--signal=TERM 41234" ]] && kill -TERM "$(cat "$SLURM_SUBMIT_DIR/task.pid")"
"""


@pytest.mark.parametrize("script", sorted(p.name for p in (ROOT / "slurm").glob("*.sbatch")))
def test_the_syntax(script):
    assert subprocess.run(["bash", "-n", ROOT / "slurm" / script]).returncode == 0


@pytest.fixture
def job(tmp_path):
    """job(*arguments, status=…, code=…, before=…) starts the job with the stand-ins -> its process."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "squeue": SQUEUE}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run").mkdir()

    def start(*arguments, status="", code=0, before="", **more):
        if before:
            (tmp_path / "run/result.json").write_text(f'{{\n  "status": "{before}",\n  "seconds": 1.0\n}}\n')
        slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41234", "SLURM_JOB_NUM_NODES": "2"}
        slurm |= {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_ON_NODE": "32", **more}
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


def test_slurms_warning_reaches_the_training_which_saves(job, tmp_path):
    """Forwarded to srun it would kill the ranks: then no result.json says preempted, and nothing is requeued."""
    process = job(WAIT="1")
    while not (tmp_path / "waiting").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert "exit code 1, status preempted" in process.communicate(timeout=60)[0]
    assert process.returncode == 0 and requeued(tmp_path)


@pytest.mark.parametrize("exported", [True, False])
def test_the_time_limit_is_the_jobs_own(job, tmp_path, exported):
    """Slurm 23 exports the end of a job; older ones are asked for it, whatever --time was."""
    end = int(time.time()) + 2 * 3600
    shown = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(end))
    known = {"SLURM_JOB_END_TIME": str(end)} if exported else {"END_TIME": shown}
    job(status="success", **known).communicate(timeout=60)
    flags = (tmp_path / "srun.txt").read_text(encoding="utf-8").splitlines()
    assert 108 <= int(flags[flags.index("--stop-after-minutes") + 1]) <= 110


def test_without_a_time_limit_there_is_no_stop(job, tmp_path):
    job(status="success").communicate(timeout=60)
    flags = (tmp_path / "srun.txt").read_text(encoding="utf-8").splitlines()
    assert flags[flags.index("--stop-after-minutes") + 1] == "0"


@pytest.mark.parametrize(
    "arguments, n_layer", [([], 12), (["gpt2-350M", "--max-lr", "2e-4"], 24), (["--seed", "1"], 12)]
)
def test_the_command_is_one_that_torchrun_and_the_trainer_understand(job, tmp_path, arguments, n_layer):
    end = str(int(time.time()) + 4 * 3600)
    job(*arguments, status="success", SLURM_JOB_END_TIME=end).communicate(timeout=60)
    command = (tmp_path / "srun.txt").read_text(encoding="utf-8").splitlines()
    assert "--cpus-per-task=32" in command[: command.index(".venv/bin/torchrun")]
    assert (tmp_path / "timeout.txt").read_text(encoding="utf-8") == "240\n"  # seconds for the ranks to save
    assert "\n#SBATCH --mem=0\n" in (ROOT / "slurm/train.sbatch").read_text(encoding="utf-8")  # all of the node's
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
    """Success and usage errors end the job with the sweep's own exit status; a stop puts it back into the queue."""
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


# ---------------------------------------------------------------------------------------------------------------------
# a real Slurm on this host: Debian's slurm-wlm and munge, one node with two pretended GPUs

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={next_port}
SelectType=select/cons_tres
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=2000 Gres=gpu:2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """run(*command) -> stdout, on a cluster of this host alone; its daemons end with the test."""
    if not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))) or os.getuid() != 0:
        pytest.skip("no Slurm to start here: apt install slurm-wlm munge, and run as root")
    host, port = socket.gethostname().split(".")[0], 20000 + os.getpid() % 20000
    facts = {"host": host, "folder": tmp_path, "port": port, "next_port": port + 1, "cpus": os.cpu_count()}
    (tmp_path / "slurm.conf").write_text(SLURM_CONF.format(**facts), encoding="utf-8")
    (tmp_path / "gres.conf").write_text("Name=gpu File=/dev/zero\nName=gpu File=/dev/full\n", encoding="utf-8")
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    if subprocess.run(["pgrep", "munged"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["su", "-s", "/bin/sh", "munge", "-c", "munged"], check=True)
    daemons = [subprocess.Popen(["slurmctld", "-D", "-i"]), subprocess.Popen(["slurmd", "-D"])]

    def run(*command):
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    try:
        wait_until(lambda: "idle" in subprocess.run(["sinfo"], capture_output=True, text=True).stdout, 60)
        yield run
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)


def wait_until(holds, seconds):
    """Wait for a condition; the test fails if it does not come."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.3)


@pytest.mark.slow
def test_a_job_under_a_real_slurm_saves_requeues_and_resumes(slurm, tmp_path, corpus):
    for name, target in {".venv": sys.prefix, "gpt2": ROOT / "gpt2"}.items():
        (tmp_path / name).symlink_to(target)
    (tmp_path / "runs").mkdir()
    flags = f"quickstart --data-dir {corpus} --device cpu --n-layer 1 --n-embd 32 --n-head 2 --block-size 32"
    flags += (
        " --total-batch-size 512 --micro-batch-size 8 --max-steps 400 --val-every 400 --sample-every 0 --no-compile"
    )
    submit = ["sbatch", "--parsable", "--gpus-per-node=2", "--time=1:00:00", str(ROOT / "slurm/train.sbatch")]
    job = slurm(*submit, *flags.split()).strip()
    run_dir = tmp_path / "runs/gpt2-124M"
    metrics, result, log = run_dir / "metrics.jsonl", run_dir / "result.json", tmp_path / f"runs/slurm-{job}.log"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 20, 120)
    slurm("scancel", "--signal=TERM", "--batch", job)  # what Slurm itself does before the time limit
    wait_until(lambda: "status preempted" in log.read_text(), 120)
    stopped_at = json.loads(result.read_text())["step"]
    assert 0 < stopped_at < 400
    wait_until(lambda: json.loads(result.read_text())["status"] == "success", 240)
    assert f"resumed at step {stopped_at}" in (run_dir / "log.txt").read_text()
    wait_until(lambda: not slurm("squeue", "--noheader"), 60)
