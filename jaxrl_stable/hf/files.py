"""Reads and writes the safetensors files of a checkpoint directory in parts.

No function here holds more than a part of a tensor in memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence

import ml_dtypes
import numpy as np
import safetensors

from jaxrl_stable.files import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHOWN = 10  # maximum number of tensors that an error lists per kind of fault
# Supported weight dtypes, by their names in the safetensors format.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorFiles:
    """All tensors in a checkpoint directory, by name.

    If a directory contains both a single file and an index, the single file takes precedence, as in
    transformers: saving a sharded checkpoint again as one file leaves a stale index behind.

    Attributes:
      shapes: shape of every tensor.
      codes: dtype of every tensor, as named in the safetensors format ("BF16").

    Raises:
      FileNotFoundError: if the directory has no weights, or a file listed in the index is missing.
      ValueError: if a file is damaged or does not match the index.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.codes: dict[str, str] = {}
        self._places: dict[str, tuple[np.memmap, int]] = {}
        index = _index(self.directory)
        for file in dict.fromkeys(index.values()) if index else (SINGLE,):
            path = self.directory / file
            try:
                handle = safetensors.safe_open(path, framework="np")
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"{path} is missing; download the rest of the checkpoint"
                ) from None
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); download it again") from None
            for name in handle.keys():  # noqa: SIM118
                if index.get(name, file) != file:
                    raise ValueError(
                        f"{path} contains {name}, but {INDEX} places it in {index[name]}; "
                        "download both files again"
                    )
                part = handle.get_slice(name)
                self.shapes[name] = tuple(part.get_shape())
                self.codes[name] = part.get_dtype()
            self._places |= _places(path)
        absent = sorted(index.keys() - self.shapes.keys())
        if absent:
            raise ValueError(
                f"{self.directory / index[absent[0]]} lacks {absent[0]}, which {INDEX} places "
                "there; download both files again"
            )

    def view(self, tensor: str) -> np.ndarray:
        """Returns a tensor as a view of its memory-mapped file; data is read on access."""
        mapped, begin = self._places[tensor]
        dtype, shape = DTYPES[self.codes[tensor]], self.shapes[tensor]
        end = begin + dtype.itemsize * int(np.prod(shape))
        return np.asarray(mapped[begin:end]).view(dtype).reshape(shape)

    def not_finite(self, tensors: Sequence[str]) -> str:
        """Returns the error message for tensors with non-finite values."""
        return (
            f"{self.directory} has non-finite values in {listed(tensors)}; download it again, or "
            "check the program that wrote it"
        )


def listed(names: Sequence[str]) -> str:
    """Lists the first `SHOWN` names and says how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _places(path: pathlib.Path) -> dict[str, tuple[np.memmap, int]]:
    """Maps each tensor to its memory-mapped file and the offset of its first byte.

    The safetensors library has checked the file, but is not used to read tensors, because it copies
    them in a single thread.
    """
    mapped = np.memmap(path, np.uint8, "r")
    length = int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8 : 8 + length].tobytes())
    header.pop("__metadata__", None)
    return {name: (mapped, 8 + length + about["data_offsets"][0]) for name, about in header.items()}


def _index(directory: pathlib.Path) -> dict[str, str]:
    """Maps each tensor to its file; empty if a single file holds all tensors."""
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is not a directory; use a Hugging Face model directory"
        )
    if (directory / SINGLE).exists():
        return {}
    path = directory / INDEX
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has neither {SINGLE} nor {INDEX}; use a directory with safetensors "
            "weights"
        )
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise ValueError(f"{path} has no weight_map; download it again")
    for file in index.values():  # an untrusted name must not escape the directory
        if not isinstance(file, str) or pathlib.PurePath(file).name != file:
            raise ValueError(f"{path} names the file {file!r}; only plain file names are allowed")
    return index


class TensorWriter:
    """Writes safetensors files part by part, in any order and from any thread.

    The safetensors library needs all tensors of a file in memory; here a file may be larger than
    memory. On leaving the context, the index is written if there are several files.

    Args:
      directory: an empty directory (`new_directory`).
      shapes: shape of every tensor, in order.
      dtypes: dtype of every tensor.
      file_bytes: size limit per file, in bytes; a larger tensor gets its own file.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        file_bytes: int = 5_000_000_000,
    ):
        self.directory = pathlib.Path(directory)
        sizes = {name: int(np.prod(shapes[name])) * dtypes[name].itemsize for name in shapes}
        self._total, groups, filled = sum(sizes.values()), [[]], 0
        for name, size in sizes.items():
            if groups[-1] and filled + size > file_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
        names = [SINGLE]
        if len(groups) > 1:
            names = [
                f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)
            ]
        self._shapes = dict(shapes)
        self._places: dict[str, tuple[int, int]] = {}
        self._descriptors: list[int] = []
        self._map: dict[str, str] = {}
        for file, group in zip(names, groups, strict=True):
            offset, header = 0, {"__metadata__": {"format": "pt"}}
            for name in group:
                header[name] = dict(
                    dtype=_CODES[dtypes[name]],
                    shape=list(shapes[name]),
                    data_offsets=[offset, offset + sizes[name]],
                )
                offset += sizes[name]
            text = json.dumps(header, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)  # aligns the data
            descriptor = os.open(self.directory / file, os.O_WRONLY | os.O_CREAT, 0o644)
            self._descriptors.append(descriptor)
            os.truncate(descriptor, 8 + len(text) + offset)
            _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
            for name in group:
                begin = 8 + len(text) + header[name]["data_offsets"][0]
                self._places[name] = (descriptor, begin)
                self._map[name] = file

    def write(self, tensor: str, first: int, part: np.ndarray) -> None:
        """Writes whole rows of the tensor, flattened to a matrix, starting at row `first`."""
        descriptor, begin = self._places[tensor]
        row = part.itemsize * int(np.prod(self._shapes[tensor][1:][-1:]))
        _write_all(descriptor, np.ascontiguousarray(part).view(np.uint8).data, begin + first * row)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        if kind is None and len(self._descriptors) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def new_directory(target: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Yields a temporary directory, which is renamed to `target` on success.

    A failure leaves nothing behind.

    Raises:
      ValueError: if `target` exists and is not an empty directory. Nothing is ever overwritten.
    """
    target = pathlib.Path(target).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; use a new one")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = pathlib.Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{target.name}.partial-"))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp creates private directories
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    data = memoryview(data).cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
