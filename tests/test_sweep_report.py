"""What is read off a sweep: from runs written here, finished, diverged and still in training."""

import math

import pytest
from matplotlib.figure import Figure

from lora import sweep_report
from lora.sweep_report import (
    contrasts,
    contrasts_table,
    draw_curves,
    final_loss,
    held_out_table,
    mean_curve,
    read_sweep,
    smoothed,
)
from runlog import RunLog

SETTINGS = {
    "use_rslora": False, "bias": "none", "init_lora_weights": "default", "use_dora": False, "lr_scheduler": "linear",
    "warmup_steps": 0, "weight_decay": 0.0, "batch_size": 1, "target_modules": "auto", "epochs": 1.0, "max_steps": 20,
}  # fmt: skip
# lr, r, dropout, seed -> held-out losses at steps 0, 10, 20
ADAPTERS = {
    (3e-4, 4, 0.05, 0): [4.0, 3.0, 2.0],
    (3e-4, 4, 0.05, 1): [4.0, 3.2, 2.4],
    (3e-2, 4, 0.05, 0): [4.0, 3.0, 5.0],
    (3e-2, 4, 0.05, 1): [4.0, 2.6],  # still in training
    (3e-2, 8, 0.05, 0): [4.0, math.nan],
    (3e-4, 4, 0.1, 0): [4.0, 2.9, 2.3],
}


@pytest.fixture
def sweep(tmp_path):
    """A sweep's folder, written as lora/sweep.py writes it."""
    for number, ((lr, r, dropout, seed), losses) in enumerate(ADAPTERS.items()):
        settings = SETTINGS | {"lr": lr, "r": r, "lora_alpha": 1, "lora_dropout": dropout, "seed": seed}
        with RunLog(tmp_path / "adapters" / f"{number:03d}", "lora", settings) as log:
            for i, loss in enumerate(losses):
                log.metric(10 * i, "val", loss=loss)
                log.metric(10 * i, "train", loss=loss)
            best = min((loss for loss in losses if loss == loss), default=None)
            if len(losses) == 3:
                log.finish("success", stopped="end", step=20, best_step=20, held_out_loss=best, after={"f1": 0.5})
            elif any(map(math.isnan, losses)):
                log.finish("diverged", stopped="diverged", step=10, best_step=0, held_out_loss=4.0, after={})
    return tmp_path


def test_a_sweep_is_read_in_its_order_with_runs_in_training(sweep):
    configs, runs = read_sweep(sweep)
    assert [(c.lr, c.r, c.lora_dropout, c.seed) for c in configs] == list(ADAPTERS)
    assert [final_loss(run) for run in runs] == [2.0, 2.4, 3.0, 2.6, 4.0, 2.3]
    assert read_sweep(sweep / "nowhere") == ([], [])


def test_the_table_has_means_over_seeds_best_first_and_runs_without_an_end(sweep):
    lines = held_out_table(*read_sweep(sweep)).splitlines()
    assert lines[0].startswith("| lr | r | lora_dropout | held-out loss | seeds |")
    assert lines[2].startswith("| 0.0003 | 4 | 0.05 | 2.2000 ± 2.5420 | 2 | 20 20 |")
    assert "2.8000 ± 2.5420" in lines[4] and "end at 20" in lines[4] and " at 10" in lines[4]
    assert "diverged at 10" in lines[5]


def test_contrasts_compare_only_what_differs_in_one_thing(sweep):
    found = contrasts(*read_sweep(sweep))
    assert found["lr"] == [({"r": 4, "lora_dropout": 0.05}, {3e-4: pytest.approx(2.2), 3e-2: pytest.approx(2.8)})]
    assert found["r"] == [({"lr": 3e-2, "lora_dropout": 0.05}, {4: pytest.approx(2.8), 8: 4.0})]
    assert found["lora_dropout"] == [({"lr": 3e-4, "r": 4}, {0.05: pytest.approx(2.2), 0.1: 2.3})]


def test_the_widest_contrast_stands_first(sweep):
    lines = contrasts_table(*read_sweep(sweep)).splitlines()
    assert lines[2] == "| r | lr 0.03, lora_dropout 0.05 | 4: 2.8000, 8: 4.0000 | 1.2000 |"
    assert lines[-1] == "| lora_dropout | lr 0.0003, r 4 | 0.05: 2.2000, 0.1: 2.3000 | 0.1000 |"
    assert contrasts_table([], []) == ""


def test_curves_are_means_over_seeds_as_far_as_each_came(sweep):
    _, runs = read_sweep(sweep)
    assert mean_curve(runs[:2], "val") == ([0, 10, 20], [4.0, 3.1, 2.2])
    assert mean_curve(runs[2:4], "val") == ([0, 10, 20], [4.0, 2.8, 5.0])
    assert smoothed([1.0, 2.0], decay=0.75) == [1.0, 1.25]
    fig = Figure()
    draw_curves(fig, *read_sweep(sweep))
    labels = [text.get_text() for text in fig.legends[0].texts]
    assert labels[0] == "lr 0.0003, r 4, dropout 0.05" and labels[-1] == "before training"
    assert "lr 0.03, r 8, dropout 0.05 (diverged: 1 of 1)" in labels


def test_training_far_above_the_held_out_loss_stays_inside_the_frame(sweep, monkeypatch):
    def higher(runs, kind):
        steps, losses = mean_curve(runs, kind)
        return steps, [loss + 30 * (kind == "train") for loss in losses]

    monkeypatch.setattr(sweep_report, "mean_curve", higher)
    fig = Figure()
    draw_curves(fig, *read_sweep(sweep))
    low, high = fig.axes[0].get_ylim()
    best = min((line.get_ydata() for line in fig.axes[0].lines), key=min)
    assert low < min(best) and best[0] < high and low < 2.0  # the best held-out loss


def test_a_sweep_that_has_not_begun_draws_nothing():
    fig = Figure()
    draw_curves(fig, [], [])
    assert not any(ax.lines for ax in fig.axes)
