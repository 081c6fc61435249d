"""What estimators ask of rewards and penalties, and what happens if it does not hold."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxrl_stable import advantages as estimators
from jaxrl_stable.advantages import (
    Conditions,
    check_group_size,
    check_penalty,
    check_rewards,
    compares_groups,
    conditions_of,
    with_conditions,
    with_penalty,
)

NAMES = (
    "centered",
    "standardized",
    "leave_one_out",
    "reinforce_plus_plus",
    "maxrl",
    "gpg",
    "clip_filter",
)
OPTIONS = [
    ("centered", {}),
    ("standardized", {}),
    ("standardized", {"scale": "batch"}),
    ("standardized", {"ddof": 0, "eps": 0.0}),
    ("leave_one_out", {}),
    ("leave_one_out", {"standardize": True}),
    ("reinforce_plus_plus", {}),
    ("reinforce_plus_plus", {"baseline": False}),
    ("maxrl", {}),
    ("gpg", {}),
    ("clip_filter", {}),
]
GROUPS = np.repeat([0, 1], 4)


@pytest.mark.fast
def test_maxrl_is_refused_where_its_mean_is_no_probability():
    """Rewards of ±1: [1, −1, −1, −1] would punish the right answer. Missing ones are not read."""
    rewards = np.array([1, 0, -1, -1], np.float32)
    message = "maxrl needs rewards of at least 0, but response 2 has -1; use advantages.centered"
    for maxrl in (estimators.maxrl, partial(estimators.maxrl, eps=0.1)):
        with pytest.raises(ValueError, match=message):
            check_rewards(maxrl, rewards)
        check_rewards(maxrl, rewards, np.array([True, True, False, False]))
    for name in set(NAMES) - {"maxrl"}:
        check_rewards(getattr(estimators, name), rewards)


@pytest.mark.fast
def test_maxrl_without_a_host_gives_no_wrong_sign():
    """Pure functions cannot raise: a group with a negative reward is NaN, the others are exact."""
    rewards = np.array([1, -1, 0, 0, 1, 0, 0, -1], np.float32)
    valid = np.array([True] * 3 + [False] + [True] * 3 + [False])
    got = jax.jit(estimators.maxrl)(rewards, GROUPS, valid)
    assert np.isnan(got[:3]).all() and got[3] == 0
    np.testing.assert_allclose(got[4:], [2, -1, -1, 0], rtol=1e-5)


@pytest.mark.fast
def test_an_estimator_of_ones_own_declares_its_conditions():
    @with_conditions(lowest=0.0, highest=1.0, instead="my.other")
    def logit(rewards, group_ids, valid=None, lengths=None):
        return rewards

    assert conditions_of(logit) == Conditions(0.0, 1.0, "added", "my.other")
    assert conditions_of(partial(logit)).highest == 1.0
    assert conditions_of(print) == Conditions()
    check_rewards(logit, np.array([0.0, 1.0]))
    with pytest.raises(
        ValueError, match=r"logit needs .* at least 0 and at most 1, .* 1 has 1.5; use my"
    ):
        check_rewards(logit, np.array([0.0, 1.5]))
    with pytest.raises(ValueError, match=r"Conditions\.penalty is 'ignored'; use one of 'added'"):
        with_conditions(penalty="ignored")


SCORES = np.array([0, 0, 0, 0, 1, 0, 0, 0], np.float32)
PENALTY = np.array([-1, 0, -0.5, 0, 0, 0, 0, -1], np.float32)
EVERYONE, LENGTHS = np.ones(8, bool), np.arange(1, 9)


@pytest.mark.fast
def test_a_length_penalty_is_added_for_most():
    def seen(scores, penalty, estimator):
        return with_penalty(estimator, scores, penalty, GROUPS, EVERYONE, LENGTHS)

    rewards = SCORES + PENALTY
    for name in set(NAMES) - {"maxrl", "gpg"}:
        estimator = getattr(estimators, name)
        expected = estimator(rewards, GROUPS, EVERYONE, LENGTHS)
        np.testing.assert_array_equal(seen(SCORES, PENALTY, estimator), expected, err_msg=name)
    expected = estimators.gpg(SCORES, GROUPS, penalty=PENALTY)
    np.testing.assert_array_equal(seen(SCORES, PENALTY, partial(estimators.gpg)), expected)
    expected = estimators.maxrl(SCORES, GROUPS)
    np.testing.assert_array_equal(seen(SCORES, 0 * PENALTY, estimators.maxrl), expected)


@pytest.mark.fast
def test_gpg_counts_right_answers_and_not_punished_wrong_ones():
    """One right answer of eight: a factor of 8. Without one, the punishments are as they are."""
    got = np.asarray(estimators.gpg(SCORES, GROUPS, penalty=PENALTY))
    deviation = np.array([-0.625, 0.375, -0.125, 0.375, 1, 0, 0, -1])
    np.testing.assert_allclose(got, 8 * deviation, rtol=1e-6)
    valid = np.arange(8) != 4
    got = estimators.gpg(np.where(valid, SCORES, np.nan), GROUPS, valid, penalty=PENALTY)
    np.testing.assert_allclose(got[:4], deviation[:4], rtol=1e-6)
    np.testing.assert_allclose(got[4:], [0, 1 / 3, 1 / 3, -2 / 3], rtol=1e-6)


@pytest.mark.fast
@pytest.mark.refusal
def test_a_penalty_of_another_shape():
    with pytest.raises(ValueError, match=r"gpg: arrays must all have shape .* penalty \[3\]"):
        estimators.gpg(SCORES, GROUPS, penalty=PENALTY[:3])


@pytest.mark.fast
def test_maxrl_refuses_a_length_penalty():
    message = (
        r"X.buffer adds a length penalty, but maxrl reads the reward as a score .* set it to 0"
    )
    with pytest.raises(ValueError, match=message):
        check_penalty(partial(estimators.maxrl, eps=0.1), "X.buffer")
    for name in set(NAMES) - {"maxrl"}:
        check_penalty(getattr(estimators, name), "X.buffer")


@pytest.mark.fast
def test_groups_of_one_teach_nothing_if_the_group_is_the_baseline():
    whole = partial(estimators.reinforce_plus_plus, baseline=False)
    for name, options in OPTIONS:
        assert compares_groups(partial(getattr(estimators, name), **options)) == (
            options != {"baseline": False}
        ), name
    message = r"X.size is 1, but centered compares .* use at least 2"
    with pytest.raises(ValueError, match=message):
        check_group_size(estimators.centered, 1, "X.size")
    check_group_size(estimators.centered, 2, "X.size")
    check_group_size(whole, 1, "X.size")


@pytest.mark.fast
def test_trying_an_estimator_respects_its_range_and_an_outer_trace():
    @with_conditions(lowest=-3.0, highest=-1.0)
    def negative(rewards, group_ids, valid, lengths):
        return jax.numpy.where((rewards < -3) | (rewards > -1), 0.0, rewards)

    assert not compares_groups(negative)

    def undefined(rewards, group_ids, valid, lengths):
        return rewards * np.nan

    assert compares_groups(undefined)  # no advantage is no signal
    assert jax.jit(lambda x: x + compares_groups(estimators.centered))(1) == 2


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
@pytest.mark.parametrize("reward", [0.1, 100.1, 1e-3])
def test_rounding_of_the_rewards_is_no_signal(name, options, reward):
    """Rewards that differ by one to three units in the last place of float32 count as equal."""
    step = np.spacing(np.float32(reward))
    rewards = np.float32(reward) + step * np.array([0, 1, 0, 0, 3, 2, 0, 1], np.float32)
    assert len(set(rewards[:4])) == 2
    estimator = partial(getattr(estimators, name), **options)
    np.testing.assert_array_equal(estimator(rewards, GROUPS, lengths=np.full(8, 4_000)), 0.0)
    # A difference that is meant: a thousandth of the reward.
    rewards[0] += 1e-3 * reward
    got = np.asarray(estimator(rewards, GROUPS))
    assert got[0] > 0 and got[0] == got.max(), got


@pytest.mark.fast
def test_a_group_that_differs_by_rounding_has_no_spread():
    """One of two groups is informative, for the factor of clip_filter as for the gradient."""
    rewards = np.array([0.1, np.nextafter(np.float32(0.1), 1), 0.1, 0.1, 1, 0, 0, 0], np.float32)
    got = estimators.clip_filter(rewards, GROUPS)
    np.testing.assert_allclose(got, [0, 0, 0, 0, 1.5, -0.5, -0.5, -0.5])


def random_batch(seed, penalties):
    """Scores of 0, 1 and between in groups of 2 to 8, with DAPO's penalty."""
    rng = np.random.default_rng(seed)
    size = 2 ** (1 + seed % 3)
    groups = np.repeat(np.arange(16 // size), size)
    scores = rng.choice([0.0, 0.0, 0.3, 1.0], 16).astype(np.float32)
    penalty = -rng.choice([0.0, 0.0, 0.4, 1.0], 16).astype(np.float32) * penalties
    return scores, penalty, groups, rng.random(16) < 0.9, rng.integers(1, 30, 16)


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_more_reward_is_never_less_advantage(name, options):
    """Within a group, under the conditions that the estimator declares; and it is bounded."""
    estimator = partial(getattr(estimators, name), **options)
    takes_penalties = conditions_of(estimator).penalty != "refused"
    for seed in range(30):
        batch = scores, penalty, groups, valid, _ = random_batch(seed, takes_penalties)
        check_rewards(estimator, scores, valid)
        got = np.asarray(with_penalty(estimator, *batch))
        total = scores + penalty
        for group in set(groups):
            rows = np.flatnonzero((groups == group) & valid)
            rows = rows[np.argsort(total[rows], kind="stable")]
            # Standardised by the others, an advantage is no function of the reward alone.
            if options != {"standardize": True}:
                assert (np.diff(got[rows]) >= -1e-5 * np.abs(got).max()).all(), seed
            if name != "reinforce_plus_plus":  # it subtracts the batch's mean as well
                above = total[rows] > total[rows].sum() / max(len(rows), 1) + 1e-6
                assert (got[rows][above] > 0).all(), seed
        assert np.abs(got).max() <= 100, seed


@pytest.mark.fast
@pytest.mark.parametrize("gap", [1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.03, 0.1])
def test_leave_one_out_is_bounded_where_the_others_nearly_agree(gap):
    """NeMo-RL#4158: −2,075 from rounding. Below a hundredth of the range the others are equal."""
    rewards = np.array([1, 1 - gap, 1, 0, 1, 0, 1, 0], np.float32)
    got = np.asarray(estimators.leave_one_out(rewards, GROUPS, standardize=True))
    others = rewards[:3].astype(float)
    exact = -others.mean() / (others.std(ddof=1) + 1e-6)
    expected = exact if others.std(ddof=1) > 0.01 else -others.mean()
    np.testing.assert_allclose(got[3], expected, rtol=2e-3)
    assert np.abs(got).max() <= 100
    np.testing.assert_allclose(got[4], 2 / 3 / np.std([0, 1, 0], ddof=1), rtol=1e-4)
    tight = estimators.leave_one_out(rewards, GROUPS, standardize=True, floor=0.5)
    np.testing.assert_allclose(tight[3], -others.mean(), rtol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("size", [3, 8, 64, 1024])
def test_leave_one_out_is_exact_for_rewards_of_0_and_1(size):
    """One right answer in any place of a large group: NeMo RL's formula, floor and all."""
    rewards = np.zeros(size, np.float32)
    rewards[:2] = 1
    got = np.asarray(estimators.leave_one_out(rewards, np.zeros(size, int), standardize=True))
    for i in (0, size - 1):
        others = np.delete(rewards.astype(float), i)
        spread = others.std(ddof=1)
        expected = (rewards[i] - others.mean()) / (spread + 1e-6 if spread > 0 else 1.0)
        np.testing.assert_allclose(got[i], expected, rtol=2e-3)
    with pytest.raises(ValueError, match="leave_one_out: floor is 0; use a share"):
        estimators.leave_one_out(rewards, np.zeros(size, int), standardize=True, floor=0)
