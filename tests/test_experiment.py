"""gpt2/experiment.py: rounds, budgets, exit statuses with a stand-in for training; then real runs, and a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT

from common import read_json
from gpt2 import experiment
from runlog import RunLog, read_run

EFFECTS = {"baseline": 0.0, "max-lr_1e-2": -0.3, "max-lr_1e-4": 0.3, "dropout_0.1": 0.0}


@pytest.fixture
def trained(monkeypatch):
    """Training as a draw of a loss: noise of the seed 0.2, of the pair 0.01, and the effect of the arm."""
    done = []

    def train(self, arm, number):
        run_dir = self.cfg.run_dir + f"/{arm.name}-seed{number}"
        rng = np.random.default_rng([number, *arm.name.encode()])
        loss = 4 + 0.2 * np.random.default_rng(number).normal() + 0.01 * rng.normal() + EFFECTS[arm.name]
        done.append((arm.name, number))
        with RunLog(run_dir, "gpt2", {"seed": number, "total_batch_size": 8, "arm": arm.name}) as log:
            log.metric(1, "val", loss=loss)
            log.finish("success", step=1, val_loss=loss)
        return read_run(run_dir)

    monkeypatch.setattr(experiment.Runner, "train", train)
    monkeypatch.setattr("runlog.judge.verify_by_replay", lambda run_dir: "")
    return done


def changes(*flags):
    return [word for flag in flags for word in ("--change", flag)]


@pytest.mark.core
def test_each_candidate_is_trained_until_it_is_decided(trained, tmp_path, in_process):
    args = ["quickstart", *changes("--max-lr 1e-2", "--max-lr 1e-4", "--dropout 0.1"), "--run-dir", tmp_path / "e"]
    code, out, err = in_process(experiment.main, *args, "--max-seeds", 5, "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0, err
    assert [rows[name]["verdict"] for name in list(EFFECTS)[1:]] == ["better", "worse", "no difference"]
    seeds = {name: max(n for arm, n in trained if arm == name) for name in EFFECTS}
    assert seeds["max-lr_1e-2"] == rows["max-lr_1e-2"]["n"] < 5
    assert seeds["baseline"] == max(seeds.values())
    assert read_json(tmp_path / "e/result.json")["rows"] == list(rows.values())
    assert (tmp_path / "e/verdicts.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "change, max_seeds, code, verdict",
    [("--max-lr 1e-2", 1, 3, "undecided"), ("--max-lr 1e-4", 4, 1, "worse"), ("--max-lr 1e-2", 4, 0, "better")],
)
def test_the_exit_status_is_the_answer(trained, tmp_path, in_process, change, max_seeds, code, verdict):
    args = ["quickstart", "--change", change, "--run-dir", tmp_path, "--max-seeds", max_seeds, "--json"]
    found, out, _ = in_process(experiment.main, *args)
    assert (found, json.loads(out)[0]["verdict"]) == (code, verdict)


def test_what_verify_contradicts_is_not_better(trained, tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("runlog.judge.verify_by_replay", lambda run_dir: "FAIL step 3")
    args = ["quickstart", "--change", "--max-lr 1e-2", "--run-dir", tmp_path, "--json"]
    code, out, _ = in_process(experiment.main, *args)
    row = json.loads(out)[0]
    assert code == 3 and row["verdict"] == "undecided" and "verify contradicts it: FAIL step 3" in row["notes"]


def test_the_budget_of_minutes_ends_between_rounds(trained, tmp_path, in_process):
    args = ["quickstart", "--change", "--dropout 0.1", "--run-dir", tmp_path, "--minutes", 1e-9]
    code, out, _ = in_process(experiment.main, *args)
    assert code == 3 and not trained and "the same command resumes" in out


@pytest.mark.parametrize(
    "args, says",
    [
        (["gpt5", "--change", "--dropout 0.1"], "gpt5"),
        (["quickstart", "--change", "--dropout 0.1", "--change", "--dropout 0.1"], "two changes are the same"),
        (["quickstart", "--change", "--dropout 0.1", "--alpha", "1"], "--alpha"),
        (["quickstart", "--change", "--no-such-flag 1"], "Unrecognized options: --no-such-flag"),
    ],
)
def test_usage_errors(tmp_path, in_process, args, says):
    code, _, err = in_process(experiment.main, *args, "--run-dir", tmp_path / "e")
    assert code == 2 and says in err and "Traceback" not in err
    assert not (tmp_path / "e").exists()


def command(corpus, run_dir, *args):
    """A real experiment of the smallest model, three steps."""
    base = f"quickstart --data-dir {corpus} --n-layer 1 --n-head 1 --n-embd 16 --block-size 16 --total-batch-size 32"
    base += " --micro-batch-size 2 --max-steps 3 --warmup-steps 1 --val-tokens 64 --sample-every 0"
    base += " --checkpoint-every 3 --device cpu"
    return ["gpt2/experiment.py", base, "--run-dir", str(run_dir), *args]


def test_a_change_that_changes_nothing(corpus, tmp_path, script):
    """A/A with real runs: equal seeds differ by exactly 0; asked again, the runs that are there answer."""
    args = command(corpus, tmp_path / "e", "--change", "--weight-decay 0.1", "--jobs", "2", "--json")
    done = script(*args, ok=False)
    (row,) = json.loads(done.stdout)
    assert done.returncode == 1 and (row["verdict"], row["difference"], row["n"]) == ("no difference", 0.0, 1)
    result = tmp_path / "e/baseline-seed1/result.json"
    before = result.stat().st_mtime_ns
    assert json.loads(script(*args, ok=False).stdout)[0]["difference"] == 0.0
    assert result.stat().st_mtime_ns == before


@pytest.mark.slow
def test_killed_it_goes_on(corpus, tmp_path, script):
    """kill -9 after the first run, then the same command: the verdicts of an experiment that ran through."""
    args = changes("--max-lr 1e-6 --muon-lr 1e-6", "--n-embd 32")
    args += ["--max-seeds", "2", "--json"]
    whole = json.loads(script(*command(corpus, tmp_path / "whole", *args), ok=False).stdout)
    halved = command(corpus, tmp_path / "halved", *args)
    process = subprocess.Popen([sys.executable, *halved], cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    first = tmp_path / "halved/baseline-seed1/result.json"
    while not (first.exists() and read_json(first)["status"] == "success"):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = first.stat().st_mtime_ns
    again = json.loads(script(*halved, ok=False).stdout)
    assert first.stat().st_mtime_ns == before
    assert [row["values"] for row in again] == [row["values"] for row in whole]
    assert [row["verdict"] for row in again] == [row["verdict"] for row in whole]
