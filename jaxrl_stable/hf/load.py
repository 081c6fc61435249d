"""Loads a checkpoint directory straight into a sharded model.

A few threads fill each device's shard of each parameter in place, a few rows at a time. A host
reads only what its own devices hold; the exception is tied embeddings that are stored twice. All
faults in the files, except non-finite values, are detected before any weights are read.
"""

from __future__ import annotations

import pathlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxrl_stable import distributed
from jaxrl_stable.hf.config import read_config, read_config_json
from jaxrl_stable.hf.copying import THREADS, all_finite, chunks, copy, page_memory
from jaxrl_stable.hf.files import DTYPES, TensorFiles, listed
from jaxrl_stable.hf.names import (
    EMBEDDING,
    HEAD,
    LAYOUTS,
    Piece,
    parameters,
    pieces,
    tensor_shapes,
)
from jaxrl_stable.hf.tied import check_copy, from_the_head, has_copy
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.transformer import Transformer, init_model
from jaxrl_stable.sharding import abstract_state


def load(
    directory: str | pathlib.Path, mesh: Mesh, config: ModelConfig | None = None
) -> Transformer:
    """Loads a Hugging Face checkpoint.

    A host allocates its own shards (on accelerators, one at a time) and `THREADS` chunks of 1 MiB.
    The files are memory-mapped, so the operating system can evict pages that have been read.
    Weights are converted to `config.param_dtype`.

    Args:
      directory: holds `config.json` and safetensors files, in the per-expert or fused layout.
      mesh: mesh over which the parameters are sharded, by the rules in `sharding`.
      config: the architecture with its execution settings; `read_config(directory)` by default.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if `config` has a different architecture, if tensors are missing, extra,
        misshapen, of an unknown dtype or non-finite (the message lists them), or if tied embeddings
        are stored twice and differ.
    """
    config = read_config(directory) if config is None else config
    _check_architecture(directory, config)
    files = TensorFiles(directory)
    abstract = abstract_state(mesh, lambda: init_model(config, 0))
    plan = plan_of(files, config, abstract)
    check_copy(files, config)
    broken: set[str] = set()
    with ThreadPoolExecutor(THREADS) as pool:
        loaded = [
            _parameter(param.get_value(), plan[path], files, pool, broken)
            for path, param in parameters(abstract).items()
        ]
    names = sorted(files.shapes)  # a process checks only the tensors that it reads
    flags = distributed.any_process([name in broken for name in names])
    broken = {name for name, flag in zip(names, flags, strict=True) if flag}
    if broken:
        raise ValueError(files.not_finite(sorted(broken)))
    return jax.tree.unflatten(jax.tree.structure(abstract), loaded)


def check(directory: str | pathlib.Path, config: ModelConfig) -> None:
    """Checks that `load` would find a model's tensors: architecture, names, shapes and dtypes.

    Reads no values, except to compare tied embeddings that are stored twice.

    Raises:
      FileNotFoundError, ValueError: as `load` does, except for non-finite values.
    """
    _check_architecture(directory, config)
    files = TensorFiles(directory)
    plan_of(files, config, jax.eval_shape(lambda: init_model(config, 0)))
    check_copy(files, config)


def _check_architecture(directory: str | pathlib.Path, config: ModelConfig) -> None:
    stored = read_config(directory)
    if config.architecture() != stored.architecture():
        differing = [
            f"{name} is {value!r} there and {config.architecture()[name]!r} here"
            for name, value in stored.architecture().items()
            if config.architecture()[name] != value
        ]
        raise ValueError(
            f"{directory} holds a different model: {'; '.join(differing)}. Use hf.read_config to "
            "take the architecture from the checkpoint"
        )


def plan_of(files: TensorFiles, config: ModelConfig, model: Any) -> dict[str, list[Piece]]:
    """Returns the pieces of every parameter, in the layout that the checkpoint uses.

    Args:
      files: the tensors of the checkpoint.
      config: the architecture.
      model: the model or its abstract shape.

    Raises:
      ValueError: if tensors are missing, extra, misshapen or of an unknown dtype. The message lists
        them.
    """
    fused = any(name.endswith(".experts.down_proj") for name in files.shapes)
    content = read_config_json(files.directory)
    plan = pieces(config, model, content["model_type"], LAYOUTS[fused])
    plan = from_the_head(plan, config, files.shapes)
    wanted = tensor_shapes(plan)
    if has_copy(config, files.shapes):
        wanted[HEAD] = wanted[EMBEDDING]
    behind = content.get("num_nextn_predict_layers") or 0
    present = {n: s for n, s in files.shapes.items() if not _left_out(n, config, behind)}
    faults = {
        "missing": sorted(wanted.keys() - present.keys()),
        "extra": sorted(present.keys() - wanted.keys()),
        "misshapen": sorted(
            f"{name} is {list(present[name])}, not {list(shape)}"
            for name, shape in wanted.items()
            if present.get(name, shape) != shape
        ),
        "of an unknown dtype": sorted(
            f"{name} is {files.codes[name]}"
            for name in wanted.keys() & present.keys()
            if files.codes[name] not in DTYPES
        ),
    }
    if any(faults.values()):
        found = "; ".join(f"{kind}: {listed(names)}" for kind, names in faults.items() if names)
        raise ValueError(
            f"{files.directory} does not match its config.json: {found}. Nothing was loaded; "
            "download the files again, or fix config.json"
        )
    return plan


def _left_out(tensor: str, config: ModelConfig, behind: int) -> bool:
    """Returns whether a tensor is one that valid checkpoints have but the model does not use.

    These tensors are rotary frequencies, which are recomputed here, and DeepSeek-V3's layers for
    multi-token prediction, which follow the model's last layer.
    """
    extra = tuple(f"model.layers.{config.num_layers + i}." for i in range(behind))
    return tensor.endswith("rotary_emb.inv_freq") or tensor.startswith(extra)


def _parameter(
    value: jax.ShapeDtypeStruct,
    part: list[Piece],
    files: TensorFiles,
    pool: ThreadPoolExecutor,
    broken: set[str],
) -> jax.Array:
    """Loads one parameter as a sharded array; the host holds one of its shards at a time."""
    devices: dict[tuple, list[jax.Device]] = {}  # grouped by content: replicas are read once
    for device, index in value.sharding.addressable_devices_indices_map(value.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, value.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    placed = []
    for bounds, holders in devices.items():
        shard = page_memory([b - a for a, b in bounds], value.dtype)
        jobs = [piece for piece in part if _inside(piece, bounds)]
        for _ in pool.map(lambda p: _fill(shard, bounds, p, files, broken), jobs):  # noqa: B023
            pass
        placed += [jax.device_put(shard, device) for device in holders]
        jax.block_until_ready(placed)
    return jax.make_array_from_single_device_arrays(value.shape, value.sharding, placed)


def _inside(piece: Piece, bounds: tuple[tuple[int, int], ...]) -> bool:
    return all(a <= i < b for i, (a, b) in zip(piece.index, bounds, strict=False))


def _fill(
    target: np.ndarray, bounds: tuple, piece: Piece, files: TensorFiles, broken: set[str]
) -> None:
    """Copies one piece into a shard by chunks; adds its tensor to `broken` if it is non-finite."""
    inner = bounds[len(piece.index) :]
    place = target[tuple(i - a for i, (a, _) in zip(piece.index, bounds, strict=False))]
    sizes = place.shape
    if piece.transposed:
        columns, rows = inner[: piece.inputs], inner[piece.inputs :]
        place = place.reshape(int(np.prod(sizes[: piece.inputs])), -1).T
    else:
        rows, columns = inner[: len(inner) - piece.inputs], inner[len(inner) - piece.inputs :]
        place = place.reshape(int(np.prod(sizes[: len(rows)])), -1)
    # Only the first axis of a group is ever sharded, so a shard is one range of rows.
    first, column = rows[0][0] * _rest(rows), columns[0][0] * _rest(columns) if columns else 0
    first += piece.start
    source = files.view(piece.tensor)[piece.lead][first : first + place.shape[0]]
    source = source.reshape(len(source), -1)[:, column : column + place.shape[1]]
    for some in chunks(place.shape, place.itemsize):
        with np.errstate(over="ignore"):  # infinities are detected below
            chunk = source[some].astype(place.dtype, copy=False)
        if not all_finite(chunk):
            broken.add(piece.tensor)
        copy(place[some], chunk)


def _rest(group: tuple[tuple[int, int], ...]) -> int:
    return int(np.prod([b - a for a, b in group[1:]]))
