import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_stable.advantages import centered, maxrl
from jaxrl_stable.configs import Reinforcement
from jaxrl_stable.diagnostics import Max
from jaxrl_stable.run.gates import (
    check_conditions,
    check_failed_rewards,
    check_finite,
    check_first_mini_batch,
)
from jaxrl_stable.run.judge import STATUSES, Judged
from jaxrl_stable.trainer.optimizer import TrainState


@pytest.mark.fast
@pytest.mark.parametrize("deviation", [2e-5, float("nan")])
def test_first_mini_batch_must_agree_with_score(deviation):
    metrics = {"staleness/ratio_deviation_max": Max(jnp.float32(deviation))}
    with pytest.raises(RuntimeError, match=r"step 7: max \|π_θ/π_old − 1\| .* first mini-batch"):
        check_first_mini_batch(metrics, 1e-5, 7)


def test_rounding_passes():
    metrics = {"staleness/ratio_deviation_max": Max(jnp.float32(9e-6))}
    check_first_mini_batch(metrics, Reinforcement().gate("float32"), 1)
    assert Reinforcement().gate("bfloat16") > Reinforcement().gate("float32")
    assert Reinforcement(ratio_tolerance=0.5).gate("float32") == 0.5


def test_run_of_skipped_steps_stops():
    def state(in_a_row):
        return TrainState(None, None, jnp.int32(9), jnp.int32(9), jnp.int32(in_a_row))

    check_finite(state(2), 3)
    with pytest.raises(RuntimeError, match="the last 3 gradients were non-finite"):
        check_finite(state(3), 3)


def test_failing_checkers_stop_the_run():
    """A policy that makes its checker fail is not left out for ever."""
    check_failed_rewards(0.05, 0.1, 3)
    with pytest.raises(RuntimeError, match=r"step 3: the reward failed on 25% .* KeyError: 'x'"):
        check_failed_rewards(0.25, 0.1, 3, ["KeyError: 'x' (2 of 2 failures)"])


@pytest.mark.fast
def test_rewards_that_the_advantages_are_not_made_for_stop_the_run():
    """Whatever a failed checker leaves as its score is no reward."""
    ok, failed = STATUSES.index("ok"), STATUSES.index("timeout")
    judged = Judged(
        np.array([1, -1, -1], np.float32),
        np.array([ok, failed, ok]),
        np.ones(3, int),
        np.ones(3, bool),
    )
    message = r"step 4: maxrl needs rewards of at least 0, but response 2 has -1; use advantages\."
    with pytest.raises(RuntimeError, match=message):
        check_conditions(maxrl, judged, 4)
    check_conditions(centered, judged, 4)
    check_conditions(maxrl, judged._replace(status=np.array([ok, failed, failed])), 4)
