import errno
import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from common import ROOT, UsageError, atomic_open, portable, write_json
from runlog import RunLog, comparable_metrics, read_run
from runlog.record import export_record


def write_run(run_dir, losses=(3.0, 2.0), **kwargs):
    with RunLog(run_dir, "test", {"lr": 0.1, "path": run_dir}, **kwargs) as log:
        for step, loss in enumerate(losses):
            log.metric(step, "train", loss=loss, ms=12.5)
        log.print("a line")
        log.finish("success", loss=losses[-1])


@pytest.mark.core
def test_a_run_reads_back(tmp_path):
    write_run(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.kind == "test" and run.settings["lr"] == 0.1
    assert run.result["status"] == "success" and run.result["loss"] == 2.0
    assert run.curve("train") == ([0, 1], [3.0, 2.0])
    assert run.config["argv"] and "git_dirty" in run.config and run.env["world_size"] == 1
    assert (tmp_path / "run/log.txt").read_text() == "a line\n"


@pytest.mark.core
def test_the_last_row_for_a_step_and_kind_wins(tmp_path):
    write_run(tmp_path, (3.0, 2.0))
    write_run(tmp_path, (3.0, 1.5), resume=True)
    assert [r["loss"] for r in read_run(tmp_path).metrics] == [3.0, 1.5]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_without_resume_the_old_record_is_replaced(tmp_path):
    write_run(tmp_path, (3.0, 2.0, 1.0))
    write_run(tmp_path, (3.0,))
    assert len(read_run(tmp_path).metrics) == 1


@pytest.mark.core
def test_a_torn_last_line_is_ignored_and_cut_on_resume(tmp_path):
    write_run(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "kind": "tr')
    assert len(read_run(tmp_path).metrics) == 2
    write_run(tmp_path, (9.0, 8.0), resume=True)
    assert [r["loss"] for r in read_run(tmp_path).metrics] == [9.0, 8.0]


@pytest.mark.core
def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0][:10], lines[1], ""]))
    with pytest.raises(UsageError, match="line 1"):
        read_run(tmp_path)


def test_samples_read_back_in_order(tmp_path):
    with RunLog(tmp_path, "test", {}) as log:
        log.sample(0, "北 once\n--- step back\n")
        log.sample(10, "")
    assert read_run(tmp_path).samples() == [(0, "北 once\n--- step back\n"), (10, "")]


@pytest.mark.core
def test_comparable_metrics_ignore_time_alone(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    write_run(tmp_path / "c", (3.0, 2.1))
    a, b, c = (comparable_metrics(tmp_path / name) for name in "abc")
    assert a == b != c and "ms" not in a[0] and "loss" in a[0]


def test_the_picture_is_drawn_from_memory_after_a_resume_too(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("runlog.record.draw_curves", lambda out, curves, *_, **__: drawn.append(curves))
    write_run(tmp_path, (3.0, 2.0))
    with RunLog(tmp_path, "test", {}, resume=True) as log:
        log.metric(1, "train", loss=1.5)
        log.metric(2, "train", loss=math.nan)
        log.metric(2, "val", loss=1.25)
        (tmp_path / "metrics.jsonl").rename(tmp_path / "moved")
        log.plot()
        (tmp_path / "moved").rename(tmp_path / "metrics.jsonl")
    assert drawn == [{"train": ((0, 1), (3.0, 1.5)), "val": ((2,), (1.25,))}]


def test_the_picture_is_a_png_with_or_without_rows(tmp_path):
    with RunLog(tmp_path, "test", {}) as log:
        log.plot()
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
        log.metric(0, "train", loss=2.0)
        log.plot(reference={"unigram entropy": 6.0})


@pytest.mark.core
def test_an_exception_is_recorded_as_failed(tmp_path):
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, "test", {}):
        _ = 1 / 0
    assert read_run(tmp_path).result["status"] == "failed"
    assert "ZeroDivisionError" in read_run(tmp_path).result["reason"]


def test_a_second_writer_is_refused_and_a_dead_one_blocks_nobody(tmp_path):
    hold = f"import os\nfrom runlog import RunLog\nwith RunLog({str(tmp_path)!r}, 'test', {{}}): os._exit(9)"
    with RunLog(tmp_path, "test", {}), pytest.raises(UsageError, match="another process"):
        RunLog(tmp_path, "test", {}).__enter__()
    assert subprocess.run([sys.executable, "-c", hold]).returncode == 9
    write_run(tmp_path)
    assert read_run(tmp_path).result["status"] == "success"


def test_a_lock_file_left_on_another_node_blocks_nobody(tmp_path):
    (tmp_path / "run.lock").write_text("4711\nanother-node\n")
    write_run(tmp_path)
    assert read_run(tmp_path).result["status"] == "success"


def test_a_file_system_without_locks_is_written_with_a_warning(tmp_path, monkeypatch, capfd):
    def no_flock(fd, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", no_flock)
    for _ in range(2):  # and a dead process leaves nothing there that would block the next
        write_run(tmp_path)
    assert "has no locks" in capfd.readouterr().err


def test_a_full_disk_shows_the_first_error(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UsageError, match="the checkpoint could not be written"), RunLog(tmp_path, "test", {}):
        monkeypatch.setattr("runlog.record.write_json", full)
        raise UsageError("the checkpoint could not be written")
    monkeypatch.undo()
    write_run(tmp_path)  # and the lock is free again


# ---------------------------------------------------------------------------------------------------------------------
# records


@pytest.mark.core
def test_a_record_reads_like_its_run_and_has_four_files(tmp_path):
    with RunLog(tmp_path / "run", "gpt2", {"lr": 0.1}) as log:
        log.metric(0, "train", loss=3.0, text="北 \U0001f600")
        log.metric(0, "train", loss=2.5)
        log.print("the log")
        log.sample(10, "once")
        log.plot()
        log.finish("success", loss=2.5)
    export_record(tmp_path / "run", tmp_path / "record")
    files = sorted(path.name for path in (tmp_path / "record").iterdir())
    assert files == ["log.txt", "loss.png", "metrics.jsonl", "record.json"]
    run, record = read_run(tmp_path / "run"), read_run(tmp_path / "record")
    assert record == replace(run, run_dir=tmp_path / "record")
    assert record.metrics_sha256 == record.result["metrics_file_sha256"]
    assert record.samples() == run.samples() == [(10, "once")] and record.log_lines() == run.log_lines() == ["the log"]
    with pytest.raises(UsageError, match="exists"):
        export_record(tmp_path / "run", tmp_path / "record")


@pytest.mark.core
def test_a_sweeps_record_has_its_adapters_in_one_table(tmp_path):
    with RunLog(tmp_path / "sweep", "lora_sweep", {"inputs": {"base_sha256": "12ab"}}) as log:
        for name in ("000_r4", "001_r8"):
            with RunLog(tmp_path / "sweep/adapters" / name, "lora", {"r": 4}) as adapter:
                adapter.metric(0, "train", loss=1 / 3, text="line\u2028separator 北")
                adapter.metric(0, "train", loss=3e-5)  # the row before it is kept, too
                adapter.finish("success")
        (tmp_path / "sweep/lora_experiments_imdb.log").write_text("PARAMETERS\n", encoding="utf-8")
        (tmp_path / "sweep/table.md").write_text("| lr |\n", encoding="utf-8")
        log.finish("success")
    export_record(tmp_path / "sweep", tmp_path / "record")
    files = sorted(path.name for path in (tmp_path / "record").iterdir())
    assert files == ["adapters.jsonl", "lora_experiments_imdb.log", "record.json"]
    assert (tmp_path / "record" / files[1]).read_text(encoding="utf-8") == "PARAMETERS\n| lr |\n"
    for run, record in zip(read_run(tmp_path / "sweep").adapters(), read_run(tmp_path / "record").adapters()):
        assert (record.name, record.metrics, record.result) == (run.name, run.metrics, run.result)
        assert record.metrics_sha256 == record.result["metrics_file_sha256"]
        assert record.settings == run.settings | {"inputs": {"base_sha256": "12ab"}}


def test_the_record_of_a_run_without_rows_that_never_ended_reads(tmp_path):
    with RunLog(tmp_path / "run", "bpe", {}):
        export_record(tmp_path / "run", tmp_path / "record")
    assert read_run(tmp_path / "record").status == "stale" and read_run(tmp_path / "record").written is None


def test_an_evaluations_record_keeps_its_items(tmp_path):
    write_run(tmp_path / "run")
    (tmp_path / "run/hellaswag.jsonl").write_text("{}\n", encoding="utf-8")
    export_record(tmp_path / "run", tmp_path / "record")
    assert (tmp_path / "record/hellaswag.jsonl").read_text(encoding="utf-8") == "{}\n"
    assert len(list((tmp_path / "record").iterdir())) == 4


# ---------------------------------------------------------------------------------------------------------------------
# mirrors


def scalars(run_dir, tag):
    """(step, value) of a curve as TensorBoard shows it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(run_dir / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_shows_the_rows_and_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    write_run(tmp_path, (9.0,), tensorboard=True)
    write_run(tmp_path, (3.0, 2.5), tensorboard=True)
    assert scalars(tmp_path, "train/loss") == [(0, 3.0), (1, 2.5)]  # the replaced run is gone
    with RunLog(tmp_path, "test", {}, resume=True, tensorboard=True) as log:
        for step, loss in [(1, 2.0), (2, 1.0)]:
            log.metric(step, "train", loss=loss, note="no number", better=True, nothing=None)
    assert scalars(tmp_path, "train/loss") == [(0, 3.0), (1, 2.0), (2, 1.0)]
    assert read_run(tmp_path).curve("train") == ([0, 1, 2], [3.0, 2.0, 1.0])


def test_tensorboards_writer_gets_the_rows(tmp_path, monkeypatch):
    """A module in its place, as for wandb below: the step from which a resumed run is written again is purged."""
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", purge_step))

        def add_scalar(self, name, value, step):
            calls.append((name, value, step))

        flush = close = lambda self: None

    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace(__spec__=object()))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    with RunLog(tmp_path, "test", {}, tensorboard=True) as log:
        log.metric(4, "train", loss=2.0, note="no number", better=True, nothing=None)
    assert calls == [("open", 4), ("train/loss", 2.0, 4)]


def test_wandb_gets_the_rows_and_a_resumed_run_has_the_same_id(tmp_path, monkeypatch):
    """A module in wandb's place: no account is needed to see what it would be given."""
    runs = []

    def init(**about):
        run = SimpleNamespace(about=about, rows=[], define_metric=lambda *_, **__: None, finish=lambda: None)
        run.log = run.rows.append
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    write_run(tmp_path / "run", wandb=True)
    write_run(tmp_path / "run", (5.0,), resume=True, wandb=True)
    write_run(tmp_path / "run", (6.0,), wandb=True)
    first, resumed, fresh = runs
    assert first.rows[1] == {"step": 1, "train/loss": 2.0, "train/ms": 12.5} and first.about["config"]["lr"] == 0.1
    assert first.about["id"] == resumed.about["id"] != fresh.about["id"] and first.about["resume"] == "allow"


def test_a_mirror_that_does_not_start_leaves_the_earlier_run_and_its_lock(tmp_path, monkeypatch):
    def init(**_):
        raise ConnectionError("no network")

    write_run(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, __spec__=object()))
    log = RunLog(tmp_path, "test", {}, wandb=True)
    with pytest.raises(UsageError, match="wandb did not start"):
        log.__enter__()
    assert read_run(tmp_path).status == "success" and len(read_run(tmp_path).metrics) == 2
    write_run(tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_missing_mirror_says_what_to_install_and_writes_nothing(tmp_path, monkeypatch, name):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None if module == name else find_spec(module))
    with pytest.raises(UsageError, match=f"pip install {name}"):
        write_run(tmp_path / "run", **{name: True})
    assert not (tmp_path / "run").exists()


def test_a_disabled_log_writes_nothing(tmp_path):
    write_run(tmp_path / "run", enabled=False)
    assert not (tmp_path / "run").exists()


def test_json_takes_numpy_and_turns_nan_into_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": np.float32(0.5), "b": math.nan, "c": (1, np.int64(2)), "d": tmp_path})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 0.5, "b": None, "c": [1, 2], "d": tmp_path.as_posix()}


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path):
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), atomic_open(tmp_path / "f") as f:
        f.write("new")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_paths_inside_the_repository_are_recorded_relative_to_it(tmp_path):
    assert portable(str(ROOT / "runs/mine")) == "runs/mine"
    with RunLog(tmp_path / "run", kind="k", config={"out": ROOT / "runs" / "mine", "data": tmp_path}):
        pass
    assert read_run(tmp_path / "run").settings == {"out": "runs/mine", "data": tmp_path.as_posix()}
    assert portable("/elsewhere/runs") == "/elsewhere/runs" and portable(3) == 3


def test_what_is_printed_into_a_pipe_is_utf8_whatever_the_code_page():
    code = "from common import cli\ncli(lambda: print('北 naïve'))"
    env = {**os.environ, "PYTHONIOENCODING": "cp1252"}  # what Windows gives a pipe
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=env).stdout.decode() == "北 naïve\n"


def test_usage_errors_are_one_line_and_status_2():
    for raised in ("UsageError('what, and what to do')", "FileNotFoundError(2, 'No such file or directory', 'x.txt')"):
        code = f"from common import UsageError, cli\ndef main(): raise {raised}\ncli(main)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
