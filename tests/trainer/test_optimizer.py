import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.configs import Optimizer
from jaxrl_stable.model import init_model
from jaxrl_stable.trainer.optimizer import (
    all_zero,
    apply_gradients,
    init_state,
    learning_rate,
    make_optimizer,
)


@cache
def made(config):
    """The optimizer and its jitted step, traced once for all tests of a config."""
    optimizer = make_optimizer(config)
    return optimizer, jax.jit(partial(apply_gradients, optimizer=optimizer))


def step(model, gradients, config, steps=1):
    optimizer, apply = made(config)
    state, norms = init_state(model, optimizer), []
    for _ in range(steps):
        state, norm = apply(state, gradients)
        norms.append(float(norm))
    return state, norms


@pytest.fixture(scope="module")
def ones(model):
    return jax.tree.map(jnp.ones_like, model)


@pytest.mark.fast
def test_the_rate_that_is_reported_is_the_rate_that_moved_the_weights(model, ones):
    """Warm-up over 2 updates, cosine over 2; a skipped update does not advance the schedule."""
    config = Optimizer(learning_rate=0.1, warmup_steps=2, decay_steps=2, clip_norm=1e9)
    optimizer, apply = made(config)
    state, rates, moves = init_state(model, optimizer), [], []
    assert learning_rate(state, config) == 0
    bad = jax.tree.map(lambda g: g * jnp.nan, ones)
    for gradients in (ones, bad, ones, ones, ones):
        before = np.asarray(state.model.norm.weight[...])[0]
        state, _ = apply(state, gradients)
        rates.append(float(learning_rate(state, config)))
        moves.append(before - np.asarray(state.model.norm.weight[...])[0])
    half = 0.1 * (0.1 + 0.9 * 0.5)  # half of the cosine from 1 to 0.1
    np.testing.assert_allclose(rates, [0.05, 0.05, 0.1, half, 0.01], rtol=1e-5)
    np.testing.assert_allclose(moves, [0.05, 0.0, 0.1, half, 0.01], rtol=1e-4, atol=1e-6)


@pytest.mark.fast
def test_warm_up_reaches_the_rate_in_the_stated_steps(model, ones):
    """With a constant gradient, Adam's steps have the size of the rate: 1/4, 2/4, 3/4, 1, 1."""
    config = Optimizer(learning_rate=1e-3, warmup_steps=4, clip_norm=1e9)
    positions = [np.asarray(model.norm.weight[...])[0]]
    for steps in range(1, 6):
        state, _ = step(model, ones, config, steps)
        positions.append(np.asarray(state.model.norm.weight[...])[0])
    np.testing.assert_allclose(-np.diff(positions) / 1e-3, [0.25, 0.5, 0.75, 1, 1], rtol=2e-3)


def test_without_warm_up_the_first_step_has_the_full_rate(model, ones):
    state, _ = step(model, ones, Optimizer(learning_rate=1e-3, clip_norm=1e9))
    moved = np.asarray(model.norm.weight[...] - state.model.norm.weight[...])
    np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)


def test_decay_ends_at_a_tenth(model, ones):
    config = Optimizer(learning_rate=1e-3, warmup_steps=1, decay_steps=4, clip_norm=1e9)
    before, _ = step(model, ones, config, 8)
    after, _ = step(model, ones, config, 9)
    moved = np.asarray(before.model.norm.weight[...] - after.model.norm.weight[...])
    np.testing.assert_allclose(moved, 1e-4, rtol=1e-2)


def test_norm_is_reported_before_clipping(model, ones):
    size = sum(leaf.size for leaf in jax.tree.leaves(model))
    _, norms = step(model, ones, Optimizer(clip_norm=1e-3))
    np.testing.assert_allclose(norms[0], size**0.5, rtol=1e-5)


def test_rates_can_be_mapped(model, ones):
    """A study maps runs over learning rates; warm-up and decay stay the same."""
    config = Optimizer(warmup_steps=1, decay_steps=4, clip_norm=1e9)

    def moved(rate):
        optimizer = make_optimizer(dataclasses.replace(config, learning_rate=rate))
        state, _ = apply_gradients(init_state(model, optimizer), ones, optimizer)
        return (model.norm.weight[...] - state.model.norm.weight[...])[0]

    rates = jnp.array([1e-3, 4e-3])
    np.testing.assert_allclose(jax.jit(jax.vmap(moved))(rates), rates, rtol=2e-3)


def test_weight_decay_spares_the_norms(model):
    zeros = jax.tree.map(jnp.zeros_like, model)
    state, _ = step(model, zeros, Optimizer(learning_rate=0.1, weight_decay=0.5))
    np.testing.assert_array_equal(state.model.norm.weight[...], model.norm.weight[...])
    shrunk = state.model.embedding[...] / model.embedding[...]
    np.testing.assert_allclose(shrunk, 0.95, rtol=1e-5)


def test_moments_are_float32_from_the_start(config):
    """Types that change in the first step would compile twice and lose bits on resume."""
    optimizer = make_optimizer(Optimizer())

    def before_and_after():
        half = init_model(dataclasses.replace(config, param_dtype="bfloat16"), 0)
        state = init_state(half, optimizer)
        ones = jax.tree.map(lambda w: jnp.ones(w.shape, jnp.float32), half)
        return state, apply_gradients(state, ones, optimizer)[0]

    state, after = jax.eval_shape(before_and_after)
    types = [[leaf.dtype for leaf in jax.tree.leaves(tree)] for tree in (state, after)]
    assert types[0] == types[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(state.opt_state.inner[1][0].nu)} == {
        jnp.dtype("float32")
    }


def test_master_weights_keep_what_bfloat16_would_lose(config):
    """Forty steps of 1/1000 of the spacing are lost without the float32 copy, exact with it."""
    half = init_model(dataclasses.replace(config, param_dtype="bfloat16"), 0)
    ones = jax.tree.map(lambda w: jnp.ones(w.shape, jnp.float32), half)
    settings = dict(learning_rate=1e-4, clip_norm=1e9)  # weights of norms are 1: spacing 2⁻⁷
    kept, _ = step(half, ones, Optimizer(**settings), 40)
    lost, _ = step(half, ones, Optimizer(master_weights=False, **settings), 40)
    np.testing.assert_array_equal(lost.model.norm.weight[...], half.norm.weight[...])
    master = kept.opt_state.master
    assert lost.opt_state.master is None
    np.testing.assert_allclose(1 - np.asarray(master.norm.weight[...]), 4e-3, rtol=1e-2)
    for stored, exact in zip(jax.tree.leaves(kept.model), jax.tree.leaves(master), strict=True):
        assert stored.dtype == jnp.bfloat16 and exact.dtype == jnp.float32
        np.testing.assert_array_equal(stored, exact.astype(jnp.bfloat16))
    assert float(kept.model.norm.weight[...][0]) != 1.0


def test_float32_parameters_need_no_copy(model):
    assert init_state(model, make_optimizer(Optimizer())).opt_state.master is None


def test_first_moment_can_be_bfloat16(model, ones):
    state, _ = step(model, ones, Optimizer(first_moment_dtype="bfloat16"))
    moments = state.opt_state.inner[1][0]
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(moments.nu)} == {jnp.dtype("float32")}


def after_a_signal(model, ones, config):
    """The state after one step with a gradient, and after another one whose gradient is 0."""
    state, _ = step(model, ones, config)
    silent, norm = made(config)[1](state, jax.tree.map(jnp.zeros_like, ones))
    assert norm == 0
    return state, silent


def test_a_gradient_of_zero_leaves_momentum_at_work_by_default(model, ones):
    """With b1 = 0.9 the first step without a signal is most of the last one with a signal."""
    state, silent = after_a_signal(model, ones, Optimizer(learning_rate=1e-3, clip_norm=1e9))
    moved = state.model.norm.weight[...] - silent.model.norm.weight[...]
    # m̂/√v̂ = (b1 (1 − b1) / (1 − b1²)) / √(b2 (1 − b2) / (1 − b2²)), in steps of the rate.
    expected = (0.9 * 0.1 / 0.19) / (0.95 * 0.05 / (1 - 0.95**2)) ** 0.5
    np.testing.assert_allclose(moved / 1e-3, expected, rtol=2e-3)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_a_gradient_of_zero_can_be_skipped(config, param_dtype):
    """Weights, master weights, moments and the schedule stay; weight decay rests too."""
    model = init_model(dataclasses.replace(config, param_dtype=param_dtype), 0)
    ones = jax.tree.map(lambda w: jnp.ones(w.shape, jnp.float32), model)
    settings = dict(learning_rate=1e-3, warmup_steps=4, weight_decay=0.1)
    state, silent = after_a_signal(model, ones, Optimizer(skip_zero_gradients=True, **settings))
    before, after = (jax.tree.leaves((s.model, s.opt_state)) for s in (state, silent))
    for a, b in zip(before, after, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert (int(silent.step), int(silent.skipped), int(silent.skipped_in_a_row)) == (2, 0, 0)
    usual, moved = after_a_signal(model, ones, Optimizer(**settings))
    assert jax.tree.structure(usual) == jax.tree.structure(state)  # checkpoints fit both
    for a, b in zip(jax.tree.leaves(usual), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)  # the same step otherwise
    assert (moved.model.embedding[...] != usual.model.embedding[...]).any()


def test_a_tiny_gradient_and_one_that_is_not_finite_are_not_zero(model):
    """The squares of 1e-30 are 0 in float32, and so is their norm, but Adam takes a full step."""
    config = Optimizer(learning_rate=1e-3, eps=1e-38, clip_norm=1e9, skip_zero_gradients=True)
    tiny = jax.tree.map(lambda w: jnp.full(w.shape, 1e-18, w.dtype), model)
    assert not all_zero(jax.tree.map(lambda g: g * 1e-8, tiny))
    assert not all_zero({"a": jnp.zeros(2), "b": jnp.array([0.0, jnp.nan])})
    assert all_zero({"a": jnp.zeros(2), "b": -jnp.zeros(1)})
    state, _ = step(model, tiny, config)
    assert (state.model.norm.weight[...] < model.norm.weight[...]).all()
    nan = jax.tree.map(lambda w: jnp.full(w.shape, jnp.nan, w.dtype), model)
    state, _ = step(model, nan, config)
    assert int(state.skipped) == 1
