import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch

from common import UsageError, read_json
from common.checkpoints import newest_checkpoint, save_checkpoint, sha256_path, sorted_checkpoints
from lora import sweep
from lora.base import load_adapter, load_base
from lora.concurrent_trainer import Slot
from lora.multi_lora import unsupported
from lora.search import next_points
from lora.sweep import SweepConfig, run_sweep
from lora.train_lora import TrainConfig, held_out_loss, load
from runlog import comparable_metrics, read_run

SETTINGS = {
    "max_steps": 12, "eval_every": 4, "log_every": 1, "batch_size": 2, "metric_rows": 2, "eval_rows": 4,
    "held_out": 0.2, "prompt": "the cat", "lora_dropout": 0.1, "max_length": 48,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    rows = [{"prompt": f"what of {i}", "response": f"the cat sat on {i}"} for i in range(60)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def write_grid(path, settings=None, **parts):
    path.write_text(json.dumps({"task": "instruction", "settings": SETTINGS | (settings or {}), **parts}))
    return str(path)


def config(grid, base, rows, run_dir, **changes):
    values = {"device": "cpu", "sample_tokens": 4, "adapters_at_once": 3} | changes
    return SweepConfig(grid=str(grid), base=str(base), data_file=str(rows), run_dir=str(run_dir), **values)


def read_configs(cfg):
    return sweep.make_configs(cfg, sweep.read_grid(cfg))


def adapters(run_dir):
    return {folder.name: folder for folder in sorted((Path(run_dir) / "adapters").iterdir())}


def weights(folder):
    return (folder / "ckpt/adapter/adapter_model.safetensors").read_bytes()


GRID = {"grid": {"r": [2, 4], "lr": [1e-3, 1e-2]}, "configs": [{"r": 3, "lr": 1e30, "max_grad_norm": 0.0}]}


@pytest.fixture(scope="module")
def finished(base, rows, tmp_path_factory):
    """An undisturbed sweep of five adapters in three slots, one of which diverges."""
    folder = tmp_path_factory.mktemp("finished")
    run_sweep(config(write_grid(folder / "grid.json", **GRID), base, rows, folder / "run"))
    return folder / "run"


def test_complaint_comparing_runs_llama_factory_7100_7094_6292(finished):
    """A sweep leaves a run directory an adapter, one table, one figure of all curves, and a log for people."""
    runs = {name: read_run(folder) for name, folder in adapters(finished).items()}
    assert list(runs) == [
        "000_r2_lr0.001", "001_r2_lr0.01", "002_r4_lr0.001", "003_r4_lr0.01", "004_r3_lr1e+30_max_grad_norm0.0",
    ]  # fmt: skip
    for name, run in runs.items():
        diverged = name.startswith("004")
        assert run.result["status"] == ("diverged" if diverged else "success")
        if not diverged:
            assert [row["step"] for row in run.rows("train")] == list(range(1, 13))
            assert [row["step"] for row in run.rows("val")] == [0, 4, 8, 12]
            assert run.result["held_out_loss"] == min(run.curve("val")[1])
            assert set(run.result["after"]) == {"exact_match", "token_f1"}
            assert (run.run_dir / "samples.txt").read_text().count("--- step") == 4
    before = read_run(finished / "groups/000").rows("task")
    assert len(before) == 1 and set(before[0]) >= {"exact_match", "token_f1"}  # of the base
    result = read_run(finished).result
    assert result["status"] == "success" and result["diverged"] == ["004_r3_lr1e+30_max_grad_norm0.0"]
    assert result["best_held_out_loss"] == min(run.result["held_out_loss"] for run in runs.values())
    table = (finished / "table.md").read_text()
    assert table.count("end at 12") == 4 and "| lr |" in table and "diverged at" in table
    human = (finished / "lora_experiments_instruction.log").read_text(encoding="utf-8")
    assert human.count("PARAMETERS:") == human.count("RESULTS:") == 5 and "the cat" in human
    assert (finished / "loss.png").stat().st_size > 10_000


def test_complaint_hpo_ignores_r_transformers_29391(finished):
    """Every adapter has the rank, scale and rate that the grid gave it."""
    from safetensors.torch import load_file

    for name, folder in adapters(finished).items():
        r = int(name.split("_r")[1][0])
        assert read_json(folder / "ckpt/adapter/adapter_config.json")["r"] == r
        tensors = load_file(folder / "ckpt/adapter/adapter_model.safetensors")
        assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {r}
        assert read_run(folder).settings["r"] == r


def test_an_adapter_learns_the_same_alone_and_in_a_slot_that_another_left(finished, base, rows, tmp_path):
    """Which neighbours it had, and that it started late, is rounding at most."""
    grid = write_grid(tmp_path / "grid.json", configs=[{"r": 4, "lr": 1e-2}])
    run_sweep(config(grid, base, rows, tmp_path / "run"))
    alone = read_run(tmp_path / "run/adapters/000_r4_lr0.01")
    among = read_run(finished / "adapters/003_r4_lr0.01")
    assert alone.curve("train")[1] == pytest.approx(among.curve("train")[1], abs=1e-5)
    assert alone.curve("val")[1] == pytest.approx(among.curve("val")[1], abs=1e-5)


def test_saved_adapters_give_the_held_out_loss_of_the_sweep(finished, base, rows):
    settings = {"task": "instruction", "data_file": str(rows), "max_length": 48, "held_out": 0.2}
    _, _, data = load(TrainConfig(base=str(base), run_dir="", device="cpu", **settings))
    for folder in adapters(finished).values():
        loss = held_out_loss(load_adapter(load_base(str(base)), folder), data.held_out[:4], 0)
        assert loss == pytest.approx(read_run(folder).result["held_out_loss"], abs=1e-5)


KILLS = ("step 3", "save 3", "finish 4")


def kill(cfg, moment):
    """Run a sweep in a process that is gone at once when it comes to the moment for the n-th time."""
    where, n = moment.split()
    name = {"step": "record", "save": "save", "finish": "finish"}[where]
    code = (
        "import os\nfrom lora import sweep\n"
        f"inner, seen = sweep.Group.{name}, []\n"
        "def counted(self, *args):\n"
        f"    seen.append(1)\n    if len(seen) == {n}: os._exit(9)\n    return inner(self, *args)\n"
        f"sweep.Group.{name} = counted\n"
        f"sweep.run_sweep(sweep.{cfg!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr[-2000:]


def assert_same_sweep(one, other):
    assert list(adapters(one)) == list(adapters(other))
    for name, folder in adapters(one).items():
        twin = adapters(other)[name]
        assert comparable_metrics(folder) == comparable_metrics(twin), name
        assert weights(folder) == weights(twin), name
        assert (folder / "samples.txt").read_text() == (twin / "samples.txt").read_text()
    assert (Path(one) / "table.md").read_text() == (Path(other) / "table.md").read_text()


def test_killed_three_times_a_sweep_ends_as_if_undisturbed(finished, base, rows, tmp_path):
    cfg = config(write_grid(tmp_path / "grid.json", **GRID), base, rows, tmp_path / "run")
    for moment in KILLS:
        kill(cfg, moment)
        assert not (tmp_path / "run/table.md").exists()
    run_sweep(cfg)
    assert_same_sweep(finished, tmp_path / "run")


@pytest.mark.parametrize("kind", ["tpe", pytest.param("random", marks=pytest.mark.slow)])
def test_a_killed_search_gives_the_same_results(base, rows, tmp_path, kind):
    """TPE has rounds of three: the kills are in the first, between the first two, and in the second."""
    if kind == "tpe":
        pytest.importorskip("optuna", reason="the package optuna is not installed")
    space = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "r": {"low": 1, "high": 4}, "lora_alpha": [1, 8]}
    settings = {"max_steps": 4, "eval_every": 2, "metric_rows": 0}
    grid = write_grid(tmp_path / "grid.json", settings, grid=space, trials=7, search=kind)
    run_sweep(config(grid, base, rows, tmp_path / "whole"))
    cfg = config(grid, base, rows, tmp_path / "run")
    for moment in ("step 2", "finish 3", "save 5"):
        kill(cfg, moment)
    run_sweep(cfg)
    assert_same_sweep(tmp_path / "whole", tmp_path / "run")
    runs = [read_run(folder) for folder in adapters(tmp_path / "run").values()]
    points = [{name: run.settings[name] for name in space} for run in runs]
    losses = [run.result["held_out_loss"] for run in runs]
    size = 3 if kind == "tpe" else 7
    for at in range(0, 7, size):
        proposed = next_points(kind, space, points[:at], losses[:at], min(size, 7 - at))
        assert points[at : at + size] == proposed
    assert len(list((tmp_path / "run/rounds").glob("*"))) == (2 if kind == "tpe" else 0)


def test_adapters_of_one_group_have_batches_of_their_own(base, rows, tmp_path):
    """Each trains as alone, also when the group is killed while a batch is not full."""
    points = [{"batch_size": 2}, {"batch_size": 1, "grad_accum_steps": 3}, {"batch_size": 3}]
    grid = write_grid(tmp_path / "grid.json", {"metric_rows": 0, "lr": 1e-2}, configs=points)
    run_sweep(config(grid, base, rows, tmp_path / "whole"))
    cfg = config(grid, base, rows, tmp_path / "run")
    kill(cfg, "step 11")
    run_sweep(cfg)
    assert_same_sweep(tmp_path / "whole", tmp_path / "run")
    assert len(list((tmp_path / "run/groups").glob("*.lock"))) == 1
    two, parts, three = (read_run(folder) for folder in adapters(tmp_path / "run").values())
    alone = write_grid(tmp_path / "alone.json", {"metric_rows": 0, "lr": 1e-2}, configs=points[2:])
    run_sweep(config(alone, base, rows, tmp_path / "alone"))
    [single] = map(read_run, adapters(tmp_path / "alone").values())
    for kind in ("train", "val"):
        assert three.curve(kind)[1] == pytest.approx(single.curve(kind)[1], abs=1e-5)
        assert parts.curve(kind)[1] == pytest.approx(three.curve(kind)[1], abs=1e-5)
        assert two.curve(kind)[1] != pytest.approx(three.curve(kind)[1], abs=1e-4)


@pytest.mark.slow
def test_ten_kills_of_a_packed_search_change_nothing(base, rows, tmp_path):
    """TPE with halving, killed from outside at random moments, each time after it has saved once."""
    pytest.importorskip("optuna", reason="the package optuna is not installed")
    space = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}, "r": {"low": 1, "high": 4}}
    settings = {"max_steps": 80, "eval_every": 1, "metric_rows": 0}
    grid = write_grid(tmp_path / "grid.json", settings, grid=space, trials=12, search="tpe")
    whole, cfg = (
        config(grid, base, rows, tmp_path / name, packing=True, halving=True, adapters_at_once=2)
        for name in ("whole", "run")
    )
    run_sweep(whole)
    draws, code = random.Random(0), f"from lora import sweep\nsweep.run_sweep(sweep.{cfg!r})"
    for _ in range(10):
        before = {*(tmp_path / "run").rglob("step_*.pt")}
        with subprocess.Popen([sys.executable, "-c", code]) as process:
            while process.poll() is None and {*(tmp_path / "run").rglob("step_*.pt")} <= before:
                time.sleep(0.01)
            time.sleep(draws.uniform(0, 1))
            process.kill()
        assert process.returncode == -9
    run_sweep(cfg)
    assert_same_sweep(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_killed_after_its_last_adapter_a_group_is_done(finished, base, rows, tmp_path):
    cfg = config(write_grid(tmp_path / "grid.json", **GRID), base, rows, tmp_path / "run")
    code = (
        "import os\nfrom lora import sweep\n"
        "inner = sweep.Group.save\n"
        "def save(self):\n    inner(self)\n    self.slots or os._exit(9)\n"
        "sweep.Group.save = save\n"
        f"sweep.run_sweep(sweep.{cfg!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr[-2000:]
    run_sweep(cfg)
    assert_same_sweep(finished, tmp_path / "run")


def test_a_damaged_checkpoint_is_skipped(tmp_path):
    """The newest whose sha256 matches counts, and only the last two are kept."""
    for step in (8, 16, 1_000_008):
        save_checkpoint(tmp_path, step, {"trained": step, "theta": torch.arange(3.0)})
    assert [path.name for path in sorted_checkpoints(tmp_path)] == ["step_000016.pt", "step_1000008.pt"]
    said, newest = [], tmp_path / "step_1000008.pt"
    assert newest_checkpoint(tmp_path, said.append) == newest and not said
    assert torch.load(newest, weights_only=True)["trained"] == 1_000_008
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    assert newest_checkpoint(tmp_path, said.append).name == "step_000016.pt"
    assert len(said) == 1 and "step_1000008.pt is skipped" in said[0]
    sha256_path(tmp_path / "step_000016.pt").unlink()
    assert newest_checkpoint(tmp_path, said.append) is None


@pytest.mark.slow
@pytest.mark.parametrize("halving", [False, True])
@pytest.mark.parametrize("moments", [("step 1", "step 1", "step 6"), ("finish 1", "finish 2", "save 2")])
def test_killed_at_other_moments(base, rows, tmp_path, moments, halving):
    grid = write_grid(tmp_path / "grid.json", **GRID)
    run_sweep(config(grid, base, rows, tmp_path / "whole", halving=halving))
    cfg = config(grid, base, rows, tmp_path / "run", halving=halving)
    for moment in moments:
        kill(cfg, moment)
    run_sweep(cfg)
    assert_same_sweep(tmp_path / "whole", tmp_path / "run")


def test_a_finished_sweep_says_so_and_another_is_refused(finished, base, rows, tmp_path, capsys):
    grid = write_grid(tmp_path / "grid.json", **GRID)
    before = (finished / "metrics.jsonl").read_bytes(), (finished / "log.txt").read_bytes()
    run_sweep(config(grid, base, rows, finished))
    assert "already done" in capsys.readouterr().out
    assert before == ((finished / "metrics.jsonl").read_bytes(), (finished / "log.txt").read_bytes())
    with pytest.raises(UsageError, match="other settings"):
        run_sweep(config(grid, base, rows, finished, divergence_factor=9.0))


def test_shards_share_the_groups_and_the_last_one_sums_up(base, rows, tmp_path, capsys):
    grid = write_grid(tmp_path / "grid.json", grid={"r": [1, 2, 3, 4]}, settings={"max_steps": 4})
    hold = filelock.FileLock(tmp_path / "run/groups/001.lock", thread_local=False)
    (tmp_path / "run/groups").mkdir(parents=True)
    with hold:  # as if another process were training it
        run_sweep(config(grid, base, rows, tmp_path / "run", shard="0/2"))
    out = capsys.readouterr().out
    assert "group 1 is being trained by another process" in out and "1 of 2 groups" in out
    assert not (tmp_path / "run/table.md").exists()
    run_sweep(config(grid, base, rows, tmp_path / "run", shard="1/2"))
    assert (tmp_path / "run/table.md").exists()
    assert [read_json(tmp_path / f"run/groups/00{g}/config.json")["settings"]["members"] for g in (0, 1)] == [
        [0, 1],
        [2, 3],
    ]


@pytest.mark.slow
def test_torchrun_gives_groups_to_processes(base, rows, tmp_path):
    grid = write_grid(tmp_path / "grid.json", grid={"r": [1, 2, 3, 4]}, settings={"max_steps": 4})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "lora/sweep.py"]
    command += [
        grid,
        "--base",
        str(base),
        "--data-file",
        str(rows),
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(adapters(tmp_path / "run")) == 4 and (tmp_path / "run/table.md").exists()


def test_complaint_base_mutated_so_the_next_starts_from_trained_biases_peft_940(base, rows, tmp_path):
    """The Trainer's second configuration, biases trained, ends as it does when it is the only one."""
    settings = {"bias": "lora_only", "max_steps": 3, "eval_every": 3, "metric_rows": 0}
    both = write_grid(tmp_path / "both.json", settings, configs=[{"lr": 3e-2}, {"lr": 1e-2}])
    one = write_grid(tmp_path / "one.json", settings, configs=[{"lr": 1e-2}])
    run_sweep(config(both, base, rows, tmp_path / "both", engine="trainer"))
    run_sweep(config(one, base, rows, tmp_path / "one", engine="trainer"))
    assert weights(tmp_path / "both/adapters/001_lr0.01") == weights(tmp_path / "one/adapters/000_lr0.01")
    assert comparable_metrics(tmp_path / "both/adapters/001_lr0.01") == comparable_metrics(
        tmp_path / "one/adapters/000_lr0.01"
    )


def test_what_the_engine_cannot_do_goes_to_the_trainer(base, rows, tmp_path):
    settings = {"max_steps": 2, "eval_every": 2, "metric_rows": 0, "lora_dropout": 0.0}
    grid = write_grid(tmp_path / "grid.json", settings, configs=[{"r": 2}, {"r": 2, "use_dora": True}])
    run_sweep(config(grid, base, rows, tmp_path / "run"))
    kinds = [read_run(folder).kind for folder in sorted((tmp_path / "run/groups").glob("0??"))]
    assert kinds == ["lora_group_concurrent", "lora_group_trainer"]
    assert read_json(tmp_path / "run/adapters/001_r2_use_doraTrue/ckpt/adapter/adapter_config.json")["use_dora"]


def test_tensorboard_shows_every_adapter_of_both_engines_when_asked(base, rows, tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    settings = {"max_steps": 2, "eval_every": 2, "metric_rows": 0, "lora_dropout": 0.0}
    grid = write_grid(tmp_path / "grid.json", settings, configs=[{"r": 2}, {"r": 2, "use_dora": True}])
    run_sweep(config(grid, base, rows, tmp_path / "run", tensorboard=True))
    for folder in adapters(tmp_path / "run").values():
        assert len(list((folder / "tensorboard").glob("events.*"))) == 1
        assert "tensorboard" not in read_run(folder).settings
    run_sweep(config(grid, base, rows, tmp_path / "run"))  # the same sweep without it: nothing is left to do


def test_halving_stops_the_worse_half(base, rows, tmp_path):
    settings = {"max_steps": 16, "eval_every": 8, "metric_rows": 0}
    grid = write_grid(tmp_path / "grid.json", settings, grid={"lr": [1e-5, 1e-4, 1e-3, 1e-2]})
    run_sweep(config(grid, base, rows, tmp_path / "run", halving=True, adapters_at_once=4))
    ends = [read_run(folder).result for folder in adapters(tmp_path / "run").values()]
    assert [(e["stopped"], e["step"]) for e in ends] == [("halving", 2), ("halving", 2), ("halving", 4), ("end", 16)]
    result = read_run(tmp_path / "run").result
    assert result["step_share"] == (2 + 2 + 4 + 16) / 64


def test_patience_stops_an_adapter_that_no_longer_gets_better(base, rows, tmp_path):
    settings = {"max_steps": 10, "eval_every": 1, "patience": 3, "metric_rows": 0}
    grid = write_grid(tmp_path / "grid.json", settings, configs=[{"lr": 0.0}, {"lr": 1e-2}])
    run_sweep(config(grid, base, rows, tmp_path / "run"))
    stuck, other = (read_run(folder).result for folder in adapters(tmp_path / "run").values())
    assert (stuck["stopped"], stuck["step"], stuck["best_step"]) == ("patience", 3, 0)
    assert (other["stopped"], other["step"]) == ("end", 10)


@pytest.mark.core
def test_divergence_is_a_smoothed_loss_above_its_best(tmp_path):
    def first_stop(losses, factor=1.5):
        slot = Slot(TrainConfig(base="b", run_dir=str(tmp_path)), {})
        stop = next((i for i, loss in enumerate(losses) if slot.diverges(loss, factor)), None)
        slot.close()
        return stop

    falling = [4 - i / 50 for i in range(100)]
    assert first_stop(falling) is None
    assert first_stop([3.0, 9.0, 1.0, 12.0, *falling]) is None  # a noisy beginning is not judged
    assert 50 < first_stop(falling[:50] + [8.0] * 50) < 70
    assert first_stop(falling[:50] + [8.0] * 50, factor=0.0) is None


@pytest.mark.core
def test_flags_go_over_the_file(base, rows, tmp_path):
    grid = write_grid(tmp_path / "grid.json", configs=[{"r": 2}, {"r": 4}], seeds=[7])
    changes = {"seeds": (0, 1), "set": ("max_length=24", "mode=faithful", "weight_decay=1"), "max_steps": 3}
    configs = read_configs(config(grid, base, rows, "run", **changes))
    assert [(c.r, c.seed) for c in configs] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert {(c.max_length, c.mode, c.weight_decay, c.max_steps, c.batch_size) for c in configs} == {
        (24, "faithful", 1, 3, 2)
    }
    for wrong, says in [("max_length", "should be int"), ("lr=long", "should be float"), ("rows=3", "unknown setting")]:
        with pytest.raises(UsageError, match=says):
            read_configs(config(grid, base, rows, "run", set=(wrong,)))


@pytest.mark.parametrize(
    "parts, says",
    [
        ({"grid": {"rank": [1]}}, "rank: an unknown setting"),
        ({"gird": {}}, "should be an object with"),
        ({"configs": [{"r": 1}, {"r": 1}]}, "same configuration twice"),
        ({"grid": {"lr": []}}, "lr should be a list of values"),
        ({"grid": {"lr": 1e-3}}, "lr should be a list of values"),
        ({"grid": [1]}, "grid should be dict"),
        ({"configs": {"r": 1}}, "configs should be list"),
        ({"configs": [3]}, "configs should be a list of objects"),
        ({"seeds": 3}, "seeds should be list"),
        ({"seeds": [0, 0]}, "same configuration twice"),
        ({"grid": {"lr": [math.nan]}}, "--lr nan"),
        ({"settings": {"lr": []}, "configs": [{"lr": 1.0}]}, "--lr should be float"),
        ({"grid": {"lr": {"low": 1e-4, "high": 1e-2}}}, "lr should be a list of values"),  # a range without trials
        ({"grid": {"lr": {"low": 1e-4}}, "trials": 3}, "lr should be a list of values, or with trials"),
        ({"grid": {"lr": {"low": 1e-2, "high": 1e-4}}, "trials": 3}, "low should be a number below high"),
        ({"grid": {"lr": {"low": 0, "high": 1, "log": True}}, "trials": 3}, "above zero"),
        ({"grid": {"r": {"low": 1.5, "high": 3}}, "trials": 3}, "--r should be int, not 1.5"),
        ({"grid": {"lora_dropout": {"low": 0, "high": 1}}, "trials": 3}, "--lora-dropout 1"),
        ({"grid": {"r": {"low": 1, "high": 3}, "lr": [1e-3]}, "trials": 4}, "found 3 different points"),
        ({"grid": {"r": [1, 1]}, "trials": 2}, "found 1 different points"),
        ({"grid": {"target_modules": {"low": "a", "high": "b"}}, "trials": 2}, "low should be a number"),
        ({"grid": {"r": [1]}, "trials": "9"}, "trials should be int"),
        ({"grid": {"r": [1]}, "search": "tpe"}, "a search"),
        ({"grid": {"r": [1]}, "search": "grid", "trials": 1}, "unknown search grid"),
        ({"grid": {"r": [1]}, "configs": [{"r": 2}], "trials": 1}, "a search"),
    ],
)
def test_a_wrong_grid_is_refused(base, rows, tmp_path, parts, says):
    with pytest.raises(UsageError, match=says):
        run_sweep(config(write_grid(tmp_path / "grid.json", **parts), base, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags, says",
    [
        ({"adapters_at_once": -1}, "--adapters-at-once -1"),
        ({"divergence_factor": math.nan}, "--divergence-factor nan"),
        ({"set": ("lr=abc",)}, "lr: an unknown setting, or one with --set that the grid varies"),
    ],
)
def test_flags_out_of_range_are_refused(base, rows, tmp_path, flags, says):
    grid = write_grid(tmp_path / "grid.json", grid={"lr": [1e-3]})
    with pytest.raises(UsageError, match=says):
        run_sweep(config(grid, base, rows, tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_a_key_given_twice_is_refused(base, rows, tmp_path):
    (tmp_path / "grid.json").write_text('{"task": "instruction", "grid": {"r": [1], "r": [2]}}')
    with pytest.raises(UsageError, match="a key twice"):
        run_sweep(config(tmp_path / "grid.json", base, rows, tmp_path / "run"))


def test_overwrite_leaves_a_live_sweep_alone(base, rows, tmp_path):
    grid = write_grid(tmp_path / "grid.json", {"max_steps": 2, "eval_every": 2, "metric_rows": 0}, grid={"r": [1]})
    run_sweep(config(grid, base, rows, tmp_path / "run"))
    lock = filelock.FileLock(tmp_path / "run/groups/000/run.lock", thread_local=False)
    with lock, pytest.raises(UsageError, match="being trained by another process"):
        run_sweep(config(grid, base, rows, tmp_path / "run", overwrite=True, divergence_factor=3.0))
    assert (tmp_path / "run/adapters/000_r1/result.json").exists()


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_sweep_of_which_nothing_is_finite_has_its_table(base, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("lora.concurrent_trainer.mean_loss", lambda nll, *args: [math.inf] * nll.__self__.k)
    grid = write_grid(tmp_path / "grid.json", grid={"lr": [1e30, 1e31]}, settings={"max_grad_norm": 0.0})
    run_sweep(config(grid, base, rows, tmp_path / "run"))
    assert (tmp_path / "run/table.md").exists() and read_run(tmp_path / "run").result["status"] == "success"


def test_usage_errors_are_one_line(assert_refuses, base, rows, tmp_path):
    assert_refuses("lora/sweep.py", tmp_path / "no.json", "--run-dir", tmp_path / "run", says="no.json does not exist")
    for shard in ("2/2", "x"):
        with pytest.raises(UsageError, match="is not a part i/n"):
            grid = write_grid(tmp_path / "grid.json", grid={"r": [1]})
            run_sweep(config(grid, base, rows, tmp_path / "run", shard=shard))


@pytest.mark.parametrize("name, number", [("imdb", 10), ("alpaca", 6), ("blowup", 5), ("quickstart", 4)])
def test_the_grids_that_come_with_the_repository(base, rows, name, number):
    path = Path(sweep.__file__).parent / "sweeps" / f"{name}.json"
    configs = read_configs(config(path, base, rows, "run"))
    assert len(configs) == number and not any(map(unsupported, configs))
    assert len(sweep.make_groups(configs, "auto", 1)) == 1


@pytest.mark.parametrize("engine", ["auto", "trainer"])
def test_packed_batches_train_the_same_adapters(base, rows, tmp_path, engine):
    grid = write_grid(
        tmp_path / "grid.json", {"lora_dropout": 0.0, "max_steps": 4, "metric_rows": 0}, grid={"r": [2, 4]}
    )
    for name in ("padded", "packed"):
        run_sweep(config(grid, base, rows, tmp_path / name, packing=name == "packed", engine=engine))
    for name, folder in adapters(tmp_path / "packed").items():
        for kind in ("train", "val"):
            padded = read_run(tmp_path / "padded/adapters" / name).curve(kind)[1]
            assert read_run(folder).curve(kind)[1] == pytest.approx(padded, abs=1e-5)


# against the first: the same figures; no training; one that diverges
JUDGED = [{"lr": 1e-2}, {"lr": 1e-2, "epochs": 2.0}, {"lr": 0.0}, {"lr": 1e30, "max_grad_norm": 0.0}]


@pytest.fixture(scope="module")
def judged(base, rows, tmp_path_factory):
    """An undisturbed sequential test -> its SweepConfig."""
    folder = tmp_path_factory.mktemp("judged")
    grid = write_grid(folder / "grid.json", {"metric_rows": 0}, configs=JUDGED)
    cfg = config(grid, base, rows, folder / "run", judge=True, adapters_at_once=0, sample_tokens=0)
    run_sweep(cfg)
    return cfg


def test_the_judge_trains_more_seeds_only_of_what_is_undecided(judged):
    runs = [read_run(folder) for folder in adapters(judged.run_dir).values()]
    arms = [[run for run in runs if JUDGED[i].items() <= run.settings.items()] for i in range(4)]
    arms[0] = [run for run in arms[0] if run not in arms[1]]
    assert [len(arm) for arm in arms[2:]] == [len(arms[0]), 1] and len(arms[1]) <= len(arms[0]) < 8
    result = read_run(judged.run_dir).result
    assert [row["verdict"] for row in result["rows"]] == ["no difference", "worse", "worse"]
    assert result["adapters"] == len(runs)
    for row, arm in zip(result["rows"], arms[1:]):
        command = ["-m", "runlog", "judge", "--json", "--metric", "held_out_loss", "--alpha", str(row["alpha"])]
        sides = [["--baseline", *arms[0]], ["--candidate", *arm]]
        command += [str(getattr(word, "run_dir", word)) for side in sides for word in side]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {name: value for name, value in row.items() if name != "name"}
    table = (Path(judged.run_dir) / "table.md").read_text()
    assert "| worse | - | unbounded |" in table and "baseline: lr 0.01" in table


def test_a_judged_sweep_stopped_after_and_killed_within_rounds_ends_the_same(judged, tmp_path):
    cfg = replace(judged, run_dir=str(tmp_path / "run"))
    kill(cfg, "finish 2")
    run_sweep(replace(cfg, minutes=1e-9))
    assert len(adapters(cfg.run_dir)) == len(JUDGED) and (tmp_path / "run/table.md").exists()
    kill(cfg, "step 15")
    run_sweep(cfg)
    assert_same_sweep(judged.run_dir, cfg.run_dir)


def test_shards_judge_together_and_more_seeds_resume(judged, tmp_path):
    """Both wait for the rounds of the other; with two seeds all but one configuration are decided."""
    cfg = replace(judged, run_dir=str(tmp_path / "run"), seeds=(0, 1), shard="0/2")
    code = f"from lora import sweep\nsweep.run_sweep(sweep.{replace(cfg, shard='1/2')!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        run_sweep(cfg)
    assert other.returncode == 0
    assert [row["verdict"] for row in read_run(cfg.run_dir).result["rows"][1:]] == ["undecided", "worse"]
    run_sweep(replace(cfg, seeds=(), shard=""))
    for name in adapters(judged.run_dir):
        theirs = read_run(Path(judged.run_dir) / "adapters" / name).curve("val")[1]
        assert read_run(tmp_path / "run/adapters" / name).curve("val")[1] == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    "parts, changes",
    [
        ({"configs": JUDGED}, {"halving": True}),
        ({"grid": {"r": [1, 2]}, "search": "tpe", "trials": 2}, {}),
        ({"configs": JUDGED[:1]}, {}),
    ],
)
def test_what_cannot_be_judged_is_refused(base, rows, tmp_path, parts, changes):
    grid = write_grid(tmp_path / "grid.json", **parts)
    with pytest.raises(UsageError, match="--judge compares whole runs"):
        run_sweep(config(grid, base, rows, tmp_path / "run", judge=True, **changes))
    assert not (tmp_path / "run").exists()
