import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import model as m
from tests.model import reference
from tests.model.common import (
    BATCH,
    MIXED,
    QUICK,
    assert_close,
    assert_identical,
    differentiate,
    forward,
    loss_weights,
    named,
    optimised,
    pack,
    pad,
    random_model,
    random_routing,
    sequences,
    small,
    value_and_grads,
    with_config,
)

score = jax.jit(m.token_log_probs, compiler_options=QUICK)

ARCHITECTURES = {
    "moe": small(),
    "gates_not_normalised": small(norm_topk_prob=False),
    "leading_dense_layer": small(mlp_only_layers=(0,), tie_embeddings=False),
    "alternating": small(decoder_sparse_step=2, num_layers=5),  # and one more dense layer
    "all_dense": small(num_experts=0, num_layers=2),
    "one_kv_head": small(num_kv_heads=1, num_layers=2, rms_norm_eps=0.1, tie_embeddings=False),
    "one_query_per_key": small(num_kv_heads=4, num_layers=1, rope_theta=1e6),
}


@pytest.mark.parametrize(
    "name", [pytest.param("moe", marks=pytest.mark.fast), *list(ARCHITECTURES)[1:]]
)
def test_agrees_with_the_numpy_reference(name):
    config = ARCHITECTURES[name]
    model, seqs = random_model(config), sequences([9, 6])
    weights = reference.unstack(model)
    output = forward(model, BATCH)
    targets = jnp.roll(BATCH.tokens, -1, axis=1)
    scores = score(model, output.hidden, targets, 0.7)
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


EXECUTIONS = [
    dict(scan_layers=False),
    dict(remat="dots"),
    dict(remat="block"),
    dict(remat="block", scan_layers=False),
    dict(remat="offload"),
]


@pytest.fixture(scope="module")
def partly_replayed():
    """Replays random experts for two thirds of the tokens, so both branches are taken."""
    routing = random_routing(MIXED, BATCH)
    replay = dataclasses.replace(routing, valid=routing.valid & (BATCH.positions % 3 != 1))
    return replay, value_and_grads(random_model(MIXED), BATCH, loss_weights(BATCH), replay)


@pytest.mark.parametrize("execution", EXECUTIONS[:3], ids=str)
def test_execution_changes_nothing(partly_replayed, execution):
    # Were the backward pass of remat to route again, it would use other experts than the forward.
    replay, (value, grads, output) = partly_replayed
    model = with_config(random_model(MIXED), dataclasses.replace(MIXED, **execution))
    value2, grads2, output2 = value_and_grads(model, BATCH, loss_weights(BATCH), replay)
    assert_close((value2, output2), (value, output), 1e-5)
    assert_close(grads2, grads, 2e-5)
    assert all(np.any(g) for g in named(grads).values())


@pytest.mark.fast
@pytest.mark.parametrize("execution", EXECUTIONS, ids=str)
def test_execution_traces_without_replay(execution):
    model = with_config(random_model(MIXED), dataclasses.replace(MIXED, **execution))
    value, grads, output = jax.eval_shape(differentiate, model, BATCH, loss_weights(BATCH))
    assert value.shape == () and output.router.experts.shape == (2, 2, 9, 3)
    assert [g.shape for g in jax.tree.leaves(grads)] == [w.shape for w in jax.tree.leaves(model)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_columns_and_rows_change_nothing(side):
    model, seqs = random_model(MIXED), sequences([5, 7])
    output = forward(model, pad([*seqs, []], 11, side))
    load = np.zeros((2, 7))
    for row, seq in enumerate(seqs):
        columns = slice(11 - len(seq), 11) if side == "left" else slice(0, len(seq))
        hidden, experts = reference.forward(MIXED, reference.unstack(model), seq)
        np.testing.assert_allclose(output.hidden[row, columns], hidden, atol=1e-5)
        np.testing.assert_array_equal(output.router.experts[:, row, columns], experts)
        load += np.stack([np.bincount(layer.ravel(), minlength=7) for layer in experts])
    np.testing.assert_array_equal(output.router.load, load)
    assert np.all(np.isfinite(output.hidden))


def test_packed_sequences_do_not_see_each_other():
    model, seqs = random_model(MIXED), sequences([5, 7])
    batch = pack(seqs, 14)
    output = forward(model, batch)
    start = 0
    for seq in seqs:
        columns = slice(start, start + len(seq))
        hidden, experts = reference.forward(MIXED, reference.unstack(model), seq)
        np.testing.assert_allclose(output.hidden[0, columns], hidden, atol=1e-5)
        np.testing.assert_array_equal(output.router.experts[:, 0, columns], experts)
        start += len(seq)
    assert output.router.load.sum() == 2 * 3 * 12
    # Control: as one segment they do see each other.
    one = batch._replace(segment_ids=(batch.segment_ids > 0).astype(jnp.int32))
    assert np.max(np.abs(forward(model, one).hidden - output.hidden)) > 1e-2


def test_padding_changes_no_gradient():
    model, seqs = random_model(MIXED), sequences([9, 6])
    weights = loss_weights(BATCH)
    expected = optimised(model, BATCH, weights)
    moved = np.zeros((3, 11), np.float32)  # the same tokens, right-padded
    moved[0, :9], moved[1, :6] = weights[0], weights[1, 3:]
    padded = value_and_grads(model, pad([*seqs, []], 11, "right", pad_id=3), jnp.asarray(moved))
    assert_close(padded[:2], expected[:2], 2e-5)


def test_token_ids_at_padding_do_not_matter():
    model, seqs = random_model(MIXED), sequences([9, 6])
    one, other = pad(seqs, 9, "left", pad_id=0), pad(seqs, 9, "left", pad_id=39)
    weights = loss_weights(one)
    value, grads, output = optimised(model, one, weights)
    value2, grads2, output2 = optimised(model, other, weights)
    real = np.asarray(one.segment_ids != 0)
    assert value == value2
    assert_identical(grads2, grads)
    np.testing.assert_array_equal(output.hidden[real], output2.hidden[real])
    assert np.max(np.abs(output.hidden[~real] - output2.hidden[~real])) > 0  # the ids did differ


@pytest.mark.parametrize(
    ("config", "widths"),
    [(MIXED, (4, 1, 1, 1, 1, 1)), (ARCHITECTURES["alternating"], (5, 2, 2))],
    ids=["tokens", "chunks"],
)
def test_decoding_with_the_cache_equals_the_full_pass(config, widths):
    model, batch = random_model(config), BATCH
    full = forward(model, batch)
    step = jax.jit(lambda model, part, cache: model(*part, cache=cache), compiler_options=QUICK)
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
    model = random_model(MIXED)
    done = BATCH._replace(segment_ids=BATCH.segment_ids.at[0, 5:].set(0))
    expected, output = forward(model, BATCH).hidden, forward(model, done).hidden
    np.testing.assert_allclose(output[1, 3:], expected[1, 3:], atol=1e-6)
    np.testing.assert_allclose(output[0, :5], expected[0, :5], atol=1e-6)
    assert np.max(np.abs(output[0, 5:] - expected[0, 5:])) > 1e-2


def test_bfloat16_keeps_the_router_and_the_log_probabilities_in_float32():
    config = small(dtype="bfloat16")
    model = random_model(config)
    weights = loss_weights(BATCH)
    value, grads, output = value_and_grads(model, BATCH, weights)
    scores = score(model, output.hidden, BATCH.tokens, 1.0)
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


@pytest.mark.parametrize("scan", [True, False])
def test_rematerialisation_recomputes_what_it_says(scan):
    def products(remat):
        config = dataclasses.replace(MIXED, remat=remat, scan_layers=scan)
        model = with_config(random_model(MIXED), config)
        jaxpr = jax.make_jaxpr(differentiate)(model, BATCH, loss_weights(BATCH)).jaxpr
        return sum(e.primitive.name == "dot_general" for e in _equations(jaxpr))

    # "dots" keeps what it names; the router's and the output projections are computed again.
    assert products("none") < products("dots") < products("block")


def test_router_logits_are_a_float32_product_whatever_the_type_of_activations():
    config = small(dtype="bfloat16", num_layers=1)
    model = random_model(config)
    jaxpr = jax.make_jaxpr(lambda model: model(*BATCH))(model)
    products = [e for e in _equations(jaxpr.jaxpr) if e.primitive.name == "dot_general"]
    router = [
        e for e in products if e.outvars[0].aval.shape == (*BATCH.tokens.shape, config.num_experts)
    ]
    assert len(router) == 1
    assert all(v.aval.dtype == jnp.float32 for v in (*router[0].invars, *router[0].outvars))
    assert any(v.aval.dtype == jnp.bfloat16 for e in products for v in e.invars)


def test_initialisation():
    config = small(num_layers=1, tie_embeddings=False)
    init = jax.jit(lambda key: m.init_model(config, key), compiler_options=QUICK)
    model = init(jax.random.key(1))
    assert_identical(init(jax.random.key(1)), model)
    one, two = named(model), named(init(jax.random.key(2)))
    assert all(np.any(one[path] != two[path]) for path in one if "norm" not in path)
    # Logits of order one, tied or not: a wrong scale would start from a degenerate policy.
    hidden = forward(model, BATCH).hidden
    for weight in (model.head.get_value(), model.embedding.get_value().T):
        assert 0.3 < float(jnp.std(hidden @ weight)) < 3.0


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from _equations(inner.jaxpr)
