"""JSON and JSON Lines files, and atomic writes."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import tempfile
from typing import Any


def existing(path: str | os.PathLike[str], what: str) -> pathlib.Path:
    """Returns the path if it exists.

    Args:
      path: a file or directory.
      what: name of the expected content, for the error message.

    Raises:
      FileNotFoundError: if the path does not exist.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: no such {what}; check the path")
    return pathlib.Path(path)


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON object; returns an empty one if the file does not exist.

    Raises:
      ValueError: if the file is not a JSON object.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fix or delete it") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object; fix or delete it")
    return content


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads the rows of a JSON Lines file.

    An incomplete last line, which a killed process leaves behind, is dropped.

    Raises:
      ValueError: if any other line is not a JSON object; the error names file and line.
    """
    lines = pathlib.Path(path).read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no newline at the end: the line was cut short
                break
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); fix or delete the line"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object; fix or delete the line")
        rows.append(row)
    return rows


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file atomically: a reader sees the old or the new content, even after a crash.

    Args:
      path: the file; missing parent directories are created.
      content: text is written as UTF-8; lone surrogates are escaped.
    """
    path = pathlib.Path(path)
    if isinstance(content, str):
        content = content.encode("utf-8", errors="backslashreplace")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some mounts do not support permissions
            os.chmod(temporary, _mode(path))  # mkstemp creates private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _mode(path: pathlib.Path) -> int:
    """Returns the file's permissions, or the default for new files if it is missing."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        umask = os.umask(0)  # the umask can only be read by setting it
        os.umask(umask)
        return 0o666 & ~umask
