"""The tables of a study: cells, claims, and evidence on replay."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_stable.report.run import is_number
from jaxrl_stable.report.text import elapsed_time, escape, figure, plain
from jaxrl_stable.statistics import Estimate, mean_over_seeds
from jaxrl_stable.study.results.analysis import CellRuns, Outcome
from jaxrl_stable.study.results.panels import swatch
from jaxrl_stable.study.results.survival import share
from jaxrl_stable.study.results.verdicts import (
    CONTRADICTED,
    NOT_RUN,
    OPEN,
    REPRODUCED,
    UNSEEN,
    Evidence,
    Row,
)
from jaxrl_stable.study.results.wording import words

# Mark and CSS class of each verdict. The marks are for readers who cannot see the colours.
MARKS = {
    REPRODUCED: ("✓", "good"),
    CONTRADICTED: ("✗", "bad"),
    UNSEEN: ("○", ""),
    OPEN: ("?", ""),
    NOT_RUN: ("–", "soft"),
}


def cell_table(cells: Sequence[CellRuns], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    """Returns a table with one row per cell: outcomes with 95 % intervals over seeds."""
    rows = []
    for index, cell in enumerate(cells):
        runs = outcomes[cell.name]
        states = Counter(run.state for run in runs)
        collapsed = share(runs, "collapsed")
        causes = Counter(run.cause for run in runs if run.cause)
        range_of_share = f"{100 * collapsed.low:.0f} to {100 * collapsed.high:.0f} %"
        by = "".join(f"<br><small>{count} by {cause}</small>" for cause, count in causes.items())
        rows.append(
            (
                f"{swatch(index)} {escape(cell.name)}",
                over_seeds([run.final for run in runs], "{:.3f}".format),
                over_seeds([run.peak for run in runs], "{:.3f}".format),
                over_seeds([run.kl for run in runs], lambda end: f"{10**end:.2g}"),
                f"{states['collapsed']} of {len(runs)}<br><small>{range_of_share}</small>{by}",
                str(states["not learned"] or "–"),
                mean_seconds(runs),
            )
        )
    heads = ("Cell", "Final score", "Peak", "KL, nats", "Collapsed", "Not learned", "s per run")
    return table(heads, rows)


def over_seeds(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Formats the mean over seeds, with Student's interval below it."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return form(values[0]) if values else "–"
    mean = mean_over_seeds(values)
    return f"{form(mean.value)}<br><small>{form(mean.low)} to {form(mean.high)}</small>"


def mean_seconds(runs: Sequence[Outcome]) -> str:
    known = [run.seconds for run in runs if math.isfinite(run.seconds)]
    return figure(sum(known) / len(known)) if known else "–"


def claim_table(rows: Sequence[Row]) -> str:
    """Returns a table of the tested claims with their evidence; the others are folded away."""
    widest: dict[str, float] = {}
    for row in rows:
        for entry in row.evidence:
            if entry.paired:
                d = entry.paired.difference
                widest[row.claim.outcome] = max(
                    widest.get(row.claim.outcome, 1e-9), abs(d.low), abs(d.high)
                )
    tested, missing = [], []
    for row in rows:
        mark, color = MARKS[row.verdict]
        sentence = f"{escape(row.claim.sentence)}<br><small>{escape(row.claim.source)}</small>"
        if row.verdict == NOT_RUN and not row.evidence:
            missing.append((sentence, escape(row.note)))
            continue
        shown = "".join(
            f'<span class="evidence">{evidence(row, entry, widest)}</span>'
            for entry in row.evidence
        )
        note = f"<br><small>{escape(row.note)}</small>" if row.note else ""
        tested.append(
            (
                sentence,
                escape(row.setting) or "–",
                shown,
                f'<b class="{color}">{mark} {escape(row.verdict)}</b>{note}',
            )
        )
    parts = []
    if tested:
        parts.append(table(("Claim", "Setting here", "Evidence", "Verdict"), tested, numbers=False))
    if missing:
        parts.append(
            f"<details><summary>{len(missing)} claims not run</summary>"
            f"{table(('Claim', 'Why'), missing, numbers=False)}</details>"
        )
    return "".join(parts)


def evidence(row: Row, entry: Evidence, widest: Mapping[str, float]) -> str:
    """Formats one comparison: cells, difference with its interval, collapsed runs, tests."""
    names = " against ".join(f"<i>{escape(name)}</i>" for name in entry.names)
    said = words(row, entry)
    if entry.paired is None:
        return f"{names}: {said.value}"
    return (
        f"{names}<br>{interval_bar(entry.paired.difference, widest[row.claim.outcome])} "
        f"{said.measure} <b>{said.value}</b>; {said.collapsed}<br>"
        f"<small>{escape(said.tests)}</small>"
    )


def interval_bar(d: Estimate, widest: float) -> str:
    """Draws an interval next to a line at 0, on one scale for all rows with the same outcome."""
    x = [60 + 54 * max(-1.0, min(1.0, end / widest)) for end in (d.low, d.value, d.high)]
    return (
        '<svg class="bar" viewBox="0 0 120 14" aria-hidden="true">'
        '<path d="M60 0V14" stroke="var(--soft)"/>'
        f'<path d="M{x[0]:.1f} 7H{x[2]:.1f}" stroke="currentColor" stroke-width="2"/>'
        f'<circle cx="{x[1]:.1f}" cy="7" r="3.2" fill="currentColor"/></svg>'
    )


def replay_evidence(found: Mapping[str, Any]) -> str:
    """Shows the effect of replay on the mismatch, and its cost, which is measured separately."""
    heads = {
        "kl_step0": "KL, step 0",
        "kl_step1": "KL, step 1",
        "routing_agreement": "Routing agreement",
        "bytes_per_token": "Bytes per token",
    }
    rows = [
        (escape(plain(row.get("setting"))), *(number(row.get(key)) for key in heads))
        for row in found.get("rows") or ()
    ]
    cost = "".join(
        f"<dt>{escape(key)}</dt><dd>{escape(plain(value))}</dd>"
        for key, value in (found.get("replay_cost") or {}).items()
    )
    shown = table(("Setting", *heads.values()), rows) if rows else ""
    return shown + (f"<dl>{cost}</dl>" if cost else "")


def number(value: Any) -> str:
    """Formats a number with three digits, a count in full, and anything else as text."""
    return figure(value) if is_number(value) else escape(plain(value))


def total_time(cells: Sequence[CellRuns], outcomes: Mapping[str, Sequence[Outcome]]) -> str:
    seconds = [run.seconds for cell in cells for run in outcomes[cell.name]]
    known = [value for value in seconds if math.isfinite(value)]
    return elapsed_time(sum(known)) if known else "–"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """Returns a table of HTML cells; on narrow screens each row is a list under its first cell."""
    align = [' class="n"' if numbers and i else "" for i in range(len(heads))]
    top = "".join(f"<th{a}>{head}</th>" for a, head in zip(align, heads))
    body = "".join(
        "<tr>"
        + "".join(
            f'<td{a} data-l="{head}"><span>{cell}</span></td>'
            for a, head, cell in zip(align, heads, row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )
