"""What an array task is: problems drawn, solved and graded by pure functions of arrays.

A task says how one problem is drawn, shown, solved and judged; `Task` maps that over a batch. Its
letters: `n` problems, `P` prompt width, `R` response width, which is `max_tokens`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_stable.checks import one_of

PAD, EOS = 0, 1
HELDOUT_SHARE = 4  # one problem in four is held out
MAX_DRAWS = 1000  # of one problem: enough where a split has 1 in 32, as (31/32)^1000 = 2e-14


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problems:
    """A batch of problems. To sample groups, repeat every leaf along its first axis.

    Attributes:
      prompts: left-padded with `pad_id`.
      mask: False on padding.
      answer: what the reward needs; arrays with a leading n.
    """

    prompts: Int[Array, "n P"]
    mask: Bool[Array, "n P"]
    answer: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task(abc.ABC):
    """A task on the device; hashable, so that it can be a static argument.

    Ids: 0 is padding, 1 ends a response, then separators, then symbols. The model's vocabulary may
    be larger.

    Attributes:
      reward_kind: how a response is graded, one of the task's `REWARD_KINDS`.
    """

    REWARD_KINDS: ClassVar[tuple[str, ...]] = ("binary",)

    reward_kind: str = "binary"

    def __post_init__(self):
        one_of(self, "reward_kind", self.REWARD_KINDS)

    @property
    @abc.abstractmethod
    def texts(self) -> tuple[str, ...]:
        """The text of each id."""

    @property
    @abc.abstractmethod
    def prompt_width(self) -> int:
        """P, the longest prompt."""

    @property
    @abc.abstractmethod
    def max_tokens(self) -> int:
        """R, the longest right response, EOS included."""

    @property
    @abc.abstractmethod
    def choices(self) -> int | tuple[int, ...]:
        """How many symbols a teacher can take for one another; if it varies, by position [R]."""

    @abc.abstractmethod
    def draw(self, key: Key[Array, ""]) -> Any:
        """One problem, as the pytree of arrays that is its `Problems.answer`."""

    @abc.abstractmethod
    def prompt(self, answer: Any) -> Int[Array, "P"]:
        """Shows one problem, left-padded."""

    @abc.abstractmethod
    def solve(self, answer: Any, slips: Int[Array, "R"]) -> Int[Array, "R"]:
        """Solves one problem; right-padded, EOS included.

        Args:
          answer: the problem.
          slips: what is added to the symbol of each step, modulo the symbols there are; 0 is right.
        """

    @abc.abstractmethod
    def judge(
        self, answer: Any, response: Int[Array, "R"], mask: Bool[Array, "R"]
    ) -> Float[Array, ""]:
        """Reward of one response, in [0, 1]; `response` is `pad_id` where `mask` is False."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return len(self.texts)

    @property
    def pad_id(self) -> int:
        """What stands before a prompt and behind a response."""
        return PAD

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return (EOS,)

    def problems(
        self, key: Key[Array, ""], count: int, heldout: bool | Bool[Array, ""] = False
    ) -> Problems:
        """Draws problems; problem i depends on the key and on i alone.

        Args:
          key: typed PRNG key.
          count: n, static.
          heldout: from which of the two splits, which have no prompt in common (`is_heldout`).
        """
        keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(count))
        answer = jax.vmap(lambda key: self._draw_from(key, heldout))(keys)
        prompts = jax.vmap(self.prompt)(answer)
        return Problems(prompts, prompts != PAD, answer)

    def _draw_from(self, key: Key[Array, ""], heldout: bool | Bool[Array, ""]) -> Any:
        """The first problem of a sequence of draws that belongs to the split."""

        def attempt(state):
            trial, _, _ = state
            answer = self.draw(jax.random.fold_in(key, trial))
            return trial + 1, answer, is_heldout(self.prompt(answer)) == heldout

        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(self.draw, key))
        start = jnp.int32(0), nothing, jnp.bool_(False)
        return jax.lax.while_loop(lambda s: ~s[2] & (s[0] < MAX_DRAWS), attempt, start)[1]

    def solutions(
        self, key: Key[Array, ""], problems: Problems, slips: float | Float[Array, ""] = 0.0
    ) -> tuple[Int[Array, "n R"], Bool[Array, "n R"]]:
        """The teacher's responses, right-padded, and which of their positions are tokens.

        Args:
          key: typed PRNG key.
          problems: of this task.
          slips: probability that a step goes wrong: another symbol, each as likely. Where a task
            has working, the rest of it follows from the mistake. EOS always comes in its place.
        """
        shape = (problems.prompts.shape[0], self.max_tokens)
        of_place, of_size = jax.random.split(key)
        places = jax.random.uniform(of_place, shape) < slips
        sizes = jax.random.randint(of_size, shape, 1, jnp.asarray(self.choices), dtype=jnp.int32)
        tokens = jax.vmap(self.solve)(problems.answer, jnp.where(places, sizes, 0))
        return tokens, tokens != PAD

    def reward(
        self, problems: Problems, responses: Int[Array, "n R"], mask: Bool[Array, "n R"]
    ) -> Float[Array, "n"]:
        """Reward of each response, in [0, 1], whatever its tokens are.

        Args:
          problems: of this task.
          responses: sampled tokens; any value where `mask` is False.
          mask: True on sampled tokens, EOS included.

        Raises:
          ValueError: responses of another width than `max_tokens`.
        """
        expected = (problems.prompts.shape[0], self.max_tokens)
        if responses.shape != expected or mask.shape != expected:
            raise ValueError(
                f"{type(self).__name__}.reward: responses are {responses.shape} and mask "
                f"{mask.shape}; both must be {expected}, problems by max_tokens"
            )
        return jax.vmap(self.judge)(problems.answer, jnp.where(mask, responses, PAD), mask)

    def decode(self, tokens: Sequence[int]) -> list[str]:
        """The text of each token, on the host; ids that the task does not use become "<id>"."""
        texts = self.texts
        return [texts[t] if 0 <= t < len(texts) else f"<{t}>" for t in map(int, tokens)]


def is_heldout(prompt: Int[Array, "P"]) -> Bool[Array, ""]:
    """Whether a problem belongs to the held-out split: a hash of its prompt, so for good.

    The hash sees neither seeds nor padding. One and the same problem is therefore in the same split
    at all difficulties of a task, and a policy trained at one can be evaluated at another.
    """
    # Padding adds nothing: it is 0, and places are counted from the right. Products wrap modulo
    # 2^32, where an odd number has powers that never reach 0.
    factors = np.array([pow(0x9E3779B1, i + 1, 2**32) for i in range(len(prompt))], np.uint32)
    mixed = (prompt.astype(jnp.uint32)[::-1] * factors).sum(dtype=jnp.uint32)
    # MurmurHash3's finalizer: the low bits come to depend on all bits.
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return (mixed ^ (mixed >> 16)) % HELDOUT_SHARE == 0


def left_padded(tokens: Int[Array, "W"], length: Int[Array, ""]) -> Int[Array, "W"]:
    """The first `length` tokens, behind padding."""
    width = tokens.shape[0]
    return jnp.roll(jnp.where(jnp.arange(width) < length, tokens, PAD), width - length)


def with_eos(tokens: Int[Array, "W"], length: Int[Array, ""]) -> Int[Array, "W+1"]:
    """The first `length` tokens, EOS, and padding."""
    place = jnp.arange(tokens.shape[0] + 1)
    return jnp.where(place < length, jnp.pad(tokens, (0, 1)), jnp.where(place == length, EOS, PAD))


def check_sizes(task: Task, least: int) -> None:
    """Raises ValueError unless least ≤ task.smallest ≤ task.largest."""
    if not least <= task.smallest <= task.largest:
        raise ValueError(
            f"{type(task).__name__}.smallest is {task.smallest} and largest {task.largest}; use "
            f"{least} <= smallest <= largest"
        )
