"""Countdown: reach a target with given numbers. The reward is a parser that accepts any tokens.

An expression is a number, followed by zero or more (operator, number) pairs. It is evaluated from
left to right without precedence, as on a pocket calculator: `2 + 3 * 5` is 25. Because there are no
parentheses, the state after a prefix is one number, not a stack. Because there is no division,
every value is an integer.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable.array_tasks.task import (
    EOS,
    AnyArray,
    ArrayTask,
    check_sizes,
    left_padded,
    with_eos,
)

ARROW, PLUS, ZERO = 2, 3, 6  # ids; operators are 3 to 5, digits 6 to 15
TARGETS = 99  # the largest target: two digits
LEGAL_REWARD = 0.1
# Values are clipped to this limit to prevent overflow. No verdict changes: numbers are from 1 to 9,
# so a response would have to be far longer to get back from the limit to a target.
_LIMIT = 10**6


class Numbers(NamedTuple):
    """A problem and the expression that generated it.

    Attributes:
      given: the numbers in ascending order, then zeros.
      size: count of the numbers.
      target: the target, from 1 to 99.
      terms, operators: one correct response; operators are 0 (+), 1 (−) or 2 (*). Each operator
        precedes its term; the first one is unused. Entries from `size` on are arbitrary.
    """

    given: Int[Array, "largest"]
    size: Int[Array, ""]
    target: Int[Array, ""]
    terms: Int[Array, "largest"]
    operators: Int[Array, "largest"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Countdown(ArrayTask):
    """`3 5 7 -> 2 2` → `3 * 5 + 7`. Each number must be used exactly once.

    Numbers are from 1 to 9 and shown in ascending order, so that their order reveals nothing. The
    target is shown with two digits. Every problem has a solution, because its target is computed
    from an expression whose intermediate results are all from 1 to 99. Many problems have several
    solutions.

    A slip of the teacher writes a wrong number or operator; the response stays well-formed.

    An expression is legal if it is well-formed and uses every number exactly as often as it is
    given. Reward kind `binary` is 1 for a legal expression with the target as its value, followed
    by EOS, and 0 otherwise. `legal` also gives 0.1 to other legal expressions. There is no
    `per_position`: several responses are correct, so no single position is correct or wrong.

    Attributes:
      smallest, largest: fewest and most numbers per problem.
    """

    REWARD_KINDS: ClassVar[tuple[str, ...]] = ("binary", "legal")

    smallest: int = 2
    largest: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_sizes(self, least=2)

    @property
    def texts(self) -> tuple[str, ...]:
        return ("<pad>", "<eos>", "->", "+", "-", "*", *"0123456789")

    @property
    def prompt_width(self) -> int:
        return self.largest + 3

    @property
    def max_tokens(self) -> int:
        return 2 * self.largest

    @property
    def choices(self) -> tuple[int, ...]:
        return (9, 3) * self.largest

    def draw(self, key: Key[Array, ""]) -> Numbers:
        of_size, of_terms, of_operators = jax.random.split(key, 3)
        size = jax.random.randint(of_size, (), self.smallest, self.largest + 1, dtype=jnp.int32)
        terms = jax.random.randint(of_terms, (self.largest,), 1, 10, dtype=jnp.int32)
        noise = jax.random.uniform(of_operators, (self.largest, 3))
        used = jnp.arange(self.largest) < size

        def step(
            value: Int[Array, ""],
            term: tuple[Int[Array, ""], Float[Array, "3"], Bool[Array, ""]],
        ) -> tuple[Int[Array, ""], Int[Array, ""]]:
            number, noise, used = term
            results = _results(value, number)
            # One result is always in range: the sum up to a value of 90, the difference from 91 on.
            operator = jnp.where((results >= 1) & (results <= TARGETS), noise, -1.0).argmax()
            return jnp.where(used, results[operator], value), operator.astype(jnp.int32)

        rest = jax.tree.map(lambda x: x[1:], (terms, noise, used))
        target, operators = jax.lax.scan(step, terms[0], rest)
        given = jnp.where(used, jnp.sort(jnp.where(used, terms, 10)), 0)
        return Numbers(given, size, target, terms, jnp.pad(operators, (1, 0)))

    def prompt(self, answer: Numbers) -> Int[Array, "P"]:
        numbers = left_padded(answer.given + ZERO, answer.size)
        tens, units = jnp.divmod(answer.target, 10)
        return jnp.append(
            numbers, jnp.stack([jnp.full_like(tens, ARROW), ZERO + tens, ZERO + units])
        )

    def solve(self, answer: Numbers, slips: Int[AnyArray, "R"]) -> Int[Array, "R"]:
        numbers = (answer.terms - 1 + slips[0::2]) % 9 + 1
        # Slips alternate like the response, which starts with a number.
        operators = (answer.operators + jnp.roll(slips[1::2], 1)) % 3
        pairs = jnp.stack([operators + PLUS, numbers + ZERO], axis=1)
        return with_eos(pairs.ravel()[1:], 2 * answer.size - 1)

    def judge(
        self, answer: Numbers, response: Int[Array, "R"], mask: Bool[Array, "R"]
    ) -> Float[Array, ""]:
        well_formed, value, used = parse(response, mask)
        given = _count(answer.given, answer.given > 0)
        legal = well_formed & (used == given).all()
        other = LEGAL_REWARD if self.reward_kind == "legal" else 0.0
        return jnp.where(legal, jnp.where(value == answer.target, 1.0, other), 0.0)


def parse(
    response: Int[Array, "R"], mask: Bool[Array, "R"]
) -> tuple[Bool[Array, ""], Int[Array, ""], Int[Array, "10"]]:
    """Parses a response, which may contain any tokens.

    Args:
      response: tokens, `pad_id` where `mask` is False; R is even.
      mask: True on sampled tokens, EOS included.

    Returns:
      well_formed: whether the response is an expression followed by EOS.
      value: value of the expression; meaningless unless `well_formed`.
      used: count of each digit in the expression; meaningless unless `well_formed`.
    """
    place = jnp.arange(len(response))
    length = mask.sum() - 1  # length of the expression
    body = place < length
    number = (response >= ZERO) & (response < ZERO + 10)
    operator = (response >= PLUS) & (response < PLUS + 3)
    alternates = jnp.where(place % 2 == 0, number, operator)
    # In an empty response, length is −1 and the last entry is padding, not EOS.
    ended = response[length] == EOS
    well_formed = ended & (length % 2 == 1) & (alternates | ~body).all()

    # Other tokens, such as EOS and padding, are read as + 0.
    digits = jnp.where(number, response - ZERO, 0)
    operators = jnp.where(operator, response - PLUS, 0)

    def step(
        value: Int[Array, ""], pair: tuple[Int[Array, ""], Int[Array, ""]]
    ) -> tuple[Int[Array, ""], None]:
        operator, digit = pair
        return jnp.clip(_results(value, digit)[operator], -_LIMIT, _LIMIT), None

    value, _ = jax.lax.scan(step, digits[0], (operators[1:-1:2], digits[2::2]))
    return well_formed, value, _count(digits, number)


def _results(value: Int[Array, ""], number: Int[Array, ""]) -> Int[Array, "3"]:
    """Returns the result of each operator, in the order of their ids."""
    return jnp.stack([value + number, value - number, value * number])


def _count(digits: Int[Array, "W"], mask: Bool[Array, "W"]) -> Int[Array, "10"]:
    """Returns how often each digit occurs where `mask` is True."""
    return (jax.nn.one_hot(digits, 10, dtype=jnp.int32) * mask[:, None]).sum(0)
