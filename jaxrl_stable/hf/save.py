"""Saves a model as a checkpoint directory that transformers can load.

Each parameter is fetched from the devices layer by layer (on a CPU it is used in place). A few
threads then transpose and write it, a few rows at a time.
"""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np

from jaxrl_stable.files import read_json, write_atomic
from jaxrl_stable.hf.config import read_config, read_config_json, to_json
from jaxrl_stable.hf.copying import THREADS, all_finite, chunks, copy
from jaxrl_stable.hf.files import DTYPES, TensorWriter, new_directory
from jaxrl_stable.hf.names import LAYOUTS, Piece, parameters, pieces, tensor_shapes
from jaxrl_stable.hf.remote_code import code_files, modules, with_its_code, without_code
from jaxrl_stable.model.config import ModelConfig
from jaxrl_stable.model.transformer import Transformer

# Files that are copied from a model's original checkpoint, in addition to the weights.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "tokenization_*.py",
    "tiktoken.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "additional_chat_templates",
)
# Keys that one version of transformers writes and the other version or an engine does not
# understand. Every saved config has both spellings, regardless of the original's version.
_SPELLINGS = ("rope_parameters", "rope_theta", "rope_scaling", "num_experts", "num_local_experts")


def save(
    model: Transformer,
    directory: str | pathlib.Path,
    *,
    dtype: str | None = None,
    layout: str = "per-expert",
    like: str | pathlib.Path | None = None,
    file_bytes: int = 5_000_000_000,
) -> None:
    """Writes `config.json` and safetensors files that transformers loads.

    Args:
      model: the policy; all its arrays must be on this process's devices.
      directory: directory to write; must be new or empty.
      dtype: "float32", "bfloat16" or "float16"; by default the parameters' dtype.
      layout: "per-expert", which every version and engine reads, or "fused" (transformers 5).
      like: original checkpoint of the model. Its `config.json` is kept, with the new dtype, and its
        tokenizer, generation settings and code (`auto_map`) are copied. With the fused layout, the
        code is left out, because it could not read that layout.
      file_bytes: size limit per file, in bytes.

    Raises:
      ValueError: if the directory is not empty, no transformers architecture computes this model,
        `like` has a different architecture, a value is non-finite, an array is spread over several
        hosts, or an argument is unknown. Nothing is left behind.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    config = model.config
    dtype = config.param_dtype if dtype is None else dtype
    types = {np.dtype(known).name: np.dtype(known) for known in DTYPES.values()}
    if dtype not in types:
        raise ValueError(f"dtype {dtype!r} is unknown; use one of {', '.join(types)}")
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(model)):
        raise ValueError(
            "the model is spread over several hosts; restore it on a single host to save it"
        )
    architecture, content = to_json(config)
    code: list[pathlib.Path] = []
    content["torch_dtype"] = content["dtype"] = dtype
    if like is not None:
        both = {name: content[name] for name in _SPELLINGS if name in content}
        content = both | _descends(config, like) | {"torch_dtype": dtype, "dtype": dtype}
        architecture = architecture._replace(model_type=content["model_type"])
        content, code = with_its_code(content, pathlib.Path(like))
        if layout == "fused":
            content, code = without_code(content), []
    plan = pieces(config, model, architecture.model_type, layout)
    shapes = dict(sorted(tensor_shapes(plan).items()))
    dtypes = {n: types["float32" if n.endswith(architecture.float32) else dtype] for n in shapes}
    with new_directory(directory) as target:
        with (
            TensorWriter(target, shapes, dtypes, file_bytes) as writer,
            ThreadPoolExecutor(THREADS) as pool,
        ):
            for path, param in parameters(model).items():
                for index, layer in _layers(param.get_value(), plan[path]):
                    ours = [piece for piece in plan[path] if piece.index[:1] == index]

                    def one(piece: Piece, layer: np.ndarray = layer) -> None:
                        _write(writer, piece, layer, dtypes[piece.tensor])

                    list(pool.map(one, ours))
        write_json(target / "config.json", content)
        if like is not None:
            copy_companions(like, target)
        for file in code:
            shutil.copyfile(file, target / file.name)


def write_json(file: pathlib.Path, content: dict) -> None:
    write_atomic(file, json.dumps(content, indent=2) + "\n")


def companions(directory: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the files of the tokenizer (with its code), chat template and generation settings."""
    directory = pathlib.Path(directory)
    found = {file for name in COMPANIONS for file in directory.glob(name)}
    auto_map = read_json(directory / "tokenizer_config.json").get("auto_map")
    found.update(code_files(directory, modules(auto_map)) or [])
    return sorted(found)


def copy_companions(source: str | pathlib.Path, target: pathlib.Path) -> None:
    """Copies the `companions` of a directory; follows symbolic links."""
    for file in companions(source):
        (shutil.copytree if file.is_dir() else shutil.copyfile)(file, target / file.name)


def _descends(config: ModelConfig, like: str | pathlib.Path) -> dict:
    content, theirs = read_config_json(like), read_config(like).architecture()
    differing = [name for name, value in config.architecture().items() if theirs[name] != value]
    if differing:
        raise ValueError(
            f"{like} differs from the model in {', '.join(differing)}; use the checkpoint that "
            "the model was imported from, or omit `like`"
        )
    if "num_nextn_predict_layers" in content:
        content["num_nextn_predict_layers"] = 0  # layers beyond the model's were not loaded
    return content


def _layers(value: jax.Array, part: list[Piece]) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """Yields a parameter layer by layer, so that the host holds one layer at a time."""
    (device, *others) = value.sharding.device_set
    whole = None
    if device.platform == "cpu" and not others:
        whole = np.asarray(value)  # shares memory with the array
    for index in dict.fromkeys(piece.index[:1] for piece in part):
        yield index, whole[index] if whole is not None else np.asarray(value[index])


def _write(writer: TensorWriter, piece: Piece, layer: np.ndarray, dtype: np.dtype) -> None:
    """Converts one piece to its layout and dtype in the checkpoint, and writes it."""
    source = layer[piece.index[1:]]
    if piece.transposed:
        source = source.reshape(piece.columns, piece.rows).T
    source = source.reshape(piece.rows, piece.columns)
    first = piece.start + (piece.lead[0] * piece.shape[1] if piece.lead else 0)
    for rows in chunks(source.shape, dtype.itemsize):
        part = np.empty((rows.stop - rows.start, piece.columns), dtype)
        copy(part, source[rows])
        if not all_finite(part):
            raise ValueError(
                f"{piece.path} has values that are non-finite in {dtype.name}; nothing was saved"
            )
        writer.write(piece.tensor, first + rows.start, part)
