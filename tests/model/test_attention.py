import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable.model import attention, empty_cache
from jaxrl_stable.model.rotary import rotate
from tests.model import reference
from tests.model.common import QUICK, small

CONFIG = small()


def frame(segments, positions=None, cache=None, config=CONFIG):
    segments = jnp.asarray(segments, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    return attention.make_frame(config, jnp.asarray(positions), segments, cache)


@pytest.mark.fast
def test_mask_of_left_padding_and_packing_by_hand():
    mask = np.asarray(frame([[0, 1, 1, 1], [1, 1, 2, 0]]).mask[:, 0]).astype(int)
    np.testing.assert_array_equal(mask[0], [[0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(mask[1], [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]])


def test_mask_of_a_decode_step_by_hand():
    cache = empty_cache(CONFIG, 2, 5).extend(jnp.array([[0, 1], [1, 1]])).advance(2)
    cache = cache.extend(jnp.array([[1, 1], [1, 0]]))  # row 1 ends after one more token
    mask = np.asarray(frame([[1, 1], [1, 0]], [[1, 2], [2, 3]], cache).mask[:, 0]).astype(int)
    np.testing.assert_array_equal(mask[0], [[0, 1, 1, 0, 0], [0, 1, 1, 1, 0]])
    np.testing.assert_array_equal(mask[1], [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])


def test_rotation_pairs_the_two_halves():
    x = np.random.default_rng(0).normal(size=(1, 4, 2, 6))
    positions = np.array([[0, 1, 5, 1000]])
    where = frame(np.ones((1, 4)), positions)
    turned = rotate(jnp.asarray(x, jnp.float32), where.cos, where.sin)
    for t, position in enumerate(positions[0]):
        for h in range(2):
            expected = reference.rotate(x[0, t, h], position, CONFIG.rope_theta)
            np.testing.assert_allclose(turned[0, t, h], expected, atol=2e-4)
    np.testing.assert_allclose(turned[0, 0], x[0, 0], atol=1e-6)  # position 0 turns nothing


def test_rotated_products_depend_on_the_distance_alone():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 6)).astype(np.float32)

    def product(i, j):
        one = rotate(jnp.asarray(q), *frame([[1]], [[i]])[:2])
        other = rotate(jnp.asarray(k), *frame([[1]], [[j]])[:2])
        return float(jnp.sum(one * other))

    assert product(3, 1) == pytest.approx(product(40, 38), abs=1e-4)
    assert product(3, 1) != pytest.approx(product(3, 2), abs=1e-2)


def test_norm_by_hand_and_in_float32():
    norm = attention.Norm({"embed": 2}, 0.5, "float32")
    norm.weight.set_value(jnp.array([2.0, 10.0]))
    # mean of squares 12.5, plus 0.5 gives 13.
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), [6 / 13**0.5, 40 / 13**0.5], rtol=1e-6)
    large = norm(jnp.array([300.0, 300.0], jnp.float16))  # squares overflow float16
    assert large.dtype == jnp.float16
    np.testing.assert_allclose(large, [2, 10], rtol=1e-2)


@functools.partial(jax.jit, compiler_options=QUICK)
def apply(layer, x, frame):
    return layer(x, frame, None, 0)[0]


def test_query_heads_share_the_key_head_of_their_group():
    layer = attention.Attention(CONFIG, nnx.Rngs(0), None)
    x = jax.random.normal(jax.random.key(0), (1, 5, CONFIG.hidden_size))
    # Head h alone reaches the output when the others' rows of `out` are zero; changing one
    # key/value head must then matter for its own group only.
    out = layer.out.get_value()
    value = layer.value.get_value()
    for h in range(CONFIG.num_heads):
        layer.out.set_value(jnp.zeros_like(out).at[h].set(out[h]))
        layer.value.set_value(value)
        before = apply(layer, x, frame(np.ones((1, 5))))
        changed = []
        for g in range(CONFIG.num_kv_heads):
            layer.value.set_value(value.at[:, g].add(1.0))
            after = apply(layer, x, frame(np.ones((1, 5))))
            changed.append(bool(jnp.max(jnp.abs(after - before)) > 1e-3))
        assert changed == [g == h // 2 for g in range(CONFIG.num_kv_heads)]


def test_rows_that_see_nothing_stay_finite():
    layer = attention.Attention(CONFIG, nnx.Rngs(0), None)
    x = jax.random.normal(jax.random.key(0), (2, 4, CONFIG.hidden_size))
    padded = frame([[0, 0, 0, 0], [0, 1, 1, 1]])

    def loss(layer, x):
        return jnp.sum(layer(x, padded, None, 0)[0] ** 2)

    for leaf in jax.tree.leaves(
        jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(layer, x)
    ):
        assert np.all(np.isfinite(leaf))


def test_implementation_of_attention(monkeypatch):
    def resolve(backend, **overrides):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        return attention.attention_implementation(small(**overrides))

    assert resolve("cpu", dtype="bfloat16") == "xla"
    assert resolve("gpu", dtype="bfloat16") == "cudnn"
    assert resolve("gpu", dtype="float32") == "xla"
    assert resolve("tpu", dtype="bfloat16") == "splash"
    assert resolve("gpu", dtype="bfloat16", attention="xla") == "xla"
