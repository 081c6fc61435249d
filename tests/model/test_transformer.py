import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from common import (
    assert_close,
    assert_identical,
    forward,
    loss_weights,
    named,
    pack,
    pad,
    random_model,
    random_routing,
    sequences,
    small,
    value_and_grads,
    with_config,
)

from jaxrl_stable import model as m

ARCHITECTURES = {
    "moe": small(),
    "gates_not_normalised": small(norm_topk_prob=False),
    "leading_dense_layer": small(mlp_only_layers=(0,), num_layers=4, tie_embeddings=False),
    "alternating": small(decoder_sparse_step=2, num_layers=4),
    "all_dense": small(num_experts=0, num_layers=2),
    "one_kv_head": small(num_kv_heads=1, num_layers=2, rms_norm_eps=0.1, tie_embeddings=False),
    "one_query_per_key": small(num_kv_heads=4, num_layers=1, rope_theta=1e6),
}
MIXED = small(mlp_only_layers=(0,), num_layers=4)
BATCH = pad(sequences([9, 6]), 9, "left")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_agrees_with_the_numpy_reference(name):
    config = ARCHITECTURES[name]
    model, seqs = random_model(config), sequences([9, 6])
    weights = reference.unstack(model)
    output = forward(model, BATCH)
    targets = jnp.roll(BATCH.tokens, -1, axis=1)
    scores = jax.jit(m.token_log_probs, static_argnums=3)(model, output.hidden, targets, 0.7)
    assert output.router.experts.shape[0] == len(weights["layers"]) - sum(
        "router" not in layer for layer in weights["layers"]
    )
    for row, seq in enumerate(seqs):
        columns = slice(9 - len(seq), 9)
        hidden, experts = reference.forward(config, weights, seq)
        np.testing.assert_allclose(output.hidden[row, columns], hidden, atol=1e-5, rtol=1e-5)
        if len(experts):
            np.testing.assert_array_equal(output.router.experts[:, row, columns], experts)
        logp, entropy = reference.scores(weights, hidden, targets[row, columns], 0.7)
        np.testing.assert_allclose(scores.logp[row, columns], logp, atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(scores.entropy[row, columns], entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("field", [dict(rope_theta=200.0), dict(norm_topk_prob=False)])
def test_the_comparison_with_the_reference_is_sharp(field):
    model, (seq, _) = random_model(small()), sequences([9, 6])
    hidden, _ = reference.forward(small(**field), reference.unstack(model), seq)
    assert np.max(np.abs(forward(model, BATCH).hidden[0] - hidden)) > 1e-2


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize(
    "execution", [dict(scan_layers=False), dict(remat="dots"), dict(remat="block")], ids=str
)
def test_execution_changes_nothing(execution, replayed):
    model = random_model(MIXED)
    other = with_config(model, small(mlp_only_layers=(0,), num_layers=4, **execution))
    replay = random_routing(MIXED, BATCH) if replayed else None
    weights = loss_weights(BATCH)
    value, grads, output = value_and_grads(model, BATCH, weights, replay)
    value2, grads2, output2 = value_and_grads(other, BATCH, weights, replay)
    assert_close((value2, output2), (value, output), 1e-5)
    assert_close(grads2, grads, 2e-5)
    assert all(np.any(g) for g in named(grads).values())


def test_rematerialisation_recomputes_with_the_replayed_experts():
    # The gradient would be that of the live choice if the backward pass routed again.
    config = small(remat="block")
    model, weights = random_model(config), loss_weights(BATCH)
    replay = random_routing(config, BATCH)
    _, grads, _ = value_and_grads(model, BATCH, weights, replay)
    _, live, _ = value_and_grads(model, BATCH, weights)
    unused = np.asarray(jax.tree.leaves(grads.stacks[0][0].mlp.gate)[0])
    assert np.max(np.abs(unused - jax.tree.leaves(live.stacks[0][0].mlp.gate)[0])) > 1e-3


@pytest.fixture(scope="module")
def alone():
    """Each sequence by itself, without any padding."""
    model = random_model(MIXED)
    seqs = sequences([5, 7])
    return model, seqs, [forward(model, pad([seq], len(seq), "left")) for seq in seqs]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_columns_and_rows_change_nothing(alone, side):
    model, seqs, expected = alone
    batch = pad([*seqs, []], 11, side)
    output = forward(model, batch)
    for row, (seq, own) in enumerate(zip(seqs, expected, strict=True)):
        columns = slice(11 - len(seq), 11) if side == "left" else slice(0, len(seq))
        np.testing.assert_allclose(output.hidden[row, columns], own.hidden[0], atol=1e-5)
        np.testing.assert_array_equal(
            output.router.experts[:, row, columns], own.router.experts[:, 0]
        )
        np.testing.assert_allclose(
            output.router.confidence[:, row, columns], own.router.confidence[:, 0], atol=1e-5
        )
    load = sum(own.router.load for own in expected)
    np.testing.assert_array_equal(output.router.load, load)
    assert np.all(np.isfinite(output.hidden))


def test_packed_sequences_do_not_see_each_other(alone):
    model, seqs, expected = alone
    output = forward(model, pack(seqs, 14))
    start = 0
    for seq, own in zip(seqs, expected, strict=True):
        columns = slice(start, start + len(seq))
        np.testing.assert_allclose(output.hidden[0, columns], own.hidden[0], atol=1e-5)
        np.testing.assert_array_equal(
            output.router.experts[:, 0, columns], own.router.experts[:, 0]
        )
        start += len(seq)
    # Control: as one segment they do see each other.
    one = pack(seqs, 14)
    one = one._replace(segment_ids=(one.segment_ids > 0).astype(jnp.int32))
    assert np.max(np.abs(forward(model, one).hidden - output.hidden)) > 1e-2


def test_padding_changes_no_gradient():
    model, seqs = random_model(MIXED), sequences([6, 6])
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6)), jnp.float32)
    weights = weights.at[:, -1].set(0)
    expected = value_and_grads(model, pad(seqs, 6, "right"), weights)
    padded = value_and_grads(
        model, pad([*seqs, []], 10, "right", pad_id=3), jnp.pad(weights, ((0, 1), (0, 4)))
    )
    assert_close(padded[:2], expected[:2], 2e-5)


def test_token_ids_at_padding_do_not_matter():
    model, seqs = random_model(MIXED), sequences([6, 4])
    one, other = pad(seqs, 8, "left", pad_id=0), pad(seqs, 8, "left", pad_id=39)
    weights = loss_weights(one)
    value, grads, output = value_and_grads(model, one, weights)
    value2, grads2, output2 = value_and_grads(model, other, weights)
    real = np.asarray(one.segment_ids != 0)
    assert value == value2
    assert_identical(grads2, grads)
    np.testing.assert_array_equal(output.hidden[real], output2.hidden[real])
    assert np.max(np.abs(output.hidden[~real] - output2.hidden[~real])) > 0  # the ids did differ


@pytest.mark.parametrize(
    "config", [MIXED, small(decoder_sparse_step=2, num_layers=4)], ids=["leading", "alternating"]
)
@pytest.mark.parametrize("widths", [(4, 1, 1, 1, 1, 1), (5, 2, 2)], ids=["tokens", "chunks"])
def test_decoding_with_the_cache_equals_the_full_pass(config, widths):
    model = random_model(config)
    batch = pad(sequences([9, 7]), 9, "left")
    full = forward(model, batch)
    step = jax.jit(lambda model, part, cache: model(*part, cache=cache))
    cache, hidden, experts, start = m.empty_cache(config, 2, 12), [], [], 0
    for width in widths:
        part = jax.tree.map(lambda a, c=slice(start, start + width): a[:, c], batch)
        output = step(model, part, cache)
        cache, start = output.cache, start + width
        hidden.append(output.hidden)
        experts.append(output.router.experts)
    real = np.asarray(batch.segment_ids != 0)
    hidden, experts = np.concatenate(hidden, 1), np.concatenate(experts, 2)
    np.testing.assert_allclose(hidden[real], full.hidden[real], atol=1e-5)
    np.testing.assert_array_equal(experts[:, real], full.router.experts[:, real])
    assert cache.length == 9
    np.testing.assert_array_equal(cache.segment_ids[:, :9], batch.segment_ids)
    for array in (cache.keys, cache.values):
        assert not np.any(array[:, :, 9:]) and np.all(np.any(array[:, :, :9], axis=(2, 3, 4)))


def test_a_row_that_is_done_does_not_disturb_the_others():
    model, seqs = random_model(MIXED), sequences([6, 6])
    batch = pad(seqs, 6, "left")
    done = batch._replace(segment_ids=batch.segment_ids.at[0, 4:].set(0))
    np.testing.assert_allclose(
        forward(model, batch).hidden[1], forward(model, done).hidden[1], atol=1e-6
    )


@pytest.mark.fast
def test_bfloat16_keeps_the_router_and_the_log_probabilities_in_float32():
    config = small(dtype="bfloat16")
    model = random_model(config)
    weights = loss_weights(BATCH)
    value, grads, output = value_and_grads(model, BATCH, weights)
    scores = jax.jit(m.token_log_probs)(model, output.hidden, BATCH.tokens)
    assert output.hidden.dtype == jnp.bfloat16
    assert output.router.confidence.dtype == jnp.float32
    assert scores.logp.dtype == scores.entropy.dtype == value.dtype == jnp.float32
    assert all(g.dtype == np.float32 for g in named(grads).values())  # param_dtype
    assert all(np.all(np.isfinite(a)) for a in named((value, grads, scores)).values())
    # Not merely float32 containers: bfloat16 values would be exact multiples of 2^-8 near one.
    assert np.any(np.asarray(scores.logp) != np.asarray(scores.logp.astype(jnp.bfloat16)))
    confidence = output.router.confidence
    assert np.any(np.asarray(confidence) != np.asarray(confidence.astype(jnp.bfloat16)))
    exact = forward(with_config(model, small()), BATCH).hidden
    real = np.asarray(BATCH.segment_ids != 0)
    error = np.abs(output.hidden.astype(jnp.float32) - exact)[real]
    assert 0 < np.median(error) < 0.1


@pytest.mark.fast
def test_router_logits_are_a_float32_product_whatever_the_type_of_activations():
    config = small(dtype="bfloat16", num_layers=1)
    model = random_model(config)
    jaxpr = jax.make_jaxpr(lambda model: model(*BATCH))(model)
    products = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    router = [
        e
        for e in products
        if e.outvars[0].aval.shape == (*BATCH.tokens.shape, config.num_experts)
    ]
    assert len(router) == 1
    assert all(v.aval.dtype == jnp.float32 for v in (*router[0].invars, *router[0].outvars))
    assert any(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


def test_initial_logits_are_of_order_one():
    # A wrong scale of embedding or head would start training from a degenerate policy.
    for tie in (True, False):
        config = small(tie_embeddings=tie)
        hidden = forward(m.init_model(config, 0), BATCH).hidden
        logits = hidden @ m.init_model(config, 0).head_weight()
        assert 0.3 < float(jnp.std(logits)) < 3.0


@pytest.mark.fast
def test_initialisation_is_a_function_of_the_seed():
    config = small(num_layers=1)
    assert_identical(m.init_model(config, 1), m.init_model(config, 1))
    one, two = named(m.init_model(config, 1)), named(m.init_model(config, 2))
    assert all(np.any(one[path] != two[path]) for path in one if "norm" not in path)


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from _equations(inner.jaxpr)
