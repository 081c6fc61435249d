"""The base class of array tasks: pure functions that draw, solve and grade problems.

A task defines how one problem is drawn, shown, solved and judged; `ArrayTask` maps this over a
batch. The teacher that solves problems can make random mistakes, called slips. Dimensions: `n`
problems, `P` prompt width, `R` response width, which is `max_tokens`.
"""

from __future__ import annotations

import abc
import dataclasses
import typing
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable import _moved
from jaxrl_stable.checks import field_types, one_of

PAD, EOS = 0, 1
HELDOUT_SHARE = 4  # one problem in four is held out
# Draws per problem. All miss a split of 1 problem in 32 with probability (31/32)^1000 = 2e-14.
MAX_DRAWS = 1000

AnyArray = Array | np.ndarray | np.generic  # on the device or the host
Size = int | Int[AnyArray, ""]


# JAX also unflattens this class with non-array leaves, such as shapes and shardings.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problems:
    """A batch of problems. To sample groups, repeat every leaf along its first axis.

    Attributes:
      prompts: token ids, left-padded with `pad_id`.
      mask: True on tokens, False on padding.
      answer: pytree of arrays with a leading axis n, which the reward reads.
    """

    prompts: Int[AnyArray, "*mapped n P"]
    mask: Bool[AnyArray, "*mapped n P"]
    answer: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArrayTask(abc.ABC):
    """A task on the device. It is hashable, so it can be a static argument.

    Id 0 is padding and id 1 ends a response; separators and symbols follow. The model's vocabulary
    may be larger.

    Attributes:
      reward_kind: kind of grading, one of the task's `REWARD_KINDS`.
    """

    REWARD_KINDS: ClassVar[tuple[str, ...]] = ("binary",)

    reward_kind: str = "binary"

    def __post_init__(self):
        field_types(self)
        one_of(self, "reward_kind", self.REWARD_KINDS)

    @property
    @abc.abstractmethod
    def texts(self) -> tuple[str, ...]:
        """Text of each id."""

    @property
    @abc.abstractmethod
    def prompt_width(self) -> int:
        """P, the length of the longest prompt."""

    @property
    @abc.abstractmethod
    def max_tokens(self) -> int:
        """R, the length of the longest correct response, EOS included."""

    @property
    @abc.abstractmethod
    def choices(self) -> int | tuple[int, ...]:
        """Number of symbols that a slip can choose from; a tuple [R] if it depends on position."""

    @abc.abstractmethod
    def draw(self, key: Key[Array, ""]) -> Any:
        """Draws one problem: a pytree like `Problems.answer`, without the leading axis."""

    @abc.abstractmethod
    def prompt(self, answer: Any) -> Int[Array, "P"]:
        """Returns the left-padded prompt of one problem."""

    @abc.abstractmethod
    def solve(self, answer: Any, slips: Int[AnyArray, "R"]) -> Int[Array, "R"]:
        """Returns the right-padded solution of one problem, EOS included.

        Args:
          answer: the problem.
          slips: offset added to the symbol at each step, modulo the number of symbols; 0 where the
            teacher makes no mistake.
        """

    @abc.abstractmethod
    def judge(
        self, answer: Any, response: Int[Array, "R"], mask: Bool[Array, "R"]
    ) -> Float[Array, ""]:
        """Returns a reward in [0, 1]; `response` is `pad_id` where `mask` is False."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.texts)

    @property
    def pad_id(self) -> int:
        """Id of the padding before a prompt and after a response."""
        return PAD

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return (EOS,)

    def problems(
        self, key: Key[Array, ""], count: int, heldout: bool | Bool[Array, ""] = False
    ) -> Problems:
        """Draws problems. Problem i depends only on the key and i.

        Args:
          key: typed PRNG key.
          count: n, static.
          heldout: whether to draw from the held-out split, which shares no prompt with the training
            split (`is_heldout`).
        """
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
        answer = jax.vmap(lambda key: self._draw_from(key, heldout))(keys)
        prompts = jax.vmap(self.prompt)(answer)
        return Problems(prompts, prompts != PAD, answer)

    def _draw_from(self, key: Key[Array, ""], heldout: bool | Bool[Array, ""]) -> Any:
        """Returns the first problem in a sequence of draws that belongs to the split."""

        def attempt(
            state: tuple[Int[Array, ""], Any, Bool[Array, ""]],
        ) -> tuple[Int[Array, ""], Any, Bool[Array, ""]]:
            trial, _, _ = state
            answer = self.draw(jax.random.fold_in(key, trial))
            return trial + 1, answer, is_heldout(self.prompt(answer)) == heldout

        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(self.draw, key))
        start = jnp.int32(0), nothing, jnp.bool_(False)
        return jax.lax.while_loop(lambda s: ~s[2] & (s[0] < MAX_DRAWS), attempt, start)[1]

    def solutions(
        self, key: Key[Array, ""], problems: Problems, slips: int | float | Float[Array, ""] = 0.0
    ) -> tuple[Int[Array, "n R"], Bool[Array, "n R"]]:
        """Returns the teacher's responses.

        Args:
          key: typed PRNG key.
          problems: problems of this task.
          slips: probability of a slip at each step. The symbol is then wrong, and all wrong symbols
            are equally likely. If a task has intermediate steps, later steps continue from the
            mistake. EOS is always in the correct place.

        Returns:
          tokens: responses, right-padded with `pad_id`.
          mask: True on tokens.
        """
        shape = (problems.prompts.shape[0], self.max_tokens)
        of_place, of_size = jax.random.split(key)
        places = jax.random.uniform(of_place, shape) < slips
        sizes = jax.random.randint(of_size, shape, 1, jnp.asarray(self.choices), dtype=jnp.int32)
        tokens = jax.vmap(self.solve)(problems.answer, jnp.where(places, sizes, 0))
        return tokens, tokens != PAD

    def reward(
        self, problems: Problems, responses: Int[AnyArray, "n R"], mask: Bool[AnyArray, "n R"]
    ) -> Float[Array, "n"]:
        """Returns the reward of each response, in [0, 1]. A response may contain any tokens.

        Args:
          problems: problems of this task.
          responses: sampled tokens; arbitrary where `mask` is False.
          mask: True on sampled tokens, EOS included.

        Raises:
          ValueError: if `responses` or `mask` does not have shape [n, max_tokens].
        """
        expected = (problems.prompts.shape[0], self.max_tokens)
        if responses.shape != expected or mask.shape != expected:
            raise ValueError(
                f"{type(self).__name__}.reward: responses have shape {responses.shape} and mask "
                f"{mask.shape}; both need shape {expected}, problems by max_tokens"
            )
        return jax.vmap(self.judge)(problems.answer, jnp.where(mask, responses, PAD), mask)

    def decode(self, tokens: Sequence[int] | Int[AnyArray, "R"]) -> list[str]:
        """Returns the text of each token, on the host; ids outside the task become "<id>"."""
        texts = self.texts
        return [texts[t] if 0 <= t < len(texts) else f"<{t}>" for t in map(int, tokens)]


def is_heldout(prompt: Int[Array, "P"]) -> Bool[Array, ""]:
    """Returns whether a problem belongs to the held-out split, by a hash of its prompt.

    The hash depends neither on seeds nor on padding. A problem is therefore in the same split at
    every difficulty of a task, and a policy trained at one difficulty can be evaluated at another.
    """
    # Padding adds nothing: it is 0, and positions count from the right. Products wrap modulo 2^32,
    # where powers of an odd number never become 0.
    factors = np.array([pow(0x9E3779B1, i + 1, 2**32) for i in range(len(prompt))], np.uint32)
    mixed = (prompt.astype(jnp.uint32)[::-1] * factors).sum(dtype=jnp.uint32)
    # MurmurHash3's finalizer: makes the low bits depend on all bits.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)) % HELDOUT_SHARE == 0


def left_padded(tokens: Int[AnyArray, "W"], length: Size) -> Int[Array, "W"]:
    """Returns padding, then the first `length` tokens."""
    width = tokens.shape[0]
    return jnp.roll(jnp.where(jnp.arange(width) < length, tokens, PAD), width - length)


def with_eos(tokens: Int[AnyArray, "W"], length: Size) -> Int[Array, "W+1"]:
    """Returns the first `length` tokens, EOS, then padding."""
    place = jnp.arange(tokens.shape[0] + 1)
    return jnp.where(place < length, jnp.pad(tokens, (0, 1)), jnp.where(place == length, EOS, PAD))


def check_sizes(task: ArrayTask, least: int) -> None:
    """Checks that least ≤ task.smallest ≤ task.largest; raises ValueError if not."""
    field_types(task)
    if not least <= task.smallest <= task.largest:
        raise ValueError(
            f"{type(task).__name__}.smallest is {task.smallest} and largest {task.largest}; use "
            f"{least} <= smallest <= largest"
        )


__getattr__ = _moved.moved_names("jaxrl_stable.array_tasks.task")  # names that have moved
