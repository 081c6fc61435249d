"""Gradient estimators measured without sampling: a tabular policy small enough to enumerate.

With V symbols and T steps there are V^T sequences, so every expectation over μ_old is a finite sum.
The bias and noise of the token-level objective of https://arxiv.org/abs/2512.01374 relative to the
sequence-level one are therefore exact to machine precision. The token-level gradients come from
`objectives.minirl` itself; the sequence-level estimator here is the reference.

Functions that return NumPy arrays or floats compute in float64, regardless of the process's default
precision. Functions that return JAX arrays are meant to be differentiated and use the caller's
precision. In the shapes, `prefixes` is the number of rows in a policy's table, 1 + V + … + V^(T−1),
one per prefix y_<t.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl_stable.array_types import Array, Float, Int
from jaxrl_stable.objectives import aggregate, minirl
from jaxrl_stable.statistics import Estimate, mean_over_seeds

Gradients = Float[np.ndarray, "B prefixes V"]


class Problem(NamedTuple):
    """One prompt with a reward for each of its B = V^T responses, and the three policies.

    Attributes:
      tokens: all sequences, in lexicographic order.
      prefixes: table row with the distribution of `tokens[b, t]`.
      rewards: R(y).
      logits, logits_old, logits_rollout: tables of π_θ, π_old and μ_old.
    """

    tokens: Int[np.ndarray, "B T"]
    prefixes: Int[np.ndarray, "B T"]
    rewards: Float[np.ndarray, "B"]
    logits: Float[np.ndarray, "prefixes V"]
    logits_old: Float[np.ndarray, "prefixes V"]
    logits_rollout: Float[np.ndarray, "prefixes V"]


def enumerate_sequences(
    vocab_size: int, length: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Returns all V^T sequences, and for each position the table row of its prefix.

    Rows are numbered by depth, then lexicographically: the empty prefix is row 0.
    """
    tokens = np.indices((vocab_size,) * length).reshape(length, -1).T
    prefixes = np.zeros_like(tokens)
    for t in range(1, length):
        # Children are numbered in the order of their parents, as in a V-ary heap.
        prefixes[:, t] = vocab_size * prefixes[:, t - 1] + tokens[:, t - 1] + 1
    return tokens, prefixes


def random_problem(
    seed: int,
    mismatch: float = 0.0,
    staleness: float = 0.0,
    vocab_size: int = 6,
    length: int = 3,
) -> Problem:
    """Samples normal logits, Bernoulli(1/2) rewards, and policies that differ by normal noise.

        θ_old = θ + staleness · N(0, 1)        μ_old = softmax(θ_old + mismatch · N(0, 1))

    One seed fixes θ, the rewards and the directions of both noise terms. As `mismatch` or
    `staleness` goes to 0, the policies therefore move along a line and the true gradient stays the
    same. (With only a few sequences, all rewards can be equal; the true gradient is then 0, and
    relative errors are undefined.)
    """
    tokens, prefixes = enumerate_sequences(vocab_size, length)
    rng = np.random.default_rng(seed)
    shape = (prefixes.max() + 1, vocab_size)
    logits = rng.normal(size=shape)
    rewards = rng.integers(0, 2, len(tokens)).astype(np.float64)
    mismatch_noise, staleness_noise = rng.normal(size=(2, *shape))
    logits_old = logits + staleness * staleness_noise
    logits_rollout = logits_old + mismatch * mismatch_noise
    return Problem(tokens, prefixes, rewards, logits, logits_old, logits_rollout)


@jax.jit
def log_probs(
    logits: Float[Array | np.ndarray, "prefixes V"], problem: Problem
) -> Float[Array, "*B T"]:
    """Returns log π(y_t | y_<t) of every sequence under one of the tables."""
    rows = jax.nn.log_softmax(jnp.asarray(logits)[problem.prefixes])
    return jnp.take_along_axis(rows, problem.tokens[..., None], -1)[..., 0]


def sequence_objective(
    logits: Float[Array | np.ndarray, "prefixes V"], problem: Problem
) -> Float[Array, ""]:
    """J_seq(θ) = E_{y∼π_θ}[R(y)] (arXiv:2512.01374, eq. 1)."""
    return jnp.exp(log_probs(logits, problem).sum(-1)) @ problem.rewards


def token_objective(
    logits: Float[Array | np.ndarray, "prefixes V"], problem: Problem
) -> Float[Array, ""]:
    """J_token(θ) = E_{y∼μ_old}[Σ_t π_θ(y_t|·)/μ_old(y_t|·) R(y)] (arXiv:2512.01374, eq. 3)."""
    logp_rollout = log_probs(problem.logits_rollout, problem)
    weights = jnp.exp(log_probs(logits, problem) - logp_rollout)
    return jnp.exp(logp_rollout.sum(-1)) @ (weights.sum(-1) * problem.rewards)


_true_gradient = jax.jit(jax.grad(sequence_objective))


def true_gradient(problem: Problem) -> Float[np.ndarray, "prefixes V"]:
    """Returns ∇_θ J_seq by differentiating the finite sum: no log-derivative trick, no weights."""
    with jax.enable_x64(True):
        return np.asarray(_true_gradient(problem.logits, problem))


def probabilities(
    logits: Float[np.ndarray, "prefixes V"], problem: Problem
) -> Float[np.ndarray, "B"]:
    """Returns π(y) = Π_t π(y_t | y_<t) under one of the tables."""
    with jax.enable_x64(True):
        return np.exp(np.asarray(log_probs(logits, problem)).sum(-1))


def rollout_probabilities(problem: Problem) -> Float[np.ndarray, "B"]:
    """Returns μ_old(y), the probability with which the sampler draws each sequence."""
    return probabilities(problem.logits_rollout, problem)


def centered_rewards(problem: Problem) -> Float[np.ndarray, "B"]:
    """Â(y) = R(y) − E_{y'∼μ_old}[R(y')], the limit of a large group (arXiv:2512.01374, §4.1)."""
    return problem.rewards - rollout_probabilities(problem) @ problem.rewards


def token_gradients(
    problem: Problem, advantages: Float[np.ndarray, "B"], **options: Any
) -> Gradients:
    """Returns ĝ(y) = −∇_θ of the library's loss, with each sequence as its own mini-batch.

    Args:
      problem: sequences and policies.
      advantages: one per sequence.
      **options: options of `objectives.minirl`. With `clip=False, truncation=None` the expectation
        of ĝ over μ_old is ∇J_token (arXiv:2512.01374, eq. 4).
    """
    with jax.enable_x64(True):
        return -np.asarray(_loss_gradients(problem, advantages, tuple(sorted(options.items()))))


@partial(jax.jit, static_argnames="options")
def _loss_gradients(
    problem: Problem, advantages: Float[Array, "B"], options: tuple[tuple[str, Any], ...]
) -> Float[Array, "B prefixes V"]:
    def loss(
        logits: Float[Array, "prefixes V"],
        tokens: Int[Array, "T"],
        prefixes: Int[Array, "T"],
        advantage: Float[Array, ""],
    ) -> Float[Array, ""]:
        one = problem._replace(tokens=tokens[None], prefixes=prefixes[None])
        tables = logits, problem.logits_old, problem.logits_rollout
        mask = jnp.ones(one.tokens.shape, bool)
        logps = (log_probs(table, one) for table in tables)
        total, count = aggregate(minirl(*logps, advantage[None], mask, **dict(options)).loss, mask)
        return total / count

    gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0, 0))
    return gradients(problem.logits, problem.tokens, problem.prefixes, advantages)


def sequence_gradients(problem: Problem, advantages: Float[np.ndarray, "B"]) -> Gradients:
    """Returns ĝ(y) = π_θ(y)/μ_old(y) · Â(y) · Σ_t ∇_θ log π_θ(y_t|·) (arXiv:2512.01374, eq. 2).

    Every token gets the product over the whole sequence as its weight, because later tokens also
    affect the probability of the reward that the token is credited with.
    """
    weights = probabilities(problem.logits, problem) / rollout_probabilities(problem)
    with jax.enable_x64(True):
        return (weights * advantages)[:, None, None] * np.asarray(_scores(problem))


@jax.jit
def _scores(problem: Problem) -> Float[Array, "B prefixes V"]:
    def log_prob(
        logits: Float[Array, "rows V"], tokens: Int[Array, "T"], prefixes: Int[Array, "T"]
    ) -> Float[Array, ""]:
        return log_probs(logits, problem._replace(tokens=tokens, prefixes=prefixes)).sum()

    scores = jax.vmap(jax.grad(log_prob), in_axes=(None, 0, 0))
    return scores(problem.logits, problem.tokens, problem.prefixes)


def expectation(problem: Problem, gradients: Gradients) -> Float[np.ndarray, "prefixes V"]:
    """Returns E_{y∼μ_old}[ĝ(y)], exactly."""
    return np.tensordot(rollout_probabilities(problem), gradients, 1)


class Quality(NamedTuple):
    """An estimator ĝ compared with the true gradient ∇J.

    Attributes:
      bias: ‖E[ĝ] − ∇J‖ / ‖∇J‖.
      cosine: cosine of the angle between E[ĝ] and ∇J.
      noise: √E‖ĝ − E[ĝ]‖² / ‖∇J‖, the standard deviation of one sample; for B samples divide by √B.
    """

    bias: float
    cosine: float
    noise: float


def quality(problem: Problem, gradients: Gradients) -> Quality:
    """Returns the bias, direction and per-sample noise of an estimator."""
    truth, mean = true_gradient(problem), expectation(problem, gradients)
    size, norm = np.linalg.norm(truth), np.linalg.norm(mean)
    deviation = np.square(gradients - mean).sum((1, 2))
    return Quality(
        bias=float(np.linalg.norm(mean - truth) / size),
        cosine=float(np.vdot(mean, truth) / (norm * size)),
        noise=float(np.sqrt(rollout_probabilities(problem) @ deviation) / size),
    )


Estimator = Callable[[Problem, Float[np.ndarray, "B"]], Gradients]
ESTIMATORS: Mapping[str, Estimator] = {
    "no IS": partial(token_gradients, weight="none", truncation=None, clip=False),
    "mismatch IS": partial(token_gradients, weight="mismatch", truncation=None, clip=False),
    "token IS": partial(token_gradients, truncation=None, clip=False),
    "token IS, C=5": partial(token_gradients, truncation=5.0, clip=False),
    "token IS, C=2": partial(token_gradients, truncation=2.0, clip=False),
    "MiniRL": token_gradients,  # clipped, C = 5: the library's defaults, which are the paper's
    "sequence IS": sequence_gradients,
}


class Row(NamedTuple):
    """The `Quality` of one estimator for one pair of distances between policies, over seeds."""

    estimator: str
    mismatch: float
    staleness: float
    bias: Estimate
    cosine: Estimate
    noise: Estimate


def table(
    mismatch: Iterable[float] = (0.0, 0.05, 0.2, 0.5, 1.0),
    staleness: Iterable[float] = (0.0,),
    estimators: Mapping[str, Estimator] = ESTIMATORS,
    seeds: Iterable[int] = range(32),
    vocab_size: int = 6,
    length: int = 3,
) -> list[Row]:
    """Returns each estimator's quality, with centred rewards, for all pairs of distances.

    Args:
      mismatch, staleness: standard deviations of the noise terms in `random_problem`.
      estimators: functions from a problem and advantages to gradients per sequence, by name.
      seeds: one random problem each.
      vocab_size, length: V and T.

    Returns:
      One row per pair of distances and estimator.

    Raises:
      ValueError: if there are fewer than two seeds, which give no interval.
    """
    seeds, staleness = tuple(seeds), tuple(staleness)
    rows = []
    for distances in ((m, s) for m in mismatch for s in staleness):
        problems = [random_problem(seed, *distances, vocab_size, length) for seed in seeds]
        for name, estimator in estimators.items():
            found = [quality(p, estimator(p, centered_rewards(p))) for p in problems]
            rows.append(Row(name, *distances, *map(mean_over_seeds, zip(*found))))
    return rows
