import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import advantages as estimators
from jaxrl_stable.advantages import centered

# Rewards and centred advantages of four groups of four.
REWARDS = np.array([1, 0, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0], np.float32)
EXPECTED = np.array(
    [0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, 0, 0, 0, 0, 0.75, -0.25, -0.25, -0.25], np.float32
)
GROUPS = np.repeat(np.arange(4), 4)


@pytest.mark.fast
def test_golden_values():
    np.testing.assert_allclose(centered(REWARDS, GROUPS), EXPECTED)


def test_rows_of_a_group_need_not_stand_together():
    order = np.random.default_rng(0).permutation(16)
    np.testing.assert_allclose(centered(REWARDS[order], GROUPS[order]), EXPECTED[order])


def test_missing_rewards_are_no_wrong_answers():
    """A failed response is left out of the baseline of its group, and gets no gradient."""
    valid = np.ones(16, bool)
    valid[[1, 2]] = False
    rewards = REWARDS.copy()
    rewards[1] = np.nan
    advantages = np.asarray(centered(rewards, GROUPS, valid))
    np.testing.assert_allclose(advantages[:4], 0.0)  # the two remaining ones are both right
    np.testing.assert_allclose(advantages[4:], EXPECTED[4:])


def test_singleton_and_empty_groups():
    advantages = centered(jnp.array([1.0, 0.5]), jnp.array([0, 1]), jnp.array([True, False]))
    np.testing.assert_allclose(advantages, [0.0, 0.0])


# First response of groups 1 and 4, a wrong one of each: what verl, SkyRL and TRL give for REWARDS.
# verl's whitening counts tokens: six per response there.
SIX = np.full(16, 6)
GOLDEN = {
    "centred": ("centered", {}, (0.5, -0.5, 0.75, -0.25)),
    "verl": ("standardized", {}, (0.866, -0.866, 1.5, -0.5)),
    "trl": ("standardized", {"eps": 1e-4}, (0.8659, -0.8659, 1.4997, -0.4999)),
    "trl_batch": (
        "standardized",
        {"scale": "batch", "eps": 1e-4},
        (0.9757, -0.9757, 1.4636, -0.4879),
    ),
    "rloo": ("leave_one_out", {}, (0.6667, -0.6667, 1.0, -0.3333)),
    "reinforce++": (
        "reinforce_plus_plus",
        {"lengths": SIX},
        (1.504, -1.504, 2.256, -0.752),
    ),
    "gpg": ("gpg", {}, (1.143, -1.143, 1.714, -0.571)),
    "maxrl": ("maxrl", {}, (1.0, -1.0, 3.0, -1.0)),
    "clip filter": ("clip_filter", {}, (1.0, -1.0, 1.5, -0.5)),
}


@pytest.mark.fast
@pytest.mark.parametrize("name, options, expected", GOLDEN.values(), ids=GOLDEN)
def test_golden_values_of_other_systems(name, options, expected):
    actual = np.asarray(getattr(estimators, name)(REWARDS, GROUPS, **options))
    np.testing.assert_allclose(actual[[0, 1, 12, 13]], expected, atol=6e-4)
    np.testing.assert_allclose(actual[4:12], 0.0, atol=1e-6)


# The same estimators, response by response. `groups` has the rewards of the valid responses.


def others_of(group, r):
    rest = list(group)
    rest.remove(r)
    return rest


def plain_standardized(r, group, batch, *, scale="group", ddof=1, eps=1e-6):
    spread = {"group": group, "batch": batch}[scale]
    return (r - np.mean(group)) / (np.std(spread, ddof=ddof) + eps) if len(group) > 1 else 0.0


def plain_leave_one_out(r, group, batch, *, standardize=False, eps=1e-6):
    others = others_of(group, r)
    if not others:
        return 0.0
    spread = np.std(others, ddof=1) if standardize and len(others) > 1 else 0.0
    return (r - np.mean(others)) / (spread + eps if spread > 0 else 1.0)


PLAIN = {
    "centered": lambda r, group, batch: r - np.mean(group),
    "standardized": plain_standardized,
    "leave_one_out": plain_leave_one_out,
    "maxrl": lambda r, group, batch, eps=1e-6: (r - np.mean(group)) / (np.mean(group) + eps),
    "gpg": lambda r, group, batch: (r - np.mean(group)) * len(batch) / sum(x != 0 for x in batch),
}


def plain(name, rewards, groups, valid, **options):
    members = {g: rewards[valid & (groups == g)] for g in groups}
    return np.array(
        [
            PLAIN[name](r, members[g], rewards[valid], **options) if ok else 0.0
            for r, g, ok in zip(rewards, groups, valid)
        ]
    )


def plain_reinforce_plus_plus(rewards, groups, valid, *, lengths=None, baseline=True, eps=1e-8):
    x = plain("centered", rewards, groups, valid) if baseline else rewards
    counts = np.ones(len(x), int) if lengths is None else lengths
    each_token = np.concatenate([[y] * n for y, n, ok in zip(x, counts, valid) if ok])
    whitened = (x - each_token.mean()) / np.sqrt(each_token.var(ddof=1) + eps)
    return np.where(valid, whitened, 0.0)


def plain_clip_filter(rewards, groups, valid, *, cap=3.0):
    members = [rewards[valid & (groups == g)] for g in set(groups[valid])]
    with_spread = sum(np.ptp(group) > 0 for group in members)
    factor = min(cap, len(members) / with_spread) if with_spread else cap
    return factor * plain("centered", rewards, groups, valid)


WHOLE_BATCH = {
    "reinforce_plus_plus": plain_reinforce_plus_plus,
    "clip_filter": plain_clip_filter,
}
LENGTHS = np.random.default_rng(1).integers(1, 30, 16)


@pytest.mark.parametrize(
    "name, options",
    [
        ("centered", {}),
        ("standardized", {}),
        ("standardized", {"scale": "batch", "eps": 1e-4}),
        ("standardized", {"ddof": 0, "eps": 0.1}),
        ("leave_one_out", {}),
        ("leave_one_out", {"standardize": True, "eps": 1e-3}),
        ("reinforce_plus_plus", {}),
        ("reinforce_plus_plus", {"lengths": LENGTHS}),
        ("reinforce_plus_plus", {"baseline": False, "eps": 0.1}),
        ("reinforce_plus_plus", {"baseline": False, "lengths": LENGTHS}),
        ("maxrl", {}),
        ("maxrl", {"eps": 0.1}),
        ("gpg", {}),
        ("clip_filter", {}),
        ("clip_filter", {"cap": 1.2}),
    ],
    ids=str,
)
def test_estimator_equals_plain_numpy(name, options):
    """Groups of different sizes, some of one response, in any order; some rewards are missing."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        groups = rng.integers(0, 5, 16)
        rewards = rng.integers(0, 2, 16) if seed % 2 else rng.choice([0.0, 0.3, 0.5, 1.0], 16)
        valid = np.ones(16, bool) if seed < 3 else rng.random(16) < 0.8
        numpy = WHOLE_BATCH.get(name, functools.partial(plain, name))
        expected = numpy(rewards.astype(float), groups, valid, **options)
        missing = np.where(valid, rewards, np.nan).astype(np.float32)
        actual = np.asarray(getattr(estimators, name)(missing, groups, valid, **options))
        np.testing.assert_allclose(actual, expected, rtol=3e-5, atol=3e-6)
        np.testing.assert_array_equal(actual[~valid], 0.0)


@pytest.mark.parametrize("name", [*PLAIN, *WHOLE_BATCH])
@pytest.mark.parametrize("rewards", [np.zeros(16), np.ones(16)], ids=["all wrong", "all right"])
def test_nothing_to_compare_is_zero(name, rewards):
    """No spread, no non-zero reward, a mean of 0: the quotients must not turn into NaN."""
    groups = np.repeat([0, 1, 2], [1, 6, 9])
    actual = np.asarray(getattr(estimators, name)(rewards.astype(np.float32), groups))
    np.testing.assert_allclose(actual, 0.0, atol=1e-6)
    nobody = getattr(estimators, name)(np.full(16, np.nan, np.float32), groups, np.zeros(16, bool))
    np.testing.assert_array_equal(nobody, 0.0)


@pytest.mark.parametrize("reward", [0.1, 0.3, 0.9, 100.1])
@pytest.mark.parametrize("size", [3, 6, 7, 12])
def test_equal_rewards_have_no_spread(reward, size):
    """Float32 misses their mean by an ulp; division by a spread of "0" must not amplify that."""
    rewards = np.array([reward] * size + [0.0, 1.0] * ((16 - size) // 2) + [0.5] * (size % 2))
    groups = np.where(np.arange(16) < size, 0, 1)
    for name in ("standardized", "leave_one_out"):
        actual = np.asarray(getattr(estimators, name)(rewards.astype(np.float32), groups))
        np.testing.assert_allclose(actual[:size], 0.0, atol=1e-3, err_msg=name)
    # One of two groups is informative: a factor of 2.
    actual = estimators.clip_filter(rewards.astype(np.float32), groups)
    np.testing.assert_allclose(actual[size:], 2 * (rewards[size:] - 0.5), atol=1e-5)
    # The others of the wrong response are equal: the difference is left as it is.
    rewards[size], groups = 0.0, np.where(np.arange(16) <= size, 0, 1)
    actual = estimators.leave_one_out(rewards.astype(np.float32), groups, standardize=True)
    np.testing.assert_allclose(actual[size], -reward, rtol=1e-4)


def test_lengths_matter_to_whitening_alone():
    for name in [*PLAIN, *WHOLE_BATCH]:
        function = getattr(estimators, name)
        same = np.array_equal(function(REWARDS, GROUPS), function(REWARDS, GROUPS, lengths=LENGTHS))
        assert same == (name != "reinforce_plus_plus")


def test_unknown_scale_is_named():
    with pytest.raises(ValueError, match="sequence"):
        estimators.standardized(REWARDS, GROUPS, scale="sequence")
