"""Tables of metrics: last values, healthy ranges, and what needs a closer look."""

from __future__ import annotations

import math

from jaxrl_stable.report.meanings import METRICS
from jaxrl_stable.report.run import AXES, Run
from jaxrl_stable.report.text import escape, figure


def metric_table(run: Run) -> str:
    """Returns the table of watched metrics: last value, verdict (if judged), healthy values."""
    rows = []
    for metric in METRICS:
        layers = run.layers(metric.name)
        if not layers or not metric.healthy:
            continue
        low, high = (end(map(run.last, layers)) for end in (min, max))
        verdict = ""
        if math.isfinite(metric.low):
            fine = metric.low <= low and high <= metric.high
            verdict = f'<b class="{"good" if fine else "bad"}">{"ok" if fine else "look"}</b>'
        shown = figure(low) if low == high else f"{figure(low)} to {figure(high)}"
        interval = [run.last(name) for name in interval_names(metric.name)]
        if all(map(math.isfinite, interval)):
            shown += f"<br><small>{' to '.join(map(figure, interval))}</small>"
        rows.append(
            f'<tr><td><code>{escape(metric.name)}</code></td><td class="n">{shown}</td>'
            f'<td>{verdict}</td><td class="hide">{escape(metric.meaning)}</td>'
            f"<td>{escape(metric.healthy)}</td></tr>"
        )
    heads = '<th>Metric</th><th class="n">Last value</th><th></th><th class="hide">What it is</th>'
    return (
        f'<div class="scroll"><table><tr>{heads}<th>Healthy</th></tr>{"".join(rows)}</table></div>'
    )


def other_metrics(run: Run) -> str:
    """Returns the table of all other metrics, including unknown and never finite ones."""
    watched = {name for metric in METRICS if metric.healthy for name in run.layers(metric.name)}
    watched |= {end for name in watched for end in interval_names(name)}
    meanings = {metric.name: metric.meaning for metric in METRICS}
    names = {name for row in run.rows for name in row} - AXES - watched
    rows = "".join(
        f'<tr><td><code>{escape(name)}</code></td><td class="n">{figure(run.last(name))}</td>'
        f'<td class="hide">{escape(meanings.get(name, ""))}</td></tr>'
        for name in sorted(names)
    )
    return f'<h2>Other metrics</h2><table class="other">{rows}</table>' if names else ""


def interval_names(name: str) -> tuple[str, str]:
    """Returns the names under which the ends of a metric's 95 % interval are recorded."""
    return f"{name}_low", f"{name}_high"
