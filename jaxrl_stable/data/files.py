"""Reads and writes the files of a tokenizer."""

import json
import os
import pathlib
import tempfile
from typing import Any


def existing(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns `path` as a `pathlib.Path`.

    Raises:
      FileNotFoundError: if nothing exists there.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such tokenizer; check the path")
    return pathlib.Path(path)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """Reads an optional JSON object. A missing file counts as an empty object.

    Raises:
      ValueError: if the file is not a JSON object.
    """
    if not file.exists():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); fix or remove it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object; fix or remove it")
    return content


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Writes a file atomically: readers see either all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp creates private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
