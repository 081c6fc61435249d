import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import model as m
from jaxrl_stable.model import head
from tests.model.common import QUICK, random_model, small

B, T, V = 2, 10, 300
# V is larger than every other size: nothing but logits has B * T * V entries.
SIZES = dict(vocab_size=V, num_layers=1, hidden_size=6)
CHUNKS = [1, 3, 5, 10, 64]


@pytest.fixture(scope="module")
def scored():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(2 * rng.normal(size=(B, T, 6)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, (B, T)))
    weights = jnp.asarray(rng.normal(size=(2, B, T)), jnp.float32)
    return hidden, targets, weights


def model_with(chunk, **overrides):
    """`chunk` columns at a time; the config counts tokens."""
    return random_model(small(**(SIZES | dict(head_chunk=chunk * B) | overrides)))


def direct(model, hidden, targets, temperature):
    """Returns log-probabilities and entropy from full float64 logits."""
    weight = np.asarray(model.head_weight(), np.float64)
    z = np.asarray(hidden, np.float64) @ weight / temperature
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    chosen = np.take_along_axis(logp, np.asarray(targets)[..., None], -1)[..., 0]
    return chosen, -(np.exp(logp) * logp).sum(-1)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_scores_equal_a_direct_computation(scored, chunk, tie):
    hidden, targets, _ = scored
    model = model_with(chunk, tie_embeddings=tie)
    score = jax.jit(m.token_log_probs, compiler_options=QUICK)
    output = score(model, hidden, targets, 0.6)
    logp, entropy = direct(model, hidden, targets, 0.6)
    assert output.logp.shape == output.entropy.shape == (B, T)
    np.testing.assert_allclose(output.logp, logp, atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(output.entropy, entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.fast
def test_scores_of_a_uniform_distribution():
    model = model_with(4)
    output = m.token_log_probs(model, jnp.zeros((1, 3, 6)), jnp.zeros((1, 3), int))
    np.testing.assert_allclose(output.logp, -np.log(V), rtol=1e-6)
    np.testing.assert_allclose(output.entropy, np.log(V), rtol=1e-6)


def test_extreme_logits_stay_finite():
    hidden = jnp.full((1, 2, 6), 1e4)
    output = m.token_log_probs(model_with(4), hidden, jnp.zeros((1, 2), int))
    assert np.all(np.isfinite(output.logp)) and np.all(np.asarray(output.entropy) >= -1e-3)


def test_logits_of_the_sampler_are_those_of_the_score(scored):
    hidden, targets, _ = scored
    model = model_with(4)
    z = head.logits(model, hidden, 0.6)
    expected = jnp.take_along_axis(jax.nn.log_softmax(z), targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(
        m.token_log_probs(model, hidden, targets, 0.6).logp, expected, atol=1e-5
    )


def loss(model, hidden, targets, weights):
    output = m.token_log_probs(model, hidden, targets, 0.6)
    return jnp.sum(weights[0] * output.logp + weights[1] * output.entropy)


@pytest.mark.parametrize("chunk", CHUNKS[:3])
def test_gradients_equal_those_without_chunks(scored, chunk):
    hidden, targets, weights = scored

    def unchunked(weight, hidden):
        logp = jax.nn.log_softmax(hidden @ weight / 0.6)
        chosen = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        entropy = -jnp.sum(jnp.exp(logp) * logp, axis=-1)
        return jnp.sum(weights[0] * chosen + weights[1] * entropy)

    model = model_with(chunk, tie_embeddings=False)
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)
    actual, d_hidden = grads(model, *scored)
    d_weight, expected = jax.grad(unchunked, argnums=(0, 1))(model.head_weight(), hidden)
    np.testing.assert_allclose(d_hidden, expected, atol=1e-5, rtol=1e-4)
    np.testing.assert_allclose(actual.head.get_value(), d_weight, atol=1e-5, rtol=1e-4)


def largest_array(chunk, scored):
    """Returns the number of entries of the largest float array in the compiled gradient."""
    grads = jax.jit(jax.grad(loss, argnums=(0, 1)))
    text = grads.lower(model_with(chunk), *scored).compile().as_text()
    shapes = re.findall(r"\bf(?:16|32|64)\[([\d,]+)\]", text)
    return max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes)


def test_the_gradient_never_holds_all_logits(scored):
    assert largest_array(2, scored) < B * T * V
    assert largest_array(T, scored) >= B * T * V  # control: one chunk is all of them
