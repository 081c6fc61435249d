import jax.numpy as jnp
import numpy as np
import pytest

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
    """A failed checker leaves the baseline of its group to the others, and gets no gradient."""
    valid = np.ones(16, bool)
    valid[[1, 2]] = False
    rewards = REWARDS.copy()
    rewards[1] = np.nan
    advantages = np.asarray(centered(rewards, GROUPS, valid))
    np.testing.assert_allclose(advantages[:4], 0.0)  # the two that are left are both right
    np.testing.assert_allclose(advantages[4:], EXPECTED[4:])


def test_singleton_and_empty_groups():
    advantages = centered(jnp.array([1.0, 0.5]), jnp.array([0, 1]), jnp.array([True, False]))
    np.testing.assert_allclose(advantages, [0.0, 0.0])
