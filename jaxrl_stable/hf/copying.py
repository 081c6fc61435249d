"""Copies matrices between two layouts, at memory bandwidth and with little extra memory."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import numpy as np

from jaxrl_stable.hf.files import DTYPES

CHUNK_BYTES = 1 << 20  # copied at a time; fits in a core's cache
STRIPE_ROWS = 12  # transposed at a time; about the associativity of an L1 cache
THREADS = min(8, os.cpu_count() or 1)


def chunks(shape: tuple[int, int], itemsize: int) -> Iterator[slice]:
    """Yields ranges of rows of about `CHUNK_BYTES` each."""
    step = max(1, CHUNK_BYTES // (shape[1] * itemsize))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def copy(target: np.ndarray, source: np.ndarray) -> None:
    """Copies `source` into `target` at memory bandwidth, even if one is a transposed view.

    NumPy copies a transposed view along the rows of one side and misses the cache on the other.
    Stripes of a few rows keep both sides in the cache. Dtypes that NumPy does not know, such as
    bfloat16, are copied as integers.
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
    """Returns whether all values are finite.

    NumPy has no fast test for bfloat16, so this function tests the exponent bits.
    """
    if x.dtype == DTYPES["BF16"]:
        return not x.size or int((x.view(np.uint16) & 0x7FFF).max()) < 0x7F80
    return bool(np.isfinite(x).all())


def page_memory(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """Returns an uninitialised, page-aligned array that JAX can use on a CPU without copying it.

    The array uses small pages. NumPy would request huge pages; under a hypervisor that reclaims
    freed memory, obtaining these takes longer than the whole load.
    """
    size = max(1, int(np.prod(shape)) * dtype.itemsize)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, dtype, int(np.prod(shape))).reshape(shape)
