"""Maps tensors in a Hugging Face checkpoint to parts of parameters.

The two sides differ in exactly three ways: in names; in layers (and experts), which are stacked
here and separate there; and in matrices, stored as `[in…, out…]` here and `[out, in]` there. A
`Piece` describes all three, for loading and for saving.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxrl_stable.model.config import ModelConfig, layer_plan

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Parameters outside the layers. Other names are relative to `model.layers.{layer}.`.
_OUTER = {"embedding": EMBEDDING, "norm.weight": "model.norm.weight", "head": HEAD}
_SHARED = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "attention.out": "self_attn.o_proj.weight",
}
_GROUPED = {
    "attention.query": "self_attn.q_proj.weight",
    "attention.key": "self_attn.k_proj.weight",
    "attention.value": "self_attn.v_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
}
_LATENT = {
    "attention.query_down": "self_attn.q_a_proj.weight",
    "attention.query_norm.weight": "self_attn.q_a_layernorm.weight",
    "attention.query": "self_attn.q_b_proj.weight",
    "attention.down": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.norm.weight": "self_attn.kv_a_layernorm.weight",
    "attention.up": "self_attn.kv_b_proj.weight",
}
_DENSE = {f"mlp.{name}": f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
_ROUTER = {
    "mlp.router": "mlp.gate.weight",
    "mlp.selection_bias": "mlp.gate.e_score_correction_bias",
    **{
        f"mlp.shared.{name}": f"mlp.shared_experts.{name}_proj.weight"
        for name in ("gate", "up", "down")
    },
}
# One tensor per expert, as checkpoints are published; `block_sparse_moe` is Mixtral's.
_EXPERTS = {
    f"mlp.{name}": f"mlp.experts.{{expert}}.{name}_proj.weight" for name in ("gate", "up", "down")
}
_MIXTRAL = {
    "mlp.router": "block_sparse_moe.gate.weight",
    "mlp.gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "mlp.up": "block_sparse_moe.experts.{expert}.w3.weight",
    "mlp.down": "block_sparse_moe.experts.{expert}.w2.weight",
}
# All experts in one tensor, gate above up. Transformers 5 computes in this layout and can save it.
_FUSED = {
    "mlp.gate": "mlp.experts.gate_up_proj",
    "mlp.up": "mlp.experts.gate_up_proj",
    "mlp.down": "mlp.experts.down_proj",
}
LAYOUTS = ("per-expert", "fused")


class Piece(NamedTuple):
    """A part of a parameter, and the part of a tensor that holds it.

    Attributes:
      path: name of the parameter, as returned by `parameters`.
      index: leading indices into the parameter: the layer, and the expert if any.
      tensor: name of the tensor in the checkpoint.
      lead: leading indices into the tensor: the expert, in the fused layout.
      start: first row of the part in the tensor; in the fused layout, `up` is below `gate`.
      shape: shape of the tensor.
      rows, columns: size of the part as a matrix; a vector is one column.
      inputs: number of parameter axes that form the columns.
      transposed: whether the columns come first in the parameter.
    """

    path: str
    index: tuple[int, ...]
    tensor: str
    lead: tuple[int, ...]
    start: int
    shape: tuple[int, ...]
    rows: int
    columns: int
    inputs: int
    transposed: bool


def parameters(model: Any) -> dict[str, nnx.Param]:
    """Returns all parameters of a (possibly abstract) model by path, such as `norm.weight`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(
        model, is_leaf=lambda x: isinstance(x, nnx.Param)
    )
    return {".".join(_name(key) for key in path): leaf for path, leaf in leaves}


def pieces(
    config: ModelConfig, model: Any, model_type: str, layout: str = "per-expert"
) -> dict[str, list[Piece]]:
    """Returns the pieces of every parameter, by path.

    Args:
      config: the architecture.
      model: the model or its abstract shape.
      model_type: the checkpoint's `model_type`, from `config.json`.
      layout: "per-expert" or "fused".
    """
    sparse = _FUSED if layout == "fused" else _EXPERTS
    if model_type == "mixtral" and layout != "fused":
        sparse = _MIXTRAL
    attention = _SHARED | (_LATENT if config.latent else _GROUPED)
    if config.latent and not config.latent.query_rank:
        attention["attention.query"] = "self_attn.q_proj.weight"
    found: dict[str, list[Piece]] = {}
    for path, param in parameters(model).items():
        if path in _OUTER:
            found[path] = [_piece(path, param, (), _OUTER[path], layout)]
            continue
        _, stack, position, inner = path.split(".", 3)
        plan = layer_plan(config)
        pattern, repeats = plan[int(stack)]
        first = sum(len(p) * r for p, r in plan[: int(stack)]) + int(position)
        moe = pattern[int(position)]
        template = (attention | (_ROUTER | sparse if moe else _DENSE))[inner]
        experts = range(config.num_experts) if moe and inner in _EXPERTS else [None]
        found[path] = [
            _piece(
                path,
                param,
                (repeat,) if expert is None else (repeat, expert),
                f"model.layers.{first + repeat * len(pattern)}." + template.format(expert=expert),
                layout,
            )
            for repeat in range(repeats)
            for expert in experts
        ]
    return found


def tensor_shapes(plan: dict[str, list[Piece]]) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in a checkpoint, in model order."""
    return {piece.tensor: piece.shape for part in plan.values() for piece in part}


def _piece(path: str, param: nnx.Param, index: tuple, tensor: str, layout: str) -> Piece:
    axes, inputs = param.get_metadata()["axes"], param.get_metadata()["inputs"]
    sizes = dict(zip(axes, param.get_value().shape, strict=True))
    for name in axes[: len(index)]:
        del sizes[name]
    columns = 1 if inputs is None else math.prod(sizes.pop(name) for name in inputs)
    rows = math.prod(sizes.values())
    transposed = inputs is not None and axes[len(index)] in inputs
    shape: tuple[int, ...] = (rows,) if inputs is None else (rows, columns)
    lead, start = (), 0
    if layout == "fused" and len(index) == 2:
        number = param.get_value().shape[1]
        double = path.endswith((".gate", ".up"))
        start = rows if path.endswith(".up") else 0
        lead, shape = index[1:], (number, rows * (2 if double else 1), columns)
    count = 0 if inputs is None else len(inputs)
    return Piece(path, index, tensor, lead, start, shape, rows, columns, count, transposed)


def _name(key: Any) -> str:
    """Returns one step of a tree path, without the quotes and brackets of `keystr`."""
    for attribute in ("name", "key", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
