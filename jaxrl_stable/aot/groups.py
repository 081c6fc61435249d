"""Parses replica groups (the devices that a collective connects) in the three forms of XLA."""

from __future__ import annotations

import re

import numpy as np

_EXPLICIT = re.compile(r"^\{((?:\{[\d, ]*\},? ?)*)\}$")
_IOTA = re.compile(r"^\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_MESH = re.compile(r"^mesh\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*)\}$")
_AXIS = re.compile(r"'([^']+)'(?:=(\d+))?(?::\((\d+)\)(\d+))?")


def replica_groups(attributes: str, devices: int) -> np.ndarray:
    """Returns the devices of each group, `[groups, size]`.

    The forms are `{{0,1},{2,3}}`, `[2,2]<=[4]T(…)` (a reshaped and transposed iota), and
    `mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}` (a mesh and the axes that a group spans).
    Without groups, all devices form one group.

    Args:
      attributes: attributes of the instruction, as text.
      devices: number of devices of the program.

    Raises:
      ValueError: if the form is unknown.
    """
    found = re.search(
        r"replica_groups=("
        r"mesh\[[^\]]*\](?:, device_ids=\(\[[\d,]*\](?:T\([\d,]*\))?\))? \{[^}]*\}"
        r"|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?"
        r"|\{(?:\{[\d, ]*\},? ?)*\})",
        attributes,
    )
    if not found:
        if "replica_groups=" in attributes:
            start = attributes.index("replica_groups=")
            raise ValueError(f"unknown form of {attributes[start : start + 80]}")
        return np.arange(devices)[None]
    text = found[1]
    if match := _MESH.match(text):
        return _of_mesh(*match.groups())
    if match := _IOTA.match(text):
        shape, source, order = (_numbers(each) for each in match.groups())
        return _iota(source, order).reshape(shape)
    rows = [_numbers(row) for row in re.findall(r"\{([\d, ]*)\}", _EXPLICIT.match(text)[1])]
    return np.array(rows) if rows else np.arange(devices)[None]


def _of_mesh(axes: str, device_shape: str | None, order: str | None, over: str) -> np.ndarray:
    sizes = {name: int(size) for name, size, _, _ in _AXIS.findall(axes)}
    devices = np.arange(int(np.prod(list(sizes.values()))))
    if device_shape is not None:
        devices = _iota(_numbers(device_shape), _numbers(order))
    # An axis may be split: 'x':(2)4 is the part of size 4 after a part of size 2.
    parts = [
        (name, int(before), int(size)) for name, _, before, size in _AXIS.findall(over) if size
    ]
    whole = [name for name, _, _, size in _AXIS.findall(over) if not size]
    shape, grouped = [], []
    for name, size in sizes.items():
        cuts = sorted((before, part) for n, before, part in parts if n == name)
        position = 1
        for before, part in cuts:
            if before > position:
                shape.append(before // position)
                grouped.append(False)
            shape.append(part)
            grouped.append(True)
            position = before * part
        shape.append(size // position)
        grouped.append(name in whole)
    devices = devices.reshape(shape)
    last = [i for i, inside in enumerate(grouped) if inside]
    first = [i for i, inside in enumerate(grouped) if not inside]
    count = int(np.prod([shape[i] for i in last]))
    return devices.transpose(first + last).reshape(-1, count)


def _iota(shape: list[int], order: list[int]) -> np.ndarray:
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    return (numbers.transpose(order) if order else numbers).reshape(-1)


def _numbers(text: str | None) -> list[int]:
    return [int(each) for each in text.split(",") if each.strip()] if text else []
