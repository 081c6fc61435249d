"""Rewards by name, and the check of a data set against one."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, Self

from jaxrl_stable.rewards.exact import exact_reward, normalise
from jaxrl_stable.rewards.numeric import numeric_reward, parse_number
from jaxrl_stable.rewards.verdict import Verdict
from jaxrl_stable.rewards.worker import WorkerPool

_LATEX_FUNCTION = "jaxrl_stable.rewards.latex:latex_reward"
_FUNCTION_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


class Scorer(Protocol):
    """Judges a batch, one verdict per response."""

    def __call__(
        self, problems: Sequence[Mapping[str, str]], responses: Sequence[str]
    ) -> list[Verdict]: ...


class Reward:
    """A reward function for batches; use it as a context manager or call `close`.

    Args:
      name: as given to `load_reward`.
      scorer: what judges.
      close: what ends its processes.
    """

    def __init__(self, name: str, scorer: Scorer, close: Callable[[], None] = lambda: None):
        self.name, self._scorer, self.close = name, scorer, close

    def __call__(
        self, problems: Sequence[Mapping[str, str]], responses: Sequence[str]
    ) -> list[Verdict]:
        """Returns one verdict per response, in order.

        Raises:
          ValueError: there are not as many problems as responses, or an in-process reward cannot
            read a reference.
        """
        if len(problems) != len(responses):
            raise ValueError(
                f"reward {self.name!r}: {len(problems)} problems but {len(responses)} responses; "
                "repeat each problem once per response"
            )
        return self._scorer(problems, responses)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def load_reward(name: str, *, timeout_s: float = 5.0, workers: int = 1) -> Reward:
    """Opens a reward.

    Args:
      name: `"numeric"` or `"exact"` (in this process, nothing is evaluated); `"math"`
        (math-verify); or `"package.module:function"` for a function `(problem: dict, response: str)
        -> float | Verdict` of the user. The last two run in processes that are killed on overrun.
      timeout_s: wall-clock limit for one response in such a process, in seconds.
      workers: number of such processes.

    Raises:
      ValueError: the name is none of these, or the function cannot be imported.
    """
    if name == "numeric":
        return Reward(name, _in_process(numeric_reward))
    if name == "exact":
        return Reward(name, _in_process(exact_reward))
    if name != "math" and not _FUNCTION_NAME.fullmatch(name):
        raise ValueError(
            f"unknown reward {name!r}; choose numeric, exact, math or package.module:function"
        )
    function = _LATEX_FUNCTION if name == "math" else name
    pool = WorkerPool(function, timeout_s=timeout_s, workers=workers)
    return Reward(name, pool, pool.close)


def check_references(source: Sequence[Mapping[str, str]], reward_name: str) -> None:
    """Checks before a run that a reward can read every reference answer.

    `"math"` takes milliseconds a record. For a function of the user there is nothing to check.

    Args:
      source: anything with a length and items `{"prompt": ..., "answer": ...}`.
      reward_name: as given to `load_reward`.

    Raises:
      ValueError: names the first record that the reward cannot read and how many there are.
    """
    if reward_name == "numeric":
        faulty = _unreadable(source, lambda answer: parse_number(answer) is not None)
    elif reward_name == "exact":
        faulty = _unreadable(source, lambda answer: normalise(answer) is not None)
    elif reward_name == "math":
        with load_reward("math", timeout_s=30.0) as reward:
            # An empty response is invalid, unless reading the reference fails before it.
            faulty = _unreadable(source, lambda a: not reward([{"answer": a}], [""])[0].failed)
    else:
        return
    if faulty:
        answer = source[faulty[0]]["answer"]
        raise ValueError(
            f"{source!r}[{faulty[0]}]: reward {reward_name!r} cannot read the reference answer "
            f"{answer[-60:]!r}; correct the record or choose another reward "
            f"(records affected: {len(faulty)} of {len(source)})"
        )


def _unreadable(source: Sequence[Mapping[str, str]], readable: Callable[[str], bool]) -> list[int]:
    return [i for i in range(len(source)) if not readable(source[i]["answer"])]


def _in_process(judge: Callable[[Mapping[str, str], str], Verdict]) -> Scorer:
    return lambda problems, responses: list(map(judge, problems, responses))
