import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable import model as m
from jaxrl_stable.configs import FORMATS
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.model.parameters import Quantized, read
from jaxrl_stable.sampler.quantize import expanded, quantize, resolve_products, sampling_copy
from jaxrl_stable.sampler.rollout import Sampling, rollout
from jaxrl_stable.trainer.batch import make_batch
from jaxrl_stable.trainer.score import score

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes nearly all of the time

CONFIG = m.tiny(
    vocab_size=40,
    hidden_size=16,
    num_layers=3,
    head_dim=6,
    intermediate_size=20,
    num_experts=4,
    moe_intermediate_size=10,
    mlp_only_layers=(0,),
    tie_embeddings=False,
)
# Sums run over these axes of a stacked parameter; the scale has one entry for all others.
SUMMED = {
    "attention.query": (1,),
    "attention.key": (1,),
    "attention.value": (1,),
    "attention.out": (1, 2),
    "mlp.gate": (-2,),
    "mlp.up": (-2,),
    "mlp.down": (-2,),
}
KEPT = ["embedding", "head", "norm.weight"] + [
    f"stacks.{stack}.0.{name}"
    for stack, moe in ((0, False), (1, True))
    for name in [
        "attention.key_norm.weight",
        "attention.query_norm.weight",
        "attention_norm.weight",
        "mlp_norm.weight",
        *(["mlp.router"] if moe else []),
    ]
]


# One stack, so that little is compiled; its shared expert is a dense layer.
STACK = dataclasses.replace(
    CONFIG, num_layers=2, mlp_only_layers=(), num_shared_experts=1, tie_embeddings=True
)


def draw(config):
    rng = np.random.default_rng(0)  # NumPy: nothing to compile
    template = jax.eval_shape(lambda: m.init_model(config, 0))
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), template)


@pytest.fixture(scope="module")
def model():
    return draw(CONFIG)


@pytest.fixture(scope="module")
def stack():
    return draw(STACK)


@pytest.fixture(scope="module")
def copy(model):
    return quantize(model, "int8")


def parameters(model):
    leaves = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@pytest.mark.fast
def test_which_parameters_are_quantised(model, copy):
    quantised, kept = [], []
    for path, param in parameters(copy).items():
        (quantised if isinstance(param.get_value(), Quantized) else kept).append(path)
    assert sorted(kept) == sorted(KEPT)
    assert sorted(quantised) == sorted(
        f"stacks.{stack}.0.{name}" for stack in (0, 1) for name in SUMMED
    )


def test_kept_parameters_are_the_same_arrays(model, copy):
    original, other = parameters(model), parameters(copy)
    for path in KEPT:
        assert other[path].get_value() is original[path].get_value()


@pytest.mark.parametrize(
    "format, dtype, largest",
    [
        ("int8", "int8", 127),
        ("int4", "int4", 7),
        ("fp8", "float8_e4m3fn", 448),
        ("int8_w8a8", "int8", 127),
        ("fp8_w8a8", "float8_e4m3fn", 448),
    ],
)
def test_errors_are_within_half_a_step_of_each_channel(model, format, dtype, largest):
    original = parameters(model)
    for path, param in parameters(quantize(model, format)).items():
        if path in KEPT:
            continue
        value, w = param.get_value(), np.asarray(original[path].get_value())
        axes = SUMMED[path.split(".", 3)[-1]]
        assert value.values.dtype == dtype and value.values.shape == value.shape == w.shape
        assert value.products == ("emulated" if "w8a8" in format else "weight_only")
        assert value.scale.dtype == jnp.float32
        scale = np.abs(w).max(axes, keepdims=True) / largest
        np.testing.assert_allclose(value.scale, scale, rtol=1e-6)
        values = np.asarray(value.values, np.float32)
        step = scale
        if "fp8" in format:  # 2^(e - 3) between 2^e and 2^(e + 1), 2^-9 below 2^-6
            exponent = np.floor(np.log2(np.maximum(np.abs(w / scale), 2.0**-6)))
            step = scale * 2.0 ** (exponent - 3)
        error = np.abs(np.asarray(value.dequantize(jnp.float32)) - w)
        assert np.all(error <= step / 2 * (1 + 1e-4)) and error.max() > 0
        most = np.abs(values).max(axes)  # the whole range, symmetric
        np.testing.assert_array_equal(most, largest)


def test_the_copy_is_smaller(model, copy):
    def size(tree, paths):
        params = parameters(tree)
        return sum(leaf.nbytes for path in paths for leaf in jax.tree.leaves(params[path]))

    paths = [path for path in parameters(model) if path not in KEPT]
    assert size(copy, paths) < 0.4 * size(model, paths)  # 1/4, and the scales of small matrices


def test_columns_of_zeros_stay_zero(model):
    zeroed = jax.tree.map(lambda a: a, model)
    up = zeroed.stacks[1][0].mlp.up
    up.set_value(up.get_value().at[1, 2, :, 3].set(0))
    value = quantize(zeroed, "int8").stacks[1][0].mlp.up.get_value()
    assert np.all(np.isfinite(value.scale)) and np.all(np.asarray(value.scale) > 0)
    assert not np.any(value.dequantize(jnp.float32)[1, 2, :, 3])


def test_values_by_hand(model):
    known = jax.tree.map(lambda a: a, model)
    down = known.stacks[0][0].mlp.down
    column = jnp.zeros(20).at[:4].set(jnp.array([1.27, -0.5, 0.014, -1.0]))
    down.set_value(down.get_value().at[0, :, 0].set(column))
    value = quantize(known, "int8").stacks[0][0].mlp.down.get_value()
    assert float(value.scale[0, 0, 0]) == pytest.approx(0.01)
    np.testing.assert_array_equal(value.values[0, :5, 0], [127, -50, 1, -100, 0])


def test_reading_gives_the_compute_type(copy):
    for dtype in (jnp.float32, jnp.bfloat16):
        assert read(copy.stacks[0][0].mlp.up, dtype).dtype == dtype


TOKENS = jnp.asarray(np.random.default_rng(1).integers(1, 40, (4, 16)))


@pytest.fixture(scope="module")
def gaps(stack):
    """Returns the mean |Δ log p| of each format."""
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))

    @partial(jax.jit, static_argnums=1, compiler_options=QUICK)
    def log_probs(model, format):
        copy = quantize(model, format)
        output = copy(TOKENS, positions, jnp.ones_like(TOKENS))
        return m.token_log_probs(copy, output.hidden, TOKENS).logp

    logp = {format: log_probs(stack, format) for format in FORMATS}
    return {format: float(np.abs(logp["none"] - x).mean()) for format, x in logp.items()}


def test_outputs_differ_by_the_coarseness_of_the_format(gaps):
    assert gaps["none"] == 0
    assert 1e-5 < gaps["int8"] < gaps["fp8"] < gaps["int4"] < 1
    for format in ("int8", "fp8"):  # quantised activations add to it
        assert gaps[format] * 1.1 < gaps[f"{format}_w8a8"] < 10 * gaps[format]


@pytest.mark.parametrize("format", FORMATS[1:])
def test_an_expanded_copy_computes_the_same(stack, format):
    positions = jnp.broadcast_to(jnp.arange(16), (4, 16))

    @partial(jax.jit, compiler_options=QUICK)
    def hidden(copy):
        return copy(TOKENS, positions, jnp.ones_like(TOKENS)).hidden

    copy = quantize(stack, format)
    wide = expanded(copy)
    leaves = [leaf.dtype for leaf in jax.tree.leaves(wide)]
    assert set(leaves) == {jnp.dtype("float32")}
    np.testing.assert_array_equal(hidden(wide), hidden(copy))
    assert np.any(hidden(wide) != hidden(stack))


def test_native_products_keep_the_narrow_type(stack):
    copy = quantize(stack, "int8_w8a8", "native")
    for a, b in zip(jax.tree.leaves(expanded(copy)), jax.tree.leaves(copy), strict=True):
        assert a is b


@pytest.fixture(scope="module")
def mismatch():
    """Returns the metrics of `score` for rollouts of several models at once."""

    def run(model, trajectory):
        batch = make_batch(trajectory, jnp.zeros(4))
        scored = score(model, batch, replay="none", micro_batch_size=4, temperature=1.0)
        return finalize(scored.metrics)

    return jax.jit(jax.vmap(run), compiler_options=QUICK)


@pytest.mark.parametrize("format", FORMATS[1:])
def test_rollouts_of_several_models_at_once(stack, mismatch, format):
    """Jitted and mapped over two models, each has its own mismatch, finite and not zero."""
    prompts = jnp.asarray(np.random.default_rng(2).integers(4, 40, (4, 3)))

    def run(model):
        sampler = sampling_copy(model, format)
        return rollout(sampler, prompts, prompts > 0, jax.random.key(1), Sampling(5))

    two = jax.tree.map(lambda a: jnp.stack([a, 0.9 * a]), stack)
    trajectory = jax.jit(jax.vmap(run), compiler_options=QUICK)(two)
    metrics = mismatch(two, trajectory)
    kl = np.asarray(metrics["mismatch/kl_k3_token_mean"])
    assert np.all(np.isfinite(kl)) and np.all(kl > 1e-9) and kl[0] != kl[1]
    assert np.all(np.asarray(metrics["mismatch/abs_token_max"]) < 3)


def test_who_multiplies():
    assert [resolve_products(format) for format in FORMATS] == ["weight_only"] * 4 + [
        "emulated"
    ] * 2
    assert resolve_products("fp8_w8a8", "native") == "native"
    assert resolve_products("int4", "native") == "weight_only"
    with pytest.raises(ValueError, match=r"products is 'fast'; use .*'native'"):
        resolve_products("int8_w8a8", "fast")


def test_no_gradient_passes_through(model):
    """A loss of the copy has no gradient with respect to the weights that were quantised."""

    def total(model):
        leaves = [param.get_value() for param in parameters(quantize(model, "fp8")).values()]
        return sum(q.dequantize(jnp.float32).sum() for q in leaves if isinstance(q, Quantized))

    assert not any(np.any(g) for g in jax.tree.leaves(jax.grad(total)(model)))


def test_formats(model):
    assert quantize(model, "none") is model
    with pytest.raises(ValueError, match=r"fp4.*int8"):
        quantize(model, "fp4")


def test_quantising_can_be_jitted(model, copy):
    compiled = jax.jit(lambda model: quantize(model, "int8"), compiler_options=QUICK)(model)
    assert jax.tree.structure(compiled) == jax.tree.structure(copy)
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(copy), strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-6, atol=1)
