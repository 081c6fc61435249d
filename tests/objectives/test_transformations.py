"""Every objective and correction under jit, vmap, grad, shard_map, and in bfloat16.

Functions are found by their signature, so new ones are tested automatically. Functions that
decide on the whole batch (`whole_batch`: m2po, bapo, the normalised weights) cannot be cut into
shards and are excluded there, by that trait alone.
"""

import functools
import inspect
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrl_stable import corrections, objectives
from jaxrl_stable.objectives import MODES, aggregate, divide, traits_of
from jaxrl_stable.objectives.capo import CapoHead, capo
from tests.objectives.inputs import make_inputs, to_jax

ARRAYS = ("logp", "logp_old", "logp_rollout", "advantages", "mask")
HORIZON = 12.0
SEEDS = (0, 1, 2)  # ragged rows; a row without a response; holes


def family(module):
    """Returns functions of the five arrays whose options have defaults."""
    found = {}
    for name, function in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(function):
            continue
        parameters = list(inspect.signature(function).parameters.values())
        signature = tuple(p.name for p in parameters[:5])
        if signature == ARRAYS and all(p.default is not p.empty for p in parameters[5:]):
            found[name] = function
    return found


def with_made_up_head(logp, logp_old, logp_rollout, advantages, mask):
    """CAPO also takes its head's input; here it is derived from the rows, so it moves with them."""
    rng = np.random.default_rng(0)
    clean = jnp.where(mask, logp_rollout, 0.0).astype(jnp.float32)
    hidden = jnp.stack([jnp.sin(7 * clean), jnp.cos(5 * clean), jnp.ones_like(clean)], axis=-1)
    tokens = (jnp.abs(clean) * 100).astype(jnp.int32) % 5
    weight, step = rng.normal(size=(2, 3, 5)).astype(np.float32)
    head = CapoHead(hidden, jnp.asarray(weight), 0.01 * jnp.asarray(step), tokens)
    return capo(logp, logp_old, logp_rollout, advantages, mask, head)


OBJECTIVES = family(objectives) | {"capo": with_made_up_head}
CORRECTIONS = family(corrections)
EVERYTHING = OBJECTIVES | CORRECTIONS
WHOLE_BATCH = {name for name, f in EVERYTHING.items() if traits_of(f).whole_batch}


def test_the_family_is_what_it_is_said_to_be():
    assert set(OBJECTIVES) >= {
        *("minirl", "reinforce", "dro", "ppo", "cispo", "minpro", "gspo", "luspo", "gmpo"),
        *("sapo", "vespo", "dppo", "m2po", "bapo", "cpgd", "capo"),
    }
    assert set(CORRECTIONS) >= {
        *("token_tis", "sequence_tis", "icepop", "sequence_mis", "geometric_mask", "veto"),
        *("off_policy_sequence_mask", "normalized_token_tis", "normalized_sequence_tis"),
    }
    assert {"m2po", "bapo", "normalized_token_tis", "normalized_sequence_tis"} == WHOLE_BATCH
    takes_arrays = {n for n in objectives.__all__ if callable(getattr(objectives, n))}
    others = {"CapoHead", "TokenLoss", "aggregate", "divide", "kl_penalty", "traits", "traits_of"}
    assert takes_arrays - others == set(OBJECTIVES)


@functools.cache
def inputs(seed, dtype=jnp.float32):
    return to_jax(make_inputs(seed), dtype)


def close(a, b, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerance), a, b)


def objective(name, mode="seq-mean-token-sum"):
    """Returns (loss, gradient by logp, all other results of the objective)."""

    def run(logp, *others):
        out = OBJECTIVES[name](logp, *others)
        total, count = aggregate(out.loss, others[-1], mode, HORIZON)
        return divide(total, count), out

    def with_gradient(*arrays):
        (loss, out), gradient = jax.value_and_grad(run, has_aux=True)(*arrays)
        return loss, gradient, out

    return with_gradient


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_under_jit_and_vmap(name):
    """Compiled and mapped over a stack of batches, it gives the results of single calls."""
    one_by_one = [objective(name)(*inputs(seed)) for seed in SEEDS]
    compiled = jax.jit(objective(name))
    for seed, expected in zip(SEEDS, one_by_one):
        close(compiled(*inputs(seed)), expected)
    stack = lambda *leaves: jnp.stack(leaves)  # noqa: E731
    mapped = jax.jit(jax.vmap(objective(name)))(*jax.tree.map(stack, *map(inputs, SEEDS)))
    close(mapped, jax.tree.map(stack, *one_by_one))


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_under_jit_and_vmap(name):
    one_by_one = jnp.stack([CORRECTIONS[name](*inputs(seed)) for seed in SEEDS])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(inputs, SEEDS))
    close(jax.jit(jax.vmap(CORRECTIONS[name]))(*stacked), one_by_one)
    close(jax.jit(CORRECTIONS[name])(*inputs(0)), one_by_one[0])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_flow_through_logp_and_the_loss_alone(name):
    arrays = [jnp.where(jnp.isfinite(x), x, 0.0) for x in inputs(0)[:4]]
    mask = inputs(0).mask

    def loss(*arrays):
        return OBJECTIVES[name](*arrays, mask).loss.sum()

    def rest(logp):
        out = OBJECTIVES[name](logp, *arrays[1:], mask)
        return out.log_weight.sum() + out.weight.sum()

    by_logp, *by_others = jax.grad(loss, argnums=(0, 1, 2, 3))(*arrays)
    assert (by_logp != 0).any()
    for gradient in (*by_others, jax.grad(rest)(arrays[0])):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_are_constants(name):
    arrays = [jnp.where(jnp.isfinite(x), x, 0.0) for x in inputs(0)[:4]]
    total = lambda *arrays: CORRECTIONS[name](*arrays, inputs(0).mask).sum()  # noqa: E731
    for gradient in jax.grad(total, argnums=(0, 1, 2, 3))(*arrays):
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", EVERYTHING)
def test_bfloat16_is_computed_in_float32(name):
    """Only the rounding of the inputs, and of the gradient, loses precision."""
    low = inputs(2, jnp.bfloat16)
    exact = [x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in low]
    mine, theirs = EVERYTHING[name](*low), EVERYTHING[name](*exact)
    jax.tree.map(np.testing.assert_array_equal, mine, theirs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(mine)} <= {"float32", "bool"}
    if name in OBJECTIVES:
        (loss, gradient, _), (_, wide, _) = objective(name)(*low), objective(name)(*exact)
        assert loss.dtype == jnp.float32 and gradient.dtype == jnp.bfloat16
        close(gradient.astype(jnp.float32), wide, rtol=2**-7)


def sharded_and_whole(devices):
    """Compares sharded with whole results, where rows can be cut; needs devices and float64."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    shard = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"))
    exact = functools.partial(close, rtol=1e-12, atol=1e-12)

    def reductions(name, add, *arrays):
        """Returns the losses of all modes, and all results per token."""
        out = OBJECTIVES[name](*arrays)
        sums = [aggregate(out.loss, arrays[-1], mode, HORIZON) for mode in MODES]
        totals, counts = add(jnp.asarray(sums)).T
        return jax.vmap(divide)(totals, counts), out

    def with_gradient(run, *arrays):
        """Returns the gradient of a sum in which every mode has its own weight."""
        weighted = lambda *arrays: run(*arrays)[0] @ jnp.sqrt(1.0 + jnp.arange(len(MODES)))  # noqa: E731
        return run(*arrays), jax.grad(weighted)(*arrays)

    for name in OBJECTIVES.keys() - WHOLE_BATCH:
        parts = functools.partial(reductions, name, lambda x: jax.lax.psum(x, "data"))
        parts = shard(parts, out_specs=(P(), P("data")))
        whole = functools.partial(reductions, name, lambda x: x)
        parts, whole = (jax.jit(functools.partial(with_gradient, run)) for run in (parts, whole))
        for seed in (0, 1):
            exact(parts(*inputs(seed, jnp.float64)), whole(*inputs(seed, jnp.float64)))
    for name, function in CORRECTIONS.items():
        arrays = inputs(0, jnp.float64)
        mine = jax.jit(shard(function, out_specs=P("data")))(*arrays)
        if name in WHOLE_BATCH:  # each shard took its own mean
            assert not np.allclose(mine, function(*arrays))
        else:
            exact(mine, function(*arrays))
    print("shards agree")


def test_sharded_loss_equals_the_whole_one():
    """(total, count) added over four devices, divided once: value and gradient, in every mode."""
    path = os.pathsep.join(sys.path)
    script = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_enable_x64", True)
from tests.objectives.test_transformations import sharded_and_whole
sharded_and_whole(4)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip().endswith("shards agree"), result.stderr
