"""Validation of config fields. Each check raises one line: which field, its value, what to use."""

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
