"""Every kind of router, with and without replay, against the float64 reference.

Tolerance: float32 rounds at 6e-8, and the longest chains here (three products of width 16, an exp,
a sum over slots and, for weights, over tokens) end within 5e-7 of the largest entry. 1e-5 leaves
room for other orders of summation; a wrong formula is off by 1e-2 or more (`test_kinds_differ`).
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxrl_stable.model.experts import Experts
from jaxrl_stable.model.router import gate_weights
from jaxrl_stable.routing import Routing
from tests.model import router_reference as reference
from tests.model.common import QUICK, assert_identical, small

TOLERANCE = 1e-5
SIGMOID = dict(router_score="sigmoid")
GROUPS = dict(expert_groups=4, chosen_groups=2)
KINDS = {
    "softmax": dict(),  # Qwen3, Mixtral
    "softmax_raw": dict(norm_topk_prob=False),  # OLMoE
    "softmax_raw_shared": dict(norm_topk_prob=False, routed_scaling=1.7, num_shared_experts=1),
    "sigmoid": SIGMOID,
    "sigmoid_raw": SIGMOID | dict(norm_topk_prob=False),
    "sigmoid_bias": SIGMOID | dict(selection_bias=True),
    "sigmoid_raw_groups": SIGMOID | GROUPS | dict(norm_topk_prob=False),
    "deepseek": SIGMOID
    | GROUPS
    | dict(selection_bias=True, routed_scaling=2.5, num_shared_experts=2),
}
CASES = ("native", "full", "partial", "drifted")
MATRICES = ("router", "gate", "up", "down")
B, T, D, E, K, F = 2, 6, 16, 8, 3, 10
REAL = np.ones((B, T), bool)
REAL[0, :2] = REAL[1, 5] = False
every_kind = pytest.mark.parametrize("name", KINDS)


def config(name, **overrides):
    sizes = dict(num_experts=E, num_experts_per_token=K, hidden_size=D, moe_intermediate_size=F)
    return small(**(sizes | KINDS[name] | overrides))


def kind(name):
    """Returns the reference's own description of a kind."""
    fields = KINDS[name]
    return reference.Kind(
        fields.get("router_score", "softmax"),
        fields.get("norm_topk_prob", True),
        K,
        fields.get("expert_groups", 1),
        fields.get("chosen_groups", 1),
        fields.get("routed_scaling", 1.0),
    )


@functools.cache
def layer(name, **overrides):
    """Returns a layer with weights drawn by NumPy; its bias is large enough to change choices."""
    template = jax.eval_shape(lambda: Experts(config(name, **dict(overrides)), nnx.Rngs(0), None))
    rng = np.random.default_rng(1)

    def draw(param):
        shape, inputs = param.get_value().shape, param.get_metadata()["inputs"]
        scale = 0.4 if inputs is None else 1.5 * shape[-2] ** -0.5
        return param.replace(jnp.asarray(scale * rng.normal(size=shape), jnp.float32))

    return jax.tree.map(draw, template, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def float64(name, tree):
    """Returns weights, or their gradients, by the reference's names."""
    array = lambda param: np.asarray(param.get_value(), np.float64)  # noqa: E731
    named = {matrix: array(getattr(tree, matrix)) for matrix in MATRICES}
    named["bias"] = array(tree.selection_bias) if hasattr(tree, "selection_bias") else np.zeros(E)
    for matrix, empty in (("gate", (D, 0)), ("up", (D, 0)), ("down", (0, D))):
        shared = hasattr(tree, "shared")
        named["shared_" + matrix] = (
            array(getattr(tree.shared, matrix)) if shared else np.zeros(empty)
        )
    return named


@functools.cache
def tokens():
    """Returns inputs, and the gradient that reaches the outputs (of real tokens only)."""
    rng = np.random.default_rng(2)
    x, upstream = rng.normal(size=(2, B, T, D)).astype(np.float32)
    return x, upstream * REAL[..., None]


def drifted_experts(name):
    """Returns K experts that the live router does not pick: the lowest scores, lowest first."""
    x, weights = tokens()[0], float64(name, layer(name))
    experts = np.zeros((B, T, K), int)
    for place in np.ndindex(B, T):
        s = x[place].astype(np.float64) @ weights["router"]
        live = reference.live_choice(kind(name), s, weights["bias"])
        experts[place] = [e for e in np.argsort(s) if e not in live][:K]
    return experts


def routing(name, case):
    """Returns what a case replays; rows without a choice hold 255, as engines leave it."""
    if case == "native":
        return None
    valid = REAL.copy()
    if case == "partial":
        valid[0, 3] = valid[1, 0] = valid[1, 4] = False
    if case == "drifted":
        experts = drifted_experts(name)
    else:
        experts = np.argsort(np.random.default_rng(3).random((B, T, E)), axis=-1)[..., :K]
    experts = np.where(valid[..., None], experts, 255)
    return Routing(jnp.asarray(experts, jnp.uint8), jnp.asarray(valid))


def forced(replay):
    """Returns the reference's form: a choice, or None, for each real token."""
    if replay is None:
        return [None] * int(REAL.sum())
    experts, valid = np.asarray(replay.experts)[REAL], np.asarray(replay.valid)[REAL]
    return [row.astype(int) if v else None for row, v in zip(experts, valid, strict=True)]


def differentiate(layer, x, upstream, replay):
    def loss(layer, x):
        y, router = layer(x, jnp.asarray(REAL), replay)
        return jnp.sum(upstream * y), (y, router)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


compiled = jax.jit(differentiate, compiler_options=QUICK)


@functools.cache
def run(name, case):
    """Runs the package's layer; returns outputs, router output, gradients of the layer and of x."""
    (_, (y, router)), (grads, dx) = compiled(layer(name), *tokens(), routing(name, case))
    return np.asarray(y), router, grads, np.asarray(dx)


@functools.cache
def expected(name, case):
    """Runs the reference; returns outputs, routing and gradients by name, for real tokens."""
    x, upstream = (np.asarray(a, np.float64)[REAL] for a in tokens())
    arguments = kind(name), float64(name, layer(name)), x, forced(routing(name, case))
    return *reference.forward(*arguments), reference.gradients(*arguments, upstream)


def close(actual, wanted):
    scale = np.max(np.abs(wanted), initial=0.0)
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=TOLERANCE * max(scale, 1e-3))


@pytest.mark.fast
@every_kind
@pytest.mark.parametrize("case", ["native", "drifted"])
def test_gradients_of_the_reference_are_its_finite_differences(name, case):
    """Compares with central differences along random directions, all in float64."""
    x, upstream = (np.asarray(a, np.float64)[REAL] for a in tokens())
    weights, replay = float64(name, layer(name)), forced(routing(name, case))
    grads, rng, step = expected(name, case)[2], np.random.default_rng(0), 1e-6
    for path in (*weights, "x"):
        direction = rng.normal(size=grads[path].shape)

        def loss(offset, path=path, direction=direction):
            moved = weights | {"x": x}
            moved[path] = moved[path] + offset * direction
            return np.sum(upstream * reference.forward(kind(name), moved, moved["x"], replay)[0])

        slope = (loss(step) - loss(-step)) / (2 * step)
        assert slope == pytest.approx(np.sum(grads[path] * direction), rel=1e-6, abs=1e-7), path


@every_kind
@pytest.mark.parametrize("case", CASES)
def test_layer_equals_the_reference(name, case):
    y, router, grads, dx = run(name, case)
    expected_y, routed, expected_grads = expected(name, case)
    close(y[REAL], expected_y)
    chosen, _, share = (np.array(part) for part in zip(*routed, strict=True))
    np.testing.assert_array_equal(np.asarray(router.experts)[REAL], chosen)  # slot order included
    np.testing.assert_array_equal(router.load, np.bincount(chosen.ravel(), minlength=E))
    close(np.asarray(router.confidence)[REAL], share)
    live = [c for c, *_ in expected(name, "native")[1]]
    np.testing.assert_array_equal(np.asarray(router.live)[REAL], live)
    for path, actual in float64(name, grads).items():
        close(actual, expected_grads[path])
    close(dx[REAL], expected_grads["x"])
    assert not np.any(dx[~REAL])


@every_kind
@pytest.mark.parametrize("case", CASES)
def test_gates_equal_the_reference(name, case):
    x, router = tokens()[0], layer(name).router.get_value()
    _, routed, _ = expected(name, case)
    chosen, gates, _ = (np.array(part) for part in zip(*routed, strict=True))
    logits = jnp.asarray(x[REAL]) @ router
    actual, _ = gate_weights(logits, jnp.asarray(chosen), config(name))
    np.testing.assert_allclose(actual, gates, rtol=TOLERANCE)


@every_kind
def test_drifted_experts_have_gates_and_gradients(name):
    """ISEEKYAN/Megatron-LM#49, #79: gathered from masked scores, both would silently be zero."""
    replay = routing(name, "drifted")
    live = np.asarray(run(name, "native")[1].experts)
    same = np.asarray(replay.experts)[..., :, None] == live[..., None, :]
    assert not np.any(same[REAL])  # the live router would have picked none of them
    x, router = jnp.asarray(tokens()[0][REAL]), layer(name).router.get_value()
    chosen = jnp.asarray(np.asarray(replay.experts)[REAL].astype(int))

    def weighted(logits):
        gates, _ = gate_weights(logits, chosen, config(name))
        return jnp.sum(gates * jnp.arange(1.0, K + 1)), gates

    by_logit, gates = jax.grad(weighted, has_aux=True)(x @ router)
    assert np.min(gates) > 1e-4
    assert np.all(np.abs(np.take_along_axis(np.asarray(by_logit), np.asarray(chosen), -1)) > 1e-6)
    _, _, grads, _ = run(name, "drifted")
    used = np.unique(np.asarray(chosen))
    assert np.all(np.max(np.abs(grads.router.get_value()), axis=0)[used] > 1e-4)
    for matrix in (grads.gate, grads.up, grads.down):
        moved = np.any(np.asarray(matrix.get_value()), axis=(1, 2))
        np.testing.assert_array_equal(np.flatnonzero(moved), used)


@every_kind
def test_replay_of_the_live_choice_is_the_ordinary_pass_bit_for_bit(name):
    native = compiled(layer(name), *tokens(), None)
    replay = Routing(native[0][1][1].experts, jnp.asarray(REAL))
    assert_identical(compiled(layer(name), *tokens(), replay), native)


@pytest.mark.parametrize("name", ["sigmoid_bias", "deepseek"])
def test_bias_takes_part_in_the_live_choice_alone(name):
    replay, (y, router, _, _) = routing(name, "full"), run(name, "full")
    biased = jax.tree.map(lambda leaf: leaf, layer(name))
    biased.selection_bias.set_value(jnp.asarray([9.0, 0, 0, 9, 0, 0, 0, 0]))
    (_, (y2, router2)), (grads, _) = compiled(biased, *tokens(), replay)
    np.testing.assert_array_equal(y2, y)
    np.testing.assert_array_equal(router2.confidence[REAL], router.confidence[REAL])
    live = np.sort(router2.live, axis=-1)[REAL]
    assert np.all(live[:, 0] == 0) and np.all(np.any(live == 3, axis=-1))
    assert np.any(router2.live != router.live)
    assert not np.any(grads.selection_bias.get_value())  # nothing here trains it


def test_groups_take_part_in_the_live_choice_alone():
    name = "sigmoid_raw_groups"
    free = layer(name, expert_groups=1, chosen_groups=1)
    y, router, _, _ = run(name, "full")
    _, (y2, router2) = compiled(free, *tokens(), routing(name, "full"))[0]
    np.testing.assert_array_equal(y2, y)
    assert np.any(np.asarray(router2.live != router.live)[REAL])  # the groups did limit something


@pytest.mark.fast
@every_kind
def test_slots_keep_their_order(name):
    """Gates and experts follow the recorded order: slot k of the gates belongs to slot k."""
    logits = jnp.asarray(tokens()[0]) @ layer(name).router.get_value()
    chosen = jnp.asarray(drifted_experts(name))
    gates, share = gate_weights(logits, chosen, config(name))
    reversed_gates, reversed_share = gate_weights(logits, chosen[..., ::-1], config(name))
    np.testing.assert_allclose(reversed_gates[..., ::-1], gates, rtol=1e-6)
    np.testing.assert_allclose(reversed_share, share, rtol=1e-6)
    picked = jnp.take_along_axis(logits, chosen, axis=-1)  # ascending: the worst comes first
    assert np.all(np.diff(picked, axis=-1) > 0) and np.all(np.diff(gates, axis=-1) > 0)


@every_kind
def test_padding_reaches_nothing(name):
    """Neither the values nor the choices of padding tokens affect real tokens."""
    (x, upstream), clean = tokens(), routing(name, "partial")
    dirty = np.where(REAL[..., None], x, 1e3)
    experts = jnp.where(REAL[..., None], clean.experts, 0)  # expert 0, K times
    replay = Routing(experts, clean.valid)
    (_, (y, router)), (grads, dx) = compiled(layer(name), dirty, upstream, replay)
    y2, router2, grads2, dx2 = run(name, "partial")
    np.testing.assert_array_equal(y[REAL], y2[REAL])
    np.testing.assert_array_equal(dx[REAL], dx2[REAL])
    np.testing.assert_array_equal(router.load, router2.load)
    assert router.load.sum() == K * REAL.sum()
    for (path, a), b in zip(float64(name, grads).items(), float64(name, grads2).values()):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.max(np.abs(b), initial=0), 1))
        assert np.any(b) or b.size == 0 or path == "bias"


@pytest.mark.fast
@pytest.mark.parametrize(("low", "agrees"), [(-30.0, True), (-80.0, False), (-1e4, False)])
def test_replayed_sigmoid_scores_that_vanish(low, agrees):
    """Gates stay normalised where 1e-20 in the denominator would make them zero."""
    logits, chosen = jnp.array([2.0, 1.0, low, low + 1.0, low, 0.0, 0.0, 0.0]), jnp.array([2, 3, 4])
    weighted = lambda z: jnp.sum(gate_weights(z, chosen, config("sigmoid"))[0] * jnp.arange(3.0))  # noqa: E731
    gates, share = gate_weights(logits, chosen, config("sigmoid"))
    np.testing.assert_allclose(gates, np.array([1, np.e, 1]) / (2 + np.e), rtol=1e-3)
    assert np.isfinite(share) and np.all(np.isfinite(jax.grad(weighted)(logits)))
    assert np.any(jax.grad(weighted)(logits)[2:5])
    with np.errstate(over="ignore"):
        other = reference.gate_weights(kind("sigmoid"), np.asarray(logits, "f8"), [2, 3, 4])
    assert np.allclose(gates, other, rtol=1e-3) == agrees
    assert agrees or np.max(other) < 1e-10


@pytest.mark.fast
def test_kinds_differ():
    """The comparison is sharp: on the same weights, no kind passes for another one."""
    x, weights = tokens()[0][REAL].astype(np.float64), float64("deepseek", layer("deepseek"))
    replay = forced(routing("deepseek", "full"))
    outputs = {
        name: reference.forward(kind(name), weights, x, replay)[0]
        for name in ("softmax", "softmax_raw", "sigmoid", "sigmoid_raw", "deepseek")
    }
    for one, other in itertools.combinations(outputs.values(), 2):
        assert np.max(np.abs(one - other)) > 1e-2 * np.max(np.abs(one))
    native, no_bias = [None] * len(x), weights | {"bias": np.zeros(E)}
    choices = [
        [c for c, *_ in reference.forward(kind(name), biased, x, native)[1]]
        for name, biased in itertools.product(("sigmoid", "deepseek"), (weights, no_bias))
    ]
    for one, other in itertools.combinations(choices, 2):
        assert one != other


@pytest.mark.fast
@every_kind
def test_live_choice_is_clear(name):
    """There are no near ties: float32 and float64 must agree, or the other tests mean little."""
    x, weights = tokens()[0][REAL].astype(np.float64), float64(name, layer(name))
    for token in x:
        s = token @ weights["router"]
        for noise in np.random.default_rng(0).normal(size=(20, E)):
            moved = reference.live_choice(kind(name), s + 1e-4 * noise, weights["bias"])
            assert moved == reference.live_choice(kind(name), s, weights["bias"])
