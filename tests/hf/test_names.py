"""Names and shapes of tensors at real sizes, without allocating them."""

import functools
import math
import re

import jax
import pytest

from jaxrl_stable.hf.names import pieces, tensor_shapes
from jaxrl_stable.model import init_model, qwen3_30b_a3b, tiny
from jaxrl_stable.model.config import LatentSizes, layer_plan

pytestmark = pytest.mark.fast
# Sizes of DeepSeek-V3 (arXiv:2412.19437, §4.2), except its number of experts.
DEEPSEEK = dict(
    vocab_size=129_280,
    hidden_size=7168,
    num_layers=61,
    num_heads=128,
    num_kv_heads=128,
    head_dim=192,
    intermediate_size=18_432,
    moe_intermediate_size=2048,
    mlp_only_layers=(0, 1, 2),
    router_score="sigmoid",
    selection_bias=True,
    num_shared_experts=1,
    query_key_norm="none",
    latent=LatentSizes(512, 64, 128, 1536),
    tie_embeddings=False,
)
CONFIGS = {
    "qwen3_moe": qwen3_30b_a3b(),
    "alternating": tiny(num_layers=5, decoder_sparse_step=2),
    "irregular": tiny(num_layers=9, mlp_only_layers=(0, 3, 4, 7)),
    "deepseek_v3": tiny(**DEEPSEEK),
}


@functools.cache
def plan(name, layout):
    config = CONFIGS[name]
    shapes = jax.eval_shape(lambda: init_model(config, 0))
    return pieces(config, shapes, name if "_" in name else "qwen3_moe", layout)


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_have_the_number_at_which_they_are_applied(name, layout):
    applied = [
        (stack, position, repeat)
        for stack, (pattern, repeats) in enumerate(layer_plan(CONFIGS[name]))
        for repeat in range(repeats)
        for position in range(len(pattern))
    ]
    assert len(applied) == CONFIGS[name].num_layers
    found = set()
    for path, part in plan(name, layout).items():
        for piece in part:
            layer = re.match(r"model\.layers\.(\d+)\.", piece.tensor)
            assert bool(layer) == path.startswith("stacks.")
            if layer:
                stack, position = map(int, path.split(".")[1:3])
                assert applied[int(layer[1])] == (stack, position, piece.index[0])
                if "experts" in piece.tensor or ".gate.weight" in piece.tensor:
                    found.add(int(layer[1]))
    assert found == {i for i in range(len(applied)) if CONFIGS[name].is_moe(i)}


@pytest.mark.parametrize("layout", ["per-expert", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pieces_cover_every_tensor_once(name, layout):
    covered: dict[str, list] = {}
    for part in plan(name, layout).values():
        for piece in part:
            covered.setdefault(piece.tensor, []).append(piece)
    for tensor, parts in covered.items():
        assert len({piece.shape for piece in parts}) == 1
        assert sum(p.rows * p.columns for p in parts) == math.prod(parts[0].shape)
        ends = {(p.lead, p.start + p.rows) for p in parts}
        starts = {(p.lead, p.start) for p in parts if p.start}
        assert len(ends) == len(parts) and starts < ends, tensor


def test_published_index_of_qwen3_30b():
    """Number of tensors and bytes as in `model.safetensors.index.json` of Qwen3-30B-A3B."""
    shapes = tensor_shapes(plan("qwen3_moe", "per-expert"))
    assert len(shapes) == 18_867
    assert 2 * sum(map(math.prod, shapes.values())) == 61_064_245_248
    assert shapes["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (4096, 2048)
    assert shapes["model.layers.0.self_attn.k_norm.weight"] == (128,)


def test_shapes_of_deepseek_v3():
    """As in its index and in `transformers`."""
    shapes, layer = tensor_shapes(plan("deepseek_v3", "per-expert")), "model.layers.60."
    assert shapes[layer + "self_attn.q_a_proj.weight"] == (1536, 7168)
    assert shapes[layer + "self_attn.q_b_proj.weight"] == (24576, 1536)
    assert shapes[layer + "self_attn.kv_a_proj_with_mqa.weight"] == (576, 7168)
    assert shapes[layer + "self_attn.kv_b_proj.weight"] == (32768, 512)
    assert shapes[layer + "self_attn.o_proj.weight"] == (7168, 16384)
    assert shapes[layer + "mlp.gate.e_score_correction_bias"] == (8,)
    assert shapes[layer + "mlp.shared_experts.up_proj.weight"] == (2048, 7168)
    assert shapes["model.layers.2.mlp.gate_proj.weight"] == (18432, 7168)
    assert "model.layers.2.mlp.gate.weight" not in shapes
