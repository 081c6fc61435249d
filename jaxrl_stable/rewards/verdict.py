"""What a reward function says about one response."""

from typing import Literal, NamedTuple

Status = Literal["ok", "invalid", "timeout", "error"]


class Verdict(NamedTuple):
    """A score and how it came about.

    `ok`: the response was judged. `invalid`: it has no answer that could be parsed, which is a
    wrong answer like any other, with score 0. `timeout` and `error`: the checker failed, not the
    response; the score means nothing and must be left out of the baseline and of the loss, lest the
    failure become a negative example.

    Attributes:
      score: the reward, finite; 1 is right and 0 wrong in the rewards of this package.
      status: one of the four above.
    """

    score: float
    status: Status

    @property
    def failed(self) -> bool:
        """Whether the checker failed, so that `score` must not be used."""
        return self.status in ("timeout", "error")
