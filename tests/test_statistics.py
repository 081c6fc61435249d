import dataclasses
import itertools

import numpy as np
import pytest

from jaxrl_stable import statistics


@pytest.mark.fast
def test_hand_computed_values():
    correct = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    assert statistics.avg_at_k(correct).value == pytest.approx((0.25 + 0.5 + 0 + 1) / 4)
    # 1 − C(3,2)/C(4,2) = 1/2; 1 − C(2,2)/C(4,2) = 5/6; 0; 1.
    assert statistics.pass_at_k(correct, 2).value == pytest.approx((1 / 2 + 5 / 6 + 0 + 1) / 4)


@pytest.mark.fast
@pytest.mark.parametrize("n", [1, 3, 6])
def test_pass_at_k_equals_enumeration_of_all_subsets(n):
    correct = np.array(list(itertools.product([0, 1], repeat=n)), bool)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        expected = np.mean([[row[list(s)].any() for s in subsets] for row in correct])
        assert statistics.pass_at_k(correct, k).value == pytest.approx(expected, abs=1e-12)


def test_pass_at_1_is_the_average_and_pass_at_n_is_any():
    correct = np.random.default_rng(0).random((40, 8)) < 0.3
    assert statistics.pass_at_k(correct, 1).value == pytest.approx(
        statistics.avg_at_k(correct).value
    )
    assert statistics.pass_at_k(correct, 8).value == pytest.approx(correct.any(axis=1).mean())


def test_pass_at_k_is_stable_for_many_samples():
    correct = np.zeros((1, 20_000), bool)
    correct[0, 0] = True  # C(20000, 5000) overflows a float; the answer is k/n.
    assert statistics.pass_at_k(correct, 5_000).value == pytest.approx(0.25)


def test_interval_matches_a_plain_bootstrap_over_problems():
    correct = np.random.default_rng(1).random((50, 4)) < 0.6
    estimate = statistics.avg_at_k(correct)
    index = np.random.default_rng(2).integers(0, 50, (20_000, 50))
    low, high = np.quantile(correct.mean(axis=1)[index].mean(axis=1), (0.025, 0.975))
    assert estimate.low == pytest.approx(low, abs=0.01)
    assert estimate.high == pytest.approx(high, abs=0.01)
    assert estimate == statistics.avg_at_k(correct), "the seed fixes the interval"


def test_interval_covers_the_truth_and_counts_problems_not_samples():
    rng = np.random.default_rng(3)
    covered = []
    widths = []
    for _ in range(150):
        difficulty = rng.beta(0.5, 0.5, 60)  # mean 0.5, most problems nearly always right or wrong
        estimate = statistics.avg_at_k(rng.random((60, 16)) < difficulty[:, None])
        covered.append(estimate.low <= 0.5 <= estimate.high)
        widths.append(estimate.high - estimate.low)
    assert 0.88 <= np.mean(covered) <= 0.99
    # Counting 960 samples as independent would give 2 · 1.96 · 0.5 / √960 = 0.063.
    assert np.mean(widths) > 0.15


def test_gain_is_paired():
    rng = np.random.default_rng(4)
    difficulty = np.linspace(0, 0.9, 60)[:, None]
    before = np.broadcast_to(difficulty, (60, 2))
    after = before + 0.05 + rng.normal(0, 0.01, (60, 2))
    estimate = statistics.gain(before, after)
    assert estimate.value == pytest.approx(0.05, abs=0.01)
    assert estimate.high - estimate.low < 0.01 < statistics.avg_at_k(before).high - 0.45


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics.pass_at_k(np.ones((2, 3)), 4), "k=4 with 3 samples"),
        (lambda: statistics.pass_at_k(np.ones((2, 3)), 0), "k=0 with 3 samples"),
        (lambda: statistics.pass_at_k(np.full((2, 3), 0.5), 1), "0 or 1"),
        (lambda: statistics.avg_at_k(np.ones(3)), r"shape \(3,\)"),
        (lambda: statistics.avg_at_k(np.zeros((0, 3))), "not empty"),
        (lambda: statistics.avg_at_k(np.array([[np.nan]])), "all NaN"),
        (lambda: statistics.avg_at_k(np.array([[1.0, np.inf]])), "infinite"),
        (lambda: statistics.gain([[1.0], [np.nan]], [[np.nan], [1.0]]), "both before and after"),
        (lambda: statistics.pass_at_k(np.array([[1.0, np.nan]]), 2), "k=2 with 1 samples"),
        (lambda: statistics.gain(np.ones((2, 1)), np.ones((3, 1))), "2 problems before, 3 after"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.fast
def test_interval_over_seeds_is_students():
    """With one degree of freedom: 12.706 standard errors (½ here) either side."""
    found = dataclasses.astuple(statistics.mean_over_seeds([1.0, 2.0]))
    np.testing.assert_allclose(found, (1.5, 1.5 - 12.7062 / 2, 1.5 + 12.7062 / 2), rtol=1e-5)
    with pytest.raises(ValueError, match="1 seeds; an interval needs at least 2"):
        statistics.mean_over_seeds([1.0])


@pytest.mark.fast
def test_unknown_scores_are_left_out():
    nan = np.nan
    scores = np.array([[1.0, nan, 0.0], [nan, 1.0, 1.0], [0.0, 0.0, 0.0], [nan, nan, nan]])
    assert statistics.avg_at_k(scores).value == pytest.approx((0.5 + 1 + 0) / 3)
    assert statistics.pass_at_k(scores, 2).value == pytest.approx((1 + 1 + 0) / 3)
    known = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    assert statistics.pass_at_k(scores, 2).value == statistics.pass_at_k(np.array(known), 2).value
    assert statistics.pass_at_k(scores, 3).value == 0  # only the third problem has three
    assert statistics.gain(scores, 1 - scores).value == pytest.approx((0 - 1 + 1) / 3)
