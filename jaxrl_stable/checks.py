"""Validation in one idiom: one line that says which field or record, what is wrong, what to do.

A config is a frozen dataclass. It checks itself in `__post_init__`: first the types of all fields
against their annotations (`field_types`), then their ranges (`within`, `positive`) and choices
(`one_of`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import os
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
PATHS = str | os.PathLike
WORDS = {bool: "True or False", int: "an integer", float: "a number", str: "a text in quotes"}


def field_types(config: Any) -> None:
    """Checks the type of every field of a dataclass against its annotation.

    An int is accepted where a float is expected, a NumPy number where a Python number is, and a
    list where a tuple is. A bool is not a number. An array that JAX traces passes as a number.

    Raises:
      ValueError: if a field has another type; names the field, its value and what to write.
    """
    for name, expected in _annotations(type(config)).items():
        value = getattr(config, name)
        if not _fits(value, expected):
            _refuse_type(f"{type(config).__name__}.{name}", value, expected)


def bound_options(function: Callable) -> None:
    """Checks the options of a `functools.partial` against the function's annotations.

    Raises:
      ValueError: if an option has another type or is NaN.
    """
    bound: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        bound, function = function.keywords | bound, function.func
    annotations = _annotations(function)
    for name, value in bound.items():
        full = f"{function.__name__}.{name}"
        if name in annotations and not _fits(value, annotations[name]):
            _refuse_type(full, value, annotations[name])
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{full} is nan; use a number")


def one_of(config: Any, field: str, allowed: Sequence[str]) -> None:
    """Raises ValueError if a field of a config is not one of the allowed values."""
    value = getattr(config, field)
    if value not in allowed:
        name = f"{type(config).__name__}.{field}"
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, allowed))}")


def positive(config: Any, *fields: str) -> None:
    """Raises ValueError if one of the fields of a config is less than 1."""
    within(config, *fields, at_least=1)


def within(
    config: Any,
    *fields: str,
    at_least: int | float | None = None,
    above: int | float | None = None,
    at_most: int | float | None = None,
    below: int | float | None = None,
) -> None:
    """Checks that numbers of a config are finite and in a range.

    None passes, and so does a value that JAX traces.

    Args:
      config: the config.
      *fields: names of the fields to check.
      at_least, above: lower end of the range, included or not; None leaves it open.
      at_most, below: upper end of the range, included or not; None leaves it open.

    Raises:
      ValueError: if a number is NaN, infinite or outside; names the field, its value and the range.
    """
    words = {"at least": at_least, "more than": above, "at most": at_most, "less than": below}
    ends = [f"{word} {end}" for word, end in words.items() if end is not None]
    for field in fields:
        value = getattr(config, field)
        if value is None or isinstance(value, jax.core.Tracer):
            continue
        advice = " and ".join(ends)
        if not math.isfinite(value):
            advice = f"a finite number{', ' * bool(ends)}{advice}"
        elif (
            (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        ):
            continue
        raise ValueError(f"{type(config).__name__}.{field} is {value}; use {advice}")


def local_path(field: str, path: str | os.PathLike[str]) -> str:
    """Returns a path of the local file system, with `~` expanded.

    Args:
      field: name of the setting, for the error.
      path: a path; an empty one stays empty.

    Raises:
      ValueError: if the path has a scheme such as `gs://`, which would name a local directory.
    """
    path = os.fspath(path)
    if SCHEME.match(path):
        raise ValueError(
            f"{field} is {path!r}, but only paths of mounted file systems can be used; mount the "
            "bucket (gcsfuse for gs://) or a shared disk such as NFS or Filestore on every host, "
            "and give the path there"
        )
    return os.path.expanduser(path)


def expand_paths(config: Any, *fields: str) -> None:
    """Replaces paths in fields of a frozen config, alone or in lists, by their `local_path`."""
    for field in fields:
        value, name = getattr(config, field), f"{type(config).__name__}.{field}"
        if isinstance(value, PATHS):
            object.__setattr__(config, field, local_path(name, value))
        elif isinstance(value, list | tuple) and any(isinstance(x, PATHS) for x in value):
            expanded = [local_path(name, x) if isinstance(x, PATHS) else x for x in value]
            object.__setattr__(config, field, type(value)(expanded))


def sources(config: Any, *fields: str) -> None:
    """Checks that fields are None, a path, a source of problems, or a list of either.

    Raises:
      ValueError: if one is anything else; names the field.
    """
    for field in fields:
        value, name = getattr(config, field), f"{type(config).__name__}.{field}"
        if value is not None and not _is_source(value):
            raise ValueError(
                f"{name} is {_shown(value)}; use the path of a JSONL file or a source such as "
                "@data.JsonlSource()"
            )


def _is_source(value: Any) -> bool:
    if isinstance(value, list | tuple):  # of problems, or of sources
        problems = all(isinstance(each, Mapping) for each in value)
        return bool(value) and (problems or all(map(_is_source, value)))
    if isinstance(value, Mapping | os.PathLike):
        return not isinstance(value, Mapping)
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")


def record_name(source: Any, index: int) -> str:
    """Returns the name of a record in error messages.

    That is the source's own `where(index)` if it has one, such as a file and a line, else the
    source and the index.
    """
    where = getattr(source, "where", None)
    return f"{source!r}[{index}]" if where is None else where(index)


@functools.cache
def _annotations(owner: Callable) -> dict[str, Any]:
    """Returns the annotated types of a dataclass's fields or of a function's arguments."""
    try:
        hints = typing.get_type_hints(owner)
    except NameError:  # an annotation for type checkers alone, in a user's own function
        return {}
    names = (
        {f.name for f in dataclasses.fields(owner)} if dataclasses.is_dataclass(owner) else hints
    )
    return {name: hints[name] for name in names if name != "return"}


def _fits(value: Any, expected: Any) -> bool:
    """Returns whether a value has an annotated type; True for annotations that are not known."""
    if isinstance(value, jax.core.Tracer) or expected is Any:
        return True
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if expected is type(None):
        return value is None
    if expected is bool:
        return isinstance(value, bool)
    if expected in (int, float):
        kind = numbers.Integral if expected is int else numbers.Real
        scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
        return isinstance(value.item() if scalar else value, kind) and not isinstance(value, bool)
    if origin is tuple or origin is Sequence:
        if not isinstance(value, list | tuple):
            return False
        if origin is tuple and arguments[-1] is not Ellipsis:
            return len(value) == len(arguments) and all(map(_fits, value, arguments))
        return all(_fits(each, arguments[0]) for each in value)
    if origin is Mapping or expected is Mapping:
        return isinstance(value, Mapping)
    if origin is Callable or expected is Callable:
        return callable(value)
    if expected is str or dataclasses.is_dataclass(expected):
        return isinstance(value, expected)
    return True


def _refuse_type(name: str, value: Any, expected: Any) -> None:
    """Raises the error of `field_types` and `bound_options`."""
    union = typing.get_origin(expected) in (typing.Union, types.UnionType)
    kinds = typing.get_args(expected) if union else (expected,)
    advice = "use " + " or ".join(dict.fromkeys(map(_words, kinds)))
    if int in kinds and isinstance(value, float) and value.is_integer():
        advice = f"write {int(value)}, without a point or exponent"
    elif (int in kinds or float in kinds) and isinstance(value, str):
        advice += ", without quotes"
    elif bool in kinds and value in ("True", "False"):
        advice = f"write {value}, without quotes"
    raise ValueError(f"{name} is {_shown(value)} ({type(value).__name__}); {advice}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _words(expected: Any) -> str:
    if expected is type(None):
        return "None"
    if expected in WORDS:
        return WORDS[expected]
    origin = typing.get_origin(expected) or expected
    if origin is tuple or origin is Sequence:
        first = typing.get_args(expected)[0]
        return f"a list of {first.__name__ if isinstance(first, type) else 'values'}"
    if origin is Mapping:
        return "a dictionary"
    if origin is Callable:
        return "a function, bound as @name"
    name = origin.__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}, bound as @…{name}()"
