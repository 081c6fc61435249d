"""The paper's claims, and what others dispute, as data: which cells to compare, by what outcome.

Cells are chosen by their settings, never by name. A selector overrides `PAPER`, the settings of
MiniRL, so it names only what the claim is about. Settings in neither (sampler format, task, cold
start, learning rate, ...) must be equal in the cells compared. Each combination of them is a
setting of its own, in which the claim is evaluated once (`verdicts`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

Selector = Mapping[str, Any]

NORM = {"aggregation": "seq-mean-token-mean"}
NO_IS = {"weight": "none"}
R2, R3 = {"replay": "R2"}, {"replay": "R3"}
# In score units: smaller differences are called comparable. It is a third of the score axis of the
# paper's Fig. 1, which runs from 0.60 to 0.75.
MARGIN = 0.05


@dataclasses.dataclass(frozen=True)
class Claim:
    """A sentence, and the comparisons that must support it, each on its own or all together.

    Attributes:
      id: short name.
      sentence: the claim as it is tested.
      source: who makes it, and where.
      comparisons: (first, second) selectors; (first,) alone for "stable".
      outcome: what is compared: "final", "peak", "area", "kl", "entropy" or "survival" (share of
        the run before its collapse, 1 without one).
      expect: how the first compares with the second: "higher", "lower", "equal" (within `margin`),
        "not higher" (no gain), "stable" (the first alone: most runs learn and do not collapse) or
        "open" (a question: nobody claims anything).
      same: keys of `PAPER` that may have any value, but the same in the cells compared.
      free: keys that are ignored.
      margin: margin of "equal" and "not higher", in units of the outcome.
      together: whether the comparisons are averaged per seed and tested as one. That is the main
        effect of a setting in a factorial design, which needs fewer seeds than its effect in any
        one cell.
    """

    id: str
    sentence: str
    source: str
    comparisons: tuple[tuple[Selector, ...], ...]
    outcome: str
    expect: str
    same: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    margin: float = MARGIN
    together: bool = False


def _paper(
    id: str, figure: str, sentence: str, first: Selector, second: Selector, *rest: str
) -> Claim:
    return Claim(id, sentence, f"arXiv:2512.01374, {figure}", ((first, second),), *rest)


ON_POLICY = (
    Claim(
        "on-policy-stable",
        "On-policy, MiniRL is stable.",
        "arXiv:2512.01374, Fig. 1",
        (({},),),
        "survival",
        "stable",
    ),
    Claim(
        "on-policy-best",
        "On-policy, MiniRL ends higher than each of its five variants.",
        "arXiv:2512.01374, Fig. 1",
        tuple(({}, other) for other in (NORM, NO_IS, R3, {**R3, **NORM}, {**R3, **NO_IS})),
        "final",
        "higher",
    ),
    *(
        _paper(f"on-policy-{id}", "Fig. 1", sentence, first, second, outcome, expect)
        for id, sentence, first, second, outcome, expect in (
            (
                "no-is-collapse",
                "Without the train–inference correction the run collapses.",
                NO_IS,
                {},
                "survival",
                "lower",
            ),
            (
                "no-is-entropy",
                "Without the train–inference correction entropy falls.",
                NO_IS,
                {},
                "entropy",
                "lower",
            ),
            ("norm-score", "Length normalisation ends lower.", NORM, {}, "final", "lower"),
            ("r3-score", "R3 brings no gain on-policy.", R3, {}, "final", "not higher"),
            ("r3-kl", "R3 lowers the train–inference KL on-policy.", R3, {}, "kl", "lower"),
            (
                "r3-norm",
                "R3 with length normalisation ends lower than length normalisation alone.",
                {**R3, **NORM},
                NORM,
                "final",
                "lower",
            ),
            (
                "r3-no-is",
                "With R3 too, the run collapses without the train–inference correction.",
                {**R3, **NO_IS},
                R3,
                "survival",
                "lower",
            ),
        )
    ),
    Claim(
        "on-policy-norm-stable",
        "On-policy, MiniRL with length normalisation is stable.",
        "arXiv:2512.01374, Fig. 1",
        ((NORM,),),
        "survival",
        "stable",
    ),
)


def _off_policy(n: int, figure: str) -> tuple[Claim, ...]:
    """Returns the claims of Figs 2–4: what N mini-batches require, and which replay is better."""
    at = {"mini_batches": n}
    bare, unclipped = {**at, "clip": False}, {**at, **R2, "clip": False}
    r2, r3 = {**at, **R2}, {**at, **R3}
    pairs = [("clip", "clipping", "R2", unclipped, r2)]
    if n < 8:  # Fig. 4 has no curve without both
        pairs.append(("replay", "replay", "no clipping", bare, unclipped))
    found = [
        _paper(
            f"n{n}-{id}-{outcome}",
            figure,
            f"N = {n}, {context}: without {part} the run {effect}.",
            first,
            second,
            outcome,
            "lower",
        )
        for id, part, context, first, second in pairs
        for outcome, effect in (("survival", "collapses earlier"), ("peak", "peaks lower"))
    ]
    better, worse = ("R2", "R3") if n == 2 else ("R3", "R2")
    ends = (r2, r3) if n == 2 else (r3, r2)
    sentence = f"N = {n}: {better} ends higher than {worse}."
    found.append(_paper(f"n{n}-r2-r3", figure, sentence, *ends, "final", "higher"))
    return tuple(found)


def _each(key: str, first: Selector, second: Selector) -> tuple[tuple[Selector, Selector], ...]:
    """Returns the comparison at every off-policy N and with every value of another setting."""
    values = {"replay": ("none", "R2", "R3"), "clip": (True, False)}[key]
    return tuple(
        tuple({"mini_batches": n, key: value, **side} for side in (first, second))
        for n in (2, 4, 8)
        for value in values
    )


OFF_POLICY = (
    *_off_policy(2, "Fig. 2"),
    *_off_policy(4, "Fig. 3"),
    *_off_policy(8, "Fig. 4"),
    _paper(
        "n8-r2-unstable",
        "Fig. 4",
        "N = 8: R2 does not stay stable as long as R3.",
        {"mini_batches": 8, **R2},
        {"mini_batches": 8, **R3},
        "survival",
        "lower",
    ),
    *(
        Claim(
            f"off-policy-{id}",
            f"N = 2, 4 and 8 together, {context}: without {part} the run collapses earlier.",
            "arXiv:2512.01374, Figs 2–4",
            comparisons,
            "survival",
            "lower",
            together=True,
        )
        for id, part, context, comparisons in (
            ("clip", "clipping", "with any replay", _each("replay", {"clip": False}, {})),
            ("r2", "R2", "clipped or not", _each("clip", {}, R2)),
            ("r3", "R3", "clipped or not", _each("clip", {}, R3)),
        )
    ),
    Claim(
        "similar-peaks",
        f"On- and off-policy runs reach similar peaks (within {MARGIN}): N = 2 with R2, "
        "N = 4 and 8 with R3, against on-policy.",
        "arXiv:2512.01374, Figs 1–4",
        tuple(
            ({"mini_batches": n, "replay": replay}, {})
            for n, replay in ((2, "R2"), (4, "R3"), (8, "R3"))
        ),
        "peak",
        "equal",
    ),
    Claim(
        "cold-starts",
        f"Three cold starts end at a comparable level (within {MARGIN}, N = 2 with R2).",
        "arXiv:2512.01374, Fig. 5",
        (),  # `cold_starts` fills in those that the study has
        "final",
        "equal",
    ),
)

OFF = {"mini_batches": (2, 4, 8)}
# Losses other than MiniRL have their own reduction, clip and weight.
OWN = ("aggregation", "clip", "clip_anchor", "weight", "truncation", "policies")
DISPUTES = (
    *(
        Claim(
            f"clip-without-replay-n{n}-{outcome}",
            f"N = {n}: does clipping alone, without replay, do as well as with {replay}? "
            "The paper has no such curve.",
            "a question",
            (({"mini_batches": n}, {"mini_batches": n, "replay": replay}),),
            outcome,
            "open",
        )
        for n, replay in ((2, "R2"), (4, "R3"), (8, "R3"))
        for outcome in ("survival", "final")
    ),
    Claim(
        "clip-anchor",
        "Off-policy, a clip anchored at the sampler μ is stable for longer than one anchored at "
        "π_old.",
        "arXiv:2602.04879, against 2512.01374",
        (({**OFF, "clip_anchor": "rollout"}, OFF),),
        "survival",
        "higher",
        ("mini_batches", "replay"),
    ),
    Claim(
        "truncation-none",
        "Off-policy, weights without truncation are stable for longer than weights truncated at 5.",
        "arXiv:2602.04879, against 2512.01374",
        (({**OFF, "truncation": None}, OFF),),
        "survival",
        "higher",
        ("mini_batches", "replay"),
    ),
    Claim(
        "truncation-mismatch",
        "Off-policy, does π_old/μ truncated at 2 end as high as π_θ/μ truncated at 5?",
        "a question: both are in use",
        (({**OFF, "weight": "mismatch", "truncation": 2.0}, OFF),),
        "final",
        "open",
        ("mini_batches", "replay"),
    ),
    Claim(
        "length-factor",
        "Off-policy too, length normalisation ends lower.",
        "arXiv:2512.01374 and 2503.20783, against 2507.18071",
        (({**OFF, **NORM}, OFF),),
        "final",
        "lower",
        ("mini_batches", "replay"),
    ),
    *(
        Claim(
            f"{loss}-stable",
            f"Off-policy, {loss.upper()} is stable without replay.",
            f"arXiv:{source}",
            (({**OFF, "loss": loss},),),
            "survival",
            "stable",
            ("mini_batches",),
            OWN,
        )
        for loss, source in (
            ("gspo", "2507.18071"),
            ("dppo", "2602.04879"),
            ("vespo", "2602.10693"),
        )
    ),
)
CLAIMS = (*ON_POLICY, *OFF_POLICY, *DISPUTES)


def cold_starts(claim: Claim, names: tuple[str, ...]) -> Claim:
    """Returns the claim on cold starts with all pairs that a study has; it needs three of them."""
    at = {"mini_batches": 2, **R2}
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    comparisons = tuple(({**at, "cold_start": a}, {**at, "cold_start": b}) for a, b in pairs)
    return dataclasses.replace(claim, comparisons=comparisons if len(names) >= 3 else ())
