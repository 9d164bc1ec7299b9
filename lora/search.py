"""The points of a search: drawn at random, or proposed by Optuna's TPE from the losses of earlier points.

A space is the `grid` of a grid file in which settings may be ranges, of whole numbers where both ends are:

    {"lr": {"low": 1e-5, "high": 1e-2, "log": true}, "r": {"low": 2, "high": 64, "log": true}, "lora_alpha": [8, 16]}

A point depends on its number and, with TPE, on earlier points and their losses, so a killed search repeats them.
"""

import random

from common import UsageError

SEARCHES = ("random", "tpe")  # independent draws; tree-structured Parzen estimator (Bergstra et al., 2011)


def check_space(space, trials, check):
    """UsageError for what is neither list nor range, what check({setting: value}) refuses, or too few points."""
    for name, values in space.items():
        is_range = trials and isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"}
        if not is_range and not (isinstance(values, list) and values):
            raise UsageError(f'{name} should be a list of values, or with trials {{"low": …, "high": …, "log": …}}')
        ends = [values["low"], values["high"]] if is_range else values
        for value in ends:
            check({name: value})
        if is_range and (isinstance(ends[0], str) or ends[0] >= ends[1] or (values.get("log") and ends[0] <= 0)):
            raise UsageError(f'{name}: low should be a number below high, and above zero with "log": true')
    next_points("random", space, [], [], trials)


def next_points(kind, space, points, losses, n):
    """The next `n` points, {setting: value}, after `points` with their held-out `losses`, without duplicates."""
    points, first = list(points), len(points)
    proposed = propose(space, points, losses, n) if kind == "tpe" else [None] * n
    for number, point in enumerate(proposed, first):
        rng, draws = random.Random(number), 0
        while point is None or point in points:
            point, draws = draw(space, rng), draws + 1
            if draws > 10_000:
                raise UsageError(f"the search found {number} different points, but should try {first + n}")
        points.append(point)
    return points[first:]


def draw(space, rng):
    """A random point: each choice alike, ranges uniform, or with "log" their logarithm."""
    point = {}
    for name, values in space.items():
        u = rng.random()
        if isinstance(values, list):
            point[name] = values[int(u * len(values))]
        else:
            low, high = values["low"], values["high"]
            point[name] = low * (high / low) ** u if values.get("log") else low + (high - low) * u
    return rounded(space, point)


def rounded(space, point):
    """A point whose values in ranges are whole numbers where both ends are, else have four digits, as in tables."""
    for name, values in space.items():
        if isinstance(values, dict):
            low, high = values["low"], values["high"]
            value = round(point[name]) if type(low) is type(high) is int else float(f"{point[name]:.4g}")
            point[name] = min(max(value, low), high)
    return point


def propose(space, points, losses, n):
    """`n` points of TPE, with a constant liar for those being trained; UsageError where Optuna is missing."""
    try:
        import optuna
    except ImportError:
        raise UsageError('"search": "tpe" needs the package optuna: pip install optuna') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    choice, span = optuna.distributions.CategoricalDistribution, optuna.distributions.FloatDistribution
    kinds = {name: choice(v) if isinstance(v, list) else span(**v) for name, v in space.items()}
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=len(points), constant_liar=True))
    for point, loss in zip(points, losses):
        study.add_trial(optuna.trial.create_trial(params=point, distributions=kinds, value=loss))
    return [rounded(space, study.ask(kinds).params) for _ in range(n)]
