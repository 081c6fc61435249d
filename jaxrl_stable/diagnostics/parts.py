"""Metric accumulators that combine over micro-batches, mini-batches and devices.

An accumulator (`Part`) holds sums rather than results, so the value does not depend on how rows are
split. `collapse` combines the entries along a leading axis; `value` divides once, at the end.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxrl_stable.array_types import Array, Bool, Float, Shaped


# JAX also unflattens this class with non-array leaves, such as shapes and shardings. This holds for
# all classes below.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """total / count, or 0 if nothing was counted; combines by addition."""

    total: Float[Array, "*n"]
    count: Float[Array, "*n"]

    def collapse(self) -> Mean:
        return Mean(self.total.sum(0), self.count.sum(0))

    def value(self) -> Float[Array, "*n"]:
        # A count may be a sum of weights below 1, so the divisor is not max(count, 1).
        return self.total / jnp.where(self.count > 0, self.count, 1.0)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Max:
    """Largest value, or −∞ if empty; combines by maximum."""

    maximum: Float[Array, "*n"]

    def collapse(self) -> Max:
        return Max(self.maximum.max(0))

    def value(self) -> Float[Array, "*n"]:
        return self.maximum


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Min:
    """Smallest value, or ∞ if empty; combines by minimum."""

    minimum: Float[Array, "*n"]

    def collapse(self) -> Min:
        return Min(self.minimum.min(0))

    def value(self) -> Float[Array, "*n"]:
        return self.minimum


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum:
    """Total; combines by addition."""

    total: Float[Array, "*n"]

    def collapse(self) -> Sum:
        return Sum(self.total.sum(0))

    def value(self) -> Float[Array, "*n"]:
        return self.total


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spread:
    """Population standard deviation √(Σ (x − x̄)² / n), with divisor n, not n − 1; 0 if empty.

    Each part sums squares around its own mean; combining shifts them to the common mean (Chan,
    Golub and LeVeque 1979). For x near 1, float32 rounding would dominate E[x²] − E[x]².
    """

    count: Float[Array, "*n"]
    mean: Float[Array, "*n"]
    squares: Float[Array, "*n"]

    def collapse(self) -> Spread:
        count, mean = self.count.sum(0), _common_mean(self.count, self.mean)
        squares = self.squares + self.count * jnp.square(self.mean - mean)
        return type(self)(count, mean, squares.sum(0))

    def variance(self) -> Float[Array, "*n"]:
        return self.squares / jnp.maximum(self.count, 1.0)

    def value(self) -> Float[Array, "*n"]:
        return jnp.sqrt(self.variance())


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EffectiveShare(Spread):
    """Effective sample size as a share: (mean w)² / mean w² = x̄² / (x̄² + variance), Kish 1965.

    It is 1 if all weights are equal, 1/n if only one is non-zero, and 0 if empty.
    """

    def value(self) -> Float[Array, "*n"]:
        square = jnp.square(self.mean)
        return square / jnp.maximum(square + self.variance(), 1e-30)


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Correlation:
    """Pearson correlation, Σ (x − x̄)(y − ȳ) / √(Σ (x − x̄)² Σ (y − ȳ)²).

    It combines like `Spread`. It is NaN if x or y does not vary, because the correlation is then
    undefined, not 0.
    """

    count: Float[Array, "*n"]
    mean_x: Float[Array, "*n"]
    mean_y: Float[Array, "*n"]
    squares_x: Float[Array, "*n"]
    squares_y: Float[Array, "*n"]
    products: Float[Array, "*n"]

    def collapse(self) -> Correlation:
        x, y = _common_mean(self.count, self.mean_x), _common_mean(self.count, self.mean_y)
        dx, dy = self.mean_x - x, self.mean_y - y
        return Correlation(
            self.count.sum(0),
            x,
            y,
            (self.squares_x + self.count * dx * dx).sum(0),
            (self.squares_y + self.count * dy * dy).sum(0),
            (self.products + self.count * dx * dy).sum(0),
        )

    def value(self) -> Float[Array, "*n"]:
        return quotient(self.products, jnp.sqrt(self.squares_x) * jnp.sqrt(self.squares_y))


Part = Mean | Max | Min | Sum | Spread | Correlation
Metrics = dict[str, Part]


def is_metric(x: object) -> bool:
    return isinstance(x, Part)


def masked_mean(x: Shaped[Array, "*n"], mask: Bool[Array, "*n"]) -> Mean:
    """Returns Σ m x / Σ m, where m is the mask."""
    x = jnp.where(mask, x.astype(jnp.float32), 0.0)
    return Mean(x.sum(), mask.sum(dtype=jnp.float32))


def weighted_mean(x: Float[Array, "*n"], weight: Float[Array, "*n"]) -> Mean:
    """Returns Σ w x / Σ w, for non-negative weights w."""
    return Mean((weight * x).sum(), weight.sum())


def masked_max(x: Shaped[Array, "*n"], mask: Bool[Array, "*n"]) -> Max:
    return Max(jnp.where(mask, x.astype(jnp.float32), -jnp.inf).max())


def masked_min(x: Shaped[Array, "*n"], mask: Bool[Array, "*n"]) -> Min:
    return Min(jnp.where(mask, x.astype(jnp.float32), jnp.inf).min())


def masked_spread(
    x: Float[Array, "*n"], mask: Bool[Array, "*n"], kind: type[Spread] = Spread
) -> Spread:
    """Returns the spread of x as `kind`: `Spread` or `EffectiveShare`."""
    mean, deviation = _centred(x, mask)
    return kind(mask.sum(dtype=jnp.float32), mean, jnp.square(deviation).sum())


def masked_correlation(
    x: Float[Array, "*n"], y: Float[Array, "*n"], mask: Bool[Array, "*n"]
) -> Correlation:
    (mean_x, dx), (mean_y, dy) = _centred(x, mask), _centred(y, mask)
    sums = ((dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum())
    return Correlation(mask.sum(dtype=jnp.float32), mean_x, mean_y, *sums)


def quotient(a: Float[Array, "*n"], b: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns a / b where b > 0, else NaN."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), jnp.nan)


def collapse(metrics: Metrics) -> Metrics:
    """Combines metrics that are stacked along a leading axis, such as the output of a scan."""
    return jax.tree.map(lambda m: m.collapse(), metrics, is_leaf=is_metric)


def merge(parts: list[Metrics]) -> Metrics:
    """Combines the metrics of several mini-batches."""
    return collapse(jax.tree.map(lambda *x: jnp.stack(x), *parts))


def finalize(metrics: Metrics) -> dict[str, Float[Array, ""]]:
    """Returns the values of all metrics, and adds these derived ones:

    - `experts/…_violation`, `experts/idle_share`: see `load_metrics`
    - `mismatch/kl_entropy_ratio`: `mismatch/kl_k3_token_mean` / `entropy`, the mismatch in units of
      the policy's own uncertainty [prime-rl: `kl_ent_ratio/mean`]
    """
    values = {name: metric.value() for name, metric in metrics.items()}
    if "experts/load" in values:
        load = values.pop("experts/load")
        share = load / jnp.maximum(load.sum(-1, keepdims=True), 1.0)
        violation = share * load.shape[-1] - 1.0
        values["experts/max_violation"] = violation.max()
        values["experts/min_violation"] = violation.min()
        values["experts/avg_violation"] = jnp.abs(violation).mean()
        values["experts/idle_share"] = (load == 0).mean()
    if "entropy" in values and "mismatch/kl_k3_token_mean" in values:
        ratio = quotient(values["mismatch/kl_k3_token_mean"], values["entropy"])
        values["mismatch/kl_entropy_ratio"] = ratio
    return values


def as_floats(values: Mapping[str, Array]) -> dict[str, float]:
    """Converts values to Python floats, with one transfer to the host."""
    return {name: float(value) for name, value in jax.device_get(dict(values)).items()}


def _common_mean(count: Float[Array, "n *m"], mean: Float[Array, "n *m"]) -> Float[Array, "*m"]:
    return (count * mean).sum(0) / jnp.maximum(count.sum(0), 1.0)


def _centred(
    x: Float[Array, "*n"], mask: Bool[Array, "*n"]
) -> tuple[Float[Array, ""], Float[Array, "*n"]]:
    """Returns the mean over the mask, and the deviations from it, which are 0 outside the mask."""
    mean = masked_mean(x, mask).value()
    return mean, jnp.where(mask, x.astype(jnp.float32) - mean, 0.0)
