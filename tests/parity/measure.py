"""Largest differences between this package and transformers, for one architecture."""

import pathlib
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch

from jaxrl_stable import hf
from tests.hf import batches, ours, theirs, zoo

SHARD_BYTES = 20_000  # several files and an index


class Check(NamedTuple):
    """A comparison and its largest acceptable difference."""

    description: str
    tolerance: float


# Differences are relative to the largest entry of transformers' result, except log-probabilities
# (nats) and counts.
CHECKS = {
    "layers": Check("outputs of all blocks", 2e-5),
    "hidden": Check("final hidden states", 2e-5),
    "logits": Check("logits", 2e-5),
    "log-probs": Check("log-probabilities of the next tokens, in nats", 2e-5),
    "experts": Check("(token, layer) pairs with other experts", 0),
    "gates": Check("weights of the experts", 2e-5),
    "packed": Check("hidden states of packed rows against each sequence alone", 2e-5),
    "gradients": Check("gradients of the tensor where they differ most", 5e-5),
    "greedy": Check("of 96 greedy tokens through the cache, those that differ", 0),
    "cached log-probs": Check("log-probabilities of these against one full pass, in nats", 5e-5),
    "loaded": Check("parameters that differ between the two layouts", 0),
    "tensors": Check("exported tensors that differ from the original in any bit", 0),
    "exported": Check("logits of transformers on exports against the original's", 1e-6),
    "bfloat16": Check(
        "mean error of log-probabilities in bfloat16, over the one of transformers in bfloat16", 1.5
    ),
}


def measure(name: str, directory: pathlib.Path) -> dict[str, float]:
    """Returns the errors of one architecture of the zoo, by the names of `CHECKS`.

    Args:
      name: name in `zoo.ZOO`.
      directory: empty directory for checkpoints.
    """
    torch.set_num_threads(1)  # these models are too small for several threads
    reference = zoo.build(name)
    original, fused = directory / "original", directory / "fused"
    reference.save_pretrained(original, max_shard_size=SHARD_BYTES)
    reference.save_pretrained(fused, save_original_format=False)
    assert (original / "model.safetensors.index.json").exists()
    model = ours.load(original)
    batch = tokens, _, segments = batches.left_padded()
    expected = theirs.observe(reference, *batch)
    errors = forward(ours.observe(model, *batch), expected, segments != 0)

    rows, _, sequences = batches.packed()
    alone = theirs.observe_alone(reference, rows, sequences)
    together = ours.observe(model, *batches.packed())
    errors["packed"] = max(
        relative(together[key][sequences != 0], alone[key][sequences != 0]) for key in alone
    )

    errors["gradients"] = gradients(
        ours.gradients(model, *batch), theirs.gradients(reference, *batch)
    )
    response, logp = ours.greedy(model, tokens, segments)
    likeliest, _ = theirs.greedy(reference, tokens, segments)
    errors["greedy"] = float(np.sum(response != likeliest))
    full = theirs.continued(reference, tokens, segments, response)
    errors["cached log-probs"] = absolute(logp, full)

    errors["loaded"] = different(
        ours.tensors(model, "fused"), ours.tensors(ours.load(fused), "fused")
    )
    errors |= exports(model, reference, directory)
    errors["bfloat16"] = bfloat16(original, reference, batch)
    return errors


def forward(actual: dict, expected: dict, real: np.ndarray) -> dict[str, float]:
    """Returns errors of one pass over a padded batch, on real tokens only."""

    def both(key):
        for side in (actual, expected):
            yield side[key][:, real] if side[key].ndim == 4 else side[key][real]

    return {key: relative(*both(key)) for key in ("layers", "hidden", "logits", "gates")} | {
        "log-probs": absolute(*both("logp")),
        "experts": float(np.not_equal(*both("experts")).any(-1).sum()),
    }


def gradients(actual: dict, expected: dict) -> float:
    """Returns the largest error. Parameters that are buffers in transformers must get zero."""
    buffers = {name: np.zeros_like(actual[name]) for name in actual.keys() - expected.keys()}
    assert all(name.endswith("e_score_correction_bias") for name in buffers)
    assert different(buffers, {name: actual[name] for name in buffers}) == 0
    return max(relative(actual[name], expected[name]) for name in expected)


def exports(model, reference, directory: pathlib.Path) -> dict[str, float]:
    """Saves in all ways, loads with transformers, and compares files and logits."""
    original, fused = directory / "original", directory / "fused"
    wanted, differing, moved = _logits(reference), 0.0, 0.0
    for number, (source, options) in enumerate(
        (
            (original, dict(file_bytes=SHARD_BYTES)),
            (original, dict(like=original)),
            (fused, dict(layout="fused", like=original)),
            (fused, dict(layout="fused", file_bytes=SHARD_BYTES)),
        )
    ):
        target = directory / f"export{number}"
        hf.save(model, target, **options)
        differing += different(stored(target), stored(source))
        moved = max(moved, relative(_logits(zoo.again(reference, target)), wanted))
    half, target = zoo.again(reference, original, dtype=torch.bfloat16), directory / "half"
    half.save_pretrained(directory / "half-original")
    hf.save(model, target, dtype="bfloat16")
    differing += different(stored(target), stored(directory / "half-original"))
    return {"tensors": differing, "exported": moved}


def bfloat16(original: pathlib.Path, reference, batch) -> float:
    """Returns the bfloat16 error of this package, divided by that of transformers.

    Both round in different places, so single log-probabilities cannot agree, but their mean errors
    should. A nearly undecided router would choose other experts and outweigh all else, so all
    passes replay the experts of transformers in bfloat16.
    """
    half = theirs.observe(zoo.again(reference, original, dtype=torch.bfloat16), *batch)
    replay = ours.routing(half["experts"], batch[2]) if half["experts"].size else None
    exact = ours.observe(ours.load(original), *batch, replay)["logp"]
    model = ours.load(original, dtype="bfloat16", param_dtype="bfloat16")
    error = np.mean(np.abs(ours.observe(model, *batch, replay)["logp"] - exact))
    return float(error / np.mean(np.abs(half["logp"] - exact)))


def stored(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    """Returns all tensors of a directory."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= safetensors.torch.load_file(file)
    return found


def different(actual: dict, expected: dict) -> float:
    """Counts arrays that only one side has, or that differ in type, shape or any bit."""
    count = len(actual.keys() ^ expected.keys())
    for name in actual.keys() & expected.keys():
        a, b = torch.as_tensor(actual[name]), torch.as_tensor(expected[name])
        count += a.dtype != b.dtype or a.shape != b.shape or not torch.equal(a, b)
    return float(count)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, divided by the largest entry."""
    largest = np.max(np.abs(expected), initial=0.0)
    return absolute(actual, expected) / float(largest or 1.0)


def absolute(actual: np.ndarray, expected: np.ndarray) -> float:
    assert np.shape(actual) == np.shape(expected)
    return float(np.max(np.abs(actual - expected), initial=0.0))


def _logits(model) -> np.ndarray:
    return theirs.observe(model, *batches.left_padded())["logits"]
