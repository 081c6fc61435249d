import dataclasses
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable.model import dispatch
from jaxrl_stable.model.experts import Experts
from jaxrl_stable.model.router import gate_weights
from jaxrl_stable.routing import Routing
from tests.model.common import QUICK, assert_close, named, small

CONFIG = small()


def normalised(norm):
    return small(norm_topk_prob=norm)


REAL = np.ones((2, 6), bool)
REAL[0, :2] = REAL[1, 5] = False


@pytest.fixture(scope="module")
def layer():
    return Experts(CONFIG, nnx.Rngs(0), None)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 6, CONFIG.hidden_size))


def with_implementation(layer, name, **overrides):
    config = small(experts=name, **overrides)
    structure = jax.tree.structure(jax.eval_shape(lambda: Experts(config, nnx.Rngs(0), None)))
    return jax.tree.unflatten(structure, jax.tree.leaves(layer))


def routing(chosen, valid=REAL):
    return Routing(jnp.asarray(chosen, jnp.uint8), jnp.asarray(valid))


def skewed():
    """Every token on experts 5, 2 and 0: four of the seven groups are empty."""
    return routing(np.broadcast_to([5, 2, 0], (2, 6, 3)))


@jax.jit
def apply(layer, x, replay):
    return layer(x, jnp.asarray(REAL), replay)


def differentiate(layer, x, replay, real=REAL):
    """Returns value, router output and gradients of a loss over all outputs of real tokens."""

    def loss(layer, x):
        y, router = layer(x, jnp.asarray(real), replay)
        return jnp.sum(jnp.cos(jnp.arange(y.size).reshape(y.shape)) * y), (y, router)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


gradients = jax.jit(differentiate, compiler_options=QUICK)


@pytest.mark.parametrize("replay", [None, skewed()], ids=["live", "skewed"])
@pytest.mark.parametrize("norm", [True, False], ids=["normalised", "raw"])
def test_implementations_agree(layer, x, replay, norm):
    expected = gradients(with_implementation(layer, "dense", norm_topk_prob=norm), x, replay)
    for name in ("ragged", "blocked"):
        other = with_implementation(layer, name, norm_topk_prob=norm)
        actual = gradients(other, x, replay)
        assert_close(actual, expected, 1e-5)
    (_, (y, _)), (grads, _) = expected
    assert all(np.any(g) for g in named(grads).values()) and np.any(y)


def test_a_single_token_and_no_token_at_all(layer, x):
    for name in ("ragged", "blocked"):
        for count in (1, 0):
            real = np.zeros((2, 6), bool)
            real[1, :count] = True
            results = [
                gradients(with_implementation(layer, n), x, None, real) for n in ("dense", name)
            ]
            assert_close(results[1], results[0], 1e-5)
            assert results[1][0][1][1].load.sum() == 3 * count


def test_router_output(layer, x):
    valid = REAL.copy()
    valid[0, 3] = valid[1, 0] = False
    chosen = np.broadcast_to([6, 0, 3], (2, 6, 3))
    _, live = apply(layer, x, None)
    _, router = apply(layer, x, routing(chosen, valid))
    np.testing.assert_array_equal(live.experts, live.live)
    np.testing.assert_array_equal(router.live, live.live)
    np.testing.assert_array_equal(router.experts, np.where(valid[..., None], chosen, live.experts))
    assert router.experts.dtype == jnp.uint8
    counts = np.bincount(np.asarray(router.experts)[REAL].ravel(), minlength=7)
    np.testing.assert_array_equal(router.load, counts)  # padding is not counted
    p = jax.nn.softmax(x @ layer.router.get_value())
    mass = jnp.take_along_axis(p, router.experts.astype(int), -1).sum(-1)
    np.testing.assert_allclose(router.confidence, mass, rtol=1e-5)
    top = jax.lax.top_k(p, 3)[0].sum(-1)
    np.testing.assert_allclose(live.confidence, top, rtol=1e-5)


def test_values_at_padding_do_not_matter(layer, x):
    # Neither NaN nor large values may leak out of padding tokens, nor may their routing.
    other = jnp.where(REAL[..., None], x, 1e6)
    for name in ("dense", "ragged", "blocked"):
        variant = with_implementation(layer, name)
        (value, _), (grads, dx) = gradients(variant, x, None)
        (value2, _), (grads2, dx2) = gradients(variant, other, None)
        assert_close((value2, grads2, dx2[REAL]), (value, grads, dx[REAL]), 1e-5)
        assert not np.any(np.asarray(dx)[~REAL])


def _leave_garbage(product):
    """A grouped product that leaves NaN in rows outside all groups, forward and backward."""

    def spoil(y, sizes):
        return jnp.where((jnp.arange(y.shape[0]) < sizes.sum())[:, None], y, jnp.nan)

    @jax.custom_vjp
    def spoiled(x, w, sizes):
        return spoil(product(x, w, sizes), sizes)

    def backward(residuals, g):
        x, w, sizes = residuals
        _, pull = jax.vjp(lambda x, w: product(x, w, sizes), x, w)
        dx, dw = pull(g)
        return spoil(dx, sizes), dw, np.zeros(sizes.shape, jax.dtypes.float0)

    spoiled.defvjp(lambda x, w, s: (spoiled(x, w, s), (x, w, s)), backward)
    return spoiled


@pytest.mark.parametrize("name", ["ragged", "tokamax"])
def test_what_a_kernel_leaves_outside_the_groups_reaches_nothing(layer, x, name, monkeypatch):
    expected = gradients(with_implementation(layer, "dense"), x, None)
    product = _leave_garbage(jax.lax.ragged_dot)
    monkeypatch.setattr(jax.lax, "ragged_dot", product)

    def kernel(x, w, sizes, *, implementation):
        assert "xla" not in implementation  # no silent fall-back to the plain op
        return product(x, w, sizes)

    monkeypatch.setitem(sys.modules, "tokamax", types.SimpleNamespace(ragged_dot=kernel))
    variant = with_implementation(layer, name)
    # A function of its own: `gradients` may hold a compiled pass without the garbage.
    fresh = jax.jit(lambda *args: differentiate(*args), compiler_options=QUICK)
    assert_close(fresh(variant, x, None), expected, 1e-5)


@pytest.mark.fast
def test_gates_by_hand():
    logits = jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4]))
    chosen = jnp.array([2, 0])
    gates, mass = gate_weights(logits, chosen, normalised(True))
    np.testing.assert_allclose(gates, [0.75, 0.25], rtol=1e-6)
    np.testing.assert_allclose(mass, 0.4, rtol=1e-6)
    gates, mass = gate_weights(logits, chosen, normalised(False))
    np.testing.assert_allclose(gates, [0.3, 0.1], rtol=1e-6)
    np.testing.assert_allclose(mass, 0.4, rtol=1e-6)


@pytest.mark.parametrize("low", [-1e4, -1e30])
def test_replayed_experts_of_vanishing_probability(low):
    # p = exp(−1e4) is zero in any float: dividing by the sum of such p would be 0 / 0.
    logits = jnp.array([0.0, 1.0, low, low, low])
    chosen = jnp.array([2, 3, 4])

    def weighted(z):
        return jnp.sum(gate_weights(z, chosen, normalised(True))[0] * jnp.array([1.0, 2.0, 4.0]))

    gates, mass = gate_weights(logits, chosen, normalised(True))
    np.testing.assert_allclose(gates, 1 / 3, rtol=1e-5)
    assert mass == 0
    gradient = jax.grad(weighted)(logits)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(gradient[2:], np.array([-4 / 3, -1 / 3, 5 / 3]) / 3, rtol=1e-4)


def test_vanishing_probability_through_the_layer(layer, x):
    router = layer.router.get_value()
    # Expert 6 of the replay has a logit near −1e4 for every token.
    x = x.at[..., 0].set(1.0)
    pushed = jax.tree.map(lambda a: a, layer)
    pushed.router.set_value(router.at[0, 4:].add(-1e4))
    (value, (y, _)), (grads, dx) = gradients(
        pushed, x, routing(np.broadcast_to([4, 5, 6], (2, 6, 3)))
    )
    assert np.isfinite(value) and np.all(np.isfinite(dx)) and np.any(np.asarray(y)[REAL])
    assert all(np.all(np.isfinite(g)) for g in named(grads).values())
    assert np.any(grads.router.get_value())


def test_more_than_256_experts_are_reported_as_uint16(x):
    config = dataclasses.replace(CONFIG, num_experts=257, moe_intermediate_size=2)
    output = jax.eval_shape(
        lambda: Experts(config, nnx.Rngs(0), None)(x, jnp.asarray(REAL), None)[1]
    )
    assert output.experts.dtype == output.live.dtype == jnp.uint16


def test_choice_does_not_depend_on_the_implementation_of_the_product(layer, x, monkeypatch):
    # Router first: what the kernels compute later must not feed back into the choice.
    seen = []
    monkeypatch.setattr(
        dispatch, "group_by_expert", lambda chosen, *rest: seen.append(chosen) or _stop()
    )
    for name in ("ragged", "blocked"):
        with pytest.raises(_Stop):
            with_implementation(layer, name)(x, jnp.asarray(REAL), None)
    np.testing.assert_array_equal(seen[0], seen[1])


class _Stop(Exception):
    pass


def _stop():
    raise _Stop
