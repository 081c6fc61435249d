"""The embedding lookup; on meshes: tests/sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable.model.embedding import lookup
from jaxrl_stable.sharding.layout import ONE_DEVICE


@pytest.mark.fast
def test_gradient_of_a_frequent_token_adds_up_in_float32():
    """A bfloat16 sum would stop at 256, from where 1 is less than half of the spacing."""
    table = jnp.ones((2, 3), jnp.bfloat16)
    tokens = jnp.zeros((4, 1024), jnp.int32)

    def total(table):
        param = nnx.Param(table, axes=("vocab", "embed"), inputs=("embed",))
        return lookup(param, tokens, "bfloat16", ONE_DEVICE).astype(jnp.float32).sum()

    np.testing.assert_array_equal(jax.grad(total)(table)[0], np.full(3, 4096, jnp.bfloat16))
