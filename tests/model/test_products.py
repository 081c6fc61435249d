"""Grids, and products on them, against plain NumPy."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable.model.attention import make_frame
from jaxrl_stable.model.config import LatentSizes
from jaxrl_stable.model.dispatch import ExpertWeights, apply_experts, group_by_expert
from jaxrl_stable.model.dispatch import grouped_matmul as grouped
from jaxrl_stable.model.parameters import Quantized
from jaxrl_stable.model.products import (
    nearest,
    product,
    products_implementation,
    rounded,
    to_grid,
)
from jaxrl_stable.sampler.quantize import quantize
from tests.model.common import random_model, small

LARGEST = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}


def numpy_grid(x, axes, dtype):
    """Computes the same with other code: float64, and the rounding of NumPy and ml_dtypes."""
    x = np.asarray(x, np.float32)
    most = np.abs(x).max(axes, keepdims=True)
    scale = np.where(most == 0, np.float32(1), most / np.float32(LARGEST[dtype]))
    float8 = dtype == "float8_e4m3fn"
    values = (x / scale).astype(ml_dtypes.float8_e4m3fn) if float8 else np.rint(x / scale)
    return values.astype(np.float64), scale.astype(np.float64)


def numpy_product(x, w, dtype):
    """[n, d] times [d, f], both on the grid, one scale per row and per column."""
    (x, row), (w, column) = numpy_grid(x, 1, dtype), numpy_grid(w, 0, dtype)
    return (x * row) @ (w * column)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def stored(w, summed, dtype, products):
    """A matrix on its grid, as `quantize` stores it."""
    return Quantized(*to_grid(jnp.asarray(w), summed, jnp.dtype(dtype)), products)


@pytest.mark.parametrize(
    "dtype, x, values",
    [
        # The first one sets the scale, here 1/8: the rest is in eighths. Ties go to even.
        ("int8", [127, -127, 2.5, 3.5, -0.5, 0.51, 0], [127, -127, 2, 4, 0, 1, 0]),
        ("int4", [-7, 7, 2.5, 3.5, -6.6, 0.4, 0], [-7, 7, 2, 4, -7, 0, 0]),
        # e4m3 has 3 bits behind the leading one, so steps of 2 from 16 and of 32 from 256; below
        # 2^-6 steps of 2^-9.
        (
            "float8_e4m3fn",
            [448, -448, 17, 19, 17.1, 272, 2**-10, 3 * 2**-10, 1.0625],
            [448, -448, 16, 20, 18, 256, 0, 2**-8, 1.0],
        ),
    ],
)
def test_grids_by_hand(dtype, x, values):
    found, scale = to_grid(jnp.array([x]) / 8, (1,), jnp.dtype(dtype))
    assert found.dtype == dtype and scale.shape == (1, 1) and scale[0, 0] == 0.125
    np.testing.assert_array_equal(found[0].astype(jnp.float32), values)


def test_every_value_of_float8_and_what_rounds_to_it():
    """All of the grid, the points halfway between two values, and their float32 neighbours."""
    grid = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    grid = np.unique(grid[np.isfinite(grid)])
    ties = (grid[1:] + grid[:-1]) / 2
    x = np.concatenate([grid, ties, *(np.nextafter(ties, np.float32(s)) for s in (-500, 500))])
    expected = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(nearest(jnp.asarray(x), jnp.float8_e4m3fn), expected)


@pytest.mark.parametrize("dtype", LARGEST)
def test_the_largest_of_each_channel_is_on_the_largest_of_the_grid(dtype):
    x = draw(64, 33) * 10.0 ** np.arange(-16, 17)
    x[:, 5] = 0
    values, scale = to_grid(x, (0,), jnp.dtype(dtype))
    most = np.abs(np.asarray(values, np.float32)).max(0)
    assert most[5] == 0 and scale[0, 5] == 1
    np.testing.assert_array_equal(np.delete(most, 5), LARGEST[dtype])
    expected, step = numpy_grid(x, 0, dtype)
    np.testing.assert_array_equal(np.asarray(values, np.float64), expected)
    error = np.abs(expected * step - x) / step
    if dtype == "float8_e4m3fn":
        assert np.all(error <= np.maximum(np.abs(x / step) / 16, 2**-10) * (1 + 1e-6))
    else:
        assert error.max() <= 0.5 + 1e-5


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("products", ["native", "emulated"])
def test_products_equal_numpy(dtype, products):
    x, w = draw(4, 6, 24) * np.logspace(-2, 2, 6)[:, None], draw(24, 3, 5, seed=1)
    w[:, 1, 2] = 0
    param = nnx.Param(stored(w, (0,), dtype, products), axes=("a", "b", "c"), inputs=("a",))
    y = jax.jit(product)(jnp.asarray(x, jnp.float32), param)
    expected = numpy_product(x.reshape(24, 24), w.reshape(24, 15), dtype).reshape(4, 6, 3, 5)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
    exact = np.tensordot(x, w, 1)
    assert np.abs(y - exact).max() > 1e-4 * np.abs(exact).max()
    # Summed over two axes, which share the scale of a token.
    x, w = x.reshape(4, 6, 6, 4), w.reshape(6, 4, 15)
    param = nnx.Param(stored(w, (0, 1), dtype, products), axes=("a", "b", "c"), inputs=("a", "b"))
    y = jax.jit(product)(jnp.asarray(x, jnp.float32), param)
    np.testing.assert_allclose(y, expected.reshape(4, 6, 15), rtol=1e-6, atol=1e-5)


def test_activations_join_only_where_the_format_says_so():
    x, w = jnp.asarray(draw(8, 24)), draw(24, 5)
    kinds = [
        nnx.Param(stored(w, (0,), "int8", products), axes=("a", "b"), inputs=("a",))
        for products in ("weight_only", "native", "emulated")
    ]
    weights, native, emulated = (product(x, param) for param in kinds)
    np.testing.assert_array_equal(weights, x @ kinds[0].get_value().dequantize(jnp.float32))
    np.testing.assert_array_equal(native, emulated)  # float32 adds such integers exactly
    assert np.abs(native - weights).max() > 1e-3
    on_grid = rounded(x, kinds[2])
    assert rounded(x, kinds[0]) is x
    np.testing.assert_allclose(product(on_grid, kinds[0]), native, atol=1e-5)


def test_half_precision_holds_every_value_of_the_grids():
    x, w = draw(8, 24).astype(ml_dtypes.bfloat16), draw(24, 5)
    for dtype in ("int8", "float8_e4m3fn"):
        param = nnx.Param(stored(w, (0,), dtype, "emulated"), axes=("a", "b"), inputs=("a",))
        y = product(jnp.asarray(x), param)
        assert y.dtype == jnp.bfloat16
        expected = numpy_product(x, w, dtype)
        np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_no_gradient_and_no_hidden_nan():
    w = draw(6, 5)
    param = nnx.Param(stored(w, (0,), "int8", "emulated"), axes=("a", "b"), inputs=("a",))
    x = jnp.asarray(draw(3, 6))
    assert not np.any(jax.grad(lambda x: product(x, param).sum())(x))
    through = jax.grad(lambda w: stored(w, (0,), "float8_e4m3fn", "native").scale.sum())
    assert not np.any(through(jnp.asarray(w)))
    for wrong in (jnp.nan, jnp.inf):
        y = product(x.at[1, 2].set(wrong), param)
        assert np.all(np.isnan(y[1])) and np.all(np.isfinite(y[::2]))


@pytest.mark.parametrize(
    "dtype, products, implementation",
    [
        ("int8", "emulated", "blocked"),
        ("float8_e4m3fn", "native", "blocked"),
        ("int8", "native", "ragged"),
        ("float8_e4m3fn", "emulated", "ragged"),
    ],
)
def test_grouped_rows_have_their_own_scales(dtype, products, implementation):
    """Multiplies each sorted row by its expert's matrix; rows outside all groups are zero."""
    rng = np.random.default_rng(3)
    chosen, real = jnp.asarray(rng.integers(0, 3, (20, 1))), jnp.arange(20) % 5 != 2
    x, w = draw(20, 16), draw(4, 16, 6, seed=1) * np.array([1, 30, 0.1, 1])[:, None, None]
    block = 8 if implementation == "blocked" else 1
    groups = group_by_expert(chosen, real, 4, block)
    source = np.asarray(groups.source)
    rows = jnp.where((source < 20)[:, None], jnp.asarray(x)[np.minimum(source, 19)], 0)
    matrices = stored(w, (1,), dtype, products)
    run = jax.jit(lambda *given: grouped(*given, groups, implementation))
    y = np.asarray(run(rows, matrices))
    for row, token in enumerate(source):
        expected = np.zeros(6)
        if token < 20:
            expected = numpy_product(x[token : token + 1], w[int(chosen[token, 0])], dtype)[0]
        np.testing.assert_allclose(y[row], expected, atol=1e-6 * np.abs(w).max() * 16)


def test_experts_agree_with_their_oracle_and_over_devices():
    """Tests every grouped product, and an expert's width in two parts with one scale per token."""
    parts = {"gate": (4, 16, 8), "up": (4, 16, 8), "down": (4, 8, 16)}
    whole = {name: draw(*shape, seed=i) for i, (name, shape) in enumerate(parts.items())}
    weights = ExpertWeights(*(stored(w, (1,), "int8", "emulated") for w in whole.values()))
    chosen = jnp.asarray(np.random.default_rng(0).permuted(np.tile(np.arange(4), (12, 1)), axis=1))
    given = jnp.asarray(draw(12, 16)), jnp.arange(12) != 3, chosen[:, :2], jnp.full((12, 2), 0.5)

    @partial(jax.jit, static_argnums=(0, 2))
    def run(experts, weights, across=()):
        apply = partial(apply_experts, config=small(experts=experts), across=across)
        if not across:
            return apply(weights, *given)
        parts = jax.vmap(lambda w: apply(w, *given), axis_name=across[0])(weights)
        return parts.sum(0)

    expected = run("dense", weights)
    assert not np.any(expected[3]) and np.abs(expected[4]).max() > 0.1
    for experts in ("blocked", "ragged"):
        np.testing.assert_allclose(run(experts, weights), expected, rtol=1e-5, atol=1e-5)

    def halves(w, axis):  # of a scale, too, if it has that axis
        cut = lambda a: jnp.stack(jnp.split(a, 2, axis) if a.shape[axis] > 1 else [a, a])  # noqa: E731
        return jax.tree.map(cut, w)

    cut = ExpertWeights(*(halves(w, axis) for w, axis in zip(weights, (2, 2, 1))))
    for experts in ("blocked", "dense"):
        found = run(experts, cut, ("tensor",))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_latent_attention_decodes_what_it_would_expand():
    """One column in the latent space is on the same grid as the expanded keys and values."""
    sizes = LatentSizes(key_value_rank=12, rotary_dim=2, value_dim=5, query_rank=None)
    config = small(latent=sizes, num_kv_heads=4, num_layers=1)
    model = quantize(random_model(config), "int8_w8a8")
    attention = jax.tree.map(lambda a: a[0], model.stacks[0][0].attention)
    q, latent = jnp.asarray(draw(2, 1, 4, 6)), jnp.asarray(draw(2, 7, 12, seed=1))
    rotated = jnp.asarray(draw(2, 7, 1, 2, seed=2))
    frame = make_frame(config, jnp.zeros((2, 1), jnp.int32), jnp.ones((2, 1), jnp.int32), None)
    frame = frame._replace(mask=jnp.ones((2, 1, 1, 7), bool))
    expanded = jax.jit(attention._expanded)(q, latent, rotated, frame)
    absorbed = jax.jit(attention._absorbed)(q, latent, rotated, frame)
    np.testing.assert_allclose(absorbed, expanded, rtol=1e-5, atol=1e-5)


def test_implementations_by_device():
    gpus = [
        ("int8", "7.0", "emulated"),
        ("int8", "8.0", "native"),
        ("float8_e4m3fn", "8.6", "emulated"),
        ("float8_e4m3fn", "8.9", "native"),
        ("float8_e4m3fn", "10.0", "native"),
    ]
    for dtype, capability, expected in gpus:
        gpu = SimpleNamespace(platform="gpu", compute_capability=capability)
        assert products_implementation(dtype, gpu) == expected
    kinds = [("TPU v5p", "emulated"), ("TPU v6 lite", "emulated"), ("TPU7x", "native")]
    for kind, expected in kinds:
        tpu = SimpleNamespace(platform="tpu", device_kind=kind)
        assert products_implementation("float8_e4m3fn", tpu) == expected
        assert products_implementation("int8", tpu) == "native"
    assert products_implementation("int8") == "emulated"
