import dataclasses

import gin
import jax
import pytest

from jaxrl_stable import model as m
from jaxrl_stable.model import config as config_module
from jaxrl_stable.model.config import EXECUTION_FIELDS, layer_plan
from tests.model.common import small


@pytest.mark.fast
def test_parameter_counts_of_the_presets():
    assert m.parameter_count(m.qwen3_30b_a3b()) == 30_532_122_624
    assert m.parameter_count(m.qwen3_235b_a22b()) == 235_093_634_560
    assert 50_000 < m.parameter_count(m.tiny()) < 1_000_000


def test_parameter_count_by_hand():
    D, V, H, G, hd, F, W, E = 16, 40, 4, 2, 6, 10, 20, 7
    attention = D * hd * (H + 2 * G) + H * hd * D + 2 * hd
    dense, moe = 3 * D * W, D * E + 3 * E * D * F
    layers = 3 * (attention + 2 * D) + dense + 2 * moe
    config = small(mlp_only_layers=(0,), tie_embeddings=False)
    assert m.parameter_count(config) == layers + D + 2 * V * D
    assert m.parameter_count(small(mlp_only_layers=(0,))) == layers + D + V * D


def test_layers_with_experts():
    def moe(**overrides):
        config = small(num_layers=6, **overrides)
        layers = [i for i in range(6) if config.is_moe(i)]
        assert config.num_moe_layers == len(layers)
        return layers

    assert moe() == [0, 1, 2, 3, 4, 5]
    assert moe(mlp_only_layers=(0, 1, 2)) == [3, 4, 5]
    assert moe(decoder_sparse_step=2) == [1, 3, 5]
    assert moe(decoder_sparse_step=2, mlp_only_layers=(1,)) == [3, 5]
    assert moe(decoder_sparse_step=4) == [3]
    assert moe(num_experts=0) == []


def test_layer_plans():
    def plan(**overrides):
        config = small(**overrides)
        result = layer_plan(config)
        kinds = [kind for pattern, repeats in result for kind in pattern * repeats]
        assert kinds == [config.is_moe(i) for i in range(config.num_layers)]
        return result

    assert plan(num_layers=48) == [((True,), 48)]
    assert plan(num_layers=61, mlp_only_layers=(0, 1, 2)) == [((False,), 3), ((True,), 58)]
    assert plan(num_layers=48, decoder_sparse_step=2) == [((False, True), 24)]
    assert plan(num_layers=5, decoder_sparse_step=2) == [((False, True), 2), ((False,), 1)]
    assert plan(num_layers=12, decoder_sparse_step=3) == [((False, False, True), 4)]
    assert plan(num_layers=1) == [((True,), 1)]
    assert plan(num_layers=4, num_experts=0) == [((False,), 4)]
    plan(num_layers=9, mlp_only_layers=(2, 3, 7))


def test_the_layers_of_a_plan_stand_in_depth_order():
    config = small(num_layers=5, mlp_only_layers=(0, 3))
    stacks = jax.eval_shape(lambda: m.init_model(config, 0)).stacks
    kinds = []
    for blocks in stacks:
        kinds += [block.moe for block in blocks] * blocks[0].attention.query.get_value().shape[0]
    assert kinds == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(remat="all"), "remat"),
        (dict(attention="flash"), "attention"),
        (dict(experts="sparse"), "experts"),
        (dict(num_heads=4, num_kv_heads=3), "num_kv_heads"),
        (dict(num_experts=4, num_experts_per_token=5), "num_experts_per_token"),
        (dict(num_experts_per_token=0), "num_experts_per_token"),
    ],
    ids=str,
)
def test_wrong_configurations_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        small(**overrides)


def test_execution_fields_are_no_part_of_the_architecture():
    assert set(EXECUTION_FIELDS) < {field.name for field in dataclasses.fields(m.ModelConfig)}
    config = small()
    other = small(dtype="bfloat16", scan_layers=False, remat="block", experts="dense", head_chunk=9)
    assert config.architecture() == other.architecture()
    assert config.architecture() != small(rope_theta=5.0).architecture()


def test_gin_files_may_still_use_the_former_name_of_the_latent_sizes():
    gin.clear_config()
    try:
        with pytest.warns(DeprecationWarning, match="write model.LatentSizes"):
            gin.parse_config(
                "from __gin__ import dynamic_registration\n"
                "from jaxrl_stable.model import config as model\n"
                "model.tiny.latent = @model.LatentAttention()\n"
                "model.LatentAttention.key_value_rank = 12\n"
                "model.LatentAttention.rotary_dim = 4\n"
                "model.LatentAttention.value_dim = 8\n"
            )
        built = gin.get_configurable(config_module.tiny)()
        assert built.latent == config_module.LatentSizes(12, 4, 8)
    finally:
        gin.clear_config()
    with pytest.raises(AttributeError, match="Latents"):
        config_module.Latents  # noqa: B018
