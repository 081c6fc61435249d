"""MiniRL against an independent float64 NumPy derivation, and the invariants of eq. (7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.objectives import aggregate, minirl

B, T = 8, 12


def make_inputs(seed, mismatch=0.5, staleness=0.4):
    """Makes ragged masks, group-centred 0/1 rewards, and three different policies."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, T + 1, B)
    mask = np.arange(T)[None] < lengths[:, None]
    rollout = rng.uniform(-4, -0.01, (B, T))
    old = rollout + mismatch * rng.normal(size=(B, T))
    logp = old + staleness * rng.normal(size=(B, T))
    rewards = rng.integers(0, 2, B).astype(float)
    rewards[:2] = [1, 0]  # at least one advantage of either sign
    return logp, old, rollout, rewards - rewards.mean(), mask


def numpy_gradient(
    logp,
    old,
    rollout,
    advantages,
    mask,
    *,
    clip=True,
    low=0.2,
    high=0.27,
    anchor="old",
    weight="full",
    cap=5.0,
    aggregation="seq-mean-token-sum",
):
    """Returns dL/dlogp of eq. (7) per token, from the definition (probabilities, not logs)."""
    gradient = np.zeros_like(logp)
    p, p_old, p_rollout = np.exp(logp), np.exp(old), np.exp(rollout)
    rows = [i for i in range(B) if mask[i].any()]
    for i in rows:
        for t in np.flatnonzero(mask[i]):
            w = {"full": p / p_rollout, "mismatch": p_old / p_rollout, "none": p / p}[weight][i, t]
            if cap is not None and w > cap:
                w = cap
            ratio = (p / {"old": p_old, "rollout": p_rollout}[anchor])[i, t]
            a = advantages[i]
            silent = clip and ((a > 0 and ratio > 1 + high) or (a < 0 and ratio < 1 - low))
            scale = {
                "seq-mean-token-sum": 1 / len(rows),
                "seq-mean-token-mean": 1 / len(rows) / mask[i].sum(),
                "token-mean": 1 / mask.sum(),
            }[aggregation]
            gradient[i, t] = 0.0 if silent else -w * a * scale
    return gradient


def jax_gradient(logp, old, rollout, advantages, mask, aggregation="seq-mean-token-sum", **options):
    def loss(x):
        out = minirl(x, old, rollout, advantages, mask, **options)
        total, count = aggregate(out.loss, mask, aggregation)
        return total / count

    return np.asarray(jax.jit(jax.grad(loss))(logp))


def as_float32(inputs):
    *floats, mask = inputs
    return (*(jnp.asarray(x, jnp.float32) for x in floats), jnp.asarray(mask))


SWITCHES = [
    {},
    {"clip": False},
    {"weight": "mismatch"},
    {"weight": "none"},
    {"truncation": None},
    {"truncation": 1.5},
    {"clip_anchor": "rollout"},
    {"clip_low": 0.1, "clip_high": 0.5},
    {"aggregation": "seq-mean-token-mean"},
    {"aggregation": "token-mean"},
]


@pytest.mark.fast
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_gradient_equals_numpy_derivation(switches):
    names = {"clip_low": "low", "clip_high": "high", "clip_anchor": "anchor", "truncation": "cap"}
    active = {"over": 0, "clipped": 0}
    for seed in range(20):
        inputs = make_inputs(seed, mismatch=1.0)
        logp, old, rollout, advantages, mask = inputs
        expected = numpy_gradient(*inputs, **{names.get(k, k): v for k, v in switches.items()})
        actual = jax_gradient(*as_float32(inputs), **switches)
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
        out = minirl(*as_float32(inputs))
        active["over"] += int((np.asarray(out.log_weight) > np.log(5)).sum())
        active["clipped"] += int((out.clipped_high | out.clipped_low).sum())
    assert active["over"] > 50 and active["clipped"] > 50  # truncation and clipping were at work


def test_float64_inputs_are_accepted():
    with jax.enable_x64(True):
        inputs = make_inputs(3, mismatch=1.0)
        logp, old, rollout, advantages, mask = inputs
        # The loss is float32 by contract, so rounding of the inputs is the whole difference.
        actual = jax_gradient(*map(jnp.asarray, inputs))
    np.testing.assert_allclose(actual, numpy_gradient(*inputs), rtol=2e-6, atol=1e-7)


@pytest.mark.fast
def test_hand_computed():
    """Four tokens: kept, truncated, clipped above, clipped below."""
    log = np.log
    logp = jnp.array([[log(0.5), log(0.6)], [log(0.4), log(0.2)]], jnp.float32)
    old = jnp.array([[log(0.5), log(0.5)], [log(0.3), log(0.3)]], jnp.float32)
    rollout = jnp.array([[log(0.25), log(0.1)], [log(0.4), log(0.4)]], jnp.float32)
    mask = jnp.ones((2, 2), bool)
    up = minirl(logp, old, rollout, jnp.array([1.0, 1.0]), mask)
    # ratios π_θ/π_old: 1, 1.2, 1.333 (> 1.27: clipped for A > 0), 0.667
    np.testing.assert_array_equal(up.clipped_high, [[False, False], [True, False]])
    np.testing.assert_allclose(up.weight, [[2.0, 5.0], [1.0, 0.5]], rtol=1e-6)  # 6 -> 5
    expected = [[-2 * log(0.5), -5 * log(0.6)], [0.0, -0.5 * log(0.2)]]
    np.testing.assert_allclose(up.loss, expected, rtol=1e-6)
    down = minirl(logp, old, rollout, jnp.array([-1.0, -1.0]), mask)
    np.testing.assert_array_equal(down.clipped_low, [[False, False], [False, True]])
    np.testing.assert_allclose(down.loss[1], [log(0.4), 0.0], rtol=1e-6)


@pytest.mark.fast
def test_on_policy_is_reinforce():
    """Invariants a and b: one update, identical engines: weight 1, no clip, plain REINFORCE."""
    logp, _, _, advantages, mask = as_float32(make_inputs(0))
    out = minirl(logp, None, logp, advantages, mask)
    assert not (out.clipped_high | out.clipped_low).any()
    np.testing.assert_array_equal(out.weight[mask], 1.0)
    gradient = jax.grad(lambda x: minirl(x, None, logp, advantages, mask).loss.sum())(logp)
    np.testing.assert_array_equal(gradient, -jnp.where(mask, advantages[:, None], 0.0))


def test_equal_policies_never_clip():
    logp, _, rollout, advantages, mask = as_float32(make_inputs(1))
    out = minirl(logp, logp, rollout, advantages, mask)
    assert not (out.clipped_high | out.clipped_low).any()


def test_gradient_flows_through_logp_alone():
    """Invariant i: weight, mask, old and rollout policies and advantages are constants."""
    logp, old, rollout, advantages, mask = as_float32(make_inputs(2))
    loss = lambda *x: minirl(*x, mask).loss.sum()  # noqa: E731
    gradients = jax.grad(loss, argnums=(0, 1, 2, 3))(logp, old, rollout, advantages)
    assert jnp.abs(gradients[0]).max() > 0
    for gradient in gradients[1:]:
        np.testing.assert_array_equal(gradient, 0.0)


def test_zero_advantage_gives_zero_gradient_and_counts():
    """Invariant h, and the denominator of eq. (7): such rows are silent but not absent."""
    logp, old, rollout, advantages, mask = as_float32(make_inputs(4))
    advantages = advantages.at[3].set(0.0)
    assert not jax_gradient(logp, old, rollout, advantages, mask)[3].any()
    _, count = aggregate(minirl(logp, old, rollout, advantages, mask).loss, mask)
    assert count == B


@pytest.mark.fast
@pytest.mark.parametrize("garbage", [1e4, -1e4, np.inf, -np.inf, np.nan])
def test_padding_can_hold_anything(garbage):
    logp, old, rollout, advantages, mask = make_inputs(5)
    clean = as_float32((logp, old, rollout, advantages, mask))
    dirty = as_float32(
        (
            np.where(mask, logp, garbage),
            np.where(mask, old, -garbage),
            np.where(mask, rollout, garbage / 2),
            advantages,
            mask,
        )
    )
    np.testing.assert_array_equal(jax_gradient(*dirty), jax_gradient(*clean))
    for switches in SWITCHES:
        assert np.isfinite(jax_gradient(*dirty, **switches)).all()


def test_extreme_ratios_in_the_response_stay_finite():
    logp, old, rollout, advantages, mask = as_float32(make_inputs(6))
    for truncation in (5.0, None):
        out = jax_gradient(logp, old, rollout - 1e4, advantages, mask, truncation=truncation)
        assert np.isfinite(out).all()


def test_clipped_rows_do_not_shrink_the_batch():
    """A row whose tokens are all clipped still counts (verl's trap of 8/7)."""
    logp, old, rollout, advantages, mask = as_float32(make_inputs(7))
    advantages = advantages.at[0].set(1.0)
    logp = logp.at[0].set(old[0] + 1.0)
    out = minirl(logp, old, rollout, advantages, mask)
    assert out.clipped_high[0][mask[0]].all()
    assert aggregate(out.loss, mask)[1] == B


def test_minirl_without_truncation_is_mismatch_weight_times_ppo_clip():
    """∇ min(r A, clip(r) A) = M r A ∇ log π (paper.md §3 item 2); with truncation they differ."""
    logp, old, rollout, advantages, mask = as_float32(make_inputs(8, mismatch=1.0))

    def decoupled_ppo(x):
        r, w = jnp.exp(x - old), jnp.exp(old - rollout)
        a = advantages[:, None]
        surrogate = jnp.minimum(r * a, jnp.clip(r, 0.8, 1.27) * a)
        return aggregate(-w * surrogate, mask)[0] / B

    ppo = np.asarray(jax.grad(decoupled_ppo)(logp))
    untruncated = jax_gradient(logp, old, rollout, advantages, mask, truncation=None)
    np.testing.assert_allclose(untruncated, ppo, rtol=2e-5, atol=1e-6)
    truncated = jax_gradient(logp, old, rollout, advantages, mask, truncation=1.5)
    assert np.abs(truncated - ppo).max() > 0.1


def test_truncation_of_the_product_is_not_truncation_of_the_mismatch():
    """min(π_θ/μ, C) is MiniRL; min(π_old/μ, C) · r is what verl and TRL compute."""
    logp, old, rollout, advantages, mask = as_float32(make_inputs(9, mismatch=1.0))
    ours = minirl(logp, old, rollout, advantages, mask, truncation=1.5).weight
    theirs = jnp.minimum(jnp.exp(old - rollout), 1.5) * jnp.exp(logp - old)
    assert jnp.abs(jnp.where(mask, ours - theirs, 0.0)).max() > 0.5


def test_permutation_and_padding_rows():
    """Invariants e and g on the loss alone."""
    inputs = as_float32(make_inputs(10))
    order = np.random.default_rng(0).permutation(B)
    permuted = tuple(x[order] for x in inputs)
    np.testing.assert_allclose(jax_gradient(*permuted), jax_gradient(*inputs)[order], rtol=1e-6)
    padded = tuple(jnp.concatenate([x, jnp.zeros_like(x[:3])]) for x in inputs)
    np.testing.assert_allclose(jax_gradient(*padded)[:B], jax_gradient(*inputs), rtol=1e-6)


def test_bfloat16_inputs_are_computed_in_float32():
    logp, old, rollout, advantages, mask = as_float32(make_inputs(11))
    out = minirl(logp.astype(jnp.bfloat16), old, rollout, advantages, mask)
    assert out.loss.dtype == out.weight.dtype == jnp.float32


def test_unknown_switches_are_named():
    inputs = as_float32(make_inputs(0))
    with pytest.raises(ValueError, match="weight 'ratio' is unknown"):
        minirl(*inputs, weight="ratio")
    with pytest.raises(ValueError, match="clip_anchor 'new' is unknown"):
        minirl(*inputs, clip_anchor="new")
    with pytest.raises(ValueError, match="aggregation 'mean' is unknown"):
        aggregate(inputs[0], inputs[4], "mean")
