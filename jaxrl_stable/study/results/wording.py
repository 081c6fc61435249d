"""One comparison in words, without markup, so that report.html and claims.md say the same."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from jaxrl_stable.statistics import Estimate
from jaxrl_stable.study.results.verdicts import Evidence, Row

MEANINGS = {
    "final": "final score",
    "peak": "peak score",
    "area": "mean score over the run",
    "kl": "KL",
    "entropy": "final entropy, nats",
    "survival": "share of the run before collapse",
}


class Words(NamedTuple):
    """The text about one comparison.

    Attributes:
      value: the difference with its 95 % interval; for one cell, the states of its runs; "–" if the
        sides share fewer than two seeds.
      measure: what differs; "" if `value` is not a difference.
      collapsed: collapsed runs on each side; "" if `value` is not a difference.
      tests: seeds, p values and effect size; "" if `value` is not a difference.
    """

    value: str
    measure: str = ""
    collapsed: str = ""
    tests: str = ""


def words(row: Row, entry: Evidence) -> Words:
    """Returns the figures of one comparison of a claim as text."""
    states = [Counter(group) for group in entry.states]
    sizes = [len(group) for group in entry.states]
    if len(states) == 1:
        (state,), (size,) = states, sizes
        low, high = 100 * entry.stable.low, 100 * entry.stable.high
        return Words(
            f"{state['stable']} of {size} runs stable (95 %: {low:.0f} to {high:.0f} %), "
            f"{state['collapsed']} collapsed, {state['not learned']} not learned"
        )
    if entry.paired is None:
        return Words("–")
    p, outcome = entry.paired, row.claim.outcome
    counts = (f"{state['collapsed']} of {size}" for state, size in zip(states, sizes))
    effect = f"; d_z {signed(p.effect, 1)}" if math.isfinite(p.effect) else ""
    return Words(
        value=difference(p.difference, outcome),
        measure=MEANINGS[outcome],
        collapsed=f"collapsed {' against '.join(counts)}",
        tests=f"{p.pairs} seeds; p {chance(p.p)}, Holm {chance(entry.p_holm)}, permutation "
        f"{chance(p.p_sign_flip)} (least possible {chance(p.attainable)}){effect}; first higher in "
        f"{100 * p.superiority:.0f} % of pairs",
    )


def chance(p: float) -> str:
    """Formats a p value with two digits."""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def signed(value: float, digits: int) -> str:
    """Formats a number with its sign, and with a minus instead of a hyphen."""
    return f"{value:+.{digits}f}".replace("-", "−")


def difference(d: Estimate, outcome: str) -> str:
    """Formats a difference: "−0.152 (−0.174 to −0.130)"; for a KL the factor, "×0.31 (…)"."""
    if outcome == "kl":
        return f"×{10**d.value:.3g} ({10**d.low:.3g} to {10**d.high:.3g})"
    value, low, high = (signed(end, 3) for end in (d.value, d.low, d.high))
    return f"{value} ({low} to {high})"
