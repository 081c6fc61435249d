import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.model import dispatch
from jaxrl_stable.model.dispatch import (
    block_rows,
    experts_implementation,
    group_by_expert,
    grouped_matmul,
    scatter_rows,
    stable_argsort,
    take_rows,
)
from tests.model.common import small

# Four tokens, two choices each; token 2 is padding; expert 1 is unused.
EXPERTS = jnp.array([[2, 0], [3, 2], [0, 1], [0, 3]])
REAL = jnp.array([True, True, False, True])


def test_groups_by_hand():
    groups = group_by_expert(EXPERTS, REAL, 4, 1)
    np.testing.assert_array_equal(groups.sizes, [2, 0, 2, 2])
    # Pairs by expert: 0 of tokens 0, 3; 2 of tokens 0, 1; 3 of tokens 1, 3; padding fills no row.
    np.testing.assert_array_equal(groups.source, [1, 6, 0, 3, 2, 7, 8, 8])
    np.testing.assert_array_equal(groups.slot[REAL], [[2, 0], [4, 3], [1, 5]])


def test_groups_in_blocks_by_hand():
    groups = group_by_expert(EXPERTS, REAL, 4, 3)
    np.testing.assert_array_equal(groups.sizes, [3, 0, 3, 3])
    assert groups.source.shape[0] % 3 == 0
    np.testing.assert_array_equal(groups.source[:9], [1, 6, 8, 0, 3, 8, 2, 7, 8])
    assert np.all(np.asarray(groups.source[9:]) == 8)
    np.testing.assert_array_equal(groups.slot[REAL], [[3, 0], [6, 4], [1, 7]])


@pytest.mark.parametrize("largest", [4, 2**31 // 200 - 1, 2**31 // 200, 2**31 - 2])
def test_sorting_by_expert_keeps_the_order_of_equals(largest):
    """Tests sizes on both sides of the limit up to which an id and its place fit one integer."""
    ids = np.random.default_rng(0).choice([0, 1, 2, largest - 1, largest], 200)
    found = jax.jit(stable_argsort, static_argnums=1)(jnp.asarray(ids, jnp.int32), largest)
    np.testing.assert_array_equal(found, np.argsort(ids, kind="stable"))


@pytest.mark.parametrize("block", [1, 2, 8])
def test_groups_of_random_choices(block):
    rng = np.random.default_rng(0)
    group = jax.jit(lambda *given: group_by_expert(*given)[:3], static_argnums=(2, 3))
    for n, k, e in [(1, 1, 1), (5, 2, 7), (40, 3, 4), (6, 4, 4)]:
        for share in (0.0, 0.6, 1.0):
            experts = np.argsort(rng.random((n, e)), axis=-1)[:, :k]
            real = rng.random(n) < share
            groups = group(jnp.asarray(experts), jnp.asarray(real), e, block)
            source, slot, sizes = map(np.asarray, groups)
            counts = np.bincount(experts[real].ravel(), minlength=e)
            np.testing.assert_array_equal(sizes, -(-counts // block) * block)
            # Every row belongs to at most one pair, and a pair of a real token to its expert.
            pairs = np.flatnonzero(np.repeat(real, k))
            assert sorted(source[source < n * k]) == list(pairs)
            np.testing.assert_array_equal(source[slot.ravel()[pairs]], pairs)
            owner = np.repeat(np.arange(e), sizes)
            np.testing.assert_array_equal(owner[slot.ravel()[pairs]], experts.ravel()[pairs])
            absent = np.setdiff1d(np.arange(n * k), pairs)
            assert (slot.ravel()[absent] == len(source)).all()  # no row, hence zero when gathered


@pytest.mark.fast
@pytest.mark.parametrize(
    ("implementation", "block"), [("ragged", 1), ("blocked", 2), ("blocked", 8)]
)
def test_grouped_product_equals_a_loop(implementation, block):
    rng = np.random.default_rng(0)
    tokens, w = rng.normal(size=(4, 5)), rng.normal(size=(4, 5, 6))
    groups = group_by_expert(EXPERTS, REAL, 4, block)
    rows = scatter_rows(jnp.asarray(tokens, jnp.float32), groups.source, groups.slot)
    y = grouped_matmul(rows, jnp.asarray(w, jnp.float32), groups, implementation)
    for n in np.flatnonzero(REAL):
        for k in range(2):
            expected = tokens[n] @ w[EXPERTS[n, k]]
            np.testing.assert_allclose(y[groups.slot[n, k]], expected, rtol=1e-5, atol=1e-5)
    used = np.asarray(groups.slot)[np.asarray(REAL)].ravel()
    assert not np.any(np.delete(np.asarray(y), used, axis=0))  # rows outside every group


def test_gradients_of_the_moves_are_those_of_plain_indexing():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    for block in (1, 4):
        groups = group_by_expert(EXPERTS, REAL, 4, block)
        source, slot, _, _ = groups
        rows = jnp.asarray(rng.normal(size=(source.shape[0], 5)), jnp.float32)
        pairs = jnp.asarray(rng.normal(size=(4, 2, 5)) * np.asarray(REAL)[:, None, None])
        scatter = lambda x, source=source: jnp.where(  # noqa: E731
            (source < 8)[:, None], x[jnp.minimum(source, 7) // 2], 0
        )
        np.testing.assert_array_equal(scatter_rows(x, source, slot), scatter(x))
        # Rows of padding get no cotangent from the products, which stop at the last group.
        cotangent = jnp.where((source < 8)[:, None], rows, 0)
        actual = jax.vjp(lambda x, g=groups: scatter_rows(x, g.source, g.slot), x)[1](cotangent)
        expected = jax.vjp(scatter, x)[1](cotangent)
        np.testing.assert_allclose(actual[0][REAL], expected[0][REAL], rtol=1e-5, atol=1e-6)
        actual = jax.vjp(lambda y, g=groups: take_rows(y, g.source, g.slot), rows)[1](pairs)
        expected = jax.vjp(lambda y, slot=slot: y[slot], rows)[1](pairs)
        np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5, atol=1e-6)


def test_rows_of_a_block():
    assert block_rows(8, 128) == 8  # never below the vector width
    assert block_rows(4 * 8 * 64, 8) == 64
    assert block_rows(4 * 8 * 100, 8) == 64  # rounded down to a power of two
    assert block_rows(10**9, 8) == 128


def test_implementation_of_experts(monkeypatch):
    def resolve(backend, installed, experts="auto"):
        monkeypatch.setattr(dispatch.jax, "default_backend", lambda: backend)
        monkeypatch.setitem(sys.modules, "tokamax", object() if installed else None)
        return experts_implementation(small(experts=experts))

    assert resolve("cpu", True) == resolve("cpu", False) == "blocked"
    assert resolve("tpu", True) == resolve("gpu", True) == "tokamax"
    assert resolve("tpu", False) == "megablox"
    assert resolve("gpu", False, "ragged") == "ragged"  # the slow path needs an explicit choice
    with pytest.raises(RuntimeError, match="tokamax"):
        resolve("gpu", False)
