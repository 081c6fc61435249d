"""The compiled programs of a study; each advances a stack of runs spread over all devices."""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Key

from jaxrl_stable.model.transformer import Transformer
from jaxrl_stable.study.config import Cell, Study
from jaxrl_stable.study.runs import RunState, advance, begin, heldout_score, policy

T = TypeVar("T")


def over_runs(
    function: Callable, devices: list[jax.Device], vmapped: bool | None = None
) -> Callable:
    """Maps `function(run, shared)` over runs; devices do not communicate.

    Args:
      function: takes one run and a value shared by all runs.
      devices: devices over which the runs are spread evenly.
      vmapped: whether a device executes all its runs at once instead of one after another. The
        default is False only on CPUs: one small run already keeps a CPU busy, and a batch dimension
        slows down sorts, gathers and products there (experiments/bench/README.md).

    Returns:
      The mapped function, jitted.
    """
    if vmapped is None:
        vmapped = devices[0].platform != "cpu"

    def part(runs: Any, shared: Any) -> Any:
        return jax.lax.map(
            lambda run: function(run, shared), runs, batch_size=0 if vmapped else None
        )

    return jax.jit(
        jax.shard_map(
            part,
            mesh=_mesh(devices),
            in_specs=(P("runs"), P()),
            out_specs=P("runs"),
            check_vma=False,
        )
    )


def scoring(
    study: Study, devices: list[jax.Device]
) -> Callable[[Transformer, None], Float[Array, "runs"]]:
    """Returns `heldout_score` mapped over a stack of models; it compiles once per stack size."""

    def score(model: Transformer, _: None) -> Float[Array, ""]:
        return heldout_score(model, study)

    return over_runs(score, devices)


def compiled(
    study: Study, cells: Sequence[Cell], size: int, devices: list[jax.Device]
) -> tuple[Callable, float]:
    """Compiles `runs.advance` for `size` runs of these cells; also returns the seconds it took."""
    begin_time = time.perf_counter()
    step = partial(
        advance,
        study=study,
        objectives=tuple(cell.objective for cell in cells),
        rollout_format=cells[0].rollout_format,
    )

    def first(key: Key[Array, ""]) -> RunState:
        return begin(study, policy(study, key), key, jnp.int32(0), jnp.float32(0))

    spread = NamedSharding(_mesh(devices), P("runs"))
    runs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=spread),
        jax.eval_shape(jax.vmap(first), jax.random.split(jax.random.key(0), size)),
    )
    made = over_runs(step, devices).lower(runs, jnp.int32(0)).compile()
    return made, time.perf_counter() - begin_time


@contextlib.contextmanager
def made_ahead(makers: Sequence[Callable[[], T]]) -> Iterator[Iterator[T]]:
    """Yields the results of the functions in order, and computes the next few in the background.

    While a GPU or a TPU executes runs, its host is free to compile the next programs. At most one
    result per thread is computed ahead, which limits memory use and the wait when the block is
    left. With several hosts, each result is computed on request, because all hosts have to compile
    in the same order.
    """
    if jax.process_count() > 1:
        yield (make() for make in makers)
        return
    threads = max(1, (os.cpu_count() or 1) // 4)
    with ThreadPoolExecutor(threads) as pool:
        begun = (pool.submit(make) for make in makers)
        ahead = collections.deque(itertools.islice(begun, threads))

        def results() -> Iterator[T]:
            while ahead:
                result = ahead.popleft().result()
                ahead.extend(itertools.islice(begun, 1))
                yield result

        yield results()


def _mesh(devices: list[jax.Device]) -> Mesh:
    return Mesh(np.array(devices), ("runs",))
