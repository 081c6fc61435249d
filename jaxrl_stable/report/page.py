"""The page: header, curves, metrics, samples and configuration in one HTML file."""

from __future__ import annotations

import math
import os
import pathlib
import re
from typing import Any

from jaxrl_stable.metrics import write_atomic
from jaxrl_stable.report.curves import MORE_PANELS, PAPER_PANELS, draw
from jaxrl_stable.report.explanations import interval_names, metric_table, other_metrics
from jaxrl_stable.report.run import Run, is_number, read_run
from jaxrl_stable.report.samples import samples_section
from jaxrl_stable.report.text import duration, escape, plain

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
CURVES = "Faint: single steps. Strong: running mean over a twentieth of the run."
SECRET = re.compile(r"(?im)^(.*(secret|password|api_?key|(auth|access)_?token)\w*\s*=).*$")

CSS = """
:root{--paper:#fff;--card:#f6f7f9;--ink:#24292e;--soft:#667080;--line:#d4d8de;--warm:217,121,47;
--cool:58,127,200;--good:#22805f;--bad:#b5333f;color-scheme:light dark}
@media(prefers-color-scheme:dark){:root{--paper:#15181d;--card:#1d2127;--ink:#e3e6ea;--soft:#98a2b0;
--line:#363c45;--good:#4cc29a;--bad:#f0808a}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1120px;padding:28px 20px 60px;background:var(--paper);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:25px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 12px}
p{margin:0 0 12px;max-width:75ch}
small,.soft,th,dt{color:var(--soft);font-size:13px;font-weight:400}
.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr))}
.grid.small{grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr))}
.cards{display:flex;flex-wrap:wrap;gap:12px;margin:20px 0}
.cards div{flex:1 0 auto;min-width:130px}
.cards div,figure,article{background:var(--card);border-radius:10px;padding:12px 14px;margin:0}
.cards b{display:block;font-size:20px;font-variant-numeric:tabular-nums;line-height:1.4}
figure svg{display:block;width:100%;height:auto}
svg *{stroke-linejoin:round;stroke-linecap:butt}
.note{margin-top:10px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px}
.other{width:auto}
th,td{text-align:left;padding:6px 14px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th.n,td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
code,pre{font:13px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
td code{white-space:nowrap}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0 10px;max-height:26em;overflow-y:auto}
dl{display:grid;grid-template-columns:max-content 1fr;gap:3px 16px;margin:12px 0 24px;
font-size:14px}
dd{margin:0;overflow-wrap:anywhere}
article{margin-bottom:12px}
details{margin-bottom:12px}.good{color:var(--good)}.bad{color:var(--bad)}
summary{cursor:pointer}
.t{border-radius:3px}
.t.clipped{text-decoration:underline 2px var(--bad);text-underline-offset:3px}
.t.routed{box-shadow:inset 0 -1px var(--ink),inset 0 1px var(--ink)}
.t:hover{outline:1px solid var(--ink)}
.t:hover::after{content:attr(data-t);position:fixed;left:50%;bottom:16px;transform:translateX(-50%);
background:var(--ink);color:var(--paper);padding:6px 14px;border-radius:8px;
white-space:pre;z-index:9}
@media(max-width:600px){body{padding:18px 12px 50px}
.scroll tr{display:grid;grid-template-columns:1fr auto 36px;border-bottom:1px solid var(--line)}
.scroll td,.scroll th{border:0;padding:4px 8px 4px 0}.scroll td:last-child{grid-column:1/-1}
.scroll th:last-child,.scroll td:last-child:empty{display:none}
dl{grid-template-columns:1fr}dd{margin-bottom:6px}.hide{display:none}}
"""


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir/report.html` and `workdir/plots/*.png`; returns the path of the page.

    Raises:
      ValueError: one line, when the directory or its metrics are missing, empty or damaged.
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
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(run.name)}</title><style>{CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    write_atomic(workdir / "report.html", page)
    return workdir / "report.html"


def header(run: Run) -> str:
    """Name, key figures, and what else the summary holds."""
    last = run.rows[-1]
    updates, skipped = last.get("gradient_steps"), run.last("gradient/skipped")
    cards = [
        *score_cards(run),
        ("Steps", f"{last['step']:,}", f"{updates:,.0f} updates" if is_number(updates) else ""),
        ("Wall time", duration(wall_time(run)), ""),
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
    """Held-out score of the first and the last evaluation, and the points gained between them."""
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


def estimate(value: Any) -> tuple[float, float, float] | None:
    """(value, low, high) of a JSON object with these keys; NaN for a missing end."""
    if not isinstance(value, dict) or not is_number(value.get("value")):
        return None
    ends = [value.get(end) for end in ("low", "high")]
    low, high = ends if all(map(is_number, ends)) else (math.nan, math.nan)
    return value["value"], low, high


def wall_time(run: Run) -> float:
    """Seconds the run took.

    The summary has those of the last process, cold start and compilation included; from the first
    row to the last is longer where a run was resumed.
    """
    stamps = [row["time"] for row in run.rows if is_number(row.get("time"))]
    times = [stamps[-1] - stamps[0]] if stamps else []
    times += [s for s in [run.summary.get("seconds")] if is_number(s)]
    return max(times, default=math.nan)


def configuration(text: str) -> str:
    """The resolved configuration behind a fold, without what looks like a secret."""
    if not text:
        return ""
    text = escape(SECRET.sub(r"\1 (left out)", text))
    return (
        f"<h2>Configuration</h2><details><summary>config.gin</summary><pre>{text}</pre></details>"
    )
