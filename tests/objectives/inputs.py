"""Random inputs for objectives: ragged responses, group-centred rewards, garbage in padding."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

B, T, GROUP = 8, 12, 4
SEEDS = range(20)
GARBAGE = (np.nan, 1e4, -1e4)


class Inputs(NamedTuple):
    logp: np.ndarray
    old: np.ndarray
    rollout: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray


def log_probabilities(x):
    """Float32 numbers below 0 (a probability above one has no binary divergence), in float64.

    Rounding to float32 here gives a test in float32 and its derivation the same inputs.
    """
    return np.where(x > -0.01, -0.02 - x, x).astype(np.float32).astype(np.float64)


def make_inputs(seed, mismatch=0.15, staleness=0.3, shift=0.0):
    """Every third seed has a row without a response; every third one has holes (several turns)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    mask = np.arange(T)[None] < lengths[:, None]
    if seed % 3 == 2:
        mask[:, 1:] &= rng.random((B, T - 1)) < 0.7
    rollout = log_probabilities(rng.uniform(-4, -0.01, (B, T)))
    old = log_probabilities(rollout + mismatch * rng.normal(size=(B, T)))
    logp = log_probabilities(old + shift + staleness * rng.normal(size=(B, T)))
    rewards = rng.integers(0, 2, (B // GROUP, GROUP)).astype(float)
    rewards[0, :2], rewards[1, 2:] = [1, 0], [0, 1]  # advantages of either sign in both groups
    advantages = (rewards - rewards.mean(1, keepdims=True)).reshape(B)
    if seed % 3 == 1:
        mask[B - 1], advantages[B - 1] = False, 3.0
    garbage = lambda x: np.where(mask, x, rng.choice(GARBAGE, (B, T)))  # noqa: E731
    return Inputs(garbage(logp), garbage(old), garbage(rollout), advantages, mask)


def token_advantages(inputs, seed=0):
    """Returns the same inputs with one advantage per token, also with garbage in the padding."""
    noise = np.random.default_rng(seed).normal(size=(B, T)).astype(np.float32).astype(np.float64)
    return inputs._replace(advantages=np.where(inputs.mask, noise, np.nan))


def stack(batches):
    """Returns inputs with a leading axis for `vmap`: one call instead of one per seed."""
    return Inputs(*(np.stack(x) for x in zip(*batches)))


def make_batches(**scale):
    return [make_inputs(seed, **scale) for seed in SEEDS]


def to_jax(inputs, dtype):
    return Inputs(*(jnp.asarray(x, dtype) for x in inputs[:4]), jnp.asarray(inputs.mask))
