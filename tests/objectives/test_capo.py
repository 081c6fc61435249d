"""CAPO's predicted effects, compared with its own Kronecker forms and with differentiation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.objectives import CapoHead, capo, ppo
from jaxrl_stable.objectives.capo import curvature

B, T, D, V = 3, 4, 3, 5
MASK = np.arange(T) < np.array([4, 2, 3])[:, None]
ADVANTAGES = np.array([0.7, -0.4, 1.1])


@pytest.fixture(scope="module")
def head():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(D, V))
    step = 0.1 * rng.normal(size=(D, V))
    tokens = rng.integers(0, V, (B, T))
    return CapoHead(rng.normal(size=(B, T, D)), weight, step, tokens, temperature=0.8)


def kronecker(head, b, t, advantage):
    """g̃ᵀΔψ + ½ΔψᵀH̃Δψ and ½ΔψᵀF̃Δψ of one token, from the matrices the paper writes down."""
    h = head.hidden[b, t] / head.temperature
    z = np.exp(h @ head.weight)
    pi = z / z.sum()
    e = np.eye(V)[head.tokens[b, t]] - pi
    fisher = np.diag(pi) - np.outer(pi, pi)
    hh, delta = np.outer(h, h), head.step.T.ravel()  # vec of a V × D matrix
    gradient = advantage * np.kron(e, h)
    hessian = advantage * np.kron(np.outer(e, e) - fisher, hh)
    policy = np.kron(np.outer(e, e), hh)
    return gradient @ delta + delta @ hessian @ delta / 2, delta @ policy @ delta / 2


@pytest.mark.fast
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_curvature_is_that_of_the_kronecker_forms(head, discount):
    with jax.enable_x64(True):
        got = curvature(head, jnp.asarray(ADVANTAGES), jnp.asarray(MASK), discount)
    for b, t in zip(*np.nonzero(MASK)):
        objective, policy = kronecker(head, b, t, ADVANTAGES[b] * discount**t)
        np.testing.assert_allclose(got.objective[b, t], objective, rtol=1e-9)
        np.testing.assert_allclose(got.policy[b, t], policy, rtol=1e-9)


@pytest.mark.fast
def test_curvature_is_the_second_order_of_the_weighted_ratio(head):
    """m_H is Taylor's polynomial of Â π(ψ + Δψ)/π(ψ) − Â, as the derivation says."""
    with jax.enable_x64(True):

        def change(s):
            def logp(weight):
                z = jax.nn.log_softmax(jnp.asarray(head.hidden) @ weight / head.temperature)
                return jnp.take_along_axis(z, jnp.asarray(head.tokens)[..., None], -1)[..., 0]

            moved = logp(jnp.asarray(head.weight) + s * jnp.asarray(head.step))
            return jnp.asarray(ADVANTAGES)[:, None] * jnp.exp(moved - logp(head.weight))

        first = jax.jacfwd(change)
        expected = first(0.0) + jax.jacfwd(first)(0.0) / 2
        got = curvature(head, jnp.asarray(ADVANTAGES), jnp.asarray(MASK)).objective
    np.testing.assert_allclose(np.asarray(got)[MASK], np.asarray(expected)[MASK], rtol=1e-9)


def test_unsafe_tokens_lose_their_gradient_and_stay_in_the_batch(head):
    rng = np.random.default_rng(1)
    old = rng.uniform(-2, -0.5, (B, T))
    logp = old + 0.2 * rng.normal(size=(B, T))
    arrays = logp, old, old, ADVANTAGES, MASK
    effect = curvature(head, jnp.asarray(ADVANTAGES), jnp.asarray(MASK))
    fisher = float(np.median(np.asarray(effect.policy)[MASK]))
    hessian = -0.05, 0.05

    def loss(x, function, *rest, **options):
        return function(x, *arrays[1:], *rest, **options).loss.sum()

    limits = dict(fisher=fisher, hessian=hessian)
    ours = jax.grad(lambda x: loss(x, capo, head, **limits))(jnp.asarray(logp))
    plain = jax.grad(lambda x: loss(x, ppo))(jnp.asarray(logp))
    unsafe = (np.abs(effect.objective) > 0.05) | (np.asarray(effect.policy) > fisher)
    assert 0 < unsafe[MASK].sum() < MASK.sum()
    np.testing.assert_allclose(ours, np.where(unsafe, 0, plain), rtol=1e-6)
    out = capo(*arrays, head, **limits)
    clipped = np.asarray(out.clipped_high | out.clipped_low)
    np.testing.assert_array_equal(clipped[MASK], (unsafe | (np.asarray(plain) == 0))[MASK])
    # With bounds that nothing reaches, PPO remains.
    wide = capo(*arrays, head, fisher=np.inf, hessian=(-np.inf, np.inf))
    np.testing.assert_array_equal(wide.loss, ppo(*arrays).loss)


def test_garbage_in_padding_reaches_nothing(head):
    hidden = np.where(MASK[..., None], head.hidden, np.nan)
    dirty = curvature(head._replace(hidden=hidden), jnp.asarray(ADVANTAGES), jnp.asarray(MASK))
    clean = curvature(head, jnp.asarray(ADVANTAGES), jnp.asarray(MASK))
    for x, y in zip(dirty, clean):
        np.testing.assert_array_equal(np.asarray(x)[MASK], np.asarray(y)[MASK])
