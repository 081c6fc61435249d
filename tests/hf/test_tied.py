"""Tied embeddings whose checkpoint stores the output head. Expected results are transformers 5's.

It computes with the head in `test_the_head_alone` and `test_a_copy`, and unties the two matrices in
`test_another_head`.
"""

import jax
import numpy as np
import pytest

from jaxrl_stable import hf
from jaxrl_stable.hf.__main__ import main, parse
from tests.hf import ours, raw

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def float32(tensor, moved=0):
    """Returns a bfloat16 tensor as float32, with `moved` added to the pattern of each value."""
    _, shape, data = tensor
    wide = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16) + np.uint32(moved)
    return ["F32", shape, wide.tobytes()]


def stored(tmp_path, head, **config):
    """Writes tied embeddings with a head, made from the embedding."""

    def edit(tensors):
        tensors[HEAD] = head(tensors[EMBEDDING])

    return raw.changed("qwen3.v5", tmp_path, edit, **config)


def assert_same(model, other):
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("head", [lambda t: t, float32])
def test_a_copy(head, tmp_path):
    assert_same(ours.load(stored(tmp_path, head)), ours.load(raw.FROZEN / "qwen3.v5"))


def test_a_copy_is_equal_in_the_type_that_is_loaded(tmp_path):
    directory = stored(tmp_path, lambda t: float32(t, moved=5))
    half = ours.load(directory, param_dtype="bfloat16")
    assert_same(half, ours.load(raw.FROZEN / "qwen3.v5", param_dtype="bfloat16"))
    with pytest.raises(ValueError, match="differs"):
        ours.load(directory)
    with pytest.raises(ValueError, match="differs"):
        hf.check(directory, hf.read_config(directory))


def test_the_head_alone(tmp_path):
    """`safetensors.torch.save_model` keeps this one of the two names."""

    def edit(tensors):
        tensors[HEAD] = tensors.pop(EMBEDDING)

    directory = raw.changed("qwen3.v5", tmp_path, edit)
    assert_same(ours.load(directory), ours.load(raw.FROZEN / "qwen3.v5"))
    raw.changed("qwen3.v5", tmp_path, edit, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight. Nothing"):
        ours.load(directory)


def test_neither(tmp_path):
    directory = raw.changed("qwen3.v5", tmp_path, lambda tensors: tensors.pop(EMBEDDING))
    with pytest.raises(ValueError, match=r"missing: model.embed_tokens.weight. Nothing"):
        ours.load(directory)


COMMANDS = {
    "load": lambda directory, out: ours.load(directory),
    "inspect": lambda directory, out: main(parse(["--debug", "inspect", str(directory)])),
    "upcycle": lambda directory, out: hf.upcycle(directory, out, copies=2),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("head", "said"),
    [
        (
            lambda t: raw.with_value(t, 7.0, 1199),  # the last value
            "lm_head.weight differs from model.embed_tokens.weight, .* = true; set it to false",
        ),
        (lambda t: raw.with_value(t, np.nan, 3), "non-finite values in lm_head.weight; download"),
        (lambda t: raw.zeros("BF16", 49, 24), r"misshapen: lm_head.weight is \[49, 24\], not"),
        (lambda t: raw.zeros("I8", 50, 24), "unknown dtype: lm_head.weight is I8"),
    ],
)
def test_another_head(head, said, command, tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(ValueError, match=said) as caught:
        COMMANDS[command](stored(tmp_path / "in", head), tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_advice_to_keep_both_matrices(tmp_path):
    zeros = stored(tmp_path, lambda t: raw.zeros("BF16", 50, 24), tie_word_embeddings=False)
    model = ours.load(zeros)
    assert not model.config.tie_embeddings and not np.any(model.head[...])


def test_both_matrices_are_not_finite(tmp_path):
    def edit(tensors):
        tensors[EMBEDDING] = tensors[HEAD] = raw.with_value(tensors[EMBEDDING], np.inf, 3)

    with pytest.raises(ValueError, match=r"non-finite values in model.embed_tokens.*, lm_head.*"):
        ours.load(raw.changed("qwen3.v5", tmp_path, edit))
