"""Validation in one idiom: one line that says which field or record, what is wrong, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def one_of(config: Any, field: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if a field of a config is not one of the allowed values."""
    value = getattr(config, field)
    if value not in allowed:
        name = f"{type(config).__name__}.{field}"
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")


def positive(config: Any, *fields: str) -> None:
    """Raises ValueError if one of the fields of a config is less than 1."""
    for field in fields:
        if getattr(config, field) < 1:
            name = f"{type(config).__name__}.{field}"
            raise ValueError(f"{name} is {getattr(config, field)}; use at least 1")


def record_name(source: Any, index: int) -> str:
    """Returns the name of a record in error messages.

    That is the source's own `where(index)` if it has one, such as a file and a line, else the
    source and the index.
    """
    where = getattr(source, "where", None)
    return f"{source!r}[{index}]" if where is None else where(index)
