"""`python -m runlog` on runs of every kind: finished, being written, killed, truncated, moved, damaged."""

import json
import shutil

import pytest
from conftest import ROOT

from common import file_sha256
from runlog import RunLog, read_run
from runlog.__main__ import main
from runlog.compare_runs import curve_table, group, number, spread

SHAPE = {"n_layer": 2, "n_embd": 16, "block_size": 32, "total_batch_size": 256, "max_steps": 20}


def gpt2_run(run_dir, optimizer="adamw", seed=1, steps=20, gain=0.1, **result):
    """A GPT-2 run whose losses are known: 8 - gain a step, shifted a little by the seed."""
    settings = {**SHAPE, "optimizer": optimizer, "seed": seed, "run_dir": str(run_dir)}
    with RunLog(run_dir, "gpt2", settings) as log:
        for step in range(steps + 1):
            if step % 10 == 0:
                log.metric(step, "val", loss=8.0 + seed / 100 - gain * step)
            if step < steps:
                log.metric(step, "train", loss=8.1 - gain * step, grad_norm=1.0, lr=1e-3, ms=500.0, tok_per_sec=512.0)
        log.print("the end 终")
        log.finish(**{"status": "success", "step": steps, "flops_per_token": 60_000, **result})
    return run_dir


@pytest.fixture
def runs(tmp_path):
    """A folder with one run of each kind."""
    gpt2_run(tmp_path / "gpt")
    with RunLog(tmp_path / "bpe", "bpe", {"vocab_size": 512, "input": ["a.txt"]}) as log:
        log.finish("success", tokens=10, bytes_per_token=3.5)
    with RunLog(tmp_path / "lora", "lora", {"r": 8, "epochs": 1.0, "max_steps": 0, "seed": 0}) as log:
        for step in range(1, 5):
            log.metric(step, "train", loss=3.0 / step, lr=1e-3, grad_norm=1.0, epoch=step / 8)
        log.metric(4, "val", loss=1.25)
        log.finish("success", step=4, max_steps=8, held_out_loss=1.25)
    with RunLog(tmp_path / "bench", "bench_bpe", {"rounds": 3}) as log:
        log.finish("success", rows=[{"name": "train", "who": "ours", "seconds": 0.5, "ratio": 1.0}])
    return tmp_path


@pytest.fixture
def runlog(in_process):
    """runlog(*args) -> stdout of a command that succeeds."""

    def run(*args):
        code, out, err = in_process(main, *args)
        assert code == 0, out + err
        return out

    return run


def cells(out, name):
    """The words of the first line that begins with `name`, without it."""
    lines = (line.split() for line in out.splitlines() if line.strip())
    return next(words[1:] for words in lines if words[0] == name)


# ---------------------------------------------------------------------------------------------------------------------
# ls, show


@pytest.mark.core
def test_ls_lists_every_kind_with_its_figures(runs, runlog):
    out = runlog("ls", runs)
    assert cells(out, "gpt")[:7] == ["gpt2", "success", "20", "6.0100", "6.0100", "5120", "0.0028"]
    assert cells(out, "lora")[:5] == ["lora", "success", "4", "1.2500", "1.2500"]
    assert cells(out, "bpe")[:4] == ["bpe", "success", "-", "-"] and cells(out, "bench")[0] == "bench_bpe"


def test_ls_sorts(runs, runlog):
    gpt2_run(runs / "long", steps=10)

    def names(*args):
        return [line.split()[0] for line in runlog("ls", runs, *args).splitlines()[1:]]

    assert names() == ["bench", "bpe", "gpt", "long", "lora"]
    assert names("--sort", "step")[:3] == ["lora", "long", "gpt"]
    assert names("--sort", "best")[:3] == ["lora", "gpt", "long"]


def test_ls_names_what_it_cannot_read_and_lists_the_rest(runs, runlog):
    (runs / "gpt/metrics.jsonl").write_text('{"step": 1\n{"step": 2, "kind": "val", "loss": 1.0}\n')
    (runs / "lora/config.json").write_text("{")
    (runs / "bench/result.json").write_text("[]")
    out = runlog("ls", runs)
    assert "bench is not a run directory" in out and "line 1 is not a metrics row" in out and "not valid JSON" in out
    assert cells(out, "bpe")[1] == "success"


def test_ls_without_runs_points_to_the_records(tmp_path, runlog, monkeypatch):
    monkeypatch.setattr("runlog.__main__.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert runlog("ls") == "no runs in runs/ yet; records of the report: python -m runlog ls records\n"


def test_ls_of_a_folder_that_is_not_there_says_so(in_process):
    code, out, err = in_process(main, "ls", "nowhere")
    assert (code, out, err) == (2, "", "error: nowhere is not a folder\n")


def test_a_sweeps_adapters_are_named_by_a_pattern_in_every_command(runlog, tmp_path):
    sweep = next(path for path in RECORDS if (path / "adapters.jsonl").exists())
    names = [run.name for run in read_run(sweep).adapters()][:2]
    assert names[0] in runlog("show", sweep / "adapters" / names[0])
    out = runlog("compare", *(sweep / "adapters" / name for name in names), "--out", tmp_path / "c.png")
    assert all(name in out for name in names)


def test_show_prints_settings_figures_and_rows(runs, runlog):
    out = runlog("show", runs / "gpt", runs / "bench")
    assert cells(out, "total_batch_size") == ["256"] and cells(out, "flops_per_token") == ["60000"]
    assert "last of 20 train rows: step 19" in out and cells(out, "train")[:2] == ["ours", "0.5000"]


# ---------------------------------------------------------------------------------------------------------------------
# compare


@pytest.mark.core
def test_seeds_make_a_group_with_mean_and_deviation(tmp_path, runlog):
    folders = [
        gpt2_run(tmp_path / f"{optimizer}-seed{seed}", optimizer, seed, gain=gain)
        for optimizer, gain in (("adamw", 0.1), ("muon", 0.2))
        for seed in (1, 2, 3)
    ]
    out = runlog("compare", *folders, "--out", tmp_path / "c.png")
    assert cells(out, "muon-seed2") == ["muon", "2"]  # the settings that differ, the run directory aside
    curves, finals = out.split("val loss by step")[1].split("difference")
    assert cells(curves, "adamw-seed2") == ["8.0200", "7.0200", "6.0200"]  # at steps 0, 10 and 20
    assert cells(curves, "muon-seed1") == ["8.0100", "6.0100", "4.0100"]
    assert cells(finals, "muon-seed1")[:9] == ["3", *2 * ["4.0200", "±", "0.0100"], "-2.0000", "20"]
    assert "seed2" not in finals
    assert (tmp_path / "c.png").stat().st_size > 5000


@pytest.mark.parametrize("x, last", [("tokens", "5,120"), ("seconds", "10"), ("step", "20")])
def test_the_axes(tmp_path, runlog, x, last):
    """nanochat#7: runs compared by steps, tokens, seconds."""
    a, b = gpt2_run(tmp_path / "a"), gpt2_run(tmp_path / "b", "muon", gain=0.2)
    out = runlog("compare", a, b, "--x", x, "--out", tmp_path / "c.png")
    assert out.split("val loss by")[0].split()[-1] == last


def test_compare_of_runs_without_curves_shows_the_settings(runs, tmp_path, runlog):
    with RunLog(tmp_path / "bench2", "bench_bpe", {"rounds": 5}) as log:
        log.finish("success")
    out = runlog("compare", runs / "bench", tmp_path / "bench2")
    assert cells(out, "rounds") == ["3", "5"] and "without a curve of val loss: bench, bench2" in out


def test_losses_on_other_shards_are_not_compared_in_silence(tmp_path, runlog):
    folders = [gpt2_run(tmp_path / name) for name in "ab"]
    config = json.loads((folders[1] / "config.json").read_text())
    config["settings"]["shards_sha256"] = "0" * 64
    (folders[1] / "config.json").write_text(json.dumps(config))
    assert "not comparable" in runlog("compare", *folders, "--out", tmp_path / "c.png")
    assert "not comparable" not in runlog("compare", folders[0], folders[0], "--out", tmp_path / "c.png")


def test_compare_names_usage_errors(runs, in_process):
    for args, says in [
        ((runs / "gpt",), "at least two"),
        ((runs / "gpt", runs / "lora", "--x", "tokens"), "does not record its tokens"),
        ((runs / "gpt", runs / "nothing"), "nothing is not a run directory"),
        ((runs / "gpt", runs / "lora", "--kind", "hellaswag"), "rows of kind hellaswag"),
    ]:
        code, _, err = in_process(main, "compare", *args)
        assert code == 2 and says in err and err.count("\n") == 1


def test_a_resumed_run_counts_each_step_once(tmp_path):
    gpt2_run(tmp_path)
    with RunLog(tmp_path, "gpt2", read_run(tmp_path).settings, resume=True) as log:
        log.metric(19, "train", loss=1.0, ms=500.0)
    run = read_run(tmp_path)
    assert run.curve("val", x="seconds")[0] == [0.0, 5.0, 10.0] and run.hours == pytest.approx(10 / 3600)


@pytest.mark.core
def test_curves_between_their_points():
    table = curve_table({"a": ([0, 10, 20], [4.0, 3.0, 2.0]), "b": ([5, 15], [6.0, 5.0])}, "loss by step")
    assert cells(table, "a") == ["4.0000", "3.0000", "2.0000"] and cells(table, "b") == ["-", "5.5000", "-"]


def test_numbers_have_the_digits_that_mean_something():
    assert spread([1.0, 3.0]) == "2.0000 ± 1.4142" and spread([2.0]) == "2.0000" and spread([]) == "-"
    assert [number(x) for x in (4.44331, 3e-4, 1.2e-5, 12345.6, 0.0)] == [
        *("4.4433", "0.0003", "1.2e-05", "12,346", "0.0000")
    ]


def test_runs_that_differ_in_more_than_the_seed_are_no_group(tmp_path):
    runs = [read_run(gpt2_run(tmp_path / name, *how)) for name, how in
            [("a", ("adamw", 1)), ("b", ("adamw", 2)), ("c", ("muon", 1))]]  # fmt: skip
    assert [len(members) for members in group(runs)] == [2, 1]


# ---------------------------------------------------------------------------------------------------------------------
# how a run ended


def test_show_tells_a_killed_run_from_a_running_one(tmp_path, runlog, monkeypatch):
    monkeypatch.setattr("runlog.run.FRESH", -1.0)
    log = RunLog(tmp_path, "gpt2", {**SHAPE, "seed": 1}).__enter__()
    log.metric(3, "train", loss=5.0, grad_norm=1.0, lr=1e-3)
    assert "gpt2, running, step 3 of 20" in runlog("show", tmp_path) and read_run(tmp_path).status == "running"
    log._held.close()  # what the operating system does for a process that died
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write('{"step": 4, "ki')
    out = runlog("show", tmp_path)
    assert "gpt2, stale, step 3 of 20" in out and "killed: no process holds it" in out
    assert "the same command resumes it: python" in out
    assert read_run(tmp_path).status == "stale" and "is stale" in runlog("ls", tmp_path)


def test_a_run_whose_lock_is_not_seen_counts_as_running_while_it_is_fresh(tmp_path):
    log = RunLog(tmp_path, "gpt2", {}).__enter__()
    log._held.close()
    assert read_run(tmp_path).status == "running"


def test_show_has_the_traceback_without_paths_of_this_host(tmp_path, runlog):
    def fails():
        raise IndexError("no such expert")

    with pytest.raises(IndexError), RunLog(tmp_path, "gpt2", {}) as log:
        log.print("a line")
        fails()
    out = runlog("show", tmp_path)
    assert "IndexError: no such expert" in out and "in fails" in out.split("the end of log.txt")[1]
    assert str(ROOT) not in (tmp_path / "log.txt").read_text(encoding="utf-8")


def test_show_names_the_step_that_is_not_finite(tmp_path, runlog):
    with RunLog(tmp_path, "gpt2", {**SHAPE}) as log:
        for step in range(6):
            log.metric(step, "train", loss=5.0 if step < 5 else float("nan"), grad_norm=2.0**step, lr=1e-3)
        log.finish("diverged", reason="the loss of step 5 is not finite")
    out = runlog("show", tmp_path)
    assert "gpt2, diverged, step 5 of 20" in out and cells(out, "reason")[-1] == "finite"
    assert "not finite is at step 5" in out


def test_show_checks_the_checkpoints_that_are_left(tmp_path, runlog):
    gpt2_run(tmp_path, steps=5, status="preempted", reason="received SIGTERM")
    (tmp_path / "ckpt").mkdir()
    names = ("step_000002.pt", "step_000004.pt")
    for name, text in zip(names, ("whole", "altered")):
        (tmp_path / "ckpt" / name).write_text(text)
    digest = file_sha256(tmp_path / "ckpt" / names[0])
    for name in names:
        (tmp_path / f"ckpt/{name}.sha256").write_text(f"{digest}  {name}\n")
    out = runlog("show", tmp_path)
    assert f"checkpoint {names[0]}: whole" in out and f"checkpoint {names[1]}: its sha256 does not match" in out
    assert "received SIGTERM" in out


# ---------------------------------------------------------------------------------------------------------------------
# runs from elsewhere


def test_a_moved_run_reads_like_the_first(runs, tmp_path, runlog):
    shutil.copytree(runs / "gpt", tmp_path / "elsewhere/gpt")
    config = json.loads((tmp_path / "elsewhere/gpt/config.json").read_text())
    config["settings"]["run_dir"] = "C:\\runs\\gpt"
    (tmp_path / "elsewhere/gpt/config.json").write_text(json.dumps(config))
    assert read_run(tmp_path / "elsewhere/gpt").metrics == read_run(runs / "gpt").metrics
    out = runlog("compare", tmp_path / "elsewhere/gpt", runs / "gpt", "--out", tmp_path / "c.png")
    assert "the settings are the same" in out


RECORDS = sorted(path.parent for path in (ROOT / "records").rglob("record.json"))


def test_every_committed_record_reads_with_every_command(runlog, tmp_path):
    assert len(RECORDS) >= 9
    listed = runlog("ls", "records")
    for record in RECORDS:
        assert record.name in listed and len(list(record.iterdir())) <= 4
        assert runlog("show", record)
        assert runlog("compare", record, RECORDS[0], "--out", tmp_path / "c.png")
