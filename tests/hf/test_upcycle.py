import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrl_stable import hf
from jaxrl_stable.configs import MeshShape
from jaxrl_stable.hf.upcycle import upcycle
from jaxrl_stable.model import init_model, tiny
from jaxrl_stable.sharding import make_mesh

DENSE = tiny(
    vocab_size=40,
    hidden_size=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=24,
    num_experts=0,
    num_experts_per_token=0,
    moe_intermediate_size=0,
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Writes a dense checkpoint with weights large enough for its MLPs to matter."""
    directory = tmp_path_factory.mktemp("dense")
    model = init_model(DENSE, 0)
    model = jax.tree.map(lambda w: 2 * w, model)
    hf.save(model, directory)
    (directory / "tokenizer.json").write_text("{}")
    return directory


def log_probs(directory):
    model = hf.load(directory, make_mesh(MeshShape()))
    tokens = np.random.default_rng(0).integers(0, DENSE.vocab_size, (4, 12))
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    output = jax.jit(
        lambda m: m(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    )(model)
    logits = output.hidden @ model.head_weight()
    return np.asarray(jax.nn.log_softmax(logits), np.float64), output.router


def kl(one, other):
    return (np.exp(one) * (one - other)).sum(-1)


@pytest.mark.parametrize(
    ("copies", "chosen", "segments"), [(4, 2, 1), (3, 1, 1), (2, 1, 4), (3, 2, 3)]
)
def test_upcycled_model_computes_the_dense_one(dense, tmp_path, copies, chosen, segments):
    upcycle(dense, tmp_path / "moe", copies=copies, chosen=chosen, segments=segments)
    config = hf.read_config(tmp_path / "moe")
    assert config.num_experts == copies * segments
    assert config.num_experts_per_token == chosen * segments
    assert config.moe_intermediate_size == DENSE.intermediate_size // segments
    expected, _ = log_probs(dense)
    found, router = log_probs(tmp_path / "moe")
    assert np.abs(kl(expected, found)).max() < 1e-6
    # One copy of each segment, `chosen` times, and different copies for different tokens.
    experts = np.asarray(router.experts).reshape(-1, chosen * segments)
    assert (np.bincount((experts % segments).ravel()) == len(experts) * chosen).all()
    assert len(np.unique(experts // segments)) == copies


def test_parts_of_the_matrices(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", copies=2, segments=4)
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    original = load_file(dense / "model.safetensors")
    down = original["model.layers.1.mlp.down_proj.weight"]
    part = weights["model.layers.1.mlp.experts.6.down_proj.weight"]  # copy 1, segment 2
    np.testing.assert_array_equal(part, 4 * down[:, 12:18])
    up = weights["model.layers.1.mlp.experts.6.up_proj.weight"]
    np.testing.assert_array_equal(up, original["model.layers.1.mlp.up_proj.weight"][12:18])
    router = weights["model.layers.0.mlp.gate.weight"]
    np.testing.assert_array_equal(router[:4], np.broadcast_to(router[0], (4, 16)))
    assert np.abs(router[0] - router[4]).max() > 1e-3


def test_noise_parts_the_copies_in_proportion(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", copies=2, noise=0.1)
    weights = load_file(tmp_path / "moe" / "model.safetensors")
    original = load_file(dense / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    copies = [weights[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in (0, 1)]
    for copy in copies:
        relative = np.sqrt(np.mean((copy - original) ** 2) / np.mean(original**2))
        assert relative == pytest.approx(0.1, rel=0.15)
    assert np.corrcoef(*(np.ravel(copy - original) for copy in copies))[0, 1] < 0.2
    expected, _ = log_probs(dense)
    found, _ = log_probs(tmp_path / "moe")
    assert kl(expected, found).max() > 1e-5


def test_upcycling_keeps_the_tokenizer_and_says_what_it_wrote(dense, tmp_path):
    upcycle(dense, tmp_path / "moe", copies=2)
    assert (tmp_path / "moe" / "tokenizer.json").exists()
    content = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert content["model_type"] == "qwen3_moe" and content["norm_topk_prob"] is True
    with pytest.raises(ValueError, match="already has experts"):
        upcycle(tmp_path / "moe", tmp_path / "again", copies=2)


@pytest.mark.parametrize(
    "sizes", [dict(copies=2, chosen=3), dict(copies=0), dict(copies=2, segments=5)]
)
def test_sizes_that_do_not_fit(dense, tmp_path, sizes):
    with pytest.raises(ValueError, match="do not fit"):
        upcycle(dense, tmp_path / "moe", **sizes)
    assert not (tmp_path / "moe").exists()
