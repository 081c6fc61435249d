import dataclasses
import itertools
import math

import numpy as np
import pytest
import scipy.stats

from jaxrl_stable.statistics import bootstrap_band
from jaxrl_stable.study.config import Collapse
from jaxrl_stable.study.results import analysis, comparison, survival
from jaxrl_stable.study.results.analysis import collapse, outcome
from tests.study.results.study_records import cell, record

RULE = Collapse(score_share=0.5, margin=0.1, gain=0.05, kl_limit=0.5, for_steps=30)


def made(reward=None, kl=None, score=None, step=10):
    """Returns a record of handwritten curves, with one value every `step` gradient steps."""
    curves = {k: v for k, v in (("reward", reward), ("kl", kl)) if v is not None}
    count = max(map(len, curves.values()), default=0)
    return {
        "cell": "a",
        "seed": 0,
        "settings": {},
        "curves": {"gradient_steps": [step * i for i in range(count)], **curves},
        "evaluations": {
            "gradient_steps": [step * i for i in range(len(score or ()))],
            "score": score or [],
        },
    }


def when(rule=RULE, **curves):
    return collapse(made(**curves), rule)


@pytest.mark.fast
def test_a_state_has_to_last():
    def first(bad, for_steps=30):
        marks = np.array([mark == "x" for mark in bad])
        return analysis.first_lasting(10.0 * np.arange(len(bad)), marks, for_steps)

    assert first("..xxx...") == math.inf, "20 steps"
    assert first("..xxxx..") == 20, "30 steps"
    assert first("x.xxxxxx") == 20
    assert first("......xx") == 60, "to the end, with two points"
    assert first(".......x") == math.inf
    assert first("........") == first("") == math.inf
    assert first("..x.x...", for_steps=0) == math.inf, "one point is none"


@pytest.mark.fast
def test_collapse_is_the_first_step_below_half_of_the_peak():
    # Under means of three 0.4 is not *below* half, and 0.39 at step 60 is.
    assert when(score=[0.8] * 5 + [0.4] * 5)[0] == math.inf
    assert when(score=[0.8] * 5 + [0.4] * 2 + [0.37] * 4) == (60, "score")
    # The peak is the highest earlier value, not of all: a late start is not a collapse.
    assert when(score=[0.3] * 6 + [0.9] * 6)[0] == math.inf


@pytest.mark.fast
def test_losing_a_cold_start_is_a_collapse_and_noise_is_none():
    assert when(score=[0.3] * 3 + [0.0] * 5) == (30, "score")  # (0.3 + 0 + 0) / 3 < 0.15
    assert when(score=[0.1] * 3 + [0.04] * 5)[0] == math.inf, "less than the margin"
    never = outcome(made(score=[0.1, 0.1, 0.14, 0.05, 0.05, 0.05]), RULE)
    assert (never.state, never.collapsed, never.time) == ("not learned", False, 50)
    assert outcome(made(score=[0.1, 0.1, 0.2, 0.2, 0.2, 0.2]), RULE).state == "stable"


def test_noise_alone_is_neither_learning_nor_collapse():
    """Samples evaluations of 256 problems at a constant accuracy, with the rule's own limits."""
    rng = np.random.default_rng(0)
    for accuracy in (0.1, 0.5):
        scores = rng.binomial(256, accuracy, (200, 33)) / 256
        states = [outcome(made(score=row.tolist(), step=8), Collapse()).state for row in scores]
        assert states.count("collapsed") == 0
        assert states.count("not learned") >= 180


@pytest.mark.fast
def test_kl_and_values_that_are_not_finite():
    assert when(kl=[0.1] * 5 + [0.6] * 5) == (50, "KL")
    assert when(kl=[0.1] * 5 + [0.6] * 3 + [0.1])[0] == math.inf
    assert when(kl=[0.1] * 5 + [None] * 5) == (50, "KL")
    assert when(kl=[None] * 5 + [0.1] * 5)[0] == math.inf, "not recorded yet"
    assert when(reward=[0.5] * 10 + [None] * 10) == (100, "reward")
    # The earliest of all causes counts.
    assert when(kl=[0.1] * 5 + [0.6] * 5, score=[0.8] * 3 + [0.0] * 6) == (30, "score")


@pytest.mark.fast
def test_a_censored_run_has_not_collapsed_and_the_reward_is_smoothed():
    noisy = np.full(60, 0.8)
    noisy[::7] = 0.1
    censored = outcome(made(reward=noisy.tolist()), RULE)
    assert (censored.collapsed, censored.time, censored.end) == (False, 590, 590)
    fallen = outcome(made(reward=[0.8] * 30 + [0.15] * 30), RULE)
    assert fallen.cause == "reward"
    # Under a mean of five: (0.8 · 2 + 0.15 · 3) / 5 = 0.41 at step 300, 0.28 at 310.
    assert fallen.time == 310


@pytest.mark.fast
def test_outcomes_by_hand():
    run = made(
        score=[0.1, 0.2, 0.6, 0.7, None, 0.5, 0.4, 0.6],
        kl=[0.1, 0.001, 0.01, 0.01],
        reward=[0, 0, 0, 1.0],
    )
    run["seconds"] = 3
    found = outcome(run, dataclasses.replace(RULE, for_steps=100))
    assert found.final == pytest.approx(0.5)  # last 2 of 8
    assert found.peak == pytest.approx((0.2 + 0.6 + 0.7) / 3)
    # Trapezoids of width 10, the null as 0: (0.35 + 0.2 + 0.6 + 0.7 + 0 + 0.5 + 0.4) · 10 / 70.
    assert found.area == pytest.approx(2.75 / 7)
    assert found.kl == pytest.approx((-1 - 3 - 2 - 2) / 4)
    assert found.reward == 1
    assert math.isnan(found.entropy)
    assert found.seconds == 3


@pytest.mark.fast
def test_cells_keep_their_order_and_align_on_gradient_steps():
    rows = [*reversed(cell("b", 3)), record("a", steps=80, every=16), record("a", 1, steps=160)]
    b, a = analysis.cells_of(rows)
    assert [run["seed"] for run in b.runs] == [0, 1, 2]
    x, values = analysis.aligned(a.runs, "kl")
    np.testing.assert_array_equal(x, np.arange(0, 161, 8))
    np.testing.assert_array_equal(np.isfinite(values[0]), (x % 16 == 0) & (x <= 80))
    assert np.isfinite(values[1]).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"cell": "a"}], "record 1: no curves, evaluations, seed, settings"),
        ([record("a"), record("a")], "seed 0 twice"),
        ([record("a", clip=True), record("a", 1, clip=False)], "different settings"),
    ],
)
def test_damaged_records_are_named_in_one_line(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        analysis.cells_of(rows)
    assert "\n" not in str(error.value)


def test_steps_and_values_must_be_equally_many():
    run = record("a")
    run["curves"]["kl"].pop()
    with pytest.raises(ValueError, match="50 values of kl at 51 gradient steps"):
        outcome(run, RULE)


@pytest.mark.parametrize(("runs", "least", "most"), [(5, 0.90, 0.97), (12, 0.92, 0.97)])
def test_bands_cover_the_mean(runs, least, most):
    """Points are independent here, so that one call is a thousand trials."""
    values = np.random.default_rng(0).normal(3.0, 1.0, (runs, 1500))
    mean, low, high = bootstrap_band(values)
    np.testing.assert_allclose(mean, values.mean(axis=0))
    assert least <= np.mean((low <= 3) & (high >= 3)) <= most


@pytest.mark.fast
def test_bands_of_few_runs_and_of_gaps():
    values = np.array(
        [[1.0, 1.0, np.nan, np.nan], [3.0, np.nan, np.nan, 4.0], [2.0, 3.0, np.nan, 5]]
    )
    mean, low, high = bootstrap_band(values)
    np.testing.assert_allclose(mean, [2, 2, np.nan, 4.5])
    np.testing.assert_allclose(low, [1, 1, np.nan, 4])
    np.testing.assert_allclose(high, [3, 3, np.nan, 5])
    assert np.isnan(bootstrap_band(values[:1])[1]).all()


@pytest.mark.fast
def test_kaplan_meier_of_freireich_1963():
    """The 6-MP arm of the leukaemia trial, a textbook example (Cox and Oakes 1984)."""
    relapsed = [6, 6, 6, 7, 10, 13, 16, 22, 23]
    censored = [6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
    curve = survival.kaplan_meier(relapsed + censored, [True] * 9 + [False] * 12)
    at = dict(zip(curve.steps, curve.share))
    for weeks, share in ((0, 1), (6, 0.857), (7, 0.807), (13, 0.690), (22, 0.538), (35, 0.448)):
        assert at[weeks] == pytest.approx(share, abs=6e-4)
    # Greenwood at 6 weeks: var S = S² · 3/(21 · 18); on the scale log(−log S).
    s = 18 / 21
    error = math.sqrt(3 / (21 * 18)) / abs(math.log(s))
    low, high = (s ** math.exp(sign * 1.959964 * error) for sign in (1, -1))
    np.testing.assert_allclose((curve.low[1], curve.high[1]), (low, high), rtol=1e-5)


@pytest.mark.fast
def test_survival_at_its_ends():
    none = survival.kaplan_meier([100, 100], [False, False])
    np.testing.assert_array_equal(none.share, [1, 1])
    np.testing.assert_array_equal(none.low, [1, 1])
    every = survival.kaplan_meier([10, 20], [True, True])
    np.testing.assert_allclose(every.share, [1, 0.5, 0])
    assert every.low[-1] == 0
    assert every.high[-1] == every.high[-2] < 1
    runs = [outcome(run, RULE) for run in cell("a", 4, collapse_at=[100, None, None, None])]
    share = survival.share(runs, "collapsed")
    # Clopper–Pearson for 1 of 4: 1 − 0.975^¼, and the root of its upper tail.
    assert (share.value, share.low) == (0.25, pytest.approx(1 - 0.975**0.25))
    assert scipy.stats.binom.cdf(1, 4, share.high) == pytest.approx(0.025)


def test_sign_flips_equal_all_flips_counted():
    rng = np.random.default_rng(0)
    for n in (4, 7):
        first, second = rng.normal(0.4, 1, n), rng.normal(0, 1, n)
        d = first - second
        means = [np.mean(d * s) for s in itertools.product((1, -1), repeat=n)]
        expected = np.mean(np.abs(means) >= abs(d.mean()) - 1e-12)
        assert comparison.sign_flip(first, second) == pytest.approx(expected)
    assert comparison.sign_flip(np.arange(5.0) + 9, np.arange(5.0)) == comparison.paired(
        np.arange(5.0) + 9, np.arange(5.0)
    ).attainable == 1 / 16  # fmt: skip


@pytest.mark.fast
def test_paired_by_hand():
    found = comparison.paired(np.array([3.0, 5.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    # Differences 2, 3, 1: mean 2, sd 1, t = 2√3 with 2 degrees of freedom.
    t = 2 * math.sqrt(3)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(t, 2))
    half = scipy.stats.t.ppf(0.975, 2) / math.sqrt(3)
    assert (found.difference.low, found.difference.high) == pytest.approx((2 - half, 2 + half))
    assert (found.effect, found.superiority, found.attainable) == (2, 1, 0.25)


@pytest.mark.fast
def test_margins_by_hand():
    d = np.array([0.01, -0.01, 0.02, 0.0])
    se = d.std(ddof=1) / 2
    inside = scipy.stats.t.sf((0.05 - d.mean()) / se, 3)  # the mean is above 0: the nearer margin
    assert comparison.paired(d, 0 * d, "equal", 0.05).p == pytest.approx(2 * inside)
    assert comparison.paired(d, 0 * d, "not higher", 0.05).p == pytest.approx(2 * inside)
    far = comparison.paired(d + 0.2, 0 * d, "equal", 0.05)
    assert far.p == pytest.approx(4 * scipy.stats.t.sf((d.mean() + 0.15) / se, 3))
    assert comparison.paired(d + 0.04, 0 * d, "equal", 0.05).p > 0.4


@pytest.mark.fast
def test_equal_differences_have_the_sign_tests_p():
    ones = np.ones(6)
    found = comparison.paired(ones, 0 * ones)
    assert (found.p, math.isnan(found.effect)) == (pytest.approx(2 / 2**6), True)
    same = comparison.paired(ones, ones)
    assert (same.p, same.superiority) == (1, 0.5)
    assert comparison.paired(ones, ones, "equal", 0.05).p == pytest.approx(2 / 2**6)
    with pytest.raises(ValueError, match="two or more finite pairs"):
        comparison.paired(ones[:1], ones[:1])


@pytest.mark.fast
def test_holm_by_hand():
    found = comparison.holm(np.array([0.01, 0.04, 0.03, 0.005, 0.9]))
    np.testing.assert_allclose(found, [0.04, 0.09, 0.09, 0.025, 0.9])
    assert len(comparison.holm(np.array([]))) == 0
