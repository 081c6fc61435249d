"""Routing: the experts that each token used, as arrays to store, compare and replay.

Column `t` holds the experts that processed `tokens[b, t]` as model *input*; they shaped the
distribution of `tokens[b, t + 1]`. Columns without a choice have `valid=False`: padding, and the
last sampled token, which was never fed to the model. No expert id can mark a missing choice,
because with 256 experts `uint8` has no spare value.
"""

from __future__ import annotations

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32, Integer, UInt

from jaxrl_stable.array_types import Array, Bool, Float, Int


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Experts of every token in every MoE layer.

    Attributes:
      experts: expert ids in the router's own order. `L` counts MoE layers only, in depth order;
        `uint8` up to 256 experts, else `uint16`.
      valid: True where a choice was made; elsewhere the live router decides on replay.

    Example:
      One MoE layer with two of four experts per token. The second token was sampled last, so it was
      never fed to the model.

      >>> experts = jnp.array([[[[3, 1], [0, 0]]]], expert_dtype(4))
      >>> routing = Routing(experts, jnp.array([[True, False]]))
      >>> validate(routing, num_layers=1, num_experts=4)
      >>> print(to_token_major(routing)[0, :, 0])
      [[ 3  1]
       [-1 -1]]
    """

    experts: UInt[Array, "L B T K"]
    valid: Bool[Array, "B T"]


def expert_dtype(num_experts: int) -> jnp.dtype:
    """Returns the smallest unsigned dtype that holds every expert id."""
    return jnp.dtype(jnp.uint8 if num_experts <= 256 else jnp.uint16)


def overlap(a: Integer[Array, "*N K"], b: Integer[Array, "*N K"]) -> Float[Array, "*N"]:
    """Returns the share of the K experts that two choices have in common, regardless of order.

    >>> print(overlap(jnp.array([[0, 1], [2, 3]]), jnp.array([[1, 0], [2, 4]])))
    [1.  0.5]
    """
    same = a[..., :, None] == b[..., None, :]
    return same.any(-1).mean(-1, dtype=jnp.float32)


def check_layout(routing: Routing, num_layers: int, num_experts: int) -> None:
    """Checks shapes and dtypes, so that no array broadcasts or indexes from the end.

    Also works while tracing.

    Raises:
      ValueError: if a shape, the layer count or a dtype is wrong.
    """
    experts, valid = routing.experts, routing.valid
    if experts.ndim != 4 or experts.shape[1:3] != valid.shape:
        raise ValueError(
            f"routing.experts has shape {experts.shape} and routing.valid {valid.shape}; "
            "use [L, B, T, K] and [B, T]"
        )
    if experts.shape[0] != num_layers:
        raise ValueError(
            f"routing has {experts.shape[0]} layers but the model has {num_layers} MoE layers; "
            "leave out dense layers, which have no router"
        )
    if experts.dtype != expert_dtype(num_experts):  # −1 would index the last expert
        raise ValueError(
            f"routing.experts is {experts.dtype}; with {num_experts} experts it must be "
            f"{expert_dtype(num_experts)}"
        )
    if valid.dtype != bool:  # integers would index rows instead of masking them
        raise ValueError(f"routing.valid is {valid.dtype}; it must be bool")


def validate(routing: Routing, num_layers: int, num_experts: int) -> None:
    """Checks on the host that routing from an external source can be replayed.

    Raises:
      ValueError: if `check_layout` fails, an expert is out of range, or a token has the same expert
        twice in one layer (which would count it twice).
    """
    check_layout(routing, num_layers, num_experts)
    experts, valid = np.asarray(routing.experts), np.asarray(routing.valid)
    chosen = np.sort(experts[:, valid], axis=-1)
    if chosen.size and chosen.max() >= num_experts:
        raise ValueError(f"routing contains expert {chosen.max()}; the model has {num_experts}")
    if (chosen[..., 1:] == chosen[..., :-1]).any():
        layer, row = np.argwhere((chosen[..., 1:] == chosen[..., :-1]).any(-1))[0]
        b, t = np.argwhere(valid)[row]
        raise ValueError(f"routing repeats an expert at layer {layer}, row {b}, position {t}")


def to_token_major(routing: Routing) -> Int32[Array, "B T L K"]:
    """Converts to the layout of other frameworks: grouped by token, −1 where no choice was made.

    MaxText accepts this layout as `forced_routed_experts`. Its early versions assign no expert to a
    token marked −1; later ones, like this library, let the live router decide.
    """
    experts = routing.experts.transpose(1, 2, 0, 3).astype(jnp.int32)
    return jnp.where(routing.valid[:, :, None, None], experts, -1)


def from_token_major(experts: Int[Array, "B T L K"], num_experts: int) -> Routing:
    """Converts routing recorded by another framework (vLLM, SGLang, sglang-jax, Tunix, MaxText).

    These frameworks record `[length, L, K]` per sequence. `length` may be one less than the number
    of tokens, since the last sampled token was never fed to the model. First align the record with
    the padded tokens and fill the gaps with −1. Align carefully: an offset of one silently gives
    every token its neighbour's experts.

    Args:
      experts: expert ids with a signed dtype, since an unsigned one could not mark missing choices.
        Each token has K different experts in each layer, or only negative values: −1 (no record)
        or −2 (no token, in Tunix). `L` counts MoE layers only.
      num_experts: E, the model's number of experts.

    Returns:
      The routing, with `valid=False` for tokens with negative values.

    Raises:
      ValueError: if the shape or dtype is wrong. For NumPy arrays, also if a token lacks some of
        its choices, an expert is out of range, or a token has the same expert twice in one layer.
        The values of device arrays and traced arrays are not checked here; `validate` can check
        them later.
    """
    if experts.ndim != 4 or not jnp.issubdtype(experts.dtype, jnp.signedinteger):
        raise ValueError(
            f"token-major routing has shape {experts.shape} and dtype {experts.dtype}; use "
            "[B, T, L, K] and a signed integer dtype"
        )
    recorded = experts >= 0
    valid = recorded.all((2, 3))
    if isinstance(experts, np.ndarray):
        if (valid != recorded.any((2, 3))).any():
            b, t = np.argwhere(valid != recorded.any((2, 3)))[0]
            _, _, layer, k = np.argwhere(~recorded[b : b + 1, t : t + 1])[0]
            raise ValueError(
                f"routing of row {b}, position {t} is incomplete: {experts[b, t, layer, k]} at "
                f"layer {layer}, choice {k}. Pass all choices of a token or none, "
                "and leave out dense layers"
            )
        if experts.size and experts.max() >= num_experts:
            raise ValueError(
                f"routing contains expert {experts.max()}; the model has {num_experts}"
            )
    chosen = jnp.where(valid[:, :, None, None], experts, 0).transpose(2, 0, 1, 3)
    routing = Routing(chosen.astype(expert_dtype(num_experts)), jnp.asarray(valid))
    if isinstance(experts, np.ndarray):
        validate(routing, experts.shape[2], num_experts)
    return routing
