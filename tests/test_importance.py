import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.importance import clip_masks, importance_weight, log_ratio


@pytest.mark.fast
def test_log_ratio_masks_before_anything_else():
    a = jnp.array([[-1.0, np.nan, 1e4]])
    b = jnp.array([[-1.5, np.inf, -1e4]])
    mask = jnp.array([[True, False, False]])
    np.testing.assert_array_equal(log_ratio(a, b, mask), [[0.5, 0.0, 0.0]])
    gradient = jax.grad(lambda x: jnp.exp(log_ratio(x, b, mask)).sum())(a)
    np.testing.assert_allclose(gradient, [[math.exp(0.5), 0.0, 0.0]], rtol=1e-6)


def test_weight_is_truncated_above_only():
    log_weight = jnp.array([[math.log(0.1), 0.0, math.log(4.9), math.log(7.0), 1e4]])
    np.testing.assert_allclose(importance_weight(log_weight, 5.0), [[0.1, 1, 4.9, 5, 5]], rtol=1e-6)
    untruncated = importance_weight(log_weight)
    np.testing.assert_allclose(untruncated[0, 3], 7.0, rtol=1e-6)
    assert np.isfinite(untruncated).all()


def test_weight_carries_no_gradient():
    gradient = jax.grad(lambda x: importance_weight(x, 5.0).sum())(jnp.array([[0.1, 3.0]]))
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.fast
def test_clip_bounds_are_relative_to_one_and_one_sided():
    """1.27 and 0.8, with a margin on either side, for both signs of the advantage."""
    ratios = jnp.array([[1.269, 1.271, 0.801, 0.799]])
    mask = jnp.ones((1, 4), bool)
    high, low = clip_masks(jnp.log(ratios), jnp.array([[1.0]]), mask, 0.2, 0.27)
    np.testing.assert_array_equal(high, [[False, True, False, False]])
    assert not low.any()
    high, low = clip_masks(jnp.log(ratios), jnp.array([[-1.0]]), mask, 0.2, 0.27)
    np.testing.assert_array_equal(low, [[False, False, False, True]])
    assert not high.any()
    for masks in clip_masks(jnp.log(ratios), jnp.array([[0.0]]), mask, 0.2, 0.27):
        assert not masks.any()
