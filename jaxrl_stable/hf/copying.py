"""Copies of matrices between two layouts, at the speed of memory and with little of it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np

from jaxrl_stable.hf.files import DTYPES

CHUNK_BYTES = 1 << 20  # copied at a time: stays in a core's cache until it is in place
STRIPE_ROWS = 12  # turned at a time: about as many as a first-level cache has ways
THREADS = min(8, os.cpu_count() or 1)


def chunks(shape: tuple[int, int], itemsize: int) -> Iterator[slice]:
    """Ranges of rows of about `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (shape[1] * itemsize))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`, which may be turned against each other, at the speed of memory.

    NumPy walks a turned copy along the rows of one side and misses the cache on the other; stripes
    of a few rows of the source keep both in it. Types of two bytes that NumPy does not know are
    moved as integers.
    """
    if target.dtype != source.dtype:
        source = source.astype(target.dtype)
    word = np.dtype(f"u{target.dtype.itemsize}")
    target, source = target.view(word), source.view(word)
    if source.strides[0] < source.strides[1]:
        target, source = target.T, source.T
    turned = target.strides[0] < target.strides[1]
    step = STRIPE_ROWS if turned else max(len(source), 1)
    for start in range(0, len(source), step):
        target[start : start + step] = source[start : start + step]


def all_finite(x: np.ndarray) -> bool:
    """Whether no value is infinite or NaN; by the exponent bits where NumPy has no fast test."""
    if x.dtype == DTYPES["BF16"]:
        return not x.size or int((x.view(np.uint16) & 0x7FFF).max()) < 0x7F80
    return bool(np.isfinite(x).all())


def page_memory(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory at the start of a page, which JAX on a CPU takes over as it is.

    Small pages: NumPy would ask for huge ones, and under a hypervisor that takes freed memory back
    these cost more to get than the whole load.
    """
    size = max(1, int(np.prod(shape)) * dtype.itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, int(np.prod(shape))).reshape(shape)
