"""Checks that stop a run early: wrong π_old, non-finite gradients, failing or unusable rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax

from jaxrl_stable.advantages import check_rewards
from jaxrl_stable.diagnostics import Metrics
from jaxrl_stable.run.judge import Judged
from jaxrl_stable.trainer.optimizer import TrainState


def check_first_mini_batch(metrics: Metrics, tolerance: float, step: int) -> None:
    """Checks that π_θ/π_old is 1 up to rounding right after `score`, before the first update.

    Raises:
      RuntimeError: if it is not; the run would optimise against a wrong π_old.
    """
    deviation = float(jax.device_get(metrics["staleness/ratio_deviation_max"].value()))
    if not deviation <= tolerance:
        raise RuntimeError(
            f"step {step}: max |π_θ/π_old − 1| is {deviation:.2e} in the first mini-batch, above "
            f"{tolerance:.0e}; score and update disagree on the same weights. Check that both use "
            "the same micro-batch size, temperature and replay, or set "
            "Reinforcement.ratio_tolerance if this much rounding is expected"
        )


def check_finite(state: TrainState, limit: int) -> None:
    """Checks that fewer than `limit` consecutive gradients were non-finite.

    Raises:
      RuntimeError: if the last `limit` steps were all skipped.
    """
    in_a_row = int(jax.device_get(state.skipped_in_a_row))
    if in_a_row >= limit:
        raise RuntimeError(
            f"the last {in_a_row} gradients were non-finite and were skipped; the weights are as "
            "before these steps. Lower the learning rate, or look at weight/raw_max and "
            "mismatch/abs_token_max"
        )


def check_failed_rewards(
    share: float, limit: float, step: int, failures: Sequence[str] = ()
) -> None:
    """Checks that the reward does not fail or time out too often.

    Failed responses are left out of the baseline, which a policy could learn to exploit.

    Args:
      share: share of failed verdicts in one rollout.
      limit: `Reinforcement.max_failed_rewards`.
      step: step number for the message.
      failures: what failed in this process, see `rewards.Reward`.

    Raises:
      RuntimeError: if the share of failed verdicts in one rollout exceeds `limit`.
    """
    if share > limit:
        reasons = "; ".join(failures) or "the log of another process has the reason"
        raise RuntimeError(
            f"step {step}: the reward failed on {share:.0%} of the responses, above {limit:.0%}: "
            f"{reasons}. Fix the reward, raise Data.reward_timeout if it was killed, and see the "
            "last rows of samples.jsonl"
        )


def check_conditions(estimator: Callable, judged: Judged, step: int) -> None:
    """Checks that a rollout's scores are in the range that the advantage estimator supports.

    Raises:
      RuntimeError: if a score is outside this range (`advantages.check_rewards`).
    """
    try:
        check_rewards(estimator, judged.rewards, judged.valid)
    except ValueError as error:
        raise RuntimeError(f"step {step}: {error}") from error
