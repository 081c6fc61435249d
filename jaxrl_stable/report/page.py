"""A run's page: header, curves, metrics, samples and configuration in one HTML file."""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

from jaxrl_stable.files import write_atomic
from jaxrl_stable.report.curves import MORE_PANELS, PAPER_PANELS, draw
from jaxrl_stable.report.explanations import interval_names, metric_table, other_metrics
from jaxrl_stable.report.layout import document
from jaxrl_stable.report.run import Run, is_number, read_run
from jaxrl_stable.report.samples import samples_section
from jaxrl_stable.report.text import elapsed_time, escape, plain

CURVES = "Faint lines: single steps. Strong lines: running mean over a twentieth of the run."
SECRET = re.compile(r"(?im)^(.*(secret|password|api_?key|(auth|access)_?token)\w*\s*=).*$")


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir/report.html` and `workdir/plots/*.png`.

    Returns:
      Path of the page.

    Raises:
      ValueError: if the directory or its metrics are missing, empty or damaged.
    """
    workdir = pathlib.Path(workdir)
    run = read_run(workdir)
    (workdir / "plots").mkdir(exist_ok=True)
    paper, more = (
        "".join(
            f"<figure>{plot}</figure>"
            for panel in panels
            if (plot := draw(run, panel, workdir / "plots" / f"{panel.name}.png"))
        )
        for panels in (PAPER_PANELS, MORE_PANELS)
    )
    body = (
        header(run),
        f'<div class="grid">{paper}</div><p class="soft note">{CURVES}</p>' if paper else "",
        f"<h2>What to watch</h2>{metric_table(run)}",
        f'<h2>More curves</h2><div class="grid small">{more}</div>' if more else "",
        samples_section(run.samples),
        configuration(run.config),
        other_metrics(run),
    )
    write_atomic(workdir / "report.html", document(run.name, body))
    return workdir / "report.html"


def header(run: Run) -> str:
    """Returns the run's name, key figures, and the other entries of its summary."""
    last = run.rows[-1]
    updates, skipped = last.get("gradient_steps"), run.last("gradient/skipped")
    cards = [
        *score_cards(run),
        ("Steps", f"{last['step']:,}", f"{updates:,.0f} updates" if is_number(updates) else ""),
        ("Wall time", elapsed_time(wall_time(run)), ""),
    ]
    if is_number(skipped):
        cards.append(("Skipped updates", f"{skipped:,.0f}", "not finite"))
    boxes = "".join(
        f"<div><small>{name}</small><b>{value}</b><small>{note}</small></div>"
        for name, value, note in cards
    )
    facts = {k: v for k, v in run.summary.items() if k not in ("name", "seconds", "gain")}
    listed = "".join(f"<dt>{escape(k)}</dt><dd>{escape(plain(v))}</dd>" for k, v in facts.items())
    return (
        f'<header><h1>{escape(run.name)}</h1><div class="soft">jaxrl_stable training run</div>'
        f'<div class="cards">{boxes}</div>{f"<dl>{listed}</dl>" if listed else ""}</header>'
    )


def score_cards(run: Run) -> list[tuple[str, str, str]]:
    """Returns cards (title, value, note) for the held-out score and the points gained."""
    score = "eval/avg_at_k"
    rows = [row for row in run.rows if is_number(row.get(score))]
    if not rows:
        return []
    ends = rows[:1] + rows[-1:] * (len(rows) > 1)
    values = [row[score] for row in ends]
    intervals = [[row.get(name) for name in interval_names(score)] for row in ends]
    samples = run.last("eval/k")
    title = f"Held-out avg@{samples:.0f}" if is_number(samples) else "Held-out score"
    note = "no interval recorded"
    if all(is_number(end) for interval in intervals for end in interval):
        note = f"95 %: {' → '.join(f'{low:.3f}–{high:.3f}' for low, high in intervals)}"
    cards = [(title, " → ".join(f"{value:.3f}" for value in values), note)]
    rewards = [row.get("eval/reward") for row in ends]
    if all(map(is_number, rewards)) and rewards != values:  # graded: not the accuracy again
        shown = " → ".join(f"{value:.3f}" for value in rewards)
        cards.insert(0, ("Held-out reward", shown, "mean"))
    gain = estimate(run.summary.get("gain"))
    if gain:
        interval = (
            f"95 %: {100 * gain[1]:+.1f} to {100 * gain[2]:+.1f}" if is_number(gain[1]) else ""
        )
        cards.append(("Points gained", f"{100 * gain[0]:+.1f}", interval))
    elif len(values) > 1:
        points = 100 * (values[1] - values[0])
        cards.append(("Points gained", f"{points:+.1f}", "last − first evaluation"))
    return cards


def estimate(value: Any) -> tuple[int | float, int | float, int | float] | None:
    """Returns (value, low, high) from a JSON object with these keys; NaN for missing ends."""
    if not isinstance(value, dict) or not is_number(value.get("value")):
        return None
    ends = [value.get(end) for end in ("low", "high")]
    low, high = ends if all(map(is_number, ends)) else (math.nan, math.nan)
    return value["value"], low, high


def wall_time(run: Run) -> int | float:
    """Returns the duration of a run in seconds.

    The summary records the seconds of the last process, including cold start and compilation. In a
    resumed run, the time from the first row to the last is longer. The longer time is returned.
    """
    stamps = [row["time"] for row in run.rows if is_number(row.get("time"))]
    times = [stamps[-1] - stamps[0]] if stamps else []
    times += [s for s in [run.summary.get("seconds")] if is_number(s)]
    return max(times, default=math.nan)


def configuration(text: str) -> str:
    """Returns the resolved configuration, folded, without values that look like secrets."""
    if not text:
        return ""
    text = escape(SECRET.sub(r"\1 (left out)", text))
    return (
        f"<h2>Configuration</h2><details><summary>config.gin</summary><pre>{text}</pre></details>"
    )
