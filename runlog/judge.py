"""Is a change better? A verdict on two sets of runs, from a statistical test that may be asked again after each seed.

    python -m runlog judge --baseline runs/a-seed* --candidate runs/b-seed*             final validation loss
    python -m runlog judge --baseline … --candidate … --metric bits_per_byte --at tokens
    python -m runlog judge --baseline runs/hellaswag-a --candidate runs/hellaswag-b     the same items, paired

Runs that share a seed start from the same weights and read the same data, so they are compared pair by pair. The
interval for the mean difference holds at all numbers of pairs at once (`critical_t`): looking after every seed, and
stopping when the answer is there, does not raise the error rate above alpha. The verdict:

    better, worse     the interval excludes 0
    no difference     the interval lies within ±delta; delta is by default the noise, the standard deviation of the
                      baseline's runs over seeds, so it takes two of them; or all rows of each pair are the same bits
    undecided         neither; `more` estimates how many further seeds would decide it

Runs that are not finished or contradict their own checksums are named and left out, and so are those that diverged: a
candidate with a diverged run is never called better, and one without any other run is worse.
"""

import math
from dataclasses import dataclass, field, replace

import numpy as np
from scipy import stats

from common import UsageError, atomic_open, read_jsonl
from runlog.compare_runs import differences, number
from runlog.run import untimed
from runlog.verify import contradictions, verify_by_replay

PRIOR_VARIANCE = 16.0  # of mean / standard deviation of the differences, in the mixture; what it is changes power alone
HIGHER_IS_BETTER = {"acc", "acc_norm", "acc_char", "accuracy", "tok_per_sec", "mfu"}
COLORS = {"better": "#2a7f3f", "worse": "#b03030", "no difference": "#3060a0", "undecided": "#888888"}
MOST_SEEDS = 1000  # beyond which `more` gives up


@dataclass
class Verdict:
    """The answer. difference: candidate minus baseline, low … high its interval; None where it is unbounded."""

    verdict: str  # better, worse, no difference, undecided
    metric: str
    at: str  # where the curves were read, for example "step 300"
    difference: float | None
    low: float | None
    high: float | None
    p: float  # always-valid p-value of "no difference at all" (exact, of McNemar's test, for items)
    n: int  # pairs; where runs are not paired, the smaller number of seeds
    paired: bool
    noise: float | None  # standard deviation of the baseline's runs over seeds
    delta: float | None  # differences below this count as none
    more: int | None  # seeds that are still needed, if mean and spread stay as they are; None: unknown, or too many
    baseline: float  # mean of the metric
    candidate: float | None
    alpha: float
    values: dict = field(default_factory=dict)  # {"baseline": {seed: figure}, "candidate": {seed: figure}}
    settings: dict = field(default_factory=dict)  # what differs: {setting: [baseline's value, candidate's]}
    notes: list = field(default_factory=list)  # runs that were left out, or are not proved
    contradicted: bool = False  # `runlog verify` found a run wrong: further seeds decide nothing


def judge(baseline, candidate, *, metric="", at="step", alpha=0.05, delta=None, fixed=False):
    """Two lists of runs (`read_run`) -> Verdict.

    metric: a field of the rows or of result.json; empty: validation loss, or bits per byte where tokenizers differ.
    at: the axis (step, tokens, seconds, flops) on which curves are read, at the last place that all runs have reached.
    alpha: the error rate, over all looks. delta: None takes the noise. fixed: the number of seeds was decided before
    the first look: a t interval instead, which is narrower.
    """
    if not 0 < alpha < 1 or (delta is not None and delta <= 0):
        raise UsageError(f"alpha {alpha:g} must lie between 0 and 1, and delta {delta} above 0")
    notes, diverged = [], [run for run in candidate if run.status == "diverged"]
    baseline, candidate = usable(baseline, "baseline", notes), usable(candidate, "candidate", notes)
    if not baseline or not (candidate or diverged):
        raise UsageError("no run is left to judge: " + ("; ".join(notes) or "none was named"))
    verdict = compare_sides(baseline, candidate or baseline, metric, at, alpha, delta, fixed)
    if not candidate:
        verdict = replace(verdict, verdict="worse", difference=None, low=None, high=None, candidate=None, n=0, more=0)
    elif diverged and verdict.verdict in ("better", "no difference"):
        verdict = replace(verdict, verdict="undecided")
    settings = differences([baseline[0], (candidate or diverged)[0]]).drop(columns=["seed"], errors="ignore")
    return replace(verdict, settings=settings.to_dict("list"), notes=notes)


def judge_all(baseline, candidates, alpha=0.05, **options):
    """[Verdict] of several lists of candidate runs; any of them is false with probability alpha at most (Holm)."""
    levels = holm([judge(baseline, runs, alpha=alpha, **options).p for runs in candidates], alpha)
    return [judge(baseline, runs, alpha=level, **options) for runs, level in zip(candidates, levels)]


def verified(verdict, runs):
    """The verdict, but undecided instead of better if `runlog verify` contradicts one of the runs that it rests on."""
    found = (verify_by_replay(run.run_dir.resolve()) for run in runs if verdict.verdict == "better")
    wrong = next(filter(None, found), "")
    notes = [*verdict.notes, f"verify contradicts it: {wrong}"]
    return replace(verdict, verdict="undecided", contradicted=True, notes=notes) if wrong else verdict


def usable(runs, side, notes):
    """The runs that can be averaged; what is wrong with the others, or cannot be verified, is appended to `notes`."""
    kept = []
    for run in runs:
        if run.status in ("running", "stale", "preempted", "failed", "diverged"):
            notes.append(f"{side} {run.name} is left out: its status is {run.status}")
        elif wrong := contradictions(run):
            notes.append(f"{side} {run.name} is left out: it contradicts its record ({wrong[0]})")
        else:
            kept.append(run)
    unproved = [r.name for r in kept if "metrics_file_sha256" not in r.result or not (r.run_dir / "ckpt").exists()]
    if unproved:
        notes.append(f"{side} without weights or checksum, so not verified by a replay: {', '.join(unproved)}")
    return kept


# --- figures by seed, or by item of HellaSwag


def compare_sides(baseline, candidate, metric, at, alpha, delta, fixed):
    """The test on the figures of both sides -> Verdict.

    Of HellaSwag runs the items are the pairs, all of them at one look, and the p-value is that of McNemar's exact test.
    """
    items = all(run.kind == "hellaswag" for run in [*baseline, *candidate])
    metric, where, a, b = (answers if items else outcomes)(baseline, candidate, metric, at)
    noise = float(np.std([*a.values()], ddof=1)) if len(a) > 1 and not items else None
    delta = noise if delta is None else delta
    shared = [key for key in a if key in b]
    paired = len(shared) >= min(2, len(b))
    if paired:
        a, b = {key: a[key] for key in shared}, {key: b[key] for key in shared}
    sample, fixed = Sample.of([*a.values()], [*b.values()], paired), fixed or items
    low, high = sample.interval(alpha, fixed)
    verdict, p = decide(low, high, delta, higher=metric.split()[-1] in HIGHER_IS_BETTER), sample.p_value(fixed)
    if items:
        same, gained, lost = a == b, sum(b[i] > a[i] for i in shared), sum(b[i] < a[i] for i in shared)
        p = 1.0 if same else float(stats.binomtest(gained, gained + lost).pvalue)
        verdict = "undecided" if p > alpha and verdict != "no difference" else verdict
    else:
        rows = [
            {run.settings.get("seed"): untimed(run.metrics) or run.result for run in s} for s in (baseline, candidate)
        ]
        same = paired and all(rows[0][seed] == rows[1][seed] for seed in shared)
    if same:
        verdict, low, high = "no difference", 0.0, 0.0
    more = 0 if verdict != "undecided" else None if items else sample.more(alpha, fixed, delta)
    low, high = (bound if math.isfinite(bound) else None for bound in (low, high))
    return Verdict(
        verdict, metric, where, sample.mean, low, high, p, sample.n, paired, noise, delta, more, alpha=alpha,
        baseline=float(np.mean([*a.values()])), candidate=float(np.mean([*b.values()])),
        values={} if items else {"baseline": a, "candidate": b},
    )  # fmt: skip


def outcomes(baseline, candidate, metric, at):
    """One figure a seed, read from rows where all runs have arrived -> (metric's name, place, {seed: figure} twice)."""
    kinds, runs = ["val"], [*baseline, *candidate]
    if metric:
        kinds = dict.fromkeys(["val", "hellaswag", *(row["kind"] for run in runs for row in run.metrics)])
    elif len({run.settings.get("tokenizer_sha256") for run in runs}) > 1:
        metric = "bits_per_byte"
    else:
        metric = "loss"
    for kind in kinds:
        curves = [run.curve(kind, metric, at) for run in runs]
        if all(len(xs) for xs, _ in curves):
            end = min(xs[-1] for xs, _ in curves)
            if late := [run.name for run, (xs, _) in zip(runs, curves) if xs[0] > end]:
                raise UsageError(f"{late[0]} has no {kind} {metric} before {at} {end:,.6g}, where another run ends")
            metric, where = f"{kind} {metric}", f"{at} {end:,.6g}"
            values = [np.interp(end, xs, ys) for xs, ys in curves]
            break
    else:
        where, values = "the end", [run.result.get(metric) for run in runs]
        if not all(isinstance(value, int | float) for value in values):
            fields = sorted({k for r in runs for row in [*r.metrics, r.result] for k in row})
            raise UsageError(f"not all of these runs record {metric}; fields: {', '.join(fields)}")
    return metric, where, by_seed(baseline, values), by_seed(candidate, values[len(baseline) :])


def by_seed(runs, values):
    """{seed: mean of its values}; a run repeated with the same seed is no new information."""
    groups = {}
    for run, value in zip(runs, values):
        groups.setdefault(run.settings.get("seed"), []).append(value)
    return {seed: float(np.mean(group)) for seed, group in groups.items()}


def answers(baseline, candidate, metric, at):
    """The items that both HellaSwag runs answered -> (metric's name, place, {item: answered rightly} twice)."""
    if len(baseline) > 1 or len(candidate) > 1:
        raise UsageError("HellaSwag's items are compared between one baseline run and one candidate run")
    metric, sides = metric or "acc_norm", []
    for run in (*baseline, *candidate):
        path = next(iter(sorted(run.run_dir.glob("hellaswag.jsonl*"))), None)
        rows = [row for _, row in read_jsonl(path)] if path else []
        if not rows or any(metric not in row for row in rows):
            raise UsageError(f"{run.run_dir} has no hellaswag.jsonl with answers by {metric} (acc, acc_norm, acc_char)")
        sides.append({row["item"]: int(row[metric] == row["label"]) for row in rows})
    a, b = ({item: side[item] for item in sides[0] if item in sides[1]} for side in sides)
    if not a:
        raise UsageError(f"{baseline[0].name} and {candidate[0].name} have no items in common")
    return f"hellaswag {metric}", f"{len(a):,} items", a, b


@dataclass
class Sample:
    """Differences between candidate and baseline, reduced to what the tests need."""

    mean: float
    sd: float  # of one difference, or pooled of one run
    n: int
    size: float  # the variance of `mean` is sd² / size
    df: int  # degrees of freedom of sd
    paired: bool

    @classmethod
    def of(cls, a, b, paired):
        """The figures of baseline and candidate, in the same order of seeds if paired."""
        x, y = np.array(a), np.array(b)
        if paired:
            n, size, df, squares = len(x), len(x), len(x) - 1, np.square(y - x - (y - x).mean()).sum()
        else:
            n, size, df = min(len(x), len(y)), len(x) * len(y) / (len(x) + len(y)), len(x) + len(y) - 2
            squares = np.square(x - x.mean()).sum() + np.square(y - y.mean()).sum()
        return cls((y.mean() - x.mean()).item(), math.sqrt(squares / df) if df else 0.0, n, size, df, paired)

    def interval(self, alpha, fixed=False):
        """(low, high) for the mean difference, unbounded where the spread is not known."""
        if self.sd == 0:
            return -math.inf, math.inf
        t = stats.t.ppf(1 - alpha / 2, self.df) if fixed else critical_t(self.size, self.df, alpha)
        half = t * self.sd / math.sqrt(self.size)
        return self.mean - half, self.mean + half

    def p_value(self, fixed=False):
        """Of the hypothesis that the mean difference is 0: valid at every look, or (fixed) at the only one."""
        if self.sd == 0:
            return 1.0
        t2 = self.mean**2 * self.size / self.sd**2
        if fixed:
            return float(2 * stats.t.sf(math.sqrt(t2), self.df))
        widening = 1 + self.size * PRIOR_VARIANCE
        ratio = (self.df + t2 / widening) / (self.df + t2)
        return float(min(1.0, math.sqrt(widening) * ratio ** ((self.df + 1) / 2)))

    def more(self, alpha, fixed, delta):
        """Seeds to add (to both sides) until this mean and spread would decide; None: more than MOST_SEEDS."""
        if self.sd == 0:
            return None
        for n in range(self.n + 1, MOST_SEEDS + 1):
            size, df = (n, n - 1) if self.paired else (n / 2, 2 * n - 2)
            low, high = Sample(self.mean, self.sd, n, size, df, self.paired).interval(alpha, fixed)
            if decide(low, high, delta) != "undecided":
                return n - self.n
        return None


def critical_t(size, df, alpha):
    """How many standard errors around the mean an interval reaches that holds at every sample size at once.

    The t test as a mixture sequential probability ratio test: under the likelihood ratio that averages the standardized
    mean over N(0, PRIOR_VARIANCE), with the scale's right Haar prior, sample sizes may depend on the data (Lai 1976;
    Hendriksen, de Heide and Grünwald 2021, "Optional stopping with Bayes factors"; Wang and Ramdas 2025, "Anytime-valid
    t-tests and confidence sequences for Gaussian means with unknown variance"). By Ville's inequality it exceeds
    1 / alpha with probability alpha at most. Solved for t; infinite where so few runs can never decide.
    """
    widening = 1 + size * PRIOR_VARIANCE
    bound = (widening / alpha**2) ** (1 / (df + 1))
    return math.sqrt(df * (bound - 1) / (1 - bound / widening)) if bound < widening else math.inf


def decide(low, high, delta, higher=False):
    """An interval of the difference -> verdict."""
    if low > 0 or high < 0:
        return "better" if (low > 0) == higher else "worse"
    return "no difference" if delta is not None and -delta < low and high < delta else "undecided"


def holm(p_values, alpha):
    """Levels at which to judge several candidates, so that any false verdict has probability alpha (Holm 1979)."""
    levels, rejected = [0.0] * len(p_values), 0
    for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        levels[i] = alpha / (len(p_values) - rejected)
        rejected += p_values[i] <= levels[i]
    return levels


# --- for people


def describe(v):
    """A Verdict in lines of text."""
    of_items = v.at.endswith(" items")
    lines = [f"{v.verdict}: {v.metric} at {v.at}, baseline {number(v.baseline)}"]
    if v.difference is not None:
        low, high = ("unbounded" if bound is None else f"{bound:+.4f}" for bound in (v.low, v.high))
        unit = "pairs of runs with the same seed" if v.paired else "seeds on either side, not paired"
        lines[0] += f", candidate {number(v.candidate)}"
        lines.append(f"difference {v.difference:+.4f}, {1 - v.alpha:.4g} interval {low} … {high}, p = {v.p:.2g}")
        lines.append(v.at if of_items else f"{v.n:,} {unit}")
    if v.noise is not None:
        source = "the noise" if v.delta == v.noise else "given"
        lines.append(f"noise of the baseline over seeds {v.noise:.4f}; delta {v.delta:.4f} ({source})")
    if v.verdict == "undecided" and v.delta is None and not of_items:
        lines.append("one seed of the baseline does not tell the noise; add seeds, or say with --delta what counts")
    if v.more or (v.more is None and v.low is not None and not of_items):
        more = f"about {v.more} more" if v.more else f"more than {MOST_SEEDS:,}"
        lines.append(f"with this mean and spread, a decision takes {more} seeds")
    lines += [f"differs: {name} {old} -> {new}" for name, (old, new) in v.settings.items()]
    return "\n".join([*lines, *v.notes])


def draw_verdicts(out, verdicts, title=""):
    """A picture of {name: Verdict}: each difference with its interval, the band of delta around 0."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.2, 1.4 + 0.32 * len(verdicts)), dpi=130, layout="constrained")
    ax = fig.subplots()
    for y, v in enumerate(verdicts.values()):
        if v.low is None:
            ax.axhline(y, color=COLORS[v.verdict], lw=2, ls=":")  # unbounded
        else:
            ax.plot([v.low, v.high], [y, y], color=COLORS[v.verdict], lw=2)
        if v.difference is not None:
            ax.plot(v.difference, y, "o", ms=5, color=COLORS[v.verdict])
        ax.annotate(f"{v.verdict}, n = {v.n}", (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    delta = next((v.delta for v in verdicts.values() if v.delta is not None), 0.0)
    ax.axvspan(-delta, delta, color="#dddddd", zorder=0, label=f"±delta {delta:.4f}")
    ax.axvline(0, color="#444444", lw=1)
    metric = next(iter(verdicts.values())).metric
    ax.set(yticks=range(len(verdicts)), yticklabels=verdicts, xlabel=f"{metric}, candidate minus baseline")
    ax.set_title(title, loc="left")
    ax.invert_yaxis()
    ax.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    with atomic_open(out, "wb") as f:
        fig.savefig(f, format="png")
