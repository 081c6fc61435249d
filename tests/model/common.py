"""Shared by the tests of the model: a small configuration, batches and jitted passes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxrl_stable import model as m
from jaxrl_stable.routing import Routing


def small(**overrides):
    """Returns a configuration with unusual sizes, so that axes cannot be confused."""
    fields = dict(
        vocab_size=40,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        intermediate_size=20,
        num_experts=7,
        num_experts_per_token=3,
        moe_intermediate_size=10,
        rope_theta=100.0,
        tie_embeddings=True,
        head_chunk=8,
    )
    return m.tiny(**(fields | overrides))


@functools.cache
def random_model(config, seed=0):
    """Returns a model whose norm weights are not all one, so a forgotten weight shows.

    The weights are drawn with NumPy, so nothing is compiled for them.
    """
    rng = np.random.default_rng(seed)

    def draw(param):
        shape, metadata = param.get_value().shape, param.get_metadata()
        if metadata["inputs"] is None:
            return param.replace(jnp.asarray(1 + 0.3 * rng.normal(size=shape), param.dtype))
        fan_in = np.prod([shape[metadata["axes"].index(name)] for name in metadata["inputs"]])
        return param.replace(jnp.asarray(rng.normal(size=shape) / np.sqrt(fan_in), param.dtype))

    template = jax.eval_shape(lambda: m.init_model(config, 0))
    return jax.tree.map(draw, template, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def with_config(model, config):
    """Returns the same weights under a config that differs only in how it is computed."""
    structure = jax.tree.structure(jax.eval_shape(lambda: m.init_model(config, 0)))
    return jax.tree.unflatten(structure, jax.tree.leaves(model))


class Batch(NamedTuple):
    tokens: jax.Array
    positions: jax.Array
    segment_ids: jax.Array


def sequences(lengths, vocab_size=40, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, vocab_size, length) for length in lengths]


def pad(seqs, width, side, pad_id=0):
    """Returns a batch with one sequence per row, padded on one side."""
    shape = (len(seqs), width)
    tokens, positions, segments = np.full(shape, pad_id), np.zeros(shape, int), np.zeros(shape, int)
    for row, seq in enumerate(seqs):
        start = width - len(seq) if side == "left" else 0
        columns = slice(start, start + len(seq))
        tokens[row, columns], positions[row, columns] = seq, np.arange(len(seq))
        segments[row, columns] = 1
    return Batch(*(jnp.asarray(a, jnp.int32) for a in (tokens, positions, segments)))


def pack(seqs, width):
    """Returns a batch with all sequences in one row, as segments 1, 2, ..."""
    gap = width - sum(map(len, seqs))
    tokens = np.concatenate([*seqs, np.zeros(gap, int)])
    positions = np.concatenate([np.arange(len(seq)) for seq in seqs] + [np.zeros(gap, int)])
    segments = np.repeat(np.arange(1, len(seqs) + 2) % (len(seqs) + 1), [*map(len, seqs), gap])
    return Batch(*(jnp.asarray(a, jnp.int32)[None] for a in (tokens, positions, segments)))


MIXED = small(mlp_only_layers=(0,))  # a dense layer, then two with experts
BATCH = pad(sequences([9, 6]), 9, "left")

# These tests spend nearly all of their time compiling.
QUICK = {"xla_backend_optimization_level": 0}


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(model, batch, replay=None):
    return model(*batch, replay=replay)


def differentiate(model, batch, weights, replay=None):
    """Returns value and gradients of `Σ weights · log π(next token)`, and the model's output."""

    def loss(model):
        output = model(*batch, replay=replay)
        scores = m.token_log_probs(model, output.hidden, jnp.roll(batch.tokens, -1, axis=1))
        return jnp.sum(weights * scores.logp), output

    (value, output), grads = jax.value_and_grad(loss, has_aux=True)(model)
    return value, grads, output


value_and_grads = jax.jit(differentiate, compiler_options=QUICK)
# With all of the compiler's optimisations, because fusion could break bitwise equality.
optimised = jax.jit(differentiate)


def loss_weights(batch, seed=0):
    """Returns random weights of tokens with a successor in their segment; zero elsewhere."""
    segments = np.asarray(batch.segment_ids)
    counts = (segments != 0) & (segments == np.roll(segments, -1, axis=1))
    counts[:, -1] = False
    return jnp.asarray(
        np.random.default_rng(seed).normal(size=segments.shape) * counts, jnp.float32
    )


def random_routing(config, batch, seed=0):
    """Returns K distinct random experts per token: indices that the live router did not choose."""
    rng = np.random.default_rng(seed)
    shape = (config.num_moe_layers, *batch.tokens.shape, config.num_experts)
    order = np.argsort(rng.random(shape), axis=-1)[..., : config.num_experts_per_token]
    return Routing(jnp.asarray(order, jnp.uint8), batch.segment_ids != 0)


def named(tree):
    """Returns the leaves by path, as NumPy arrays."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_close(actual, expected, tolerance):
    """Checks that two trees agree, relative to the largest entry of each leaf."""
    actual, expected = jax.tree.leaves(actual), named(expected)
    assert len(actual) == len(expected)
    for a, (path, b) in zip(actual, expected.items(), strict=True):
        error = np.max(np.abs(np.asarray(a) - b), initial=0.0)
        assert error <= tolerance * max(np.max(np.abs(b), initial=0.0), 1e-6), (path, error)


def assert_identical(actual, expected):
    """Checks that all leaves of two trees agree bit for bit."""
    for a, (path, b) in zip(jax.tree.leaves(actual), named(expected).items(), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b, err_msg=path)
