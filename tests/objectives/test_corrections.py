"""Compares factors of the corrections with `derivations.py`, and checks `correct`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import corrections
from jaxrl_stable.objectives import ppo
from tests.objectives.derivations import FACTORS
from tests.objectives.inputs import make_batches, stack, to_jax

SMALL = {"mismatch": 0.15}
LARGE = {"mismatch": 1.0}
TINY = {"mismatch": 2e-3}
# The last entry: whether factors of 0 and above 0 must both occur over the seeds.
CASES = [
    ("token_tis", {}, LARGE, False),
    ("token_tis", {"cap": 1.5, "floor": 0.7}, LARGE, False),
    ("sequence_tis", {}, SMALL, False),
    ("sequence_tis", {"cap": 5.0}, LARGE, False),
    ("icepop", {}, LARGE, True),
    ("icepop", {"low": 0.8, "high": 1.1}, SMALL, True),
    ("icepop", {"weigh": False}, LARGE, True),
    ("sequence_mis", {}, LARGE, True),
    ("sequence_mis", {"low": 0.5, "high": 1.5}, SMALL, True),
    ("sequence_mis", {"low": 0.5, "weigh": False}, LARGE, True),
    ("geometric_mask", {}, TINY, True),
    ("geometric_mask", {"low": 0.95, "high": 1.1}, SMALL, True),
    ("veto", {}, {"mismatch": 4.0}, True),
    ("veto", {"threshold": 0.3}, LARGE, True),
    ("off_policy_sequence_mask", {}, LARGE, True),
    ("off_policy_sequence_mask", {"delta": 0.1}, {}, True),
    ("normalized_token_tis", {}, LARGE, False),
    ("normalized_token_tis", {"cap": 1.2}, SMALL, False),
    ("normalized_sequence_tis", {}, SMALL, False),
    ("normalized_sequence_tis", {"cap": 5.0}, LARGE, False),
]
IDS = [f"{name}-{options}" for name, options, *_ in CASES]


@pytest.mark.fast
@pytest.mark.parametrize("name, options, scale, drops", CASES, ids=IDS)
def test_factor_equals_the_derivation(name, options, scale, drops):
    function = jax.vmap(lambda *arrays: getattr(corrections, name)(*arrays, **options))
    batches = make_batches(**scale)
    with jax.enable_x64(True):
        double = np.asarray(function(*to_jax(stack(batches), jnp.float64)))
    single = np.asarray(function(*to_jax(stack(batches), jnp.float32)))
    some, all_of_them = 0, 0
    for k, inputs in enumerate(batches):
        expected = FACTORS[name](*inputs, **options)
        np.testing.assert_allclose(double[k], expected, rtol=1e-12)
        np.testing.assert_allclose(single[k], expected, rtol=1e-5)
        some += (expected[inputs.mask] == 0).sum()
        all_of_them += inputs.mask.sum()
    assert (0 < some < all_of_them) if drops else some == 0


def batches_and_arrays(**scale):
    batches = make_batches(**scale)
    return batches, to_jax(stack(batches), jnp.float32)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_factor_is_a_constant(name):
    _, arrays = batches_and_arrays(mismatch=1.0)
    total = lambda *arrays: getattr(corrections, name)(*arrays).sum()  # noqa: E731
    for gradient in jax.vmap(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_without_old_policy_it_is_the_current_one(name):
    batches, arrays = batches_and_arrays(mismatch=1.0)
    factor = lambda logp, *rest: getattr(corrections, name)(logp, None, *rest)  # noqa: E731
    actual = np.asarray(jax.vmap(factor)(arrays.logp, *arrays[2:]))
    for k, inputs in enumerate(batches):
        expected = FACTORS[name](*inputs._replace(old=inputs.logp))
        np.testing.assert_allclose(actual[k], expected, rtol=1e-5)


@pytest.mark.parametrize("name", sorted(FACTORS))
def test_equal_engines_need_no_correction(name):
    _, arrays = batches_and_arrays()
    arrays = arrays._replace(logp=arrays.rollout, old=arrays.rollout)
    actual = jax.vmap(getattr(corrections, name))(*arrays)
    np.testing.assert_allclose(actual, np.asarray(arrays.mask, float), rtol=1e-6)


def test_correct_multiplies_loss_and_weight_and_nothing_else():
    _, arrays = batches_and_arrays(mismatch=1.0)
    plain = jax.vmap(ppo)(*arrays)
    factor = jax.vmap(corrections.icepop)(*arrays)
    out = corrections.correct(plain, factor)
    np.testing.assert_array_equal(out.loss, plain.loss * factor)
    np.testing.assert_array_equal(out.weight, plain.weight * factor)
    for field in ("log_weight", "truncated", "clipped_high", "clipped_low"):
        np.testing.assert_array_equal(getattr(out, field), getattr(plain, field))


def test_normalised_factors_have_mean_one():
    batches, arrays = batches_and_arrays(mismatch=1.0)
    token = np.asarray(jax.vmap(corrections.normalized_token_tis)(*arrays))
    sequence = np.asarray(jax.vmap(corrections.normalized_sequence_tis)(*arrays))
    for k, inputs in enumerate(batches):
        np.testing.assert_allclose(token[k][inputs.mask].mean(), 1.0, rtol=1e-6)
        one_each = sequence[k].max(1)[inputs.mask.any(1)]
        np.testing.assert_allclose(one_each.mean(), 1.0, rtol=1e-6)
