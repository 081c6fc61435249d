"""Bugs that other systems had with routing replay; each test names where they were reported.

Most were silent: training continued on experts other than the reported ones. The whole list, with
the tests in other files, is in test_bug_catalogue.py.
"""

import dataclasses
import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable import configs
from jaxrl_stable.diagnostics import finalize
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.model.experts import Experts
from jaxrl_stable.routing import Routing, validate
from jaxrl_stable.run.evaluation import evaluate
from jaxrl_stable.sampler.rollout import rollout
from jaxrl_stable.trainer.batch import TrainBatch, make_batch, split
from jaxrl_stable.trainer.score import with_old_policy
from tests.negative_controls import shift


@pytest.fixture(scope="module")
def rescored(model, trajectory, advantages, passes):
    """Scores the rollout under R3 with another routing; sampler and trainer are the same model."""

    def run(routing):
        changed = dataclasses.replace(trajectory, routing=routing)
        return passes.scored(model, changed, advantages, "R3")

    return run


@pytest.fixture(scope="module")
def good(trajectory, rescored):
    return rescored(trajectory.routing)


def values(scored):
    return {name: float(value) for name, value in finalize(scored.metrics).items()}


def assert_noticed(scored, good):
    """Both alarms go off: the mismatch of sampler and trainer, and their agreement on experts."""
    bad, fine = values(scored), values(good)
    assert fine["mismatch/kl_k3_token_mean"] < 1e-7 and fine["routing/agreement"] == 1.0
    assert bad["mismatch/kl_k3_token_mean"] > 1e-4
    assert bad["routing/agreement"] < 0.9


def with_experts(routing, change):
    experts = np.array(routing.experts)
    change(experts)
    return dataclasses.replace(routing, experts=jnp.asarray(experts))


@pytest.mark.fast
def test_routing_of_another_row_is_noticed(trajectory, rescored, good):
    """SkyRL#1335, verl#7106: another layout in training permuted the choices over tokens."""
    experts = jnp.roll(trajectory.routing.experts, 1, axis=1)
    assert_noticed(rescored(dataclasses.replace(trajectory.routing, experts=experts)), good)


def test_routing_of_another_layer_is_noticed(trajectory, rescored, good):
    """verl#5037: the dense first layer was counted, so every row went to the next layer."""
    experts = jnp.roll(trajectory.routing.experts, 1, axis=0)
    assert_noticed(rescored(dataclasses.replace(trajectory.routing, experts=experts)), good)


@pytest.mark.fast
def test_physical_expert_ids_are_noticed(config, trajectory, rescored, good):
    """TensorRT-LLM#17778: ids taken after the balancer's remapping are in range, but wrong."""
    physical = np.random.default_rng(0).permutation(config.num_experts)
    experts = jnp.asarray(physical[np.asarray(trajectory.routing.experts)], jnp.uint8)
    routing = dataclasses.replace(trajectory.routing, experts=experts)
    validate(routing, config.num_moe_layers, config.num_experts)  # nothing wrong with the ids
    assert_noticed(rescored(routing), good)


@pytest.mark.fast
def test_stale_rows_are_found_where_they_are(trajectory, rescored, good):
    """sglang#36404: one row of an earlier request, repeated at the border of a chunk."""
    block = slice(4, 10)  # the last of the prompt and the first of the response
    stale = with_experts(
        trajectory.routing, lambda e: e.__setitem__(np.s_[:, :, block], e[:, :1, 4:5])
    )
    scored = rescored(stale)
    assert_noticed(scored, good)
    valid = np.asarray(trajectory.routing.valid)
    differs = np.asarray(scored.differing_layers) > 0
    inside = np.zeros_like(valid)
    inside[:, block] = True
    assert not np.any(differs[:, :4])  # what precedes the block is untouched
    assert differs[inside & valid].mean() > 0.9  # a healthy run has 0
    assert not np.any(good.differing_layers)


def test_every_row_is_replayed_padded_or_not(trajectory, rescored, good):
    """miles#645: sequences with padding were skipped entirely, so replay was mostly off."""
    bad = rescored(shift(trajectory.routing, 1))
    lengths = np.asarray(trajectory.real).sum(-1)
    assert len(np.unique(lengths)) > 3  # few rows are full
    change = np.abs(np.asarray(bad.logp_old - good.logp_old)).max(-1)
    assert np.all(change > 1e-4)


@pytest.mark.fast
def test_padding_may_name_one_expert_k_times(perturbed, trajectory, advantages, passes):
    """miles#1002, verl#4986: the dispatch crashed; SkyRL#2091, prime-rl#3350: load on expert 0."""
    batch = passes.scored_batch(perturbed, trajectory, advantages, "R3")
    filled = with_experts(batch.routing, lambda e: e.__setitem__(np.s_[:, ~batch.routing.valid], 0))
    assert np.any(filled.experts != batch.routing.experts)
    state = passes.init(perturbed)
    one, other = (
        passes.step(state, dataclasses.replace(batch, routing=r)) for r in (batch.routing, filled)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)  # weights, moments and metrics, including the load
    layers, k = batch.routing.experts.shape[0], batch.routing.experts.shape[-1]
    assert one[1]["experts/load"].total.sum() == layers * k * batch.real.sum()


@pytest.mark.fast
def test_a_minus_one_stored_in_uint8_is_loud(model, trajectory, advantages, passes, rescored, good):
    """sglang#9499: −1 becomes expert 255. `validate` refuses it; without it, NaN results."""
    valid = np.asarray(trajectory.routing.valid)
    harmless = with_experts(trajectory.routing, lambda e: e.__setitem__(np.s_[:, ~valid], 255))
    np.testing.assert_array_equal(rescored(harmless).logp_old, good.logp_old)
    bad = with_experts(trajectory.routing, lambda e: e.__setitem__(np.s_[1, 3, 6], 255))
    assert valid[3, 6]
    with pytest.raises(ValueError, match="contains expert 255; the model has 8"):
        validate(bad, 2, 8)
    logp = np.asarray(rescored(bad).logp_old)
    rows = np.isnan(logp).any(-1)
    np.testing.assert_array_equal(np.flatnonzero(rows), [3])
    batch = passes.scored_batch(model, trajectory, advantages, "R3")
    state, metrics = passes.step(passes.init(model), dataclasses.replace(batch, routing=bad))
    assert int(state.skipped) == 1 and not np.isfinite(finalize(metrics)["gradient/norm"])


@pytest.mark.fast
def test_the_last_of_256_experts_is_an_expert():
    """sglang#9499, prime-rl#3051: with 256 experts, uint8 has no spare value, and needs none."""
    config = tiny(num_experts=256, hidden_size=4, moe_intermediate_size=2)
    layer = Experts(config, nnx.Rngs(0), None)
    x, real = jax.random.normal(jax.random.key(0), (1, 3, 4)), jnp.ones((1, 3), bool)
    replay = Routing(jnp.full((1, 3, 2), 255, jnp.uint8).at[..., 1].set(254), real)

    @jax.jit
    @partial(jax.grad, has_aux=True)
    def gradient(layer):
        y, router = layer(x, real, replay)
        return jnp.sum(y**2), router

    grads, router = gradient(layer)
    np.testing.assert_array_equal(router.experts, replay.experts)
    np.testing.assert_array_equal(router.load[-2:], [3, 3])
    used = np.flatnonzero(np.any(np.asarray(grads.down.get_value()), axis=(1, 2)))
    np.testing.assert_array_equal(used, [254, 255])


@pytest.mark.fast
def test_routing_cannot_be_left_out(trajectory, advantages, passes, model):
    """AReno#524, NeMo-RL#2849, slime#1145, #1909: the field got lost, and training continued."""
    required = {f.name for f in dataclasses.fields(TrainBatch) if f.default is dataclasses.MISSING}
    assert "routing" in required
    batch = make_batch(trajectory, advantages)
    scored = passes.scored(model, trajectory, advantages, "R3")
    for kept in (batch, with_old_policy(batch, scored)):
        np.testing.assert_array_equal(kept.routing.experts, trajectory.routing.experts)
        np.testing.assert_array_equal(kept.routing.valid, trajectory.routing.valid)
    lost = dataclasses.replace(batch, routing=None, logp_old=scored.logp_old)
    for replay in ("R2", "R3"):
        with pytest.raises((AttributeError, TypeError, ValueError)):
            passes.step(passes.init(model), lost, configs.Objective(replay=replay))
    with pytest.raises((AttributeError, TypeError, ValueError)):
        split(lost, 2)


@pytest.mark.fast
def test_objectives_that_replay_score_first():
    """verl#7805: without a pass of the old policy, R2 has nothing to record."""
    for replay, parts in (("R2", 1), ("R2", 4), ("R3", 1), ("R3", 4), ("none", 4)):
        assert configs.Objective(replay=replay, mini_batches=parts).needs_score
    assert not configs.Objective(replay="none", mini_batches=1).needs_score


def arguments(trajectory):
    positions = jnp.maximum(jnp.cumsum(trajectory.real, axis=-1) - 1, 0)
    return trajectory.tokens, positions, trajectory.real.astype(jnp.int32)


@pytest.fixture(scope="module")
def forward(trajectory):
    """`forward(model, replay)`; compiled once with a routing and once without."""
    inputs = arguments(trajectory)
    return jax.jit(lambda model, replay: model(*inputs, replay=replay).hidden)


def test_models_of_one_program_have_their_own_routing(model, perturbed, trajectory, forward):
    """verl#7786, NeMo-RL#4083: process-wide state replayed the policy's routes in its teacher."""
    own, inputs = shift(trajectory.routing, 1), arguments(trajectory)

    @jax.jit
    def together(policy, other, routing):
        replayed = policy(*inputs, replay=routing).hidden
        native = other(*inputs).hidden
        return replayed, native, other(*inputs, replay=trajectory.routing).hidden

    results = together(model, perturbed, own)
    alone = (
        forward(model, own),
        forward(perturbed, None),
        forward(perturbed, trajectory.routing),
    )
    real = np.asarray(trajectory.real)
    for a, b in zip(results, alone, strict=True):
        np.testing.assert_allclose(a[real], b[real], atol=1e-5)
    for one, other in ((0, 1), (1, 2)):
        assert np.max(np.abs(alone[one] - alone[other])[real]) > 1e-2


@pytest.mark.fast
def test_a_model_that_is_built_twice_is_replayed_all_the_same(config, model, trajectory, forward):
    """miles#2570, verl#4562, NeMo-RL#2590: routes stayed bound to modules that were thrown away."""
    before = jax.tree.structure(model), [np.array(leaf) for leaf in jax.tree.leaves(model)]
    wrong = shift(trajectory.routing, 1)
    replayed = forward(model, wrong)
    again = init_model(config, 0)
    np.testing.assert_array_equal(forward(again, wrong), replayed)
    # A pass leaves no trace in the model: the next one without replay is the ordinary one.
    native = forward(again, None)
    np.testing.assert_array_equal(forward(model, None), native)
    assert np.max(np.abs(native - replayed)) > 1e-2
    assert jax.tree.structure(model) == before[0]
    for a, b in zip(jax.tree.leaves(model), before[1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.fast
def test_without_replay_there_is_no_trace_of_it(model, trajectory):
    """verl#7786, #7805: runs with replay off failed in the code of replay."""
    inputs = arguments(trajectory)

    def traced(replay):
        return jax.make_jaxpr(lambda m, r: m(*inputs, replay=r).hidden)(model, replay)

    before = str(traced(None))
    replayed = traced(trajectory.routing)
    assert str(traced(None)) == before
    # Stored expert ids become indices in one place only, where a choice is replaced: once in the
    # body that both MoE layers share.
    assert [sum(map(_reads_uint8, _equations(j.jaxpr))) for j in (traced(None), replayed)] == [0, 1]


def _reads_uint8(equation):
    return equation.primitive.name == "convert_element_type" and (
        equation.invars[0].aval.dtype == jnp.uint8
    )


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)
                elif hasattr(inner, "jaxpr"):
                    yield from _equations(inner.jaxpr)


@pytest.mark.fast
def test_sampling_and_evaluation_cannot_be_replayed():
    """NeMo-RL#4083 and similar: models that are not trained always use their own routing."""
    for function in (rollout, evaluate):
        names = set(inspect.signature(function).parameters)
        assert not names & {"replay", "routing", "experts"}


def test_recomputation_replays_each_micro_batch(config, perturbed, trajectory, advantages, passes):
    """SkyRL#1908: micro-batches shared a queue of choices, which recomputation put out of step."""
    batch = passes.scored_batch(perturbed, trajectory, advantages, "R3")
    batch = dataclasses.replace(batch, routing=shift(batch.routing, 1))  # none of them is live
    other = dataclasses.replace(config, remat="block")
    structure = jax.tree.structure(jax.eval_shape(lambda: init_model(other, 0)))
    recomputing = jax.tree.unflatten(structure, jax.tree.leaves(perturbed))
    moments = [
        jax.tree.leaves(passes.step(passes.init(model), batch)[0].opt_state.inner[1][0].mu)
        for model in (perturbed, recomputing)
    ]
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6 * max(1e-3, np.abs(a).max()))


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.float32], ids=lambda d: d.__name__)
def test_valid_is_a_mask_and_nothing_else(trajectory, dtype):
    """Numbers would index rows instead of masking them, and hide what `validate` should find."""
    routing = trajectory.routing
    validate(routing, 2, 8)
    with pytest.raises(ValueError, match=r"routing\.valid is \w+; it must be bool"):
        validate(dataclasses.replace(routing, valid=routing.valid.astype(dtype)), 2, 8)
