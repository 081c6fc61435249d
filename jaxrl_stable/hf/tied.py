"""Handles checkpoints with tied embeddings that store the output head.

A model with tied embeddings has one matrix, and its checkpoint usually stores it once, as the
embedding. Some writers store it as the head instead, or twice. Transformers 5 accepts both, but
does not tie two matrices that differ, regardless of `config.json`. Version 4 ties them and drops
the head. No interpretation agrees with both versions, so a head that differs is an error here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxrl_stable import distributed
from jaxrl_stable.hf.copying import THREADS, all_finite, chunks
from jaxrl_stable.hf.files import TensorFiles
from jaxrl_stable.hf.names import EMBEDDING, HEAD, Piece
from jaxrl_stable.model.config import ModelConfig


def from_the_head(
    plan: Mapping[str, list[Piece]], config: ModelConfig, stored: Collection[str]
) -> dict[str, list[Piece]]:
    """Returns the plan, with tied embeddings read from the head if only the head is stored.

    `safetensors.torch.save_model` keeps only the alphabetically first name of a shared matrix.

    Args:
      plan: pieces of every parameter (`names.pieces`).
      config: the architecture.
      stored: names of the stored tensors.
    """
    if not config.tie_embeddings or EMBEDDING in stored or HEAD not in stored:
        return dict(plan)
    return {
        path: [p._replace(tensor=HEAD) if p.tensor == EMBEDDING else p for p in part]
        for path, part in plan.items()
    }


def has_copy(config: ModelConfig, stored: Collection[str]) -> bool:
    """Returns whether a checkpoint stores tied embeddings twice."""
    return config.tie_embeddings and EMBEDDING in stored and HEAD in stored


def check_copy(files: TensorFiles, config: ModelConfig) -> None:
    """Checks that both copies are equal if tied embeddings are stored twice.

    The values are compared in `config.param_dtype`, the dtype in which they are loaded. Every
    process reads both matrices.

    Args:
      files: the tensors of the checkpoint; both copies have the same shape and known dtypes.
      config: the architecture.

    Raises:
      ValueError: if the copies differ, or one of them has non-finite values.
    """
    if not has_copy(config, files.shapes):
        return
    embedding, head, dtype = files.view(EMBEDDING), files.view(HEAD), np.dtype(config.param_dtype)

    def faults(rows: slice) -> tuple[bool, bool, bool]:
        with np.errstate(over="ignore"):  # infinities are detected below
            one, other = (x[rows].astype(dtype, copy=False) for x in (embedding, head))
        return not all_finite(one), not all_finite(other), not np.array_equal(one, other)

    with ThreadPoolExecutor(THREADS) as pool:
        found = np.array(list(pool.map(faults, chunks(head.shape, 4)))).any(axis=0)
    *broken, differs = distributed.any_process(found)
    if any(broken):
        names = [name for name, flag in zip((EMBEDDING, HEAD), broken, strict=True) if flag]
        raise ValueError(files.not_finite(names))
    if differs:
        raise ValueError(
            f"{files.directory}: {HEAD} differs from {EMBEDDING}, but config.json has "
            "tie_word_embeddings = true; set it to false to keep both, or delete the wrong tensor"
        )
