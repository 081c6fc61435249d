"""Arrays that would broadcast are refused: with a mask [1, T] a loss divides by 1 instead of B."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import advantages, corrections, objectives
from jaxrl_stable.objectives import CapoHead, aggregate, capo, kl_penalty
from jaxrl_stable.objectives.token_loss import TokenLoss

B, T, D, V = 3, 4, 2, 5
ARRAYS = ("logp", "logp_old", "logp_rollout", "advantages", "mask")
PER_RESPONSE = ("gspo", "luspo", "gmpo", "vespo")

pytestmark = pytest.mark.fast


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def family(module, arrays):
    """Returns the public functions of a module whose first arguments are these arrays."""
    functions = inspect.getmembers(module, inspect.isfunction)
    starts = {name: tuple(inspect.signature(f).parameters)[: len(arrays)] for name, f in functions}
    return {name: f for name, f in functions if starts[name] == arrays and name[0] != "_"}


def with_head(*arrays):
    tokens = zeros(B, T, dtype=np.int32)
    return capo(*arrays, CapoHead(zeros(B, T, D), zeros(D, V), zeros(D, V), tokens))


FAMILY = family(objectives, ARRAYS) | family(corrections, ARRAYS) | {"capo": with_head}
ESTIMATORS = family(advantages, ("rewards", "group_ids", "valid", "lengths"))
CORRECT = {
    "logp": zeros(B, T),
    "logp_old": zeros(B, T),
    "logp_rollout": zeros(B, T),
    "advantages": zeros(B),
    "mask": np.ones((B, T), bool),
}
WRONG = [
    ("mask", (1, T)),
    ("mask", (B, 1)),
    ("mask", (T,)),
    ("logp", (1, T)),
    ("logp", (T,)),
    ("logp_old", (B, 1)),
    ("logp_old", (T,)),
    ("logp_rollout", (B, T + 1)),
    ("logp_rollout", (1, T)),
    ("advantages", (T,)),
    ("advantages", (1,)),
    ("advantages", ()),
    ("advantages", (B, 1)),
    ("advantages", (1, T)),
]


def test_the_families_are_complete():
    assert len(FAMILY) == 16 + 9 and len(ESTIMATORS) == 7


@pytest.mark.refusal
@pytest.mark.parametrize("wrong", WRONG, ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_losses_and_corrections_refuse(name, wrong):
    argument, shape = wrong
    arrays = CORRECT | {argument: zeros(*shape, dtype=CORRECT[argument].dtype)}
    function = FAMILY[name]
    for call in (function, jax.jit(function)):
        with pytest.raises(ValueError, match=rf"^{name}: .*{argument} ") as error:
            call(*arrays.values())
        assert "\n" not in str(error.value) and str(list(shape)) in str(error.value)


@pytest.mark.parametrize("name", FAMILY)
def test_what_is_documented_passes(name):
    """NumPy or JAX arrays work, without π_old, and under jit, grad and vmap."""
    function, last = FAMILY[name], len(CORRECT) - 1

    def total(*arrays):
        out = function(*arrays[:last], CORRECT["mask"])
        return (out.loss if isinstance(out, TokenLoss) else out).sum()

    arrays = list(CORRECT.values())[:last]
    expected = total(*arrays)
    for run in (jax.jit(total), jax.grad(total)):
        run(*map(jnp.asarray, arrays))
    mapped = jax.vmap(total)(*(jnp.stack([x, x]) for x in arrays))
    np.testing.assert_allclose(mapped, [expected, expected])
    function(arrays[0], None, *arrays[2:], CORRECT["mask"])


def test_one_advantage_per_token_passes_where_it_is_documented():
    arrays = CORRECT | {"advantages": zeros(B, T)}
    for name in FAMILY.keys() - set(PER_RESPONSE):
        FAMILY[name](*arrays.values())


@pytest.mark.refusal
@pytest.mark.parametrize("name", PER_RESPONSE)
def test_one_advantage_per_token_is_refused_elsewhere(name):
    with pytest.raises(ValueError, match=rf"^{name}.*pass one advantage per response, \[B\]$"):
        FAMILY[name](*(CORRECT | {"advantages": zeros(B, T)}).values())


@pytest.mark.refusal
@pytest.mark.parametrize(("argument", "shape"), [(a, s) for a, s in WRONG if a == "mask"])
def test_the_reduction_refuses(argument, shape):
    loss, mask = zeros(B, T), np.ones(shape, bool)
    for call in (aggregate, jax.jit(aggregate)):
        with pytest.raises(ValueError, match=r"^aggregate: arrays must all have shape \[B, T\]"):
            call(loss, mask)


@pytest.mark.refusal
@pytest.mark.parametrize("argument", ["logp_reference", "mask", "logp_old"])
def test_the_penalty_refuses(argument):
    arrays = {name: CORRECT[name] for name in ("logp", "mask", "logp_old")}
    arrays["logp_reference"] = zeros(B, T)
    arrays[argument] = arrays[argument][:1]
    with pytest.raises(ValueError, match=rf"^kl_penalty: .*{argument} \[1, 4\]"):
        kl_penalty(**arrays)


@pytest.mark.refusal
def test_a_factor_of_another_shape_is_refused():
    loss = objectives.minirl(*CORRECT.values())
    with pytest.raises(ValueError, match=r"^correct: .*loss \[3, 4\], factor \[3, 1\]"):
        corrections.correct(loss, zeros(B, 1))


@pytest.mark.refusal
@pytest.mark.parametrize("argument", ["rewards", "group_ids", "valid", "lengths"])
@pytest.mark.parametrize("shape", [(1,), (B, 1), (), (B + 1,)], ids=str)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_advantages_refuse(name, shape, argument):
    kinds = {"rewards": np.float32, "group_ids": np.int32, "valid": bool, "lengths": np.int32}
    arrays = {key: zeros(B, dtype=kind) for key, kind in kinds.items()}
    ESTIMATORS[name](**arrays)
    arrays[argument] = zeros(*shape, dtype=kinds[argument])
    with pytest.raises(ValueError, match=rf"^{name}: arrays must all have shape \[B\] but are"):
        ESTIMATORS[name](**arrays)
