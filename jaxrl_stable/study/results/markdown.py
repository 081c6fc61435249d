"""The table of claims as Markdown, to read without a browser."""

from __future__ import annotations

import pathlib
from collections import Counter
from collections.abc import Iterable, Sequence

from jaxrl_stable.files import write_atomic
from jaxrl_stable.study.config import Collapse
from jaxrl_stable.study.results.analysis import Record, cells_of
from jaxrl_stable.study.results.verdicts import NOT_RUN, RULE, Evidence, Row, evaluate
from jaxrl_stable.study.results.wording import words

HEAD = (
    "| claim | setting | evidence | verdict |",
    "|---|---|---|---|",
)


def write_claims(directory: pathlib.Path, records: Iterable[Record], rule: Collapse) -> None:
    """Writes claims.md: every claim with its figures and verdict."""
    rows = evaluate(cells_of(records), rule)
    counts = Counter(row.verdict for row in rows)
    lines = [
        "# Claims",
        "",
        ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) + ".",
        "",
        RULE,
        "",
        *claim_lines(rows),
    ]
    write_atomic(directory / "claims.md", "\n".join(lines) + "\n")


def claim_lines(rows: Sequence[Row]) -> list[str]:
    """Returns the lines of the table, including claims that were not run."""
    lines = list(HEAD)
    for row in rows:
        sentence = f"{row.claim.sentence} ({row.claim.source})"
        shown = "<br>".join(evidence(row, entry) for entry in row.evidence) or "–"
        verdict = row.verdict if row.verdict == NOT_RUN else f"**{row.verdict}**"
        verdict += f": {row.note}" if row.note else ""
        cells = (sentence, row.setting or "–", shown, verdict)
        lines.append(f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |")
    return lines


def evidence(row: Row, entry: Evidence) -> str:
    """Formats one comparison: cells, difference with its interval, tests, collapsed runs."""
    names = " against ".join(f"`{name}`" for name in entry.names)
    said = words(row, entry)
    if entry.paired is None:
        return f"{names}: {said.value}"
    return f"{names}: {said.measure} {said.value}; {said.tests}; {said.collapsed}"
