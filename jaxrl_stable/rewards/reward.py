"""Loads rewards by name, and checks that a reward can read a data set."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxrl_stable.checks import record_name
from jaxrl_stable.rewards.exact import exact_reward, normalise
from jaxrl_stable.rewards.literal import boxed_reference, needs_parsing
from jaxrl_stable.rewards.numeric import numeric_reward, parse_reference
from jaxrl_stable.rewards.verdict import Verdict
from jaxrl_stable.rewards.worker import WorkerPool

_LATEX_FUNCTION = "jaxrl_stable.rewards.latex:latex_reward"
# Starting a process takes as long as parsing this many references.
_REFERENCES_PER_WORKER = 100
_FUNCTION_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


@runtime_checkable
class Scorer(Protocol):
    """A function that judges a batch and returns one verdict per response."""

    def __call__(
        self, problems: Sequence[Mapping[str, Any]], responses: Sequence[str]
    ) -> list[Verdict]: ...


@runtime_checkable
class References(Protocol):
    """Problems with reference answers, such as a `data.Source` or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Mapping[str, Any]: ...


class Reward:
    """A reward function for batches. Use it as a context manager or call `close`.

    Args:
      name: the name given to `load_reward`.
      scorer: judges a batch.
      close: stops the scorer's processes.
      right_at: score from which a response counts as right, for accuracies.
      failures: returns why the scorer failed in the last call in which it did, one line per kind.
    """

    def __init__(
        self,
        name: str,
        scorer: Scorer,
        close: Callable[[], None] = lambda: None,
        right_at: int | float = 1.0,
        failures: Callable[[], list[str]] = list,
    ):
        self.name, self._scorer, self.close = name, scorer, close
        self.right_at, self.failures = right_at, failures

    def __call__(
        self, problems: Sequence[Mapping[str, Any]], responses: Sequence[str]
    ) -> list[Verdict]:
        """Returns one verdict per response, in order.

        Raises:
          ValueError: if the numbers of problems and responses differ, or an in-process reward
            cannot read a reference.
        """
        if len(problems) != len(responses):
            raise ValueError(
                f"reward {self.name!r}: {len(problems)} problems but {len(responses)} responses; "
                "repeat each problem once per response"
            )
        return self._scorer(problems, responses)

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def load_reward(name: str, *, timeout_s: int | float = 5.0, workers: int = 1) -> Reward:
    """Opens a reward.

    Args:
      name: `"numeric"` or `"exact"`, which run in this process and evaluate nothing; `"math"`
        (math-verify); or `"package.module:function"`, a user's function `(problem: dict,
        response: str) -> float | Verdict`. The last two run in worker processes, which are killed
        if they exceed the time limit. A function may have an attribute `right_at`, the score from
        which a response counts as right in accuracies; it is 1 by default.
      timeout_s: wall-clock limit per response in a worker process, in seconds.
      workers: number of worker processes.

    Raises:
      ValueError: if the name is unknown, or the function cannot be imported or is not callable
        with `(problem, response)`.
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
    return Reward(name, pool, pool.close, pool.right_at, lambda: pool.failures)


def try_reward(reward: Reward, problem: Mapping[str, Any]) -> None:
    """Calls a reward as a run will: with a problem's own reference answer, and with no response.

    A run thus fails at its start if the reward cannot judge, and not after hours of training.

    Raises:
      ValueError: if the reward fails on either; the message has the exception.
    """
    tries = {"its reference answer": problem["answer"], "an empty response": ""}
    for what, response in tries.items():
        if reward([problem], [response])[0].failed:
            raise ValueError(
                f"reward {reward.name!r} fails on {what}, for the problem "
                f"{problem['prompt'][:60]!r}: {'; '.join(reward.failures())}. Fix the reward, or "
                "raise Data.reward_timeout if it was killed"
            )


def check_references(source: References, reward_name: str) -> None:
    """Checks before a run that a reward can read every reference answer.

    `"math"` parses what is not a number or a word, which takes about 10 ms per distinct reference;
    each has to score 1 if it is boxed. A user's function is not checked.

    Args:
      source: problems `{"prompt": ..., "answer": ...}`.
      reward_name: the name given to `load_reward`.

    Raises:
      ValueError: if the reward cannot read a reference. The message names the first such record and
        their number.
    """
    advice = "correct the record or choose another reward"
    if reward_name == "numeric":
        faulty = _unreadable(source, lambda answers: [parse_reference(a) is None for a in answers])
        advice = "correct the record, or choose the reward 'math' if it is not a plain number"
    elif reward_name == "exact":
        faulty = _unreadable(source, lambda answers: [normalise(a) is None for a in answers])
    elif reward_name == "math":
        faulty = _unreadable(source, _misread)
    else:
        return
    if faulty:
        answer = source[faulty[0]]["answer"]
        raise ValueError(
            f"{record_name(source, faulty[0])}: reward {reward_name!r} cannot read the reference "
            f"answer {answer[-60:]!r}; {advice} (records affected: {len(faulty)} of {len(source)})"
        )


def _unreadable(source: References, unreadable: Callable[[list[str]], Sequence[bool]]) -> list[int]:
    answers = [source[i]["answer"] for i in range(len(source))]
    distinct = list(dict.fromkeys(answers))
    bad = dict(zip(distinct, unreadable(distinct), strict=True))
    return [i for i, answer in enumerate(answers) if bad[answer]]


def _misread(answers: list[str]) -> list[bool]:
    """Returns which references `math` cannot read, or does not find equal to themselves."""
    parsed = [answer for answer in answers if needs_parsing(answer)]
    if not parsed:
        return [False] * len(answers)
    workers = min(os.cpu_count() or 1, 8, 1 + len(parsed) // _REFERENCES_PER_WORKER)
    boxed = list(map(boxed_reference, parsed))
    with load_reward("math", timeout_s=30.0, workers=workers) as reward:
        verdicts = reward([{"answer": answer} for answer in parsed], boxed)
    bad = {
        answer
        for answer, box, verdict in zip(parsed, boxed, verdicts, strict=True)
        if verdict.failed or (box and verdict.score != 1.0)
    }
    return [answer in bad for answer in answers]


def _in_process(judge: Callable[[Mapping[str, Any], str], Verdict]) -> Scorer:
    return lambda problems, responses: list(map(judge, problems, responses))
