import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.routing import Routing, expert_dtype, overlap, shift, validate


def routing(layers=2, b=2, t=3, k=2, num_experts=8):
    order = np.argsort(np.random.default_rng(0).random((layers, b, t, num_experts)), axis=-1)
    experts = jnp.asarray(order[..., :k], expert_dtype(num_experts))
    return Routing(experts, jnp.ones((b, t), bool))


@pytest.mark.fast
def test_overlap_by_hand():
    a = jnp.array([[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [7, 1, 0, 5]], jnp.uint8)
    b = jnp.array([[3, 2, 1, 0], [4, 5, 6, 7], [0, 9, 8, 3], [1, 2, 3, 4]], jnp.uint8)
    np.testing.assert_array_equal(overlap(a, b), [1, 0, 0.5, 0.25])
    np.testing.assert_array_equal(overlap(b, a), overlap(a, b))


def test_dtype_of_experts():
    # 256 experts use every value of uint8: there is no room for a sentinel, and none is needed.
    assert expert_dtype(256) == jnp.uint8
    assert expert_dtype(257) == jnp.uint16
    assert expert_dtype(512) == jnp.uint16
    experts = jnp.array([[[[255, 254]]]], expert_dtype(256))
    validate(Routing(experts, jnp.ones((1, 1), bool)), 1, 256)


def test_shift_moves_positions_and_nothing_else():
    one = routing()
    moved = shift(one, 1)
    np.testing.assert_array_equal(moved.experts[:, :, 1:], one.experts[:, :, :-1])
    np.testing.assert_array_equal(moved.experts[:, :, 0], one.experts[:, :, -1])
    np.testing.assert_array_equal(moved.valid, one.valid)


def test_routing_is_a_pytree_of_its_arrays():
    one = routing()
    halved = jax.tree.map(lambda a: a, one)
    assert isinstance(halved, Routing) and len(jax.tree.leaves(one)) == 2


def test_a_good_routing_passes():
    validate(routing(), 2, 8)


@pytest.mark.parametrize("shape", [(2, 2, 4, 2), (2, 3, 3, 2), (2, 2, 3)], ids=str)
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"shape.*\[L, B, T, K\]"):
        validate(dataclasses.replace(routing(), experts=jnp.zeros(shape, jnp.uint8)), 2, 8)


def test_rows_of_dense_layers_are_refused():
    with pytest.raises(ValueError, match="has 3 layers but the model has 2 MoE layers"):
        validate(routing(layers=3), 2, 8)


@pytest.mark.parametrize(("dtype", "num_experts"), [(jnp.int32, 8), (jnp.uint8, 300)])
def test_wrong_dtypes_are_refused(dtype, num_experts):
    one = routing()
    one = dataclasses.replace(one, experts=one.experts.astype(dtype))
    with pytest.raises(ValueError, match="must be uint"):
        validate(one, 2, num_experts)


def test_experts_out_of_range_are_refused():
    one = routing()
    bad = dataclasses.replace(one, experts=one.experts.at[1, 0, 2, 1].set(255))  # a stored −1
    with pytest.raises(ValueError, match="names expert 255; the model has 8"):
        validate(bad, 2, 8)


def test_an_expert_twice_is_refused_with_its_place():
    one = routing()
    bad = dataclasses.replace(one, experts=one.experts.at[1, 0, 2].set(5))
    with pytest.raises(ValueError, match="twice at layer 1, row 0, position 2"):
        validate(bad, 2, 8)


def test_rows_without_a_choice_are_not_checked():
    one = routing()
    padded = Routing(one.experts.at[:, 1, 2].set(255), one.valid.at[1, 2].set(False))
    validate(padded, 2, 8)
    # The reported place skips rows without a choice.
    bad = dataclasses.replace(padded, valid=padded.valid.at[0, 0].set(False))
    bad = dataclasses.replace(bad, experts=bad.experts.at[0, 1, 1].set(3))
    with pytest.raises(ValueError, match="twice at layer 0, row 1, position 1"):
        validate(bad, 2, 8)
    validate(Routing(one.experts, jnp.zeros_like(one.valid)), 2, 8)
