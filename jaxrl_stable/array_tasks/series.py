"""Tasks with one correct response to a series of symbols, and the grading of responses."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable.array_tasks.task import EOS, PAD, ArrayTask, left_padded

MIN_PROBLEMS = 32  # with fewer, all problems might fall into one split


class Series(NamedTuple):
    """One problem of a `SeriesTask`.

    Attributes:
      values: symbols, counted from 0; zeros from `size` on.
      size: number of symbols.
    """

    values: Int[Array, "largest"]
    size: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeriesTask(ArrayTask):
    """A task whose problems are series of independent, uniformly distributed symbols.

    All allowed sizes are equally likely. A response is graded against the one correct response:

    - `binary`: 1 if the whole response is correct, 0 otherwise;
    - `per_position`: number of correct positions, EOS included, divided by the length of the given
      or the correct response, whichever is longer.

    A response without EOS is wrong under `binary` and has at least one wrong position under
    `per_position`.
    """

    REWARD_KINDS: ClassVar[tuple[str, ...]] = ("binary", "per_position")
    SEPARATORS: ClassVar[tuple[str, ...]] = ("=",)

    def __post_init__(self):
        super().__post_init__()
        smallest, largest = self.sizes
        count = sum(len(self.symbol_texts) ** size for size in range(smallest, largest + 1))
        if count < MIN_PROBLEMS:
            raise ValueError(
                f"{self!r} has {count} distinct problems, too few to hold some out; increase "
                f"its sizes, symbols or modulus to get at least {MIN_PROBLEMS}"
            )

    @property
    def sizes(self) -> tuple[int, int]:
        """Fewest and most symbols per problem; by default the fields `smallest` and `largest`."""
        return self.smallest, self.largest

    @property
    @abc.abstractmethod
    def symbol_texts(self) -> tuple[str, ...]:
        """Text of each symbol."""

    @property
    def first_symbol(self) -> int:
        """Id of symbol 0; the others follow."""
        return 2 + len(self.SEPARATORS)

    @property
    def texts(self) -> tuple[str, ...]:
        return ("<pad>", "<eos>", *self.SEPARATORS, *self.symbol_texts)

    @property
    def choices(self) -> int:
        return len(self.symbol_texts)

    @property
    def prompt_width(self) -> int:
        return self.sizes[1] + 1

    def draw(self, key: Key[Array, ""]) -> Series:
        smallest, largest = self.sizes
        of_size, of_values = jax.random.split(key)
        size = jax.random.randint(of_size, (), smallest, largest + 1, dtype=jnp.int32)
        values = jax.random.randint(of_values, (largest,), 0, self.choices, dtype=jnp.int32)
        return Series(jnp.where(jnp.arange(largest) < size, values, 0), size)

    def prompt(self, answer: Series) -> Int[Array, "P"]:
        symbols = left_padded(answer.values + self.first_symbol, answer.size)
        return jnp.append(symbols, self.texts.index("="))

    def judge(
        self, answer: Series, response: Int[Array, "R"], mask: Bool[Array, "R"]
    ) -> Float[Array, ""]:
        target = self.solve(answer, jnp.zeros(self.max_tokens, jnp.int32))
        expected = target != PAD
        if self.reward_kind == "answer":
            return (_result(response, mask) == _result(target, expected)).astype(jnp.float32)
        if self.reward_kind == "per_position":
            right = (response == target) & expected
            return right.sum() / jnp.maximum(mask.sum(), expected.sum()).astype(jnp.float32)
        return ((response == target).all() & (mask == expected).all()).astype(jnp.float32)


def _result(response: Int[Array, "R"], mask: Bool[Array, "R"]) -> Int[Array, ""]:
    """Returns the symbol before EOS, or −1 if there is none or the response lacks EOS."""
    length = mask.sum()
    ended = (length >= 2) & (response[length - 1] == EOS)
    return jnp.where(ended, response[length - 2], -1)
