"""A foreign trainer replays our routing, and ours replays what a foreign one recorded."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.model import init_model
from jaxrl_stable.routing import from_token_major, to_token_major
from tests.integrations.outside import example
from tests.negative_controls import shift

foreign = example("maxtext_like")


@pytest.fixture(scope="module")
def model():
    return jax.jit(partial(init_model, foreign.CONFIG, 0))()


@pytest.fixture(scope="module")
def sampled(model):
    """Returns a rollout of the int8 copy, and log π_old with its experts."""
    prompts = np.random.default_rng(1).integers(1, 16, (32, foreign.WIDTH))
    return foreign.sample(model, prompts, jax.random.key(2))


@pytest.fixture(scope="module")
def decode(model, sampled):
    """The foreign decoder on the sampled tokens."""
    decoder = jax.jit(foreign.decoder)
    return partial(decoder, model, sampled[0].tokens, sampled[0].real)


@pytest.fixture(scope="module")
def ours(model, sampled):
    """This library's decoder on the same tokens: `ours(replay)`."""
    batch = sampled[0]
    positions = jnp.maximum(jnp.cumsum(batch.real, -1) - 1, 0)
    segments = batch.real.astype(jnp.int32)
    call = lambda model, replay: model(batch.tokens, positions, segments, replay=replay)  # noqa: E731
    return partial(jax.jit(call), model)


def apart(a, b, real):
    return np.abs(np.asarray(a) - np.asarray(b))[np.asarray(real)].max()


def test_replaying_its_own_choice_changes_no_bit(decode, sampled):
    hidden, used = decode(None)
    replayed, again = decode(used)
    np.testing.assert_array_equal(hidden, replayed)
    np.testing.assert_array_equal(used, again)
    # To the stored type and back; missing where there is no token.
    recorded = np.where(sampled[0].real[..., None, None], used, -1)
    stored = from_token_major(recorded, foreign.CONFIG.num_experts)
    assert stored.experts.dtype == jnp.uint8
    np.testing.assert_array_equal(decode(to_token_major(stored))[0], hidden)
    np.testing.assert_array_equal(decode(jnp.full_like(used, -1))[0], hidden)  # its own router


def test_routing_recorded_here_reproduces_the_native_output_there(decode, ours, sampled):
    """With equal weights, two decoders agree: each natively, and each replaying the other."""
    real = sampled[0].real
    native = ours(None)
    hidden, used = decode(None)
    recorded = dataclasses.replace(sampled[0].routing, experts=native.router.experts, valid=real)
    assert apart(native.hidden, hidden, real) < 1e-5
    assert apart(native.hidden, decode(to_token_major(recorded))[0], real) < 1e-5
    theirs = from_token_major(np.asarray(used), foreign.CONFIG.num_experts)
    assert apart(hidden, ours(theirs).hidden, real) < 1e-5


def test_replay_of_the_sampler_differs_from_native_and_agrees_with_ours(decode, ours, sampled):
    """The int8 copy chose other experts for some tokens: both decoders follow it."""
    batch = sampled[0]
    there = decode(to_token_major(batch.routing))[0]
    assert apart(there, ours(batch.routing).hidden, batch.real) < 1e-5
    assert apart(there, decode(None)[0], batch.real) > 1e-2


def test_a_shift_of_one_token_does_not(decode, ours, sampled):
    batch = sampled[0]
    right = decode(to_token_major(batch.routing))[0]
    for offset in (-1, 1):
        wrong = to_token_major(shift(batch.routing, offset))
        assert apart(right, decode(wrong)[0], batch.real) > 0.1


def test_the_router_learns_from_replayed_choices(model, sampled):
    """Tokens without a record leave nothing behind that is not finite."""
    batch, logp_old = sampled
    assert not batch.routing.valid.all()
    advantages = np.where(np.arange(32) % 2 == 0, 1, -1).astype(np.float32)
    state = foreign.optimizer.init(model)
    moved, _, _ = foreign.update(model, state, batch, logp_old, advantages)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(moved))
    router = lambda model: np.asarray(model.stacks[0][0].mlp.router[...])  # noqa: E731
    # Adam's first step is its rate wherever the gradient is more than 1e-8.
    step = np.abs(router(moved) - router(model))
    assert step.shape[0] == foreign.CONFIG.num_layers
    assert (np.quantile(step, 0.5, axis=(1, 2)) > 0.99e-2).all()


def test_the_reward_rises():
    losses, rewards = np.transpose(list(foreign.train(steps=6)))
    assert np.isfinite(losses).all() and rewards[-1] > rewards[0] + 0.25
