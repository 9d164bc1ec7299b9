"""`python -m runlog judge`: its intervals against simulation and theory, its verdicts on runs of known figures."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import integrate, stats

from runlog import RunLog, read_run
from runlog.__main__ import main
from runlog.judge import PRIOR_VARIANCE, Sample, critical_t, decide, describe, draw_verdicts, holm, judge


def train(folder, name, seed, loss, status="success", wobble=0.0, steps=(0, 10, 20), **settings):
    """A GPT-2 run whose validation loss falls from loss + 1 at step 0 to `loss` at step 20."""
    run_dir = folder / f"{name}-seed{seed}"
    settings = {"total_batch_size": 64, "flops_per_token": 100, "seed": seed, **settings}
    with RunLog(run_dir, "gpt2", settings) as log:
        for step in steps:
            log.metric(step, "train", loss=loss + wobble, ms=20.0)
            log.metric(step, "val", loss=loss + (1 - step / 20), bits_per_byte=loss / 2)
        log.finish(status, step=steps[-1], val_loss=loss + (1 - steps[-1] / 20))
    return read_run(run_dir)


def arms(folder, a, b, **settings):
    """Baseline and candidate with seeds 1, 2, … and these losses."""
    baseline = [train(folder, "a", seed, loss) for seed, loss in enumerate(a, 1)]
    return baseline, [train(folder, "b", seed, loss, wobble=1e-9, **settings) for seed, loss in enumerate(b, 1)]


@pytest.mark.core
def test_the_same_bits_are_no_difference(tmp_path):
    run = train(tmp_path, "a", 1, 4.0)
    again = train(tmp_path, "again", 1, 4.0)
    verdict = judge([run], [again])
    assert (verdict.verdict, verdict.difference, verdict.low, verdict.high) == ("no difference", 0.0, 0.0, 0.0)


def test_the_same_bits_stay_no_difference_when_the_baseline_has_more_seeds(tmp_path):
    baseline = [train(tmp_path, "a", seed, 4.0 + seed) for seed in (1, 2, 3)]
    assert judge(baseline, [train(tmp_path, "again", 1, 5.0)]).verdict == "no difference"


def test_the_same_figure_from_other_bits_is_not_yet_no_difference(tmp_path):
    verdict = judge([train(tmp_path, "a", 1, 4.0)], [train(tmp_path, "b", 1, 4.0, wobble=0.1)])
    assert verdict.verdict == "undecided" and verdict.low is None


@pytest.mark.core
def test_pairs_decide_what_seeds_alone_do_not(tmp_path):
    a = [4.0, 4.4, 3.7, 4.2, 4.1]
    better = [x - 0.05 + e for x, e in zip(a, (0.001, -0.002, 0.0, 0.002, -0.001))]
    baseline, candidate = arms(tmp_path, a, better, lr=2.0)
    verdict = judge(baseline, candidate)
    assert verdict.verdict == "better" and verdict.paired and verdict.n == 5
    assert verdict.low < -0.05 < verdict.high < 0 and verdict.difference == pytest.approx(-0.05)
    assert verdict.noise == pytest.approx(np.std(a, ddof=1)) and verdict.settings["lr"] == ["-", "2.0"]
    others = [train(tmp_path, "c", seed + 10, loss) for seed, loss in enumerate(better)]
    apart = judge(baseline, others)
    assert apart.verdict == "undecided" and not apart.paired and apart.more > 20
    assert judge(candidate, baseline).verdict == "worse"
    assert judge(baseline, candidate, delta=0.2).verdict == "better"  # what is shown to differ is not called equal
    assert judge(baseline, [candidate[0]]).verdict == "undecided"


def test_less_than_delta_is_no_difference(tmp_path):
    a = [4.0, 4.4, 3.7, 4.2, 4.1, 4.3]
    baseline, candidate = arms(tmp_path, a, [x + e for x, e in zip(a, (0.01, -0.01, 0.02, -0.02, 0.01, -0.01))])
    assert judge(baseline, candidate).verdict == "no difference"
    assert judge(baseline, candidate, delta=0.001).verdict == "undecided"


def test_the_means_are_those_of_the_pairs(tmp_path):
    baseline, candidate = arms(tmp_path, [4.0, 4.2, 9.0], [4.1, 4.3])
    verdict = judge(baseline, candidate)
    assert (verdict.baseline, verdict.candidate) == (pytest.approx(4.1), pytest.approx(4.2))


@pytest.mark.parametrize("at", ["step", "tokens", "seconds", "flops"])
def test_curves_are_read_where_the_shorter_one_ends(tmp_path, at):
    long = train(tmp_path, "long", 1, 4.0)
    short = train(tmp_path, "short", 1, 4.0, steps=(0, 10))
    verdict = judge([long], [short], at=at)
    assert verdict.difference == pytest.approx(0) and verdict.at.startswith(at)
    assert verdict.baseline == pytest.approx(4.5)


def test_runs_that_cannot_be_averaged_are_named(tmp_path):
    baseline, candidate = arms(tmp_path, [4.0, 4.4, 3.7], [3.0, 3.4, 2.7])
    assert judge(baseline, candidate, fixed=True).verdict == "better"
    bad = train(tmp_path, "b", 4, 9.0, status="diverged")
    verdict = judge(baseline, [*candidate, bad], fixed=True)
    assert verdict.verdict == "undecided" and any(
        "b-seed4 is left out: its status is diverged" in note for note in verdict.notes
    )
    assert any("not verified by a replay" in note for note in verdict.notes)
    assert judge(baseline, [bad]).verdict == "worse"
    with (candidate[0].run_dir / "result.json").open("r+", encoding="utf-8") as f:
        result = {**json.load(f), "val_loss": 1.0}
        f.seek(0)
        json.dump(result, f)
        f.truncate()
    verdict = judge(baseline, [read_run(run.run_dir) for run in candidate])
    assert verdict.n == 2 and any("b-seed1 is left out: it contradicts its record" in note for note in verdict.notes)


def test_hellaswag_by_mcnemar(tmp_path):
    rng = np.random.default_rng(0)
    runs = []
    for name, rate in (("a", 0.3), ("b", 0.45)):
        with RunLog(tmp_path / name, "hellaswag", {}) as log:
            rows = [{"item": i, "label": 1, "acc_norm": int(rng.random() < rate)} for i in range(400)]
            (log.run_dir / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
            log.finish("success")
        runs.append((read_run(tmp_path / name), np.array([row["acc_norm"] == row["label"] for row in rows])))
    (a, right_a), (b, right_b) = runs
    verdict = judge([a], [b])
    gained, lost = (right_b & ~right_a).sum(), (right_a & ~right_b).sum()
    assert verdict.p == pytest.approx(2 * stats.binom.cdf(lost, gained + lost, 0.5))
    assert verdict.verdict == "better" and verdict.difference == pytest.approx((gained - lost) / 400)
    assert verdict.low == pytest.approx(
        stats.ttest_rel(right_b.astype(int), right_a.astype(int)).confidence_interval().low
    )
    assert "\n400 items" in describe(verdict) and judge([a], [a]).verdict == "no difference"
    undecided = judge([a], [b], alpha=1e-9)
    assert undecided.verdict == "undecided" and "seed" not in describe(undecided)
    assert judge([a], [b], alpha=1e-9, delta=0.9).verdict == "no difference"


def test_what_is_not_known_of_the_seeds_to_come_is_not_said(tmp_path):
    """The spread of one pair is not known, and more seeds do not mend a run that diverged."""
    baseline, candidate = arms(tmp_path, [4.0, 4.4, 3.7], [3.0, 3.4, 2.7])
    assert "a decision takes" not in describe(judge(baseline, candidate[:1]))
    diverged = train(tmp_path, "b", 4, 9.0, status="diverged")
    assert "a decision takes" not in describe(judge(baseline, [*candidate, diverged], fixed=True))
    assert "a decision takes about" in describe(judge(baseline, candidate, alpha=1e-3))


@pytest.mark.core
def test_the_interval_holds_at_all_looks_at_once():
    """The share of experiments whose interval ever excludes the truth, in 2,000 of them with a look after each seed."""
    rng, alpha, looks = np.random.default_rng(1), 0.1, range(2, 40)
    d = rng.normal(size=(2000, 40))
    ever, student = np.zeros(2000, bool), np.zeros(2000, bool)
    for n in looks:
        t = np.abs(d[:, :n].mean(1)) / d[:, :n].std(1, ddof=1) * math.sqrt(n)
        ever |= t > critical_t(n, n - 1, alpha)
        student |= t > stats.t.ppf(1 - alpha / 2, n - 1)
    assert 0.01 < ever.mean() < alpha < 0.3 < student.mean()


@pytest.mark.parametrize("n", [3, 5, 20])
def test_critical_t_is_where_the_mixture_reaches_its_bound(n):
    """The likelihood ratio of the t statistic by numerical integration over the standardized mean."""
    t, alpha = critical_t(n, n - 1, 0.05), 0.05

    def mixture(effect):
        return stats.nct.pdf(t, n - 1, math.sqrt(n) * effect) * stats.norm.pdf(effect, scale=math.sqrt(PRIOR_VARIANCE))

    ratio = integrate.quad(mixture, -40, 40, limit=500, points=[0, t / math.sqrt(n)])[0] / stats.t.pdf(t, n - 1)
    assert ratio == pytest.approx(1 / alpha, rel=1e-3)


def test_p_value_and_interval_agree():
    for x in (0.5, 1.0, 3.0, 8.0):
        sample = Sample.of([0.0] * 6, [x - 1, x + 1, x, x - 0.5, x + 0.5, x], paired=True)
        for alpha in (0.2, 0.05, 0.01):
            for fixed in (False, True):
                low, high = sample.interval(alpha, fixed)
                assert (low > 0 or high < 0) == (sample.p_value(fixed) < alpha)


def test_a_fixed_number_of_seeds_is_students_t_test():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=7), rng.normal(0.5, size=7)
    for paired, test in ((True, stats.ttest_rel), (False, stats.ttest_ind)):
        sample, found = Sample.of(a, b, paired), test(b, a)
        assert sample.p_value(fixed=True) == pytest.approx(found.pvalue)
        assert sample.interval(0.05, fixed=True) == pytest.approx(tuple(found.confidence_interval(0.95)))


def test_more_is_the_number_that_decides():
    sample = Sample.of([0.0] * 4, [0.3, 0.9, 0.1, 0.8], paired=True)
    n = 4 + sample.more(0.05, False, None)
    bounds = [Sample(sample.mean, sample.sd, k, k, k - 1, True).interval(0.05) for k in (n - 1, n)]
    assert [decide(*b, None) for b in bounds] == ["undecided", "worse"]


def test_holm_is_bonferroni_closed_over_all_subsets():
    rng, everyone = np.random.default_rng(3), range(4)
    subsets = [s for size in (1, 2, 3, 4) for s in itertools.combinations(everyone, size)]
    for _ in range(50):
        p = rng.random(4) ** 3
        closed = [all(min(p[j] for j in s) <= 0.05 / len(s) for s in subsets if i in s) for i in everyone]
        assert [x <= level for x, level in zip(p, holm(p, 0.05))] == closed


def test_the_command(tmp_path, in_process):
    baseline, candidate = arms(tmp_path, [4.0, 4.4, 3.7], [3.9, 4.31, 3.6])
    sides = ["--baseline", *(r.run_dir for r in baseline), "--candidate", *(r.run_dir for r in candidate)]
    code, out, _ = in_process(main, "judge", *sides, "--json")
    shown = json.loads(out)
    assert code == 0 and shown["metric"] == "val loss" and shown["n"] == 3
    assert {"verdict", "difference", "low", "high", "n", "noise", "metric"} <= shown.keys()
    code, out, _ = in_process(main, "judge", *sides, "--metric", "bits_per_byte")
    assert code == 0 and "pairs of runs with the same seed" in out and "val bits_per_byte at step 20" in out
    for wrong, says in (
        (["--metric", "glue"], "record glue; fields:"),
        (["--alpha", "2"], "alpha 2"),
        (["--delta", "-1"], "delta -1"),
    ):
        code, _, err = in_process(main, "judge", *sides, *wrong)
        assert code == 2 and says in err and len(err.strip().splitlines()) == 1
    draw_verdicts(tmp_path / "v.png", {"b": judge(baseline, candidate), "c": judge(baseline, candidate[:1])})
    assert (tmp_path / "v.png").stat().st_size > 5000
