"""What is read off a sweep: from runs written here, finished and diverged."""

import math
from dataclasses import replace

import pytest

from lora.sweep_report import (
    adapter_frame,
    contrasts_table,
    draw_curves,
    held_out_table,
    judge_configs,
    verdicts_table,
)
from lora.train_lora import TrainConfig
from runlog import RunLog
from runlog.judge import judge

# lr, r, dropout, seed -> held-out losses at steps 0, 10, 20
ADAPTERS = {
    (3e-4, 4, 0.05, 0): [4.0, 3.0, 2.0],
    (3e-4, 4, 0.05, 1): [4.0, 3.2, 2.4],
    (3e-2, 4, 0.05, 0): [4.0, 3.0, 5.0],
    (3e-2, 4, 0.05, 1): [4.0, 2.6, 2.7],
    (3e-2, 8, 0.05, 0): [4.0, math.nan],
    (3e-4, 4, 0.1, 0): [4.0, 2.9, 2.3],
}


@pytest.fixture
def sweep(tmp_path):
    """(frame, names) of a sweep, written as lora/sweep.py writes it."""
    configs = []
    for number, ((lr, r, dropout, seed), losses) in enumerate(ADAPTERS.items()):
        values = {"lr": lr, "r": r, "lora_alpha": 1, "lora_dropout": dropout, "seed": seed}
        configs.append(TrainConfig(base="b", run_dir=str(tmp_path / "adapters" / f"{number:03d}"), **values))
        with RunLog(configs[-1].run_dir, "lora", configs[-1]) as log:
            for i, loss in enumerate(losses):
                log.metric(10 * i, "val", loss=loss)
                log.metric(10 * i, "train", loss=loss + 1)
            ended, best = "diverged" if any(map(math.isnan, losses)) else "end", min(x for x in losses if x == x)
            status, result = "success" if ended == "end" else ended, {"step": 10 * (len(losses) - 1), "best_step": 20}
            log.finish(status, stopped=ended, held_out_loss=best, after={"f1": 0.5}, **result)
    return adapter_frame(configs)


def test_every_setting_can_vary(monkeypatch):
    """Configurations are told apart by whatever differs, seeds aside, not by a list of what usually does."""
    configs = [TrainConfig(base="b", run_dir=f"r{i}", max_grad_norm=norm, seed=i) for i, norm in enumerate((0.1, 1.0))]
    run = type("Run", (), {"result": {"held_out_loss": None}})
    monkeypatch.setattr("lora.sweep_report.read_run", lambda folder: run)
    frame, names = adapter_frame(configs)
    assert names == ["max_grad_norm"] and frame["loss"].tolist() == [math.inf] * 2
    assert adapter_frame(configs[:1])[1] == ["task"]


@pytest.mark.core
def test_the_table_has_means_over_seeds_best_first(sweep):
    lines = held_out_table(*sweep).splitlines()
    assert lines[0].startswith("| lr | r | lora_dropout | held-out loss | seeds |")
    assert lines[2].startswith("| 0.0003 | 4 | 0.05 | 2.2000 ± 2.5412 | 2 | 20 20 | 2.0000 2.4000 | end at 20 |")
    assert lines[3].startswith("| 0.0003 | 4 | 0.1 | 2.3000 | 1 |")  # no interval of a single value
    assert "2.8000 ± 2.5412" in lines[4] and lines[4].endswith("f1 0.500 |") and "diverged at 10" in lines[5]


def test_better_is_said_of_what_a_replay_does_not_contradict(sweep, monkeypatch):
    frame, names = sweep
    verdicts = [replace(verdict, verdict="better") for verdict in judge_configs(frame, names)[1].values()]
    monkeypatch.setattr("lora.sweep_report.judge_all", lambda *args, **options: verdicts)
    wrong = frame["run"][5].run_dir  # of the last configuration alone
    monkeypatch.setattr("runlog.judge.verify_by_replay", lambda run_dir: "FAIL it" if run_dir == wrong else "")
    found = [*judge_configs(frame, names)[1].values()]
    assert [v.verdict for v in found] == ["better", "better", "undecided"] and found[2].contradicted
    assert found[2].notes[-1] == "verify contradicts it: FAIL it"


def test_verdicts_are_those_of_the_judge_at_holms_levels(sweep):
    frame, names = sweep
    baseline, verdicts = judge_configs(frame, names)
    assert baseline == (3e-4, 4, 0.05)
    runs = dict(list(frame.groupby(names)["run"]))
    assert verdicts == {
        values: judge(runs[baseline], runs[values], metric="held_out_loss", alpha=0.05 / 3) for values in verdicts
    }
    lines = [line.strip("| ").split(" | ") for line in verdicts_table(verdicts, names).splitlines()]
    assert lines[0][3:] == ["verdict", "difference", "interval", "pairs", "noise", "more seeds"]
    assert [line[:4] for line in lines[2:]] == [
        ["0.03", "4", "0.05", "undecided"], ["0.03", "8", "0.05", "worse"], ["0.0003", "4", "0.1", "undecided"],
    ]  # fmt: skip
    assert lines[2][4:7] == ["+0.6000", "unbounded", "2"]  # two seeds decide nothing that may be looked at again


@pytest.mark.core
def test_contrasts_compare_only_what_differs_in_one_thing_the_widest_first(sweep):
    assert contrasts_table(*sweep).splitlines()[2:] == [
        "| r | lr 0.03, lora_dropout 0.05 | 4: 2.8000, 8: 4.0000 | 1.2000 |",
        "| lr | r 4, lora_dropout 0.05 | 0.0003: 2.2000, 0.03: 2.8000 | 0.6000 |",
        "| lora_dropout | lr 0.0003, r 4 | 0.05: 2.2000, 0.1: 2.3000 | 0.1000 |",
    ]
    frame, _ = sweep
    assert contrasts_table(frame[:1], ["task"]) == ""


def test_curves_have_one_entry_a_configuration_and_keep_the_best_inside_the_frame(sweep):
    fig = draw_curves(*sweep)
    labels = [text.get_text() for text in fig.legends[0].texts]
    assert len(labels) == 4 and labels[0] == "lr 0.0003, r 4, lora_dropout 0.05"
    assert "lr 0.03, r 8, lora_dropout 0.05 (diverged: 1 of 1)" in labels
    assert [len(ax.lines) for ax in fig.axes] == [6, 6]
    low, high = fig.axes[0].get_ylim()
    assert low <= 2.0 and high > 4.0
