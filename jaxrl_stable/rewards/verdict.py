"""The result of judging one response."""

from typing import Literal, NamedTuple

Status = Literal["ok", "invalid", "timeout", "error"]


class Verdict(NamedTuple):
    """A score and its status.

    `ok`: the response was judged. `invalid`: it has no answer that can be parsed; this counts as a
    wrong answer, with score 0. `timeout` and `error`: the checker failed, not the response. The
    score then means nothing and must be excluded from the baseline and the loss; otherwise the
    failure would become a negative example.

    Attributes:
      score: the reward, finite; in the rewards of this package 1 is right and 0 is wrong.
      status: one of the four above.
    """

    score: float
    status: Status

    @property
    def failed(self) -> bool:
        """True if the checker failed, so that `score` must not be used."""
        return self.status in ("timeout", "error")
