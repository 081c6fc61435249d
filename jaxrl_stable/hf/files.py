"""The safetensors files of a checkpoint directory, read and written in parts.

Nothing here holds more than a part of a tensor in memory.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Names of the types in the file format, where they are ones that weights come in.
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorFiles:
    """All tensors of a directory, by name.

    Attributes:
      shapes: of every tensor.
      codes: type of every tensor, as the format names it ("BF16").

    Raises:
      FileNotFoundError: there are no weights, or the index names a file that is not there.
      ValueError: a file is damaged, or does not hold what the index says.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory)
        self._slices: dict[str, Any] = {}
        wanted = _index(self.directory)
        for file in dict.fromkeys(wanted.values()):
            path = self.directory / file
            try:
                handle = safetensors.safe_open(path, framework="np")
            except FileNotFoundError:
                raise FileNotFoundError(f"{path} is missing; download the rest") from None
            except safetensors.SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); download it again") from None
            self._slices |= {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        absent = sorted(name for name in wanted if name and name not in self._slices)
        if absent:
            raise ValueError(
                f"{self.directory / wanted[absent[0]]} does not hold {absent[0]} as {INDEX} says; "
                "download both again"
            )
        self.shapes = {name: tuple(part.get_shape()) for name, part in self._slices.items()}
        self.codes = {name: part.get_dtype() for name, part in self._slices.items()}

    def read(self, tensor: str, lead: tuple[int, ...], *ranges: slice) -> np.ndarray:
        """Copies a part of a tensor: one entry of its leading axes, ranges of the others."""
        return self._slices[tensor][(*lead, *ranges)]


def _index(directory: pathlib.Path) -> dict[str, str]:
    """File of each tensor; without an index, all files, under names that no tensor has."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} does not exist; give a Hugging Face model directory")
    if (directory / INDEX).exists():
        try:
            return dict(json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{directory / INDEX} is damaged; download it again") from None
    if (directory / SINGLE).exists():
        return {"": SINGLE}
    raise FileNotFoundError(
        f"{directory} has neither {SINGLE} nor {INDEX}; give a directory with safetensors weights"
    )


class TensorWriter:
    """New safetensors files whose tensors are written in parts, in any order and by any thread.

    The library writes a file from tensors that are all in memory; here a file may be larger than
    what memory has left. Files appear under their names once all is written (`close`); until then
    they end in `.partial`, which no loader opens.

    Args:
      directory: made if need be.
      shapes: of every tensor, in order.
      dtypes: of every tensor.
      file_bytes: a file is closed before it gets larger than this; a larger tensor has its own.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        shapes: Mapping[str, tuple[int, ...]],
        dtypes: Mapping[str, np.dtype],
        file_bytes: int = 5_000_000_000,
    ):
        self.directory = pathlib.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
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
        self._files: dict[str, int] = {}
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
            text += b" " * (-len(text) % 8)  # the data starts aligned
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
            descriptor = os.open(self._partial(file), flags, 0o644)
            os.truncate(descriptor, 8 + len(text) + offset)
            _write_all(descriptor, len(text).to_bytes(8, "little") + text, 0)
            self._files[file] = descriptor
            for name in group:
                begin = 8 + len(text) + header[name]["data_offsets"][0]
                self._places[name] = (descriptor, begin)
                self._map[name] = file

    def write(self, tensor: str, first: int, part: np.ndarray) -> None:
        """Writes whole rows; `first` counts rows of the tensor flattened to a matrix."""
        descriptor, begin = self._places[tensor]
        row = part.itemsize * int(np.prod(self._shapes[tensor][1:][-1:]))
        _write_all(descriptor, np.ascontiguousarray(part).view(np.uint8).data, begin + first * row)

    def close(self) -> None:
        """Gives the files their names, and writes the index where there are several."""
        for descriptor in self._files.values():
            os.close(descriptor)
        for stale in (*self.directory.glob("model*.safetensors"), self.directory / INDEX):
            stale.unlink(missing_ok=True)
        for file in self._files:
            os.replace(self._partial(file), self.directory / file)
        if len(self._files) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._map}
            (self.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def abandon(self) -> None:
        """Removes what was written."""
        for file, descriptor in self._files.items():
            os.close(descriptor)
            self._partial(file).unlink(missing_ok=True)

    def _partial(self, file: str) -> pathlib.Path:
        return self.directory / f"{file}.partial"


def _write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    data = memoryview(data).cast("B")
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
