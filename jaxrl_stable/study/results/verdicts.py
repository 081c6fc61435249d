"""Verdicts on the paper's claims: what the runs of a study support, and by how much."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_stable.statistics import Estimate
from jaxrl_stable.study.config import PAPER, Collapse
from jaxrl_stable.study.results.analysis import CellRuns, Outcome, outcomes_of
from jaxrl_stable.study.results.claims import CLAIMS, Claim, Selector, cold_starts
from jaxrl_stable.study.results.comparison import Paired, holm, paired
from jaxrl_stable.study.results.survival import share

Comparisons = tuple[tuple[CellRuns, ...], ...]  # the cells of each comparison

REPRODUCED, UNSEEN = "reproduced", "not visible at this scale"
CONTRADICTED, NOT_RUN, OPEN = "contradicted", "not run", "no claim"
ALPHA = 0.05
# Cells that differ in one of these settings are never compared.
CONTEXT = ("rollout_format", "task", "cold_start", "learning_rate")
RULE = (
    "Reproduced: the 95 % Student interval of the difference over shared seeds excludes 0 in the "
    "claimed direction, and p after Holm's correction over all comparisons in this table is below "
    f"{ALPHA}. Contradicted: the same in the other direction. “Equal” requires the interval to be "
    "within ± the margin (contradicted: beyond it); “no gain” requires it to be below the margin "
    "and to reach 0 or less (contradicted: above 0). “Stable” concerns one cell and is not "
    "corrected: the exact 95 % interval of the share of runs that learned and did not collapse is "
    "above one half (contradicted: the interval of the share of collapsed runs is). A claim with "
    "several comparisons requires all of them; one that is contradicted contradicts the claim. "
    "Cells taken together are averaged per seed and then compared as one. Anything else is not "
    "visible at this scale, which is not evidence of absence. The permutation p is a check and "
    "decides nothing: with n pairs it cannot be below 2^(1−n)."
)


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Figures of one comparison, or of several that are tested as one.

    Attributes:
      names: the cell of each side; of several comparisons, the first one and how many more.
      states: states of the runs on each side.
      stable, collapsed: shares of such runs on the first side, with exact intervals.
      paired: the two sides over the seeds they share; None for a single cell, or with fewer than
        two shared seeds.
      p_holm: `paired.p` after correction over all comparisons in the table.
    """

    names: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    stable: Estimate
    collapsed: Estimate
    paired: Paired | None = None
    p_holm: float = math.nan


@dataclasses.dataclass(frozen=True)
class Row:
    """A claim in one setting.

    Attributes:
      claim: what was tested.
      setting: values of the settings that vary over the study; "" if none does.
      evidence: one entry per comparison.
      verdict: verdict by `RULE`.
      note: why the claim was not run or, for a question, which side is higher; else "".
    """

    claim: Claim
    setting: str = ""
    evidence: tuple[Evidence, ...] = ()
    verdict: str = NOT_RUN
    note: str = ""


def evaluate(
    cells: Sequence[CellRuns], rule: Collapse | None = None, claims: Sequence[Claim] = CLAIMS
) -> list[Row]:
    """Evaluates all claims in all settings of the study, in the order of the claims."""
    rule = rule or Collapse()
    outcomes = outcomes_of(cells, rule)
    starts = dict.fromkeys(
        full.get("cold_start", "default")
        for full in (canonical(cell.settings) for cell in cells)
        if (full["mini_batches"], full["replay"]) == (2, "R2")
    )
    rows = []
    for claim in claims:
        if not claim.comparisons:
            claim = cold_starts(claim, tuple(starts))
        found = [
            Row(claim, setting, tuple(_evidence(claim, p, outcomes) for p in _parts(claim, chosen)))
            for setting, chosen in settings(claim, cells)
        ]
        rows += found or [Row(claim, note=_missing(claim, cells))]
    tests = [e.paired.p for row in rows for e in row.evidence if e.paired]
    corrected = iter(holm(np.array(tests)))
    return [
        _judged(
            dataclasses.replace(
                row,
                evidence=tuple(
                    dataclasses.replace(e, p_holm=float(next(corrected))) if e.paired else e
                    for e in row.evidence
                ),
            )
        )
        for row in rows
    ]


def verdict(expect: str, interval: Estimate, p_holm: float, margin: float) -> str:
    """Applies `RULE` to one comparison; `interval` is the interval of the difference."""
    low, high = interval.low, interval.high
    if expect == "open":
        return OPEN
    for_it, against = {
        "higher": (low > 0, high < 0),
        "lower": (high < 0, low > 0),
        "equal": (-margin < low and high < margin, low > margin or high < -margin),
        "not higher": (high < margin, low > 0),
    }[expect]
    if p_holm >= ALPHA:
        return UNSEEN
    # A small but certain gain is below the margin and above 0: it contradicts "no gain".
    return CONTRADICTED if against else REPRODUCED if for_it else UNSEEN


def canonical(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fills in the paper's settings where they are missing or make no difference."""
    full = {**PAPER, **settings}
    if full["mini_batches"] == 1:  # π_θ is π_old ...
        if full["clip_anchor"] == "old":
            full["clip"] = True  # ... so no token is clipped either way,
        if full["policies"] == "recomputed":
            full |= {"policies": "all", "weight": "none"}  # ... and π_θ/π_old is 1
    return full


def matches(cell: CellRuns, selector: Selector, claim: Claim) -> bool:
    """Returns whether a cell has the settings of a selector; a tuple lists alternatives."""
    full = canonical(cell.settings)
    for key, wanted in {**PAPER, **selector}.items():
        if key not in selector and key in (*claim.same, *claim.free):
            continue
        allowed = wanted if isinstance(wanted, tuple) else (wanted,)
        if full.get(key) not in allowed:
            return False
    return True


def settings(claim: Claim, cells: Sequence[CellRuns]) -> Iterable[tuple[str, Comparisons]]:
    """Yields a label and the cells of each comparison, for every setting of the study.

    Cells belong together if they agree in all settings that the claim leaves open, except those
    that follow the number of mini-batches (`following`).
    """
    sides = [selector for comparison in claim.comparisons for selector in comparison]
    if not sides:
        return
    fixed = (set(PAPER) | {key for side in sides for key in side}) - set(claim.same)
    ignored = fixed | set(claim.free) | following(cells)
    candidates: list[dict[str, list[CellRuns]]] = []
    for side in sides:
        by_rest: dict[str, list[CellRuns]] = {}
        for cell in cells:
            if matches(cell, side, claim):
                full = canonical(cell.settings)
                rest = {k: v for k, v in full.items() if k not in ignored}
                by_rest.setdefault(json.dumps(rest, sort_keys=True, default=str), []).append(cell)
        candidates.append(by_rest)
    varying = [
        key
        for key in dict.fromkeys(key for cell in cells for key in cell.settings)
        if len({json.dumps(c.settings.get(key), default=str) for c in cells}) > 1
    ]
    for rest in candidates[0]:
        if not all(rest in by_rest for by_rest in candidates):
            continue
        shown = json.loads(rest)
        if shown.get("rollout_format") == "none" and any("weight" in side for side in sides):
            continue  # sampler and trainer agree, so the weight is 1 either way
        label = ", ".join(f"{key} {shown[key]}" for key in varying if key in shown)
        for chosen in itertools.product(*(by_rest[rest] for by_rest in candidates)):
            left = iter(chosen)
            yield (
                label,
                tuple(tuple(itertools.islice(left, len(c))) for c in claim.comparisons),
            )


def following(cells: Sequence[CellRuns]) -> set[str]:
    """Returns the settings that are determined by the number of mini-batches.

    In the paper the mini-batch stays the same: the batch grows with N, and a run with the same
    number of gradient steps has fewer rollouts.
    """
    keys = {key for cell in cells for key in cell.settings} - set(PAPER) - set(CONTEXT)
    found = set()
    for key in keys:
        values: dict[int, set[str]] = {}
        for cell in cells:
            full = canonical(cell.settings)
            values.setdefault(full["mini_batches"], set()).add(repr(full.get(key)))
        determined = all(len(group) == 1 for group in values.values())
        if determined and len(set.union(*values.values())) > 1:
            found.add(key)
    return found


def _parts(claim: Claim, comparisons: Comparisons) -> tuple[Comparisons, ...]:
    """Groups the comparisons that are tested as one."""
    return (comparisons,) if claim.together else tuple((one,) for one in comparisons)


def _evidence(
    claim: Claim, comparisons: Comparisons, outcomes: Mapping[str, Sequence[Outcome]]
) -> Evidence:
    """Gathers evidence on comparisons tested as one; uses only seeds that all of them have."""
    sides = tuple(zip(*comparisons))
    groups = [[outcomes[cell.name] for cell in side] for side in sides]
    found = None
    if len(sides) == 2:
        values: dict[int, list[tuple[float, float]]] = {}
        for pair in zip(*groups):
            for seed, both in _shared(claim.outcome, *pair):
                values.setdefault(seed, []).append(both)
        pairs = [np.mean(v, axis=0) for v in values.values() if len(v) == len(comparisons)]
        if len(pairs) > 1:
            found = paired(*np.transpose(pairs), claim.expect, claim.margin)
    runs = [list(itertools.chain(*group)) for group in groups]
    more = f" and {len(comparisons) - 1} more" if len(comparisons) > 1 else ""
    return Evidence(
        names=tuple(side[0].name + more for side in sides),
        states=tuple(tuple(run.state for run in group) for group in runs),
        stable=share(runs[0], "stable"),
        collapsed=share(runs[0], "collapsed"),
        paired=found,
    )


def _shared(
    name: str, first: Sequence[Outcome], second: Sequence[Outcome]
) -> Iterable[tuple[int, tuple[float, float]]]:
    """Yields each seed that two cells share, with both values, if these are finite."""
    other = {o.seed: o for o in second}
    runs = (*first, *second)
    # Nothing is known about a censored run beyond its end.
    horizon = min((o.end for o in runs if not o.collapsed), default=max(o.end for o in runs))
    for one in first:
        if one.seed not in other:
            continue
        pair = tuple(_value(o, name, horizon) for o in (one, other[one.seed]))
        if all(map(math.isfinite, pair)):
            yield one.seed, pair


def _value(run: Outcome, name: str, horizon: float) -> float:
    if name == "survival":
        return min(run.time, horizon) / horizon if horizon else math.nan
    return getattr(run, name)


def _judged(row: Row) -> Row:
    if not row.evidence:
        return row
    if row.claim.expect == "stable":
        (entry,) = row.evidence
        # Runs that did not learn support neither verdict.
        lost = CONTRADICTED if entry.collapsed.low > 0.5 else UNSEEN
        return dataclasses.replace(row, verdict=REPRODUCED if entry.stable.low > 0.5 else lost)
    if not all(e.paired for e in row.evidence):
        return dataclasses.replace(row, note="fewer than two seeds in common")
    found = {
        verdict(row.claim.expect, e.paired.difference, e.p_holm, row.claim.margin)
        for e in row.evidence
    }
    worst = next(v for v in (CONTRADICTED, UNSEEN, OPEN, REPRODUCED) if v in found)
    return dataclasses.replace(row, verdict=worst, note=_seen(row) if worst == OPEN else "")


def _seen(row: Row) -> str:
    """Says which side of a question is higher, by the same rule as for a claim."""
    (entry,) = row.evidence
    for side in ("higher", "lower"):
        if verdict(side, entry.paired.difference, entry.p_holm, 0.0) == REPRODUCED:
            return f"the first is {side}"
    return "no difference visible"


def _missing(claim: Claim, cells: Sequence[CellRuns]) -> str:
    """Says which cell the study lacks."""
    if not claim.comparisons:
        return "needs three cold starts"
    for side in (s for comparison in claim.comparisons for s in comparison):
        if not any(matches(cell, side, claim) for cell in cells):
            text = ", ".join(f"{key}={value}" for key, value in side.items())
            return f"no cell with {text or 'the settings of MiniRL'}"
    return "no two cells that differ in this alone"
