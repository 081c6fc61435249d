"""The smallest possible study; what compiles is made once."""

from functools import partial

import jax
import pytest

from jaxrl_stable.array_tasks import Reverse
from jaxrl_stable.configs import Optimizer
from jaxrl_stable.model import tiny
from jaxrl_stable.objectives import gspo
from jaxrl_stable.study.config import ColdStart, Grid, Study
from jaxrl_stable.study.programs import over_runs, scoring
from jaxrl_stable.study.runner import begin_runs, make_starts, plan
from jaxrl_stable.study.runs import advance


@pytest.fixture(scope="session")
def study():
    """Two programs: N = 1, and N = 2 with four objectives under R3."""
    return Study(
        task=Reverse(smallest=2, largest=3, symbols=4, reward_kind="per_position"),
        model=tiny(hidden_size=16, num_heads=2, head_dim=8, moe_intermediate_size=16),
        cold_starts=(
            ColdStart(steps=8, batch_size=8),
            ColdStart(name="careful", steps=8, batch_size=8, slips=0.0),
        ),
        grids=(
            Grid(figure="one"),
            Grid(
                figure="two",
                mini_batches=(2,),
                replay=("R3",),
                options=({}, {"clip": False}),
            ),
            Grid(figure="two", mini_batches=(2,), replay=("R3",), losses=(gspo,)),
            Grid(mini_batches=(2,), replay=("R3",), cold_starts=("careful",)),
        ),
        seeds=2,
        prompts=2,
        group_size=4,
        gradient_steps=8,
        evaluations=2,
        heldout_problems=4,
        rollout_format="int8",
        # A larger eps than Adam's usual: where a gradient is rounding, a step is not.
        optimizer=Optimizer(learning_rate=1e-2, warmup_steps=1, eps=1e-4),
    )


@pytest.fixture(scope="session")
def starts(study):
    names = [start.name for start in study.cold_starts]
    devices = jax.devices()[:1]
    return make_starts(study, devices, names, scoring(study, devices))


@pytest.fixture(scope="session")
def together(study, starts):
    """All runs of the program with four objectives: the wave, its initial runs, the program.

    A device makes its runs at once, as accelerators do; the study's own program, in
    test_runner.py, makes them one after another, as it does on a CPU.
    """
    cells = study.cells()
    (wave,) = plan(study, cells, (), 1)[1]
    runs = begin_runs(study, cells, wave, starts, jax.devices()[:1])
    step = partial(
        advance,
        study=study,
        objectives=tuple(cells[name].objective for name in wave.cells),
        rollout_format="int8",
    )
    return wave, runs, over_runs(step, jax.devices()[:1], vmapped=True)
