"""Names of the stages in the lowered program; a profile groups operations by them."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxrl_stable import model as m
from jaxrl_stable.model.config import LatentSizes
from tests.model.common import small

ATTENTION = {f"attention/{stage}" for stage in ("qkv", "rope", "cache", "attended", "out")}
EXPERTS = {f"mlp/{stage}" for stage in ("route", "dispatch", "experts", "combine", "load")}
SWIGLU = ("gate", "up", "down")
STAGES = {
    *("embed", "final_norm", "head"),
    *ATTENTION,
    *(f"mlp/{product}" for product in SWIGLU),  # a dense layer
    *EXPERTS,
    *(f"mlp/experts/{product}" for product in SWIGLU),
    *(f"mlp/shared/{product}" for product in SWIGLU),
}
CONFIGS = {
    "grouped": small(mlp_only_layers=(0,), num_shared_experts=1),
    "latent": small(
        mlp_only_layers=(0,),
        num_shared_experts=1,
        latent=LatentSizes(key_value_rank=12, rotary_dim=2, value_dim=5, query_rank=7),
    ),
}


def scopes(config, columns):
    """Returns the scopes of all operations of a cached forward pass, without JAX's prefixes."""

    def forward(model, tokens, cache):
        ones = jnp.ones_like(tokens)
        output = model(tokens, ones, ones, cache=cache)
        return m.token_log_probs(model, output.hidden, tokens), output

    model = jax.eval_shape(lambda: m.init_model(config, 0))
    tokens = jax.ShapeDtypeStruct((2, columns), jnp.int32)
    cache = jax.eval_shape(lambda: m.empty_cache(config, 2, 4))
    text = jax.jit(forward).lower(model, tokens, cache).as_text(debug_info=True)
    names = re.findall(r'loc\("([^"]*)/[^/"]+"', text)
    found = set()
    for name in names:
        parts = [part for part in name.split("/") if "(" not in part]
        ends = range(1, len(parts) + 1)
        found |= {"/".join(parts[start:end]) for end in ends for start in range(end)}
    return found


@pytest.mark.parametrize("columns", [3, 1])  # prefill and decode
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_stage_of_a_forward_pass_has_its_name(kind, columns):
    assert STAGES - scopes(CONFIGS[kind], columns) == set()
