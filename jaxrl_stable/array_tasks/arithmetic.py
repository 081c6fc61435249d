"""Sums modulo m, with or without intermediate steps: modular addition, sums of terms, parity."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxrl_stable.array_tasks.series import Series, SeriesTask
from jaxrl_stable.array_tasks.task import AnyArray, check_sizes, left_padded, with_eos
from jaxrl_stable.checks import field_types


class _Sum(SeriesTask):
    """Maps terms to the sums of the first two, three, … terms, or to the last sum only.

    The additional reward kind `answer` is 1 if the symbol before EOS is the result, regardless of
    earlier symbols, and 0 otherwise.
    """

    REWARD_KINDS: ClassVar[tuple[str, ...]] = ("binary", "per_position", "answer")

    modulus: int
    worked: bool

    def __post_init__(self):
        field_types(self)
        if self.modulus < 2:
            name = type(self).__name__
            raise ValueError(f"{name}.modulus is {self.modulus}; use at least 2")
        super().__post_init__()

    @property
    def symbol_texts(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.modulus)))

    @property
    def max_tokens(self) -> int:
        return self.sizes[1] if self.worked else 2

    def solve(self, answer: Series, slips: Int[AnyArray, "R"]) -> Int[Array, "R"]:
        if self.worked:
            # A slip in one sum acts like a wrong term: all later sums contain it, too.
            terms = answer.values.at[1:].add(slips[:-1])
            sums, length = jnp.cumsum(terms, dtype=jnp.int32)[1:], answer.size - 1
        else:
            sums, length = (answer.values.sum(dtype=jnp.int32) + slips[0])[None], 1
        return with_eos(sums % self.modulus + self.first_symbol, length)


class _Terms(_Sum):
    """Shows sums with a plus between the terms. Each residue is one symbol."""

    SEPARATORS: ClassVar[tuple[str, ...]] = ("=", "+")

    @property
    def prompt_width(self) -> int:
        return 2 * self.sizes[1]

    def prompt(self, answer: Series) -> Int[Array, "P"]:
        terms = answer.values + self.first_symbol
        plus = jnp.full_like(terms, self.texts.index("+"))
        shown = jnp.stack([terms, plus], axis=1).ravel()[:-1]
        return jnp.append(left_padded(shown, 2 * answer.size - 1), self.texts.index("="))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModularAddition(_Terms):
    """`17 + 9 =` → `3`, modulo 23. A slip of the teacher writes a wrong residue.

    There are only modulus² problems. Training and held-out problems are split by prompt, so a sum
    may be held out while the same sum with swapped terms is not.

    Attributes:
      modulus: m; the vocabulary has m + 4 ids.
    """

    worked: ClassVar[bool] = False

    modulus: int = 23

    @property
    def sizes(self) -> tuple[int, int]:
        return 2, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainSum(_Terms):
    """`7 + 8 + 4 =` → `5 9`, modulo 10.

    A slip of the teacher makes one sum wrong; the later sums build on it.

    Attributes:
      smallest, largest: fewest and most terms per problem.
      modulus: m; the vocabulary has m + 4 ids.
      worked: whether the correct response contains all sums or only the result.
    """

    smallest: int = 2
    largest: int = 4
    modulus: int = 10
    worked: bool = True

    def __post_init__(self):
        check_sizes(self, least=2)
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parity(_Sum):
    """`1 0 1 1 =` → `1 0 1`, the parities of the first 2, 3 and 4 bits.

    A slip of the teacher flips one parity and all later ones. Two slips cancel, so the result
    (`reward_kind="answer"`) can still be correct. Few problems have few bits: with only 2 or 3
    bits, the training split or the held-out split may be empty.

    Attributes:
      smallest, largest: fewest and most bits per problem.
      worked: whether the correct response contains all parities or only the last.
    """

    modulus: ClassVar[int] = 2

    smallest: int = 4
    largest: int = 8
    worked: bool = True

    def __post_init__(self):
        check_sizes(self, least=2)
        super().__post_init__()
