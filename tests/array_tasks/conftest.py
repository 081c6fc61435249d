"""One compiled program per task, shared by all tests: it draws, solves and grades five runs."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable import array_tasks

COUNT = 1024
TASKS = (
    array_tasks.Reverse(),
    array_tasks.Sort(symbols=5),
    array_tasks.ModularAddition(),
    array_tasks.ChainSum(),
    array_tasks.Parity(),
    array_tasks.Countdown(largest=4),
)
# Right, all wrong, held out, the first run's problems with some slips, other problems.
SEEDS = (0, 1, 2, 0, 3)
HELDOUT = (False, False, True, False, False)
SLIPS = (0.0, 1.0, 0.0, 0.25, 0.0)


class Runs(NamedTuple):
    """Arrays with two leading axes: runs, and problems per run."""

    problems: Any
    responses: Any
    mask: Any
    rewards: Any


def make(task, count, seed, heldout, slips):
    of_problems, of_teacher = jax.random.split(jax.random.key(seed))
    problems = task.problems(of_problems, count, heldout=heldout)
    responses, mask = task.solutions(of_teacher, problems, slips)
    return Runs(problems, responses, mask, task.reward(problems, responses, mask))


@functools.cache
def compiled(task):
    program = jax.jit(jax.vmap(functools.partial(make, task, COUNT)))
    runs = program(jnp.array(SEEDS), jnp.array(HELDOUT), jnp.array(SLIPS))
    return program, jax.tree.map(np.asarray, runs)


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: type(task).__name__)
def task(request):
    return request.param


@pytest.fixture(scope="module")
def runs(task):
    return compiled(task)[1]


@pytest.fixture(scope="module")
def program(task):
    """`program(seeds, heldout, slips)` of five runs."""
    return compiled(task)[0]
