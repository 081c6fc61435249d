"""Finds the Python files of a checkpoint that ships its own code ("remote code").

`auto_map` in `config.json` and `tokenizer_config.json` names classes in files in the directory.
Transformers imports these files if `trust_remote_code=True`. Nothing is ever run here.
"""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterable
from typing import Any


def modules(auto_map: Any) -> set[str]:
    """Returns the files that an `auto_map` needs, without ".py".

    A class is named "module.Class". A tokenizer has a list of two classes, either of which may be
    null. "owner/name--module.Class" is in another repository, so it needs no file.
    """
    if isinstance(auto_map, dict):
        return set().union(*map(modules, auto_map.values()))
    if isinstance(auto_map, list):
        return set().union(*map(modules, auto_map))
    if not isinstance(auto_map, str) or "--" in auto_map:
        return set()
    return {auto_map.split(".")[0]}


def code_files(directory: pathlib.Path, names: Iterable[str]) -> list[pathlib.Path] | None:
    """Returns the files of modules and of everything that they import from the directory.

    Returns:
      Files in alphabetical order; None if one is missing or is not Python.
    """
    found: dict[str, pathlib.Path] = {}
    waiting = sorted(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        file = directory / f"{name}.py"
        if not name.isidentifier() or not file.is_file():  # must not escape the directory
            return None
        found[name] = file
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                waiting += [node.module] if node.module else [a.name for a in node.names]
    return sorted(found.values())


def with_its_code(
    content: dict[str, Any], directory: pathlib.Path
) -> tuple[dict[str, Any], list[pathlib.Path]]:
    """Returns a `config.json` that can be stored elsewhere, and the code to store next to it.

    If some of the code is missing, `auto_map` is removed. Transformers then uses its own classes
    for the `model_type`.
    """
    files = code_files(directory, modules(content.get("auto_map")))
    if files is None:
        return without_code(content), []
    return content, files


def without_code(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a `config.json` without `auto_map`, so that transformers uses its own classes."""
    return {key: value for key, value in content.items() if key != "auto_map"}
