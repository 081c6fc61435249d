"""Axis rules: which mesh axes shard each logical axis of a parameter.

Everything else follows from the `axes` that a parameter declares: the shardings of moments,
checkpoint templates, abstract shapes, and the collectives in the parts of the model that use
`jax.shard_map` (embedding, attention kernels, experts, head).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrl_stable.sharding.mesh import STORED, mesh_axes, mesh_in_use

# Logical axis of a parameter -> mesh axes. The model names logical axes ("embed", "heads", …) to
# say what each axis means; only this table decides how it is sharded. Axes that are not listed are
# replicated. A mesh axis shards at most one axis of a parameter, the first one that lists it:
# "expert" shards the experts, so only the rest of STORED shards their rows.
PARAMETER_RULES: dict[str, tuple[str, ...]] = {
    "embed": STORED,
    "latent_in": STORED,
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "spread_expert": ("fsdp", "expert"),  # in the sampler: see `for_sampling`
}


def spec(names: tuple[str, ...], shape: tuple[int, ...], mesh: Any) -> P:
    """Returns the PartitionSpec of one parameter.

    An axis is sharded over the subset of its mesh axes that splits it evenly into the most parts;
    if no subset does, it is replicated. Vectors are replicated too: they are small, and gathering
    each would cost more than it saves. Storage axes never shard a weight over a whole `data`
    replica: if together they would, the last one is dropped. The reason is that over a whole slice,
    libtpu lowers a reduce-scatter (on a 3D torus also an all-gather) to an all-reduce, which sends
    twice the bytes.

    Args:
      names: logical axes of the parameter.
      shape: sizes of these axes.
      mesh: concrete or abstract mesh.
    """
    vector = sum(name != "layers" for name in names) == 1
    rest = math.prod(n for a, n in mesh.shape.items() if a != "data")
    entries, taken = [], set()
    for name, size in zip(names, shape, strict=True):
        axes = () if vector else PARAMETER_RULES.get(name, ())
        axes = tuple(a for a in axes if a not in taken and mesh.shape.get(a, 1) > 1)
        for_storage = PARAMETER_RULES.get(name) is STORED
        if for_storage and len(axes) > 1 and math.prod(mesh.shape[a] for a in axes) == rest:
            axes = axes[:-1]
        axes = _fitting(axes, size, mesh)
        taken.update(axes)
        entries.append(axes if len(axes) > 1 else axes[0] if axes else None)
    return P(*entries)


def _fitting(axes: tuple[str, ...], size: int, mesh: Any) -> tuple[str, ...]:
    """Returns the subset of mesh axes that splits `size` evenly into the most parts."""
    parts = lambda some: math.prod(mesh.shape[a] for a in some)  # noqa: E731
    some = [c for n in range(len(axes) + 1) for c in itertools.combinations(axes, n)]
    return max((c for c in some if size % parts(c) == 0), key=parts)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the shardings of a tree of parameters, or of moments with the parameters' shapes.

    Args:
      mesh: device mesh.
      state: arrays or abstract shapes; parameters are `nnx.Param` with `axes`.
    """

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return NamedSharding(mesh, P())
        names = leaf.get_metadata()["axes"]
        value = leaf.get_value()
        return leaf.replace(
            jax.tree.map(lambda x: NamedSharding(mesh, spec(names, x.shape, mesh)), value)
        )

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def abstract_state(mesh: Mesh, init: Callable[[], Any]) -> Any:
    """Returns the shapes, dtypes and shardings of `init()`'s result, without computing it."""
    shapes = jax.eval_shape(init)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def sharded_init(mesh: Mesh, init: Callable[[], Any]) -> Any:
    """Initialises a state in place: each device computes its own shards."""
    return jax.jit(init, out_shardings=state_shardings(mesh, jax.eval_shape(init)))()


def for_sampling(model: Any) -> Any:
    """Renames the logical axes of weights for sampling, so that no decode step gathers them.

    A decode step has few tokens and reads every weight, so gathering them would cost more than the
    step itself. Experts are sharded over both `fsdp` and `expert`; other weights are replicated,
    except over `tensor`.

    Returns:
      The same weights with new axis names; `constrain_state` then moves them.
    """
    new_names = {"expert": "spread_expert", "embed": "whole_embed", "latent_in": "whole_latent"}

    def rename(param: nnx.Variable) -> nnx.Variable:
        metadata = param.get_metadata()
        named = {
            field: metadata[field] and tuple(new_names.get(n, n) for n in metadata[field])
            for field in ("axes", "inputs")
        }
        return param.replace(param.get_value(), **named)

    return jax.tree.map(rename, model, is_leaf=lambda x: isinstance(x, nnx.Variable))


def constrain(x: Array, *entries: Any) -> Array:
    """Constrains the sharding of an array inside a jitted function; does nothing without a mesh.

    Args:
      x: the array.
      *entries: mesh axes for each leading axis, or None to replicate it. An axis whose size is not
        divisible by its mesh axes is replicated.

    Returns:
      The array, constrained.
    """
    mesh = mesh_in_use()
    if mesh.empty or mesh.size == 1:
        return x
    fits = [
        entry if size % math.prod(mesh.shape[a] for a in mesh_axes(entry)) == 0 else None
        for size, entry in zip(x.shape, entries)
    ]
    return jax.lax.with_sharding_constraint(x, P(*fits))


def expert_parts(num_experts: int) -> int:
    """Returns the number of devices over which a layer's experts are split, on the mesh in use."""
    mesh = mesh_in_use()
    parts = 1 if mesh.empty else mesh.shape["expert"]
    return parts if num_experts and num_experts % parts == 0 else 1


def constrain_state(state: Any) -> Any:
    """Constrains parameters to the shardings of their logical axes, inside a jitted function."""
    mesh = mesh_in_use()
    if mesh.empty or mesh.size == 1:
        return state

    def of(param: Any) -> Any:
        if not isinstance(param, nnx.Variable):
            return param
        names = param.get_metadata()["axes"]
        return param.replace(
            jax.tree.map(
                lambda x: jax.lax.with_sharding_constraint(x, spec(names, x.shape, mesh)),
                param.get_value(),
            )
        )

    return jax.tree.map(of, state, is_leaf=lambda x: isinstance(x, nnx.Variable))
