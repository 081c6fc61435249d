"""Routing replay (arXiv:2512.01374, §3; Ma et al., arXiv:2510.11370): identities and controls."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.routing import Routing, validate
from tests.model import reference
from tests.model.common import (
    BATCH,
    MIXED,
    assert_close,
    assert_identical,
    forward,
    loss_weights,
    named,
    optimised,
    random_model,
    random_routing,
    sequences,
    small,
    value_and_grads,
)
from tests.negative_controls import shift

REAL = np.asarray(BATCH.segment_ids != 0)


@pytest.fixture(scope="module")
def model():
    return random_model(MIXED)


@pytest.fixture(scope="module")
def live(model):
    """Runs the ordinary pass."""
    return optimised(model, BATCH, loss_weights(BATCH))


@pytest.fixture(scope="module")
def recorded(live):
    return Routing(live[2].router.experts, jnp.asarray(REAL))


def assert_same_pass(one, other):
    """Checks that values, gradients, hidden states and routers agree bit for bit."""
    assert_identical(one[:2], other[:2])
    np.testing.assert_array_equal(one[2].hidden, other[2].hidden)
    assert_identical(one[2].router, other[2].router)


def test_replay_without_valid_rows_is_the_ordinary_pass(model, live):
    routing = dataclasses.replace(random_routing(MIXED, BATCH), valid=jnp.zeros_like(REAL))
    assert_same_pass(optimised(model, BATCH, loss_weights(BATCH), routing), live)


def test_replay_of_its_own_routing_is_the_ordinary_pass(model, live, recorded):
    assert_same_pass(optimised(model, BATCH, loss_weights(BATCH), recorded), live)


def test_padding_rows_of_the_routing_do_not_matter(model, live, recorded):
    # Whatever an engine leaves there: zeros, 255 (a −1 stored in uint8), the same expert K times.
    for filler in (0, 255):
        experts = jnp.where(REAL[None, :, :, None], recorded.experts, filler).astype(jnp.uint8)
        routing = dataclasses.replace(recorded, experts=experts)
        assert_same_pass(optimised(model, BATCH, loss_weights(BATCH), routing), live)


@pytest.mark.fast
@pytest.mark.parametrize(
    "config",
    [
        MIXED,
        small(mlp_only_layers=(1,)),
        small(decoder_sparse_step=2, num_layers=5),
        small(mlp_only_layers=(2, 5), num_layers=6),
    ],
    ids=["leading_dense", "dense_between", "alternating", "two_of_three"],
)
def test_replayed_experts_equal_the_reference(config):
    model, routing = random_model(config), random_routing(config, BATCH)
    routing = dataclasses.replace(routing, valid=routing.valid & (BATCH.positions % 4 != 2))
    output = forward(model, BATCH, routing)
    for row, seq in enumerate(sequences([9, 6])):
        columns = slice(9 - len(seq), 9)
        forced = np.asarray(routing.experts[:, row, columns]).astype(int)
        forced[:, ~np.asarray(routing.valid[row, columns])] = -1
        hidden, used = reference.forward(config, reference.unstack(model), seq, forced)
        np.testing.assert_allclose(output.hidden[row, columns], hidden, atol=1e-5, rtol=1e-5)
        np.testing.assert_array_equal(output.router.experts[:, row, columns], used)


def distance(model, live, routing):
    hidden = forward(model, BATCH, routing).hidden
    return float(jnp.max(jnp.abs(hidden - live[2].hidden)[REAL]))


@pytest.mark.parametrize("offset", [1, -1])
def test_a_shift_by_one_token_shows(model, live, recorded, offset):
    assert distance(model, live, recorded) < 1e-5
    assert distance(model, live, shift(recorded, offset)) > 1e-2


def test_wrong_layers_show(model, live, recorded):
    swapped = dataclasses.replace(recorded, experts=recorded.experts[::-1])
    assert distance(model, live, swapped) > 1e-2


def test_layers_are_counted_without_the_dense_ones(model, live, recorded):
    # An engine that returns a row for the dense first layer shifts every layer after it.
    dense = jnp.broadcast_to(jnp.arange(3, dtype=jnp.uint8), (1, *REAL.shape, 3))
    aligned_to_depth = jnp.concatenate([dense, recorded.experts])
    with pytest.raises(ValueError, match="leave out dense layers"):
        validate(Routing(aligned_to_depth, recorded.valid), MIXED.num_moe_layers, 7)
    truncated = dataclasses.replace(recorded, experts=aligned_to_depth[:2])
    assert distance(model, live, truncated) > 1e-2


def test_order_of_the_experts_does_not_matter(model, live, recorded):
    reordered = dataclasses.replace(recorded, experts=recorded.experts[..., ::-1])
    assert distance(model, live, reordered) < 1e-5


def test_replay_reaches_only_later_tokens(model, live, recorded):
    # Row t belongs to the input of position t: it shapes hidden states from t on, none before.
    experts = recorded.experts.at[:, 0, 4].set((recorded.experts[:, 0, 4] + 3) % 7)
    hidden = forward(model, BATCH, dataclasses.replace(recorded, experts=experts)).hidden
    change = np.max(np.abs(hidden - live[2].hidden), axis=-1)
    assert np.all(change[0, :4] < 1e-6) and np.all(change[1] < 1e-6)
    assert np.all(change[0, 4:] > 1e-4)


@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("drifted", [False, True], ids=["own", "drifted"])
def test_gradient_of_the_router_equals_finite_differences(norm, drifted, recorded):
    """Compares with differences of the float64 reference along random directions, by layer."""
    config = dataclasses.replace(MIXED, norm_topk_prob=norm)
    model, seqs, weights = random_model(config), sequences([9, 6]), loss_weights(BATCH)
    routing = random_routing(config, BATCH) if drifted else recorded
    _, grads, _ = value_and_grads(model, BATCH, weights, routing)
    router = np.asarray(grads.stacks[1][0].mlp.router.get_value(), np.float64)
    assert all(np.max(np.abs(layer)) > 1e-3 for layer in router)
    parameters = reference.unstack(model)

    def loss():
        total = 0.0
        for row, seq in enumerate(seqs):
            columns = slice(9 - len(seq), 9)
            forced = np.asarray(routing.experts[:, row, columns])
            hidden, _ = reference.forward(config, parameters, seq, forced.astype(int))
            logp, _ = reference.scores(parameters, hidden[:-1], seq[1:])
            total += np.sum(np.asarray(weights[row, columns])[:-1] * logp)
        return total

    rng = np.random.default_rng(0)
    for index, layer in enumerate(parameters["layers"][1:]):
        value, step = layer["router"], 1e-5
        for _ in range(2):
            direction = rng.normal(size=value.shape)
            layer["router"] = value + step * direction
            above = loss()
            layer["router"] = value - step * direction
            slope = (above - loss()) / (2 * step)
            layer["router"] = value
            expected = np.sum(router[index] * direction)
            assert slope == pytest.approx(expected, abs=1e-4 * np.linalg.norm(router[index]))


def test_no_gradient_reaches_experts_that_were_not_replayed(model):
    routing = dataclasses.replace(
        random_routing(MIXED, BATCH),
        experts=jnp.broadcast_to(jnp.array([5, 2, 0], jnp.uint8), (2, *REAL.shape, 3)),
    )
    _, grads, output = value_and_grads(model, BATCH, loss_weights(BATCH), routing)
    mlp = grads.stacks[1][0].mlp
    for weight in (mlp.gate, mlp.up, mlp.down):
        used = np.any(np.asarray(weight.get_value()), axis=(2, 3))
        np.testing.assert_array_equal(used, [[True, False, True, False, False, True, False]] * 2)
    np.testing.assert_array_equal(output.router.load[:, [5, 2, 0]], REAL.sum())
    # Gates normalised over the chosen three depend on no other score.
    router = np.any(np.asarray(mlp.router.get_value()), axis=1)
    np.testing.assert_array_equal(router, used)


def test_live_choice_under_replay_is_that_of_the_replayed_states(model, live, recorded):
    drifted = random_routing(MIXED, BATCH)
    router = forward(model, BATCH, drifted).router
    real = np.broadcast_to(REAL, router.live.shape[:3])
    # The first MoE layer sees the same input, the second one does not.
    np.testing.assert_array_equal(router.live[0][REAL], live[2].router.experts[0][REAL])
    assert np.any(np.asarray(router.live[1] != live[2].router.experts[1])[real[1]])
    assert_close(router.experts[:, REAL], drifted.experts[:, REAL], 0)


def test_value_depends_on_the_replayed_experts(model, live):
    value, grads, _ = value_and_grads(
        model, BATCH, loss_weights(BATCH), random_routing(MIXED, BATCH)
    )
    assert abs(float(value - live[0])) > 1e-2
    assert all(np.all(np.isfinite(g)) for g in named(grads).values())


@pytest.mark.parametrize(
    "cut", [(..., slice(1)), (slice(None), slice(None), slice(1)), (slice(None), slice(1))]
)
def test_a_routing_of_another_shape_is_not_broadcast(cut):
    routing = random_routing(MIXED, BATCH)
    narrow = dataclasses.replace(routing, experts=routing.experts[cut])
    with pytest.raises(ValueError, match=r"these tokens need|use \[L, B, T, K\]"):
        forward(random_model(MIXED), BATCH, narrow)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.float32])
def test_signed_expert_ids_are_refused(dtype):
    routing = random_routing(MIXED, BATCH)
    signed = dataclasses.replace(routing, experts=routing.experts.astype(dtype).at[0, 0, 3].set(-1))
    with pytest.raises(ValueError, match="it must be uint8"):
        forward(random_model(MIXED), BATCH, signed)
