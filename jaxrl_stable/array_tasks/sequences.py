"""Tasks that reverse or sort a few letters."""

from __future__ import annotations

import dataclasses
import string

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_stable.array_tasks.series import Series, SeriesTask
from jaxrl_stable.array_tasks.task import AnyArray, check_sizes, with_eos


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Letters(SeriesTask):
    """Maps letters to the same letters in another order.

    Attributes:
      smallest, largest: fewest and most letters per problem.
      symbols: size of the alphabet, which starts at "a"; at most 26.
    """

    smallest: int = 3
    largest: int = 6
    symbols: int = 8

    def __post_init__(self):
        check_sizes(self, least=1)
        if not 2 <= self.symbols <= 26:
            name = type(self).__name__
            raise ValueError(f"{name}.symbols is {self.symbols}; use 2 to 26 letters")
        super().__post_init__()

    @property
    def symbol_texts(self) -> tuple[str, ...]:
        return tuple(string.ascii_lowercase[: self.symbols])

    @property
    def max_tokens(self) -> int:
        return self.largest + 1

    def _write(
        self, values: Int[Array, "largest"], size: Int[Array, ""], slips: Int[AnyArray, "R"]
    ) -> Int[Array, "R"]:
        written = (values + slips[: self.largest]) % self.symbols
        return with_eos(written + self.first_symbol, size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reverse(_Letters):
    """`d a c =` → `c a d`. A slip of the teacher writes a wrong letter."""

    def solve(self, answer: Series, slips: Int[AnyArray, "R"]) -> Int[Array, "R"]:
        # After the flip, unused places come first; `roll` moves them to the end.
        values = jnp.roll(answer.values[::-1], answer.size - self.largest)
        return self._write(values, answer.size, slips)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sort(_Letters):
    """`d a c =` → `a c d`, in alphabetical order. A slip of the teacher writes a wrong letter."""

    def solve(self, answer: Series, slips: Int[AnyArray, "R"]) -> Int[Array, "R"]:
        unused = jnp.arange(self.largest) >= answer.size
        values = jnp.sort(jnp.where(unused, self.symbols, answer.values))
        return self._write(values, answer.size, slips)
