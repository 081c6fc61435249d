import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable import model as m
from jaxrl_stable.model.parameters import Quantized, read
from jaxrl_stable.quantize import quantize

QUICK = {"xla_backend_optimization_level": 0}  # compiling is nearly all of the time

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


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)  # NumPy: nothing to compile
    template = jax.eval_shape(lambda: m.init_model(CONFIG, 0))
    return jax.tree.map(lambda a: jnp.asarray(0.3 * rng.normal(size=a.shape), a.dtype), template)


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


def test_errors_are_within_half_a_step_of_each_channel(model, copy):
    original = parameters(model)
    for path, param in parameters(copy).items():
        if path in KEPT:
            continue
        value, w = param.get_value(), np.asarray(original[path].get_value())
        axes = SUMMED[path.split(".", 3)[-1]]
        assert value.values.dtype == jnp.int8 and value.values.shape == w.shape
        assert value.scale.dtype == jnp.float32
        scale = np.abs(w).max(axes, keepdims=True) / 127
        np.testing.assert_allclose(value.scale, scale, rtol=1e-6)
        error = np.abs(np.asarray(value.dequantize(jnp.float32)) - w)
        assert np.all(error <= scale / 2 * (1 + 1e-5)) and error.max() > 0
        assert np.abs(np.asarray(value.values)).max() == 127  # the whole range, symmetric
        assert np.asarray(value.values).min() >= -127


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


def test_outputs_differ_but_little(model, copy):
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 1, 40)
    positions = jnp.broadcast_to(jnp.arange(8), (2, 8))
    run = jax.jit(
        lambda model: model(tokens, positions, jnp.ones_like(tokens)),
        compiler_options=QUICK,
    )
    exact, output = run(model), run(copy)
    logp = m.token_log_probs(model, exact.hidden, tokens).logp
    gap = np.abs(m.token_log_probs(copy, output.hidden, tokens).logp - logp)
    assert 1e-5 < gap.mean() < 0.05
    assert output.router.experts.shape == exact.router.experts.shape


def test_formats(model):
    assert quantize(model, "none") is model
    with pytest.raises(ValueError, match=r"fp4.*int8"):
        quantize(model, "fp4")


def test_quantising_can_be_jitted(model, copy):
    compiled = jax.jit(lambda model: quantize(model, "int8"), compiler_options=QUICK)(model)
    assert jax.tree.structure(compiled) == jax.tree.structure(copy)
    for a, b in zip(jax.tree.leaves(compiled), jax.tree.leaves(copy), strict=True):
        np.testing.assert_allclose(a.astype(float), b.astype(float), rtol=1e-6, atol=1)
