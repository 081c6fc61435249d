import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.routing import (
    Routing,
    expert_dtype,
    from_token_major,
    overlap,
    to_token_major,
    validate,
)
from tests.negative_controls import shift


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
    # 256 experts use every value of uint8: a sentinel does not fit and is not needed.
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
    with pytest.raises(ValueError, match="contains expert 255; the model has 8"):
        validate(bad, 2, 8)


def test_an_expert_twice_is_refused_with_its_place():
    one = routing()
    bad = dataclasses.replace(one, experts=one.experts.at[1, 0, 2].set(5))
    with pytest.raises(ValueError, match="repeats an expert at layer 1, row 0, position 2"):
        validate(bad, 2, 8)


def test_rows_without_a_choice_are_not_checked():
    one = routing()
    padded = Routing(one.experts.at[:, 1, 2].set(255), one.valid.at[1, 2].set(False))
    validate(padded, 2, 8)
    # The reported place skips rows without a choice.
    bad = dataclasses.replace(padded, valid=padded.valid.at[0, 0].set(False))
    bad = dataclasses.replace(bad, experts=bad.experts.at[0, 1, 1].set(3))
    with pytest.raises(ValueError, match="repeats an expert at layer 0, row 1, position 1"):
        validate(bad, 2, 8)
    validate(Routing(one.experts, jnp.zeros_like(one.valid)), 2, 8)


# Row 0: a padding token, then two tokens. Row 1: the last token was sampled, never fed.
TOKEN_MAJOR = np.array(
    [
        [[[-1, -1], [-1, -1]], [[3, 0], [1, 2]], [[5, 7], [6, 4]]],
        [[[2, 4], [0, 7]], [[1, 0], [3, 5]], [[-1, -1], [-1, -1]]],
    ],
    np.int32,
)


@pytest.mark.fast
def test_token_major_layout_by_hand():
    one = from_token_major(TOKEN_MAJOR, 8)
    assert one.experts.shape == (2, 2, 3, 2) and one.experts.dtype == jnp.uint8
    np.testing.assert_array_equal(one.valid, [[False, True, True], [True, True, False]])
    np.testing.assert_array_equal(one.experts[0, 0, 2], [5, 7])  # layer 0, row 0, position 2
    np.testing.assert_array_equal(one.experts[1, 1, 0], [0, 7])  # layer 1, row 1, position 0
    back = to_token_major(one)
    assert back.dtype == jnp.int32
    np.testing.assert_array_equal(back, TOKEN_MAJOR)


def test_token_major_round_trip_keeps_256_experts_apart_from_the_sentinel():
    one = routing(layers=3, b=2, t=4, k=8, num_experts=256)
    one = dataclasses.replace(one, experts=one.experts.at[:, :, :, 0].set(255))
    one = dataclasses.replace(one, experts=one.experts.at[:, :, :, 1:].min(254))
    one = dataclasses.replace(one, valid=one.valid.at[1, 2].set(False))
    major = to_token_major(one)
    assert major.shape == (2, 4, 3, 8)
    assert (major[1, 2] == -1).all() and (major[0, :, :, 0] == 255).all()
    again = from_token_major(major, 256)
    np.testing.assert_array_equal(again.valid, one.valid)
    np.testing.assert_array_equal(again.experts[:, one.valid], one.experts[:, one.valid])


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64, np.int8])
def test_token_major_of_other_widths_and_with_tunix_padding(dtype):
    padded = TOKEN_MAJOR.astype(dtype)
    padded[0, 0] = -2  # not a token
    np.testing.assert_array_equal(to_token_major(from_token_major(padded, 8)), TOKEN_MAJOR)


@pytest.mark.fast
def test_conversions_inside_jit_are_those_outside():
    inside = jax.jit(from_token_major, static_argnums=1)(TOKEN_MAJOR, 8)
    outside = from_token_major(TOKEN_MAJOR, 8)
    jax.tree.map(np.testing.assert_array_equal, inside, outside)
    np.testing.assert_array_equal(jax.jit(to_token_major)(inside), TOKEN_MAJOR)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        ((0, 1, 1), -1, r"row 0, position 1 is incomplete: -1 at layer 1, choice 0.*dense"),
        ((1, 0, 0, 1), -1, r"row 1, position 0 is incomplete: -1 at layer 0, choice 1"),
        ((0, 0, 0, 0), 5, r"row 0, position 0 is incomplete: -1 at layer 0, choice 1"),
        ((1, 1, 0, 0), 8, "contains expert 8; the model has 8"),
        ((1, 1, 0, 0), 259, "contains expert 259"),  # 3 once it is stored in eight bits
        ((0, 2, 1, 1), 6, "repeats an expert at layer 1, row 0, position 2"),
    ],
)
def test_wrong_token_major_values_are_refused_on_the_host(index, value, message):
    wrong = TOKEN_MAJOR.copy()
    wrong[index] = value
    with pytest.raises(ValueError, match=message):
        from_token_major(wrong, 8)
    jax.eval_shape(lambda a: from_token_major(a, 8), wrong)  # values are not known while tracing


@pytest.mark.refusal
@pytest.mark.parametrize(
    "wrong", [TOKEN_MAJOR[0], TOKEN_MAJOR.astype(np.uint8), TOKEN_MAJOR.astype(np.float32)]
)
def test_wrong_token_major_layouts_are_refused_also_when_tracing(wrong):
    for convert in (from_token_major, jax.jit(from_token_major, static_argnums=1)):
        with pytest.raises(ValueError, match=r"\[B, T, L, K\] and a signed integer dtype"):
            convert(wrong, 8)
