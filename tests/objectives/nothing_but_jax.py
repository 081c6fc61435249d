"""A loss, its correction and its gradient, in an environment with jax and numpy only.

A script: `test_imports.py` blocks other imports; `.ci/run` uses a separate environment.
"""

import jax
import jax.numpy as jnp

import jaxrl_stable
from jaxrl_stable import advantages, corrections, diagnostics, objectives
from jaxrl_stable.published import PUBLISHED

logp = jnp.log(jnp.array([[0.5, 0.25], [0.125, 0.5]]))
mask = jnp.array([[True, True], [True, False]])
advantage = advantages.centered(jnp.array([1.0, 0.0]), jnp.array([0, 0]))


def loss(logp):
    arrays = (logp, logp, logp, advantage, mask)
    out = objectives.minirl(*arrays)
    out = corrections.correct(out, corrections.icepop(*arrays))
    return objectives.divide(*objectives.aggregate(out.loss, mask))


value, gradient = jax.jit(jax.value_and_grad(loss))(logp)
# On policy: −½ (½ log ½ + ½ log ¼ − ½ log ⅛) is 0, and its gradient −Â/2.
assert abs(float(value)) < 1e-6, value
assert jnp.allclose(gradient, jnp.array([[-0.25, -0.25], [0.25, 0.0]])), gradient
assert jaxrl_stable.minirl is objectives.minirl  # the flat names load only what they name
assert diagnostics.Mean(jnp.float32(1), jnp.float32(2)).value() == 0.5
total, count = PUBLISHED["minirl"](logp, logp, logp, advantage, mask)
assert abs(float(objectives.divide(total, count)) - float(value)) < 1e-6
print("a loss with nothing but jax")
