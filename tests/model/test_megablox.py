"""Gradients of the grouped product with the kernel in interpret mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.model.megablox import ragged_dot


@pytest.mark.parametrize("rows, d, f", [(512, 256, 128), (300, 64, 48)])
def test_gradients_are_those_of_lax(rows, d, f):
    """Groups, one of them empty and one that crosses a tile, and rows after the last group."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    sizes = jnp.array([3, 0, 257, 30], jnp.int32)
    x, w, g = draw(rows, d), draw(4, d, f), draw(rows, f)
    g = jnp.where((jnp.arange(rows) < sizes.sum())[:, None], g, 0)  # as `grouped_matmul` masks
    y, pull = jax.vjp(lambda x, w: ragged_dot(x, w, sizes, True), x, w)
    expected, pull_lax = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
    np.testing.assert_array_equal(y, expected)
    for ours, theirs in zip(pull(g), pull_lax(g), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not np.any(pull(g)[1][1])  # the empty group
