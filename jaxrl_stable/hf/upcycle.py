"""Turns a dense checkpoint into a mixture of experts that computes the same function.

The feed-forward layer is copied m times, and the width of each copy is split into S segments. Each
segment of each copy becomes an expert. The router has the same weights for all segments of a copy,
so they get the same score: a token that chooses C copies uses all C · S of their experts ("virtual
groups", He et al. 2024, arXiv:2410.07524, §4.2). The gates of these experts sum to one, so each
segment gets 1 / S of its copy's gate g_c. Multiplying the last matrix by S compensates for this:

    Σ_c g_c Σ_s (S · segment_s(x)) / S  =  Σ_c g_c · dense(x)  =  dense(x)

S = 1 is sparse upcycling by copies (Komatsuzaki et al. 2023, arXiv:2212.05055).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable

import jax
import numpy as np

from jaxrl_stable.hf.config import read_config, read_config_json, to_json
from jaxrl_stable.hf.copying import all_finite
from jaxrl_stable.hf.files import DTYPES, TensorFiles, TensorWriter, new_directory
from jaxrl_stable.hf.load import plan_of
from jaxrl_stable.hf.remote_code import without_code
from jaxrl_stable.hf.save import copy_companions, write_json
from jaxrl_stable.hf.tied import check_copy
from jaxrl_stable.model.transformer import init_model

# With normalised inputs, logits then have order one for hidden sizes in the thousands.
_ROUTER_STD = 0.02


def upcycle(
    source: str | pathlib.Path,
    target: str | pathlib.Path,
    *,
    copies: int,
    chosen: int = 1,
    segments: int = 1,
    noise: int | float = 0.0,
    seed: int = 0,
) -> None:
    """Writes a Qwen3-MoE checkpoint that computes the same function as a dense Qwen3 checkpoint.

    The result has `copies * segments` experts, of which each token uses `chosen * segments`. Each
    expert has 1/`segments` of the dense width. With `noise=0`, the outputs are equal up to
    rounding; if `segments` is a power of two, scaling the weights is exact.

    Args:
      source: directory of the dense checkpoint.
      target: directory to write; must be new or empty.
      copies: m, number of copies of the feed-forward layer.
      chosen: C, number of copies that each token uses.
      segments: S, number of parts of each copy; must divide the dense width.
      noise: standard deviation of the noise on each copy's matrices, relative to the root mean
        square of the matrix. It makes the copies differ from the start of training.
      seed: seed for routers and noise.

    Raises:
      FileNotFoundError: if a file of the source is missing.
      ValueError: if the source is not a valid dense checkpoint, the sizes do not fit, or the target
        is not empty. Nothing is left behind.
    """
    dense = read_config(source)
    if dense.num_experts:
        raise ValueError(f"{source} already has experts; use a dense checkpoint")
    if not 1 <= chosen <= copies or segments < 1 or dense.intermediate_size % segments:
        raise ValueError(
            f"copies={copies}, chosen={chosen}, segments={segments} do not fit: chosen must be "
            f"between 1 and copies, and segments must divide the width {dense.intermediate_size}"
        )
    config = dataclasses.replace(
        dense,
        num_experts=copies * segments,
        num_experts_per_token=chosen * segments,
        moe_intermediate_size=dense.intermediate_size // segments,
        norm_topk_prob=True,
    )
    files = TensorFiles(source)
    plan_of(files, dense, jax.eval_shape(lambda: init_model(dense, 0)))
    check_copy(files, dense)
    made = _tensors(files, config.num_layers, copies, segments, noise, seed)
    shapes = {name: shape for name, (shape, _, _) in made.items()}
    dtypes = {name: DTYPES[code] for name, (_, code, _) in made.items()}
    _, content = to_json(config)
    content["torch_dtype"] = content["dtype"] = next(iter(dtypes.values())).name
    kept = {name: value for name, value in content.items() if value is not None}
    with new_directory(target) as directory:
        with TensorWriter(directory, shapes, dtypes) as writer:
            for name, (_, _, value) in made.items():
                part = value().astype(dtypes[name])
                if not all_finite(part):
                    raise ValueError(f"{name}, made from {source}, is non-finite; check the source")
                writer.write(name, 0, part)
        # The source's own code, if any, would compute the dense model.
        write_json(directory / "config.json", without_code(read_config_json(source)) | kept)
        copy_companions(source, directory)


Made = tuple[tuple[int, ...], str, Callable[[], np.ndarray]]


def _tensors(
    files: TensorFiles, layers: int, copies: int, segments: int, noise: int | float, seed: int
) -> dict[str, Made]:
    """Returns shape, dtype and factory of every new tensor. Only calling a factory reads data."""
    made: dict[str, Made] = {}
    for name, shape in files.shapes.items():
        if ".mlp." not in name:
            made[name] = (shape, files.codes[name], lambda n=name: files.view(n))
    for layer in range(layers):
        prefix = f"model.layers.{layer}.mlp."
        for kind, matrix in enumerate(("gate_proj", "up_proj", "down_proj")):
            source = f"{prefix}{matrix}.weight"
            rows, columns = files.shapes[source]
            axis = 1 if matrix == "down_proj" else 0
            width = (rows, columns)[axis] // segments
            for expert in range(copies * segments):
                copy, segment = divmod(expert, segments)
                part = slice(segment * width, (segment + 1) * width)
                ranges = (slice(0, rows), part) if axis else (part, slice(0, columns))
                shape = (rows, width) if axis else (width, columns)
                factor = segments if axis else 1
                key = (seed, layer, kind, copy, segment)

                def value(
                    source: str = source,
                    ranges: tuple[slice, slice] = ranges,
                    factor: int = factor,
                    key: tuple[int, ...] = key,
                ) -> np.ndarray:
                    return _perturbed(files.view(source)[ranges], factor, noise, key)

                name = f"{prefix}experts.{expert}.{matrix}.weight"
                made[name] = (shape, files.codes[source], value)
        hidden = files.shapes[f"{prefix}gate_proj.weight"][1]

        def router(layer: int = layer, hidden: int = hidden) -> np.ndarray:
            rng = np.random.default_rng((seed, layer))
            return np.repeat(rng.normal(0, _ROUTER_STD, (copies, hidden)), segments, axis=0)

        code = files.codes[f"{prefix}gate_proj.weight"]
        made[f"{prefix}gate.weight"] = ((copies * segments, hidden), code, router)
    return made


def _perturbed(x: np.ndarray, factor: int, noise: int | float, key: tuple[int, ...]) -> np.ndarray:
    """Returns the segment times `factor`, plus noise relative to its root mean square."""
    if factor == 1 and not noise:
        return x
    wide = x.astype(np.float32) * factor
    if noise:
        size = noise * np.sqrt(np.mean(np.square(wide)))
        wide += size * np.random.default_rng(key).standard_normal(wide.shape, np.float32)
    return wide
