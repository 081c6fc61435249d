"""The page of a study: one self-contained HTML file."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxrl_stable.files import read_json, read_jsonl, write_atomic
from jaxrl_stable.report import samples as sampled
from jaxrl_stable.report.layout import document
from jaxrl_stable.report.text import escape, plain
from jaxrl_stable.study.config import Collapse
from jaxrl_stable.study.results import panels, verdicts
from jaxrl_stable.study.results.analysis import (
    CellRuns,
    Outcome,
    Record,
    cells_of,
    outcome,
    outcomes_of,
)
from jaxrl_stable.study.results.tables import (
    MARKS,
    cell_table,
    claim_table,
    replay_evidence,
    total_time,
)

TITLES = {
    "on_policy": "On-policy (Fig. 1)",
    "off_policy_n2": "Two mini-batches per rollout (Fig. 2)",
    "off_policy_n4": "Four mini-batches per rollout (Fig. 3)",
    "off_policy_n8": "Eight mini-batches per rollout (Fig. 4)",
    "cold_starts": "Three cold starts (Fig. 5)",
}
NO_FIGURE = "other"
JUDGED = (verdicts.REPRODUCED, verdicts.UNSEEN, verdicts.CONTRADICTED)
CURVES = (
    "Lines: means over seeds. Bands: 95 % bootstrap intervals over runs. Held-out scores are shown "
    "as evaluated; other curves are smoothed by a running mean over a twentieth of the points, at "
    "least five. The mean of the KL is geometric. Survival: Kaplan–Meier with Greenwood's band; "
    "curves are offset slightly. Dots: seeds (× collapsed, ■ not learned)."
)
STYLE = """
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 12px;padding:0;
font-size:14px}
.swatch{width:26px;height:6px;vertical-align:middle}
.bar{width:120px;height:14px;vertical-align:middle}
.wide{overflow-x:auto;margin:12px 0}
.wide td:last-child,.wide th:last-child{padding-right:0}
.wide td:first-child{min-width:11em}
.evidence{display:block;margin-bottom:8px}.evidence b{white-space:nowrap}
@media(min-width:1000px){.evidence{min-width:32em}}
nav{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:14px;margin:12px 0}
a{color:inherit}
h3{font-size:16px;margin:20px 0 8px}
@media(max-width:700px){.wide thead{display:none}.wide table,.wide tbody,.wide tr,.wide td{
display:block;width:100%;text-align:left}
.wide tr{border-bottom:1px solid var(--line);padding:8px 0}
.wide td,.wide td.n{border:0;padding:2px 0;text-align:left;white-space:normal}
.wide td:first-child{font-weight:600}.wide td.n:not(:first-child){display:grid;
grid-template-columns:9em 1fr}
.wide td:not(:first-child)::before{content:attr(data-l);color:var(--soft);font-size:13px}
.wide td.n br{display:none}.wide td.n small{margin-left:8px;white-space:nowrap}
.wide td:not(.n):not(:first-child)::before{display:block}}
"""


def write_page(directory: str | os.PathLike) -> pathlib.Path:
    """Writes `directory/report.html` from the files of a study; returns its path.

    Reads results.jsonl (see `analysis`) and, if they exist:

      evidence.json  {"rows": [{"setting", "kl_step0", "kl_step1", "routing_agreement",
                     "bytes_per_token"}], "replay_cost": {text: value}}
      samples.jsonl  rows as in a training run (`jaxrl_stable.run.samples`), plus "cell"
      study.json     {"title": text, "figures": {id: title}, "about": [lines],
                     "collapse": fields of `Collapse`, "cells": {name: [ids]}}

    Raises:
      ValueError: if a file is missing, empty or damaged.
    """
    directory = pathlib.Path(directory)
    records = read_records(directory)
    study, evidence = (read_json(directory / name) for name in ("study.json", "evidence.json"))
    samples = directory / "samples.jsonl"
    text = page(
        records,
        study,
        evidence,
        read_jsonl(samples) if samples.exists() else [],
        directory.resolve().name,
    )
    write_atomic(directory / "report.html", text)
    return directory / "report.html"


def write_figure(
    records: Iterable[Record], figure: str, path: str | os.PathLike, title: str = ""
) -> pathlib.Path:
    """Writes the paper's four panels of one figure as a PNG file; returns its path.

    Raises:
      ValueError: if no record belongs to the figure.
    """
    cells = cells_in(figure, cells_of(records))
    if not cells:
        raise ValueError(f"figure {figure!r}: no record belongs to it; run its cells first")
    panels.write_figure(cells, pathlib.Path(path), title)
    return pathlib.Path(path)


def cells_in(figure: str, cells: Iterable[CellRuns]) -> list[CellRuns]:
    """Returns the cells of a figure; cells without a figure belong to `NO_FIGURE`."""
    return [cell for cell in cells if figure in (cell.figures or (NO_FIGURE,))]


def read_records(directory: pathlib.Path) -> list[dict]:
    """Reads the records of a study, limited to the cells and figures of the current study.json.

    Raises:
      ValueError: if there are no records.
    """
    path = directory / "results.jsonl"
    records = read_jsonl(path) if path.exists() else []
    cells = read_json(directory / "study.json").get("cells")
    if cells is not None:  # results.jsonl keeps records of cells that were removed from the study
        records = [r | {"figure": cells[r["cell"]]} for r in records if r["cell"] in cells]
    if not records:
        raise ValueError(f"{path}: missing or empty; run the study first")
    return records


def page(
    records: Sequence[Record],
    study: Mapping[str, Any],
    evidence: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]],
    name: str = "Study",
) -> str:
    """Returns the HTML of the page."""
    try:
        rule = Collapse(**study.get("collapse", {}))
    except TypeError as error:
        raise ValueError(f"study.json, collapse: {error}; see study.config.Collapse") from None
    cells = cells_of(records)
    outcomes = outcomes_of(cells, rule)
    rows = verdicts.evaluate(cells, rule)
    title = str(study.get("title") or name)
    given = study.get("figures", {})
    titles = given | {figure: text for figure, text in TITLES.items() if figure not in given}
    ids = dict.fromkeys(f for cell in cells for f in cell.figures or (NO_FIGURE,))
    ordered = [*(f for f in titles if f in ids), *(f for f in ids if f not in titles)]
    figures = {f: str(titles.get(f, f.replace("_", " "))) for f in ordered}
    links = [*((f"figure-{i}", text) for i, text in enumerate(figures.values()))]
    sections = (
        ("claims", "Claims", f'{claim_table(rows)}<p class="soft">{escape(verdicts.RULE)}</p>'),
        ("replay", "Replay: effect and cost", replay_evidence(evidence)),
        ("samples", "Samples", sample_viewer(samples)),
        ("collapse", "What counts as collapse", collapse_section(cells, outcomes, rule)),
    )
    links += [(key, text) for key, text, content in sections if content]
    nav = "".join(f'<a href="#{key}">{escape(text)}</a>' for key, text in links)
    return document(
        title,
        (
            header(title, study, cells, outcomes, rows),
            f"<nav>{nav}</nav>",
            *(
                figure_section(f"figure-{i}", figures[f], f, cells, outcomes)
                for i, f in enumerate(figures)
            ),
            *(
                f'<section id="{key}"><h2>{text}</h2>{content}</section>'
                for key, text, content in sections
                if content
            ),
        ),
        STYLE,
    )


def header(
    title: str,
    study: Mapping[str, Any],
    cells: Sequence[CellRuns],
    outcomes: Mapping[str, Sequence[Outcome]],
    rows: Sequence[verdicts.Row],
) -> str:
    """Returns title, description and key figures of the study."""
    runs = [run for group in outcomes.values() for run in group]
    seeds = len({run.seed for run in runs})
    found = Counter(row.verdict for row in rows)
    claims = sum(found[kind] for kind in JUDGED)
    cards = [
        ("Runs", f"{len(runs):,}", f"{len(cells)} cells, up to {seeds} seeds"),
        ("Collapsed", str(sum(run.collapsed for run in runs)), "by the definition below"),
        ("Time of all runs", total_time(cells, outcomes), ""),
        *(
            (f"{MARKS[kind][0]} {kind}", str(found[kind]), f"of {claims} claims run")
            for kind in JUDGED
        ),
    ]
    boxes = "".join(
        f"<div><small>{escape(name)}</small><b>{escape(value)}</b><small>{escape(note)}</small></div>"
        for name, value, note in cards
    )
    about = "".join(f"<p>{escape(plain(line))}</p>" for line in study.get("about", ()))
    return (
        f'<header><h1>{escape(title)}</h1><div class="soft">jaxrl_stable study</div>'
        f'<div class="cards">{boxes}</div>{about}</header>'
    )


def figure_section(
    key: str,
    title: str,
    figure: str,
    cells: Sequence[CellRuns],
    outcomes: Mapping[str, Sequence[Outcome]],
) -> str:
    """Returns legend, panels and table of one figure."""
    cells = cells_in(figure, cells)
    note = f'<p class="soft note">{CURVES}</p>' if key == "figure-0" else ""
    shown = "".join(f"<figure>{svg}</figure>" for svg in panels.panels(figure, cells, outcomes))
    return (
        f'<section id="{key}"><h2>{escape(title)}</h2>{panels.legend(cells)}'
        f'<div class="grid small">{shown}</div>{note}'
        f"{cell_table(cells, outcomes)}</section>"
    )


def sample_viewer(rows: Sequence[Mapping[str, Any]]) -> str:
    """Shows responses of each cell token by token; all cells except the first are folded."""
    if not rows:
        return ""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get("cell", "")), []).append(row)
    folds = "".join(
        f"<details{' open' * (not i)}><summary>{escape(name)}</summary><br>"
        f"{sampled.articles(group)}</details>"
        for i, (name, group) in enumerate(groups.items())
    )
    return sampled.legend(rows) + folds


def collapse_section(
    cells: Sequence[CellRuns], outcomes: Mapping[str, Sequence[Outcome]], rule: Collapse
) -> str:
    """States the rule, and how many runs would have collapsed under stricter or laxer limits."""
    text = (
        "A run has collapsed if, from some gradient step on, for "
        f"{rule.for_steps:g} gradient steps or until the end of the record, one of these holds: "
        "the held-out score or the training reward, under a running mean, is below "
        f"{rule.score_share:g} of its highest value so far and more than {rule.margin:g} below it; "
        f"the KL between sampler and trainer is above {rule.kl_limit:g} nats per token; or one of "
        f"them is no longer finite. A run that gains less than {rule.gain:g} and does not collapse "
        "has not learned; it counts as censored."
    )
    others = [
        (f"score below {share:g}", dataclasses.replace(rule, score_share=share))
        for share in (0.25, 0.75)
    ] + [
        (f"KL above {10 * rule.kl_limit:g}", dataclasses.replace(rule, kl_limit=10 * rule.kl_limit))
    ]
    changed = []
    for cell in cells:
        now = sum(run.collapsed for run in outcomes[cell.name])
        counts = [sum(outcome(run, other).collapsed for run in cell.runs) for _, other in others]
        if any(count != now for count in counts):
            figures = ", ".join(f"{n} if {name}" for n, (name, _) in zip(counts, others))
            changed.append(
                f"<dt>{escape(cell.name)}</dt><dd>{now} of {len(cell.runs)}; {figures}</dd>"
            )
    if changed:
        limits = "Cells whose number of collapsed runs depends on these limits:"
    else:
        limits = (
            "Under other limits (a score below 0.25 or 0.75, a KL ten times higher) every cell has "
            "the same number of collapsed runs."
        )
    listed = f"<dl>{''.join(changed)}</dl>" if changed else ""
    return f"<p>{escape(text)}</p><p>{limits}</p>{listed}"
