"""If a loss is a true function of logp, its gradient is the slope of its own value."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import objectives
from jaxrl_stable.objectives import aggregate, divide
from tests.objectives.derivations import GRADIENTS, VALUES, aggregation_factor
from tests.objectives.inputs import B, T, make_batches, stack, to_jax

STEP = 1e-6
MODE = "seq-mean-token-mean"
FAR = {"staleness": 1.0, "shift": 0.9}
CASES = [
    ("ppo", {}, {}),
    ("ppo", {"dual_clip": 3.0}, FAR),
    ("gspo", {}, {"staleness": 1e-3}),
    ("luspo", {}, {"staleness": 6e-3}),
    ("gmpo", {}, {"staleness": 0.5}),
    ("sapo", {}, {"staleness": 0.5}),
    ("dro", {"beta": 0.5}, {}),
    ("m2po", {"moment": "mismatch"}, {"mismatch": 0.4}),
]
IDS = [f"{name}-{options}" for name, options, _ in CASES]


def silent_everywhere_near(name, options, inputs):
    """No kink is within reach of a difference: the clipped set is the same on either side."""
    factor = np.ones(inputs.mask.shape)
    near = [
        GRADIENTS[name](*inputs._replace(logp=inputs.logp + x), factor, **options).silent
        for x in (-10 * STEP, 0.0, 10 * STEP)
    ]
    return all((x == near[1]).all() for x in near)


@pytest.mark.parametrize("name, options, scale", CASES, ids=IDS)
def test_gradient_is_the_slope(name, options, scale):
    def matrix(logp, *rest):
        return getattr(objectives, name)(logp, *rest, **options).loss

    def loss(logp, *rest):
        return divide(*aggregate(matrix(logp, *rest), rest[-1], MODE))

    @jax.vmap
    def slopes(logp, *rest):
        moved = STEP * jnp.eye(B * T).reshape(B * T, B, T)
        at = jax.vmap(lambda x: loss(x, *rest))
        slope = (at(logp + moved) - at(logp - moved)) / (2 * STEP)
        return slope.reshape(B, T), jax.grad(loss)(logp, *rest), matrix(logp, *rest)

    batches = make_batches(**scale)
    with jax.enable_x64(True):
        results = jax.jit(slopes)(*to_jax(stack(batches), jnp.float64))
    smooth = 0
    for inputs, slope, gradient, actual in zip(batches, *map(np.asarray, results)):
        value = VALUES[name](*inputs, **options)
        derived = GRADIENTS[name](*inputs, aggregation_factor(inputs.mask, MODE), **options)
        np.testing.assert_allclose(actual, value, rtol=1e-9, atol=1e-12)
        if silent_everywhere_near(name, options, inputs):
            smooth += 1
            largest = np.abs(slope).max()
            np.testing.assert_allclose(gradient, slope, rtol=0, atol=1e-7 * largest)
            np.testing.assert_allclose(derived.gradient, slope, rtol=0, atol=1e-7 * largest)
    assert smooth >= 10
