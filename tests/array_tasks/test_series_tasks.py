"""Reverse, sort and sums: examples by hand, independent solutions, and grading."""

import functools

import jax
import numpy as np
import pytest

from jaxrl_stable.array_tasks import ChainSum, ModularAddition, Parity, Reverse, Sort
from jaxrl_stable.array_tasks.series import Series


def series(task, *values):
    """Builds one problem."""
    padded = [*values] + [0] * (task.sizes[1] - len(values))
    return Series(np.array(padded, np.int32), np.int32(len(values)))


def text(task, tokens):
    return " ".join(task.decode(tokens)).replace("<pad>", "·").replace("<eos>", "$")


EXAMPLES = [
    (Reverse(largest=4), (3, 0, 2), "· d a c =", "c a d $ ·"),
    (Reverse(largest=4), (3, 0, 2, 2), "d a c c =", "c c a d $"),
    (Sort(largest=4), (3, 0, 3), "· d a d =", "a d d $ ·"),
    (Sort(largest=4), (7, 6, 0, 1), "h g a b =", "a b g h $"),
    (ModularAddition(), (17, 9), "17 + 9 =", "3 $"),
    (ChainSum(), (7, 8, 4), "· · 7 + 8 + 4 =", "5 9 $ ·"),
    (ChainSum(), (7, 8), "· · · · 7 + 8 =", "5 $ · ·"),
    (ChainSum(worked=False), (7, 8, 4, 9), "7 + 8 + 4 + 9 =", "8 $"),
    (Parity(largest=5), (1, 0, 1, 1), "· 1 0 1 1 =", "1 0 1 $ ·"),
    (Parity(largest=5, worked=False), (1, 0, 1, 1), "· 1 0 1 1 =", "1 $"),
]


@pytest.mark.fast
@pytest.mark.parametrize("task, values, prompt, response", EXAMPLES)
def test_examples_by_hand(task, values, prompt, response):
    slips = np.zeros(task.max_tokens, np.int32)
    both = jax.jit(lambda problem: (task.prompt(problem), task.solve(problem, slips)))
    shown, solved = both(series(task, *values))
    assert text(task, shown) == prompt
    assert text(task, solved) == response
    assert task.prompt_width == len(prompt.split())


def reference(task, values):
    """Returns the right symbols, in plain Python."""
    if isinstance(task, Reverse):
        return values[::-1]
    if isinstance(task, Sort):
        return sorted(values)
    sums = [sum(values[: i + 1]) % task.modulus for i in range(1, len(values))]
    return sums if task.worked else sums[-1:]


UNIQUE = [Reverse(), Sort(symbols=5), ModularAddition(), ChainSum(), Parity()]


@pytest.mark.parametrize("task", UNIQUE, indirect=True, ids=lambda task: type(task).__name__)
def test_solutions_equal_those_of_plain_python(runs, task):
    values, sizes = (x[0, :400] for x in runs.problems.answer)
    for series, size, tokens in zip(values, sizes, runs.responses[0], strict=False):
        expected = reference(task, series[:size].tolist())
        end = [1] + [0] * (task.max_tokens - len(expected) - 1)
        assert tokens.tolist() == [task.first_symbol + value for value in expected] + end


@pytest.mark.fast
@pytest.mark.parametrize(
    "task, values, slips, response",
    [
        # 7 + 8 + 4 + 9: the first sum becomes 5 + 3 = 8, and 4 and 9 are added to that.
        (ChainSum(), (7, 8, 4, 9), (3, 0, 0, 0), "8 2 1 $"),
        (ChainSum(), (7, 8, 4, 9), (0, 0, 1, 0), "5 9 9 $"),
        (Parity(largest=5), (1, 0, 1, 1), (1, 0, 0, 0, 0), "0 1 0 $ ·"),
        # In a task without intermediate steps, a slip has no further effect.
        (Reverse(largest=4), (3, 0, 2), (0, 7, 0, 0, 0), "c h d $ ·"),
    ],
)
def test_a_mistake_in_the_working_carries_on(task, values, slips, response):
    solved = jax.jit(task.solve)(series(task, *values), np.array(slips, np.int32))
    assert text(task, solved) == response


@functools.cache
def judge(task):
    return jax.jit(task.judge)


def grade(task, values, response):
    """Returns the reward of a response given as text; `·` was not sampled."""
    ids = {name: i for i, name in enumerate(task.texts)} | {"$": 1, "·": 0}
    tokens = np.array([ids[name] for name in response.split()])
    mask = np.array([name != "·" for name in response.split()])
    return float(judge(task)(series(task, *values), tokens, mask))


@pytest.mark.fast
@pytest.mark.parametrize(
    "response, binary, per_position",
    [
        ("c a d $ ·", 1, 1),
        ("c a d · ·", 0, 3 / 4),  # cut off before EOS
        ("c a d d $", 0, 3 / 5),  # too long
        ("c a $ · ·", 0, 2 / 4),  # too short
        ("c b d $ ·", 0, 3 / 4),
        ("c a d $ <pad>", 0, 4 / 5),
        ("b c a d $", 0, 0),  # one extra at the front shifts all others
        ("$ · · · ·", 0, 0),
        ("· · · · ·", 0, 0),
    ],
)
def test_grades_by_hand(response, binary, per_position):
    values = 3, 0, 2
    assert grade(Reverse(largest=4), values, response) == binary
    by_position = Reverse(largest=4, reward_kind="per_position")
    assert grade(by_position, values, response) == pytest.approx(per_position)


@pytest.mark.fast
@pytest.mark.parametrize(
    "response, all_of_it, result",
    [
        ("5 9 8 $", 1, 1),
        ("4 9 8 $", 0, 1),  # a wrong intermediate step
        ("8 $ · ·", 0, 1),  # no intermediate steps
        ("5 9 8 8", 0, 0),  # no EOS
        ("5 8 9 $", 0, 0),
        ("$ · · ·", 0, 0),
        ("· · · ·", 0, 0),
    ],
)
def test_the_result_alone_can_be_graded(response, all_of_it, result):
    values = 7, 8, 4, 9
    assert grade(ChainSum(), values, response) == all_of_it
    assert grade(ChainSum(reward_kind="answer"), values, response) == result
