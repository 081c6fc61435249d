"""Countdown: compares its parser with one in plain Python, and checks its problems."""

import jax
import numpy as np
import pytest

from jaxrl_stable.array_tasks import Countdown
from jaxrl_stable.array_tasks.countdown import Numbers, parse

TASK = Countdown(largest=4)
IDS = {name: i for i, name in enumerate(TASK.texts)} | {"$": 1, "·": 0, "<16>": 16}
OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def evaluate(names):
    """Parses in plain Python: numbers and value of an expression followed by EOS, else None."""
    if not names or names[-1] != "<eos>" or len(names) % 2:
        return None
    terms, operators = names[0:-1:2], names[1:-1:2]
    if not all(map(str.isdigit, terms)) or not all(o in OPERATIONS for o in operators):
        return None
    value = int(terms[0])
    for operator, term in zip(operators, terms[1:], strict=True):
        value = OPERATIONS[operator](value, int(term))
    return sorted(map(int, terms)), value


def expected_reward(given, target, names, other=0.0):
    found = evaluate(names)
    if found is None or found[0] != sorted(given):
        return 0.0
    return 1.0 if found[1] == target else other


def problem(given, target):
    """Builds one problem; the reward reads only its numbers and target."""
    padded = np.array(sorted(given) + [0] * (TASK.largest - len(given)), np.int32)
    unknown = np.zeros_like(padded)
    return Numbers(padded, np.int32(len(given)), np.int32(target), unknown, unknown)


@pytest.fixture(scope="module")
def graded():
    """Returns rewards of both kinds; compiled once."""
    kinds = TASK, Countdown(largest=4, reward_kind="legal")
    return jax.jit(lambda *arguments: [jax.vmap(kind.judge)(*arguments) for kind in kinds])


@pytest.mark.fast
@pytest.mark.parametrize(
    "given, target, response, binary, legal",
    [
        ((3, 5, 7), 22, "3 * 5 + 7 $", 1, 1),
        ((3, 5, 7), 22, "5 * 3 + 7 $", 1, 1),
        ((3, 5, 7), 36, "7 + 5 * 3 $", 1, 1),  # from left to right: (7 + 5) · 3
        ((3, 5, 7), 22, "7 + 5 * 3 $", 0, 0.1),
        ((3, 5, 7), 22, "3 * 5 + 7", 0, 0),  # no EOS
        ((3, 5, 7), 22, "3 * 5 + 7 + $", 0, 0),
        ((3, 5, 7), 22, "+ 3 * 5 + 7 $", 0, 0),
        ((3, 5, 7), 22, "3 * 5 7 + $", 0, 0),  # the right symbols in another notation
        ((3, 5, 7), 22, "1 5 + 7 $", 0, 0),  # no number has two digits
        ((3, 5, 7), 15, "3 * 5 $", 0, 0),  # 7 is not used
        ((3, 5), 20, "5 * 5 - 5 $", 0, 0),  # 5 is used too often
        ((3, 5), 20, "3 * 5 + 5 $", 0, 0),
        ((5, 5), 25, "5 * 5 $", 1, 1),
        ((2, 3), -1, "2 - 3 $", 1, 1),
        ((2, 3), 6, "2 * 3 $ $", 0, 0),
        ((2, 3), 6, "2 * 3 <pad> $", 0, 0),
        ((2, 3), 6, "2 * 3 $ <pad>", 0, 0),
        ((2, 3), 6, "2 * · 3 $", 0, 0),  # a mask that no sampler produces
        ((2, 3), 6, "2 · * 3 $", 0, 0),
        ((2, 3), 6, "2 * 3 · $", 0, 0),
        ((2, 3), 6, "· 2 * 3 $", 0, 0),
        ((2, 3), 16, "2 * 3 + <16> $", 0, 0),  # an id above those of the digits (6 to 15)
        ((2, 3), 0, "$", 0, 0),
        ((2, 3), 0, "", 0, 0),
        ((9, 9, 9, 9), 6561, "9 * 9 * 9 * 9 $", 1, 1),
    ],
)
def test_grades_by_hand(graded, given, target, response, binary, legal):
    names = response.split() + ["·"] * (TASK.max_tokens - len(response.split()))
    tokens = np.array([[IDS[name] for name in names]])
    mask = np.array([[name != "·" for name in names]])
    problems = jax.tree.map(lambda x: np.array(x)[None], problem(given, target))
    found = [float(reward[0]) for reward in graded(problems, tokens, mask)]
    assert found == pytest.approx([binary, legal])


def test_the_parser_equals_plain_python_on_any_tokens(graded):
    """Random tokens, random expressions of the given numbers, and those with one token changed."""
    rng = np.random.default_rng(0)
    count, width = 6000, TASK.max_tokens
    size = rng.integers(2, TASK.largest + 1, count)
    used = np.arange(TASK.largest) < size[:, None]
    given = np.where(used, rng.integers(1, 10, (count, TASK.largest)), 0)
    tokens = np.zeros((count, width), int)
    tokens[:, 0::2] = np.where(used, given + IDS["0"], 0)  # in the order given
    tokens[:, 1::2] = rng.integers(IDS["+"], IDS["*"] + 1, used.shape)
    length = 2 * size
    tokens[np.arange(count), length - 1] = 1
    changed = rng.integers(0, length)
    some = np.arange(count) % 3 == 1
    tokens[some, changed[some]] = rng.integers(0, TASK.vocab_size + 2, some.sum())
    wild = np.arange(count) % 3 == 2
    tokens[wild] = rng.integers(0, TASK.vocab_size + 2, (wild.sum(), width))
    length = np.where(wild, rng.integers(0, width + 1, count), length)
    mask = np.arange(width) < length[:, None]

    names = [TASK.decode(row[:n]) for row, n in zip(tokens, length, strict=True)]
    values = [(evaluate(name) or (0, 0))[1] for name in names]
    target = np.where(rng.random(count) < 0.5, values, rng.integers(1, 100, count))
    unknown = np.zeros_like(given)
    problems = Numbers(np.sort(given)[:, ::-1], size, target, unknown, unknown)
    rewards = graded(problems, np.where(mask, tokens, 0), mask)
    for found, other in zip(rewards, (0.0, 0.1), strict=True):
        expected = [
            expected_reward(given[i][used[i]].tolist(), target[i], names[i], other)
            for i in range(count)
        ]
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (np.asarray(rewards[0]) == 1).sum() > 900  # not only zeros are compared
    assert (np.asarray(rewards[1]) == np.float32(0.1)).sum() > 300


def test_many_factors_do_not_overflow():
    """9^16 is far beyond 32 bits; the clipped value must not come back to a target."""
    tokens = np.full(32, IDS["*"])
    tokens[0::2], tokens[-1] = IDS["9"], 1
    well_formed, value, used = jax.jit(parse)(tokens, np.ones(32, bool))
    assert well_formed and value >= 10**6 and used[9] == 16


@pytest.mark.parametrize("task", [TASK], indirect=True, ids=["Countdown"])
def test_every_problem_has_its_target_in_reach(runs, task):
    """The drawn expression is legal and stays from 1 to 99; all operators are drawn."""
    answer, operators = runs.problems.answer, set()
    for i, prompt in enumerate(runs.problems.prompts[0, :400]):
        shown = [name for name in task.decode(prompt) if name != "<pad>"]
        arrow = shown.index("->")
        given, target = list(map(int, shown[:arrow])), int("".join(shown[arrow + 1 :]))
        assert given == sorted(given) and min(given) >= 1 and len(given) == answer.size[0, i]
        assert target == answer.target[0, i] and 1 <= target <= 99
        names = task.decode(runs.responses[0, i][runs.mask[0, i]])
        assert expected_reward(given, target, names) == 1
        for end in range(2, len(names), 2):
            assert 1 <= evaluate([*names[: end - 1], "<eos>"])[1] <= 99
        operators |= set(names[1:-1:2])
    assert operators == set(OPERATIONS)


@pytest.mark.parametrize("task", [TASK], indirect=True, ids=["Countdown"])
def test_numbers_and_operators_slip_alike(runs, task):
    """The first and fourth run have the same problems; the fourth slips in a quarter of steps."""
    wrong = (runs.responses[0] != runs.responses[3]).mean(0)
    np.testing.assert_allclose(wrong[:3], 0.25, atol=0.055)  # four standard deviations


def test_slips_write_what_is_well_formed():
    terms = np.array([3, 5, 7, 0])
    answer = Numbers(terms, np.int32(3), np.int32(22), terms, np.array([0, 2, 0, 0]))
    slips = np.concatenate([np.eye(8, dtype=int)[:5] * size for size in (1, 2)])
    written = jax.jit(jax.vmap(lambda slips: TASK.solve(answer, slips)))(slips)
    right = ["3", "*", "5", "+", "7", "<eos>", "<pad>", "<pad>"]
    for tokens, place in zip(written, [*range(5)] * 2, strict=True):
        names = TASK.decode(tokens)
        assert [i for i in range(8) if names[i] != right[i]] == [place]
        assert evaluate(names[:6]) is not None
