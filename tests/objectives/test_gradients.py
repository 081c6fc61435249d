"""Compares gradient and bookkeeping of every objective and option with `derivations.py`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import objectives
from jaxrl_stable.objectives import TokenLoss, aggregate, divide
from jaxrl_stable.objectives.capo import CapoHead, capo
from tests.objectives import derivations
from tests.objectives.derivations import GRADIENTS, HORIZON, MODES, aggregation_factor, bapo_bounds
from tests.objectives.inputs import (
    SEEDS,
    B,
    T,
    make_batches,
    make_inputs,
    stack,
    to_jax,
    token_advantages,
)

# (objective, options, scale of the inputs, what must be active over the seeds). The scales put
# some tokens or responses inside the bounds and some outside; GSPO's are narrow.
WIDE = {"mismatch": 1.0, "staleness": 0.4}
FAR = {"staleness": 1.0, "shift": 0.9}
SHIFTED = {"staleness": 0.6, "shift": 0.9}
CASES = [
    ("minirl", {}, WIDE, "silent capped"),
    ("minirl", {"clip": False}, WIDE, "capped"),
    ("minirl", {"weight": "mismatch"}, WIDE, "silent capped"),
    ("minirl", {"weight": "none"}, WIDE, "silent"),
    ("minirl", {"truncation": None}, WIDE, "silent"),
    ("minirl", {"truncation": 1.5}, WIDE, "silent capped"),
    ("minirl", {"clip_anchor": "rollout"}, WIDE, "silent capped"),
    ("minirl", {"clip_low": 0.1, "clip_high": 0.5}, WIDE, "silent capped"),
    ("reinforce", {}, {}, ""),
    ("dro", {}, {}, ""),
    ("dro", {"beta": 0.5}, {"staleness": 0.8}, ""),
    ("ppo", {}, {}, "silent"),
    ("ppo", {"clip_low": 0.2, "clip_high": 0.28}, {}, "silent"),
    ("ppo", {"dual_clip": 3.0}, FAR, "silent"),
    ("cispo", {}, FAR, "capped"),
    ("cispo", {"clip_low": 0.2, "clip_high": 0.28}, {}, "capped"),
    ("minpro", {}, FAR, "capped"),
    ("minpro", {"clip_low": 0.5, "clip_high": 0.1}, {}, "capped"),
    ("gspo", {}, {"staleness": 1e-3}, "silent"),
    ("gspo", {"form": "token"}, {"staleness": 1e-3}, "silent"),
    ("gspo", {"clip_low": 0.1, "clip_high": 0.2}, {"staleness": 0.4}, "silent"),
    ("luspo", {}, {"staleness": 6e-3}, "silent"),
    ("luspo", {"clip_low": 0.1, "clip_high": 0.2}, {"staleness": 0.4}, "silent"),
    ("gmpo", {}, {"staleness": 0.5}, "silent"),
    ("gmpo", {"clip_low": 0.1, "clip_high": 0.3}, {}, "silent"),
    ("sapo", {}, {"staleness": 0.5}, ""),
    ("sapo", {"temperature_high": 2.0, "temperature_low": 0.5}, {"staleness": 0.5}, ""),
    ("vespo", {}, {"staleness": 0.15}, ""),
    ("vespo", {"positive": (1.0, 0.5), "negative": (2.0, 0.3)}, {"staleness": 0.15}, ""),
    ("vespo", {"tis_cap": 1.2}, {"staleness": 0.1}, "capped"),
    ("dppo", {}, WIDE, "silent"),
    ("dppo", {"divergence": "kl", "threshold": 0.05}, WIDE, "silent"),
    ("dppo", {"truncation": 3.0}, WIDE, "silent capped"),
    ("m2po", {}, {"mismatch": 0.4}, "silent"),
    ("m2po", {"moment": "full"}, {"mismatch": 0.4}, "silent"),
    ("m2po", {"threshold": 0.1}, {"mismatch": 0.5}, "silent"),
    ("bapo", {}, FAR, "silent"),
    ("bapo", {"target": 0.5}, SHIFTED, "silent"),
    ("bapo", {"low": (0.3, 0.8, 0.1), "high": (1.1, 2.6, 0.3)}, FAR, "silent"),
    ("bapo", {"form": "code", "target": 0.5, "dual_clip": 3.0}, SHIFTED, "silent"),
    ("cpgd", {}, {"staleness": 0.4}, "silent"),
    ("cpgd", {"drift": 0.1, "clip_high": 0.4}, FAR, "silent capped"),
    ("cpgd", {"drift": 0.1, "drift_cap": 0.5}, {"staleness": 0.5}, "silent capped"),
]
IDS = [f"{name}-{options}" for name, options, *_ in CASES]
SEQUENCE = ("gspo", "luspo", "gmpo", "vespo")
# The gradient is not -weight · A there: a penalty is added to the score function.
PENALISED = ("dro", "cpgd")


def gradients(name, batches, dtype, mode="seq-mean-token-mean", **options):
    """Returns (gradient of the aggregated loss, TokenLoss) of a list of inputs.

    Not jitted: the members share nearly all of their operations, and compile them once.
    """

    def loss(logp, *rest):
        out = getattr(objectives, name)(logp, *rest, **options)
        return divide(*aggregate(out.loss, rest[-1], mode, HORIZON)), out

    with jax.enable_x64(dtype is jnp.float64):
        out = jax.vmap(jax.grad(loss, has_aux=True))(*to_jax(stack(batches), dtype))
    return jax.tree.map(np.asarray, out)


def mode_of(case):
    """Each case uses the next aggregation in turn."""
    return MODES[CASES.index(case) % len(MODES)]


def derive(case, inputs):
    name, options, *_ = case
    return GRADIENTS[name](*inputs, aggregation_factor(inputs.mask, mode_of(case)), **options)


def assert_close(gradient, expected, relative):
    bound = relative * np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=max(bound, 1e-300))


@pytest.mark.fast
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gradient_equals_the_derivation(case):
    name, options, scale, at_work = case
    batches = make_batches(**scale)
    double, token_losses = gradients(name, batches, jnp.float64, mode_of(case), **options)
    single, _ = gradients(name, batches, jnp.float32, mode_of(case), **options)
    assert (double.dtype, single.dtype) == (np.float64, np.float32)
    count = {"silent": 0, "capped": 0, "tokens": 0}
    for k, inputs in enumerate(batches):
        expected = derive(case, inputs)
        assert_close(double[k], expected.gradient, 1e-6)
        # Float32 of the same numbers: a few ulp of exp, times lambda W for VESPO's kernel.
        assert_close(single[k], expected.gradient, 2e-4 if name == "vespo" else 1e-5)
        out = TokenLoss(*(field[k] for field in token_losses))
        check_bookkeeping(case, inputs, double[k], out, expected)
        for what in ("silent", "capped"):
            count[what] += getattr(expected, what).sum()
        count["tokens"] += inputs.mask.sum()
    for what in at_work.split():
        assert 0 < count[what] < count["tokens"], f"{what}: {count}"


def check_bookkeeping(case, inputs, gradient, out, expected):
    """What TokenLoss says about weights and clipping must explain the gradient."""
    a, mask = inputs.advantages[:, None], inputs.mask
    np.testing.assert_array_equal(out.clipped_high, expected.silent & (a > 0))
    np.testing.assert_array_equal(out.clipped_low, expected.silent & (a < 0))
    for field in out:
        assert field.shape == mask.shape and np.isfinite(field).all()
    assert not out.loss[~mask].any() and not out.truncated[~mask].any()
    if case[0] not in ("cpgd", "vespo"):  # their caps are on a part, not on the weight
        np.testing.assert_array_equal(out.truncated, expected.capped & ~expected.silent)
    if case[0] not in PENALISED:
        clipped = out.clipped_high | out.clipped_low
        factor = aggregation_factor(mask, mode_of(case))
        explained = -np.where(mask & ~clipped, out.weight * a, 0.0) * factor
        assert_close(gradient, explained, 1e-9)


def test_denominators_that_are_none():
    loss, mask = jnp.ones((B, T)), jnp.ones((B, T), bool)
    with pytest.raises(ValueError, match="horizon"):
        aggregate(loss, mask, "seq-mean-token-sum-norm")
    assert aggregate(loss, mask, "token-sum")[1] == 0
    for mode in MODES:  # a batch without any response token
        assert divide(*aggregate(loss, ~mask, mode, HORIZON)) == 0


def make_heads(scale):
    """Returns CAPO's further inputs: random hidden states and a step of the output head."""
    heads = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        hidden, weight = rng.normal(size=(B, T, 3)), rng.normal(size=(3, 5))
        step = scale * rng.normal(size=(3, 5))
        heads.append(CapoHead(hidden, weight, step, rng.integers(0, 5, (B, T)), np.float64(1.3)))
    return heads


@pytest.mark.parametrize(
    "scale, options",
    [
        (0.01, {}),
        (0.05, {"hessian": (-0.02, 0.03), "fisher": 1.0}),
        (0.05, {"hessian": (-1.0, 1.0), "fisher": 1e-3, "clip_high": 0.3}),
        (0.05, {"discount": 0.7, "fisher": 1e-2}),
    ],
    ids=str,
)
def test_capo(scale, options):
    batches, heads = make_batches(), make_heads(scale)

    def loss(logp, old, rollout, advantages, mask, head):
        out = capo(logp, old, rollout, advantages, mask, head, **options)
        return divide(*aggregate(out.loss, mask)), out

    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *heads)
        arrays = to_jax(stack(batches), jnp.float64)
        results = jax.vmap(jax.grad(loss, has_aux=True))(*arrays, stacked)
    gradient, token_loss = jax.tree.map(np.asarray, results)
    rejected = 0
    for k, (inputs, head) in enumerate(zip(batches, heads)):
        factor = aggregation_factor(inputs.mask, "seq-mean-token-sum")
        expected = derivations.capo(*inputs, factor, head=head, **options)
        assert_close(gradient[k], expected.gradient, 1e-6)
        sign = inputs.advantages[:, None]
        np.testing.assert_array_equal(token_loss.clipped_high[k], expected.silent & (sign > 0))
        np.testing.assert_array_equal(token_loss.clipped_low[k], expected.silent & (sign < 0))
        clip = {key: options[key] for key in ("clip_high",) if key in options}
        rejected += (expected.silent & ~GRADIENTS["ppo"](*inputs, factor, **clip).silent).sum()
    tokens = sum(inputs.mask.sum() for inputs in batches)
    assert 0.05 * tokens < rejected < 0.95 * tokens


@pytest.mark.parametrize("mode", MODES)
def test_aggregation_factors(mode):
    """Checks the denominators: tokens, responses, or responses times a constant; no empty rows."""
    for seed in range(6):
        mask = make_inputs(seed).mask

        def total(loss, mask=mask):
            return divide(*aggregate(loss, mask, mode, HORIZON))

        loss = np.where(mask, np.random.default_rng(seed).normal(size=mask.shape), 0.0)
        value, gradient = jax.value_and_grad(total)(jnp.asarray(loss, jnp.float32))
        expected = aggregation_factor(mask, mode)
        np.testing.assert_allclose(gradient * mask, expected, rtol=1e-6)
        np.testing.assert_allclose(value, (expected * loss).sum(), rtol=1e-5, atol=1e-6)


def assert_all_close(name, actual, batches, mode="seq-mean-token-mean", **options):
    for gradient, inputs in zip(actual, batches):
        factor = aggregation_factor(inputs.mask, mode)
        assert_close(gradient, GRADIENTS[name](*inputs, factor, **options).gradient, 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["gspo", "luspo", "gmpo"])
def test_every_aggregation_of_a_loss_of_whole_responses(name, mode):
    batches = make_batches(staleness=6e-3)
    actual, _ = gradients(name, batches, jnp.float32, mode)
    assert_all_close(name, actual, batches, mode)


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_without_old_policy_it_is_the_current_one(name):
    batches = make_batches(mismatch=0.4)

    def loss(logp, rollout, advantages, mask):
        out = getattr(objectives, name)(logp, None, rollout, advantages, mask)
        return divide(*aggregate(out.loss, mask, "seq-mean-token-mean"))

    logp, _, *rest = to_jax(stack(batches), jnp.float32)
    actual = np.asarray(jax.vmap(jax.grad(loss))(logp, *rest))
    assert_all_close(name, actual, [inputs._replace(old=inputs.logp) for inputs in batches])


TOKEN_FORMS = [(name, {}) for name in sorted(set(GRADIENTS) - set(SEQUENCE))]
TOKEN_FORMS += [("gspo", {"form": "token"})]


@pytest.mark.parametrize("name, options", TOKEN_FORMS, ids=str)
def test_advantage_of_single_tokens(name, options):
    scale = {"staleness": 1e-3} if name == "gspo" else {"mismatch": 0.5}
    batches = [token_advantages(x, seed) for seed, x in enumerate(make_batches(**scale))]
    actual, out = gradients(name, batches, jnp.float32, **options)
    assert_all_close(name, actual, batches, **options)
    for field in out:  # for any advantages in the padding
        assert np.isfinite(field).all()
    assert not out.loss[~stack(batches).mask].any()


@pytest.mark.refusal
@pytest.mark.parametrize("name", SEQUENCE)
def test_a_response_has_one_advantage(name):
    with pytest.raises(ValueError):
        getattr(objectives, name)(*to_jax(token_advantages(make_inputs(0)), jnp.float32))


@pytest.mark.parametrize("name", sorted(GRADIENTS))
def test_gradient_flows_through_logp_alone(name):
    def loss(*arrays):
        out = getattr(objectives, name)(*arrays)
        return divide(*aggregate(out.loss, arrays[-1], "seq-mean-token-mean"))

    arrays = to_jax(stack(make_batches(mismatch=0.4)), jnp.float32)
    through, *others = jax.vmap(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)
    assert np.abs(through).max() > 0
    for other in others:
        np.testing.assert_array_equal(other, 0.0)


def test_bapo_searches():
    """The bounds of the seeds above differ, and no search ends at once or at the last pair only."""
    for case in CASES:
        name, options, scale, _ = case
        if name != "bapo":
            continue
        options = {key: value for key, value in options.items() if key != "dual_clip"}
        bounds = [bapo_bounds(*inputs, **options) for inputs in make_batches(**scale)]
        assert len(set(bounds)) >= 4, (options, bounds)
