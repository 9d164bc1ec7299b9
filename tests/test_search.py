"""The points of a search; how a sweep trains them is in test_sweep.py."""

import itertools
import math
import sys

import pytest

from common import UsageError
from lora.search import next_points

SPACE = {
    "lr": {"low": 1e-4, "high": 1e-2, "log": True}, "lora_dropout": {"low": 0, "high": 1e-1},
    "r": {"low": 1, "high": 4}, "lora_alpha": [1, 8],
}  # fmt: skip


def loss_of(point):
    """A smooth loss with one minimum."""
    return (math.log10(point["lr"]) + 2.5) ** 2 + point["lora_dropout"] + 1 / point["r"] + (point["lora_alpha"] == 1)


@pytest.mark.core
def test_random_points_lie_in_the_space_and_do_not_depend_on_how_many_are_asked_for():
    points = next_points("random", SPACE, [], [], 200)
    assert next_points("random", SPACE, points[:50], [0.0] * 50, 3) == points[50:53]
    assert all(1e-4 <= p["lr"] <= 1e-2 and 0 <= p["lora_dropout"] <= 0.1 for p in points)
    assert {p["r"] for p in points} == {1, 2, 3, 4} and {p["lora_alpha"] for p in points} == {1, 8}
    assert {type(p["r"]) for p in points} == {int} and {type(p["lora_dropout"]) for p in points} == {float}
    assert 70 < sum(p["lr"] < 1e-3 for p in points) < 130  # as many in each decade
    assert all(p["lr"] == float(f"{p['lr']:.4g}") for p in points)


def test_a_finite_space_is_tried_whole():
    space = {"r": {"low": 1, "high": 3}, "lora_alpha": [1, 8]}
    points = next_points("random", space, [], [], 6)
    assert sorted(tuple(p.values()) for p in points) == list(itertools.product((1, 2, 3), (1, 8)))


def test_tpe_beats_random_draws_and_repeats():
    pytest.importorskip("optuna", reason="the package optuna is not installed")

    def search(kind):
        points = []
        while len(points) < 64:
            points += next_points(kind, SPACE, points, [loss_of(p) for p in points], 8)
        return points

    points = search("tpe")
    assert points == search("tpe") and len({repr(p) for p in points}) == 64
    tpe, random = (sorted(map(loss_of, found))[8] for found in (points, search("random")))
    assert tpe < random


def test_without_optuna_tpe_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UsageError, match="pip install optuna"):
        next_points("tpe", SPACE, [], [], 1)
