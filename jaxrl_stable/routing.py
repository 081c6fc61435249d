"""Routing: which experts each token used, as arrays that can be stored, compared and replayed.

Row `t` belongs to `tokens[b, t]` as an *input* of the model (it shaped the distribution of
`tokens[b, t + 1]`). Rows without a choice have `valid=False`: padding, and the last sampled token,
which was never fed. There is no sentinel expert: `uint8` has no spare value at 256 experts.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, UInt


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Experts of every token in every MoE layer.

    Attributes:
      experts: expert ids in the router's own order. `L` counts MoE layers only, in depth order;
        `uint8` up to 256 experts, else `uint16`.
      valid: True where a choice was made; elsewhere the live router decides on replay.
    """

    experts: UInt[Array, "L B T K"]
    valid: Bool[Array, "B T"]


def expert_dtype(num_experts: int) -> jnp.dtype:
    """The smallest unsigned type that holds every expert id."""
    return jnp.dtype(jnp.uint8 if num_experts <= 256 else jnp.uint16)


def overlap(a: UInt[Array, "*N K"], b: UInt[Array, "*N K"]) -> Float[Array, "*N"]:
    """Share of the K experts that two choices have in common, whatever their order."""
    same = a[..., :, None] == b[..., None, :]
    return same.any(-1).mean(-1, dtype=jnp.float32)


def check_layout(routing: Routing, num_layers: int, num_experts: int) -> None:
    """Refuses what would broadcast, or index from the end; also while tracing.

    Raises:
      ValueError: wrong shape, layer count or type.
    """
    experts, valid = routing.experts, routing.valid
    if experts.ndim != 4 or experts.shape[1:3] != valid.shape:
        raise ValueError(
            f"routing.experts has shape {experts.shape} and routing.valid {valid.shape}; "
            "they must be [L, B, T, K] and [B, T]"
        )
    if experts.shape[0] != num_layers:
        raise ValueError(
            f"routing has {experts.shape[0]} layers but the model has {num_layers} MoE layers; "
            "dense layers carry no routing"
        )
    if experts.dtype != expert_dtype(num_experts):  # −1 would name the last expert
        raise ValueError(
            f"routing.experts is {experts.dtype}; with {num_experts} experts it must be "
            f"{expert_dtype(num_experts)}"
        )
    if valid.dtype != bool:  # as an index, numbers would pick rows instead of masking them
        raise ValueError(f"routing.valid is {valid.dtype}; it must be bool")


def validate(routing: Routing, num_layers: int, num_experts: int) -> None:
    """Checks on the host that a routing from outside can be replayed.

    Raises:
      ValueError: `check_layout`; an expert out of range; or an expert twice in one choice (which
        would count a token twice).
    """
    check_layout(routing, num_layers, num_experts)
    experts, valid = np.asarray(routing.experts), np.asarray(routing.valid)
    chosen = np.sort(experts[:, valid], axis=-1)
    if chosen.size and chosen.max() >= num_experts:
        raise ValueError(f"routing names expert {chosen.max()}; the model has {num_experts}")
    if (chosen[..., 1:] == chosen[..., :-1]).any():
        layer, row = np.argwhere((chosen[..., 1:] == chosen[..., :-1]).any(-1))[0]
        b, t = np.argwhere(valid)[row]
        raise ValueError(f"routing names an expert twice at layer {layer}, row {b}, position {t}")


def to_token_major(routing: Routing) -> Int32[Array, "B T L K"]:
    """The layout of other systems: a token's choices together, −1 where none was made.

    It is what MaxText takes as `forced_routed_experts`. Early versions give a token of −1 no
    expert at all; later ones, like this library, let the live router decide.
    """
    experts = routing.experts.transpose(1, 2, 0, 3).astype(jnp.int32)
    return jnp.where(routing.valid[:, :, None, None], experts, -1)


def from_token_major(experts: Int[Array, "B T L K"], num_experts: int) -> Routing:
    """Reads routing that another system recorded: vLLM, SGLang, sglang-jax, Tunix, MaxText.

    They report `[length, L, K]` for each sequence, where `length` may be one less than the number
    of tokens, since the last sampled one was never fed. Lay it along the padded tokens first, with
    −1 wherever nothing was recorded: one row too far gives every token its neighbour's experts,
    and nothing fails.

    Args:
      experts: a signed type, or a missing row could not be told from an expert. A token has K
        different experts in each layer, or is negative throughout: −1 (no record) or −2 (Tunix:
        no token). `L` counts MoE layers only.
      num_experts: E of the model.

    Raises:
      ValueError: wrong shape or type. NumPy arrays are also checked value by value: tokens that
        miss a part of their choices, experts out of range, an expert twice in one choice. Arrays
        on a device, or being traced, are not; `validate` fetches and checks them later.
    """
    if experts.ndim != 4 or not jnp.issubdtype(experts.dtype, jnp.signedinteger):
        raise ValueError(
            f"token-major routing has shape {experts.shape} and type {experts.dtype}; it must be "
            "[B, T, L, K] of a signed integer type"
        )
    recorded = experts >= 0
    valid = recorded.all((2, 3))
    if isinstance(experts, np.ndarray):
        if (valid != recorded.any((2, 3))).any():
            b, t = np.argwhere(valid != recorded.any((2, 3)))[0]
            _, _, layer, k = np.argwhere(~recorded[b : b + 1, t : t + 1])[0]
            raise ValueError(
                f"routing of row {b}, position {t} is incomplete: {experts[b, t, layer, k]} at "
                f"layer {layer}, choice {k}. A token has all its choices or none; leave out the "
                "layers that are dense"
            )
        if experts.size and experts.max() >= num_experts:
            raise ValueError(f"routing names expert {experts.max()}; the model has {num_experts}")
    chosen = jnp.where(valid[:, :, None, None], experts, 0).transpose(2, 0, 1, 3)
    routing = Routing(chosen.astype(expert_dtype(num_experts)), jnp.asarray(valid))
    if isinstance(experts, np.ndarray):
        validate(routing, experts.shape[2], num_experts)
    return routing
