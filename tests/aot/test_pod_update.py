"""On a mesh with every kind of axis, the update gathers only what it should, and it is counted."""

import dataclasses
import math
from collections import Counter

import jax
import pytest

from jaxrl_stable import configs, sharding
from jaxrl_stable.aot import hlo, programs
from jaxrl_stable.aot.collectives import KINDS, collectives
from jaxrl_stable.model.config import tiny
from jaxrl_stable.sharding import AXES, MeshShape, rows
from jaxrl_stable.trainer import batch

LAYERS, MICRO_BATCHES, PASSES = 3, 2, 2  # remat = "block" runs each layer forward twice
ONCE, PER_LAYER = MICRO_BATCHES, LAYERS * MICRO_BATCHES

# Sizes are chosen so that no two kinds of arrays have the same: D 256, H 4, G 2, E 8, K 2, F 256,
# V 1536; 512 columns. On a device: 2 rows of 256 columns, 4 experts, a quarter of D.
EXPERIMENT = configs.Experiment(
    model=tiny(
        vocab_size=1536,
        hidden_size=256,
        num_layers=LAYERS,
        head_dim=128,
        moe_intermediate_size=256,
        tie_embeddings=False,
        dtype="bfloat16",
        remat="block",
        attention="splash",
        experts="megablox",
    ),
    data=configs.Data(prompt_width=128),
    reinforcement=configs.Reinforcement(
        prompts=8,
        group_size=2,
        max_tokens=384,
        micro_batch_size=8,
        objective=configs.Objective(mini_batches=1, replay="R2"),
    ),
    mesh=MeshShape(data=1, fsdp=2, expert=2, tensor=1, context=2),
)

PLAN = {
    "three matrices of each expert": ("bf16", (4, 64, 256), 3 * PASSES * PER_LAYER),
    "query and output matrices": ("bf16", (4, 64, 128), 2 * PASSES * PER_LAYER),
    "key and value matrices": ("bf16", (2, 64, 128), 2 * PASSES * PER_LAYER),
    "router": ("f32", (8, 64), PASSES * PER_LAYER),
    "output head": ("bf16", (64, 1536), ONCE),
    "tokens to the experts, and their gradients": ("bf16", (256, 512), (PASSES + 1) * PER_LAYER),
    "choices of these tokens": ("u8", (2, 512), PASSES * PER_LAYER),
    "gates of these tokens": ("bf16", (2, 512), PASSES * PER_LAYER),
    "which of them are real": (
        "pred",
        (512,),
        PER_LAYER + ONCE,
    ),  # the first pass: outside its loop
    "keys and values of a row": ("bf16", (2, 2, 128, 256), 2 * PASSES * PER_LAYER),
    "segments of a row": ("s32", (2, 256), PER_LAYER + ONCE),
    "lengths before each part of a row": ("s32", (2, 2), ONCE),
    "ids to the embedding": ("s32", (512,), ONCE),
}
PLANNED = Counter({(dtype, dims): count for dtype, dims, count in PLAN.values()})


def compiled_update(slice_of, experiment):
    sizes = dataclasses.astuple(experiment.mesh)
    mesh = slice_of("v5e:2x4", sizes, AXES)
    with jax.set_mesh(mesh):
        *_, update = programs.compiled_programs(experiment, mesh, ("update",))
    return collectives(hlo.parse(update.executable.as_text()), devices=8)


def arrays(found, *kinds):
    """Counts how often each kind of array is sent, by type and sorted sizes other than 1."""
    total = Counter()
    for each in found:
        if each.kind in kinds or (each.gathers and "all-gather" in kinds):
            for a in each.arrays:
                total[a.dtype, tuple(sorted(n for n in a.dims if n > 1))] += each.times
    return total


@pytest.fixture(scope="module")
def found(slice_of):
    return compiled_update(slice_of, EXPERIMENT)


def test_every_gather_is_planned(found):
    """Otherwise something new is sent: routing, log-probabilities, logits, or a weight twice."""
    assert arrays(found, "all-gather") == PLANNED


def test_gradients_of_experts_go_back_by_reduce_scatter(found):
    """Gradients are cut into four parts before they are sent, never summed whole everywhere."""
    scattered = arrays(found, "reduce-scatter")
    assert scattered["bf16", (4, 256, 256)] == 2 * PER_LAYER  # into the experts: 4 · D/4 rows of F
    assert scattered["bf16", (4, 64, 1024)] == PER_LAYER  # out of them: 4 · F rows of D/4
    summed = arrays(found, "all-reduce")
    assert not [dims for _, dims in summed if math.prod(dims) >= 4 * 256 * 256]


def test_no_logits_travel(found):
    """Only the head, the embedding and their gradients have the vocabulary as an axis."""
    kinds = arrays(found, *KINDS)
    with_vocabulary = {dims for _, dims in kinds if 1536 in dims}
    assert with_vocabulary == {(64, 1536), (256, 1536)}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["routing", "log_probs", "experts"])
def test_a_fault_is_seen(slice_of, monkeypatch, fault):
    experiment = EXPERIMENT
    if fault == "routing":  # micro-batches are brought to every device
        whole = lambda *args, **kwargs: sharding.constrain(rows.cut_rows(*args, **kwargs), None)  # noqa: E731
        monkeypatch.setattr(batch, "cut_rows", whole)
    elif fault == "log_probs":  # the columns of cut and of joined rows come together
        monkeypatch.setattr(rows, "_columns", lambda over: ())
    else:  # each layer runs forward once: half of the gathers
        model = dataclasses.replace(EXPERIMENT.model, remat="none")
        experiment = dataclasses.replace(EXPERIMENT, model=model)
    seen = arrays(compiled_update(slice_of, experiment), "all-gather")
    assert seen != PLANNED
    new = {dtype for dtype, _ in seen - PLANNED}
    assert {"routing": "u8", "log_probs": "f32"}.get(fault, "u8") in new or fault == "experts"
