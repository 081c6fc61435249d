"""The report of a run: one HTML file that needs nothing else, and its plots as PNG files.

    python -m jaxrl_stable.report --workdir=DIR

Reads, below the run's directory:
  metrics.jsonl   required; rows of the same step are merged, the later value wins
  samples.jsonl   sampled responses, see `MetricsWriter.samples`
  config.gin      the resolved configuration, shown as text
  summary.json    an object. `name`, `wall_time_s`, `skipped_updates`, and `score_before`,
                  `score_after`, `gain` (each with value, low, high; fractions) stand in for what is
                  otherwise derived from the metrics; everything else is listed as it is.
Writes report.html and plots/*.png there.

The page holds what a language model wrote. All of it is escaped, there is no script, and a content
security policy forbids the page to load or run anything.
"""

import dataclasses
import fnmatch
import html
import io
import itertools
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from absl import app, flags

from jaxrl_stable.metrics import read_jsonl, visible, write_atomic

# --- What is shown -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot. `keys` maps a metric, or a pattern of metrics, to its label ("" = its own name)."""

    name: str
    title: str
    unit: str
    keys: Mapping[str, str]
    style: str = "lines"  # lines | band | depth | stack
    log: bool = False


# The paper's four panels (arXiv:2512.01374, Figs 1–4) come first.
PANELS = (
    Panel("score", "Held-out score", "avg@k, fraction", {"eval/avg_at_k": ""}, style="band"),
    Panel(
        "mismatch_kl",
        "Training–inference KL",
        "nats per token",
        # Two estimators of one KL. The paper plots k1, whose mean over a batch can be below zero:
        # on this axis it is drawn as |k1|. k3 = e^Δ − 1 − Δ is never negative.
        {"mismatch/kl_k3": "k3", "mismatch/kl_k1": "|k1|"},
        log=True,
    ),
    Panel("reward", "Training reward", "mean reward", {"reward/mean": ""}),
    Panel("entropy", "Entropy", "nats per token", {"entropy": ""}),
    Panel("length", "Response length", "tokens", {"response/*length*": ""}),
    Panel("truncated", "Truncated responses", "share", {"response/*truncated*": ""}),
    Panel("weight_max", "Largest importance weight", "π/μ", {"weight/raw_max": ""}, log=True),
    Panel("ess", "Effective sample size", "share of tokens", {"weight/ess": ""}),
    Panel(
        "clip",
        "Clipped and capped tokens",
        "share of tokens",
        {
            "clip/high_share": "clipped, high",
            "clip/low_share": "clipped, low",
            "weight/over_cap_share": "capped",
        },
    ),
    Panel("grad_norm", "Gradient norm", "before clipping", {"gradient/norm": ""}, log=True),
    Panel(
        "routing",
        "Routing: sampler, trainer",
        "share",
        {
            "routing/agreement": "choices that agree",
            "routing/differing_tokens_share": "tokens that differ",
        },
    ),
    Panel(
        "routing_layers",
        "Routing agreement by layer",
        "share",
        {"routing/agreement_layer_*": ""},
        style="depth",
    ),
    Panel("expert_load", "Expert load, worst", "load × E − 1", {"experts/max_violation": ""}),
    Panel(
        "experts",
        "Routers",
        "share",
        {"experts/confidence": "confidence", "experts/idle_share": "idle experts"},
    ),
    Panel(
        "time",
        "Time per step",
        "seconds",
        {"time/rollout": "", "time/reward": "", "time/score": "", "time/update": ""},
        style="stack",
    ),
    Panel("throughput", "Throughput", "tokens/s", {"throughput/tokens_per_s": ""}),
)
MAIN_PANELS = 4


@dataclasses.dataclass(frozen=True)
class Metric:
    """What a metric says, what is healthy, and the range outside which to look closer.

    Without a meaning it is known, but not listed.
    """

    keys: str
    meaning: str = ""
    healthy: str = ""
    low: float = -math.inf
    high: float = math.inf


METRICS = (
    Metric("eval/avg_at_k", "Held-out accuracy: mean of k samples a problem.", "rises"),
    Metric("eval/avg_at_k_*"),
    Metric("eval/pass_at_*", "Share of problems that at least one of k samples solves.", "rises"),
    Metric(
        "mismatch/kl_k3",
        "KL(μ‖π_old) between sampler and trainer at equal weights: mean of e^Δ − 1 − Δ.",
        "1e-3 with matched precision, 1e-2 with an FP8 sampler. A sharp rise precedes collapse.",
        0.0,
        0.05,
    ),
    Metric(
        "mismatch/kl_k1",
        "The same KL as the paper plots it: mean of log μ − log π_old.",
        "as k3, but noisier; may dip below 0",
        -0.05,
        0.05,
    ),
    Metric("mismatch/abs_mean", "Mean of |Δ|, Δ = log π_old − log μ.", "steady"),
    Metric("mismatch/abs_max", "Largest |Δ| of one token.", "one token; heavy-tailed"),
    Metric(
        "mismatch/extreme_share", "Tokens with |Δ| > ln 2.", "below 0.01 (rule of thumb)", 0, 0.01
    ),
    Metric("mismatch/*", "Distance between sampler and trainer.", "steady"),
    Metric(
        "staleness/*",
        "Drift of the policy since the rollout, log π_θ − log π_old.",
        "0 in the first mini-batch, small after",
    ),
    Metric("reward/*", "Reward of the training samples.", "rises; noisy"),
    Metric(
        "entropy",
        "Entropy over the whole vocabulary, on sampled prefixes.",
        "changes slowly; a sharp fall is collapse",
    ),
    Metric("response/*truncated*", "Responses cut at the length limit.", "near 0", 0, 0.1),
    Metric("response/*length*", "Response length in tokens.", "no jumps, not at the limit"),
    Metric("weight/raw_max", "Largest π/μ of one token before the cap.", "one token; look at ESS"),
    Metric("weight/over_cap_share", "Tokens whose weight was capped.", "below 0.01", 0, 0.01),
    Metric("weight/ess", "1 / mean((w / mean w)²).", "near 1 (rule of thumb: over 0.5)", 0.5, 1),
    Metric("weight/*", "Importance weights π/μ.", "mean near 1"),
    Metric(
        "clip/*",
        "Tokens without gradient: the policy has moved past ε where the advantage pushes on.",
        "below 0.01 at token level with ε 0.2/0.27; sequence-level objectives clip 0.1 to 0.3",
        0,
        0.3,
    ),
    Metric("gradient/norm", "Global norm before clipping.", "finite, without spikes"),
    Metric("gradient/skipped", "Updates left out so far, as not finite.", "0", 0, 0),
    Metric(
        "routing/agreement",
        "Share of expert choices that sampler and trainer have in common.",
        "about 0.9 without replay (R3 paper), 1 when replayed",
        0.8,
        1,
    ),
    Metric(
        "routing/differing_tokens_share",
        "Tokens with another choice in at least one layer.",
        "up to 0.94 in a deep model without replay (R3 paper), 0 when replayed",
    ),
    Metric(
        "routing/agreement_layer_*", "Agreement, layer by layer.", "no layer far below the rest"
    ),
    Metric("routing/*", "Routing, sampler against trainer."),
    Metric(
        "experts/max_violation",
        "Load of the busiest expert × E − 1, worst layer.",
        "0 = even; a steady rise means the router is collapsing",
    ),
    Metric("experts/idle_share", "Experts that got no token.", "near 0"),
    Metric("experts/confidence", "Probability mass of the experts used.", "changes slowly"),
    Metric("throughput/*", "Speed.", "steady"),
    Metric("time/*", "Seconds per phase of a step.", "steady"),
    Metric("learning_rate", "Learning rate of the step."),
    Metric("loss", "The objective. Its value says little in RL; read the reward."),
)
AXIS_KEYS = {"step", "time", "gradient_steps"}

# --- Data ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as read from its directory; `rows` has one mapping per step, in order."""

    name: str
    rows: list[dict]
    samples: list[dict]
    summary: dict
    config: str

    def match(self, pattern: str) -> list[str]:
        """Metric names that fit a pattern and hold at least one number, in natural order."""
        names = {name for row in self.rows for name, value in row.items() if _number(value)}
        return sorted(fnmatch.filter(names - AXIS_KEYS, pattern), key=_natural)

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """(gradient steps, values) of the rows that have `key`; null becomes NaN."""
        known = [
            (r["step"], r["gradient_steps"]) for r in self.rows if _number(r.get("gradient_steps"))
        ]
        rows = [row for row in self.rows if key in row]
        x = np.array([row["step"] for row in rows], float)
        if known:  # rows without the count (an evaluation) lie between those that have it
            x = np.interp(x, *zip((0, 0), *known, strict=True))
        y = np.array([row[key] if _number(row[key]) else math.nan for row in rows], float)
        return x, y

    def last(self, key: str) -> float:
        return next((row[key] for row in reversed(self.rows) if _number(row.get(key))), math.nan)


def read_run(workdir: pathlib.Path) -> Run:
    if not workdir.is_dir():
        raise ValueError(f"{workdir}: no such directory; give the workdir of a training run")
    metrics = workdir / "metrics.jsonl"
    rows = read_jsonl(metrics) if metrics.exists() else []
    if not rows:
        raise ValueError(f"{metrics}: missing or empty; train at least one step first")
    merged: dict[float, dict] = {}
    for row in rows:
        if not _number(row.get("step")):
            raise ValueError(f"{metrics}: a row has no step; this is not a metrics file of a run")
        merged.setdefault(row["step"], {}).update(row)
    samples, summary, config = (
        workdir / n for n in ("samples.jsonl", "summary.json", "config.gin")
    )
    try:
        facts = json.loads(summary.read_bytes()) if summary.exists() else {}
    except ValueError:
        facts = None
    if not isinstance(facts, dict):
        raise ValueError(f"{summary}: not a JSON object; mend or delete it")
    return Run(
        name=str(facts.get("name") or workdir.resolve().name),
        rows=[merged[step] for step in sorted(merged)],
        samples=read_jsonl(samples) if samples.exists() else [],
        summary=facts,
        config=config.read_text(encoding="utf-8", errors="replace") if config.exists() else "",
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _natural(name: str) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# --- Plots ---------------------------------------------------------------------------------------

# Mid-tones, legible on white and on the dark page. INK and GRID are replaced in the SVG by colours
# of the page, so that the plots follow its light and dark mode.
COLORS = ("#3a7fc8", "#d9792f", "#2f9d7b", "#9169c9", "#c9505f", "#8a929c")
INK, GRID = "#24292e", "#d4d8de"
RC = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.prop_cycle": matplotlib.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}
POINTS = 600


def draw(run: Run, panel: Panel, path: pathlib.Path) -> str:
    """Draws a panel to a PNG file and returns it as inline SVG; "" when its metrics are missing."""
    keys = {}
    for pattern, label in panel.keys.items():
        for key in run.match(pattern):
            keys.setdefault(key, label or _label(key))
    series = {label: run.series(key) for key, label in keys.items()}
    if panel.log:
        series = {label: (x, np.abs(y)) for label, (x, y) in series.items() if np.any(y != 0)}
    if not series:
        return ""
    with matplotlib.rc_context({**RC, "svg.hashsalt": panel.name}):
        size = (5.4, 3.1) if panel in PANELS[:MAIN_PANELS] else (4.4, 2.8)
        figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        if panel.style == "stack":
            x = np.unique(np.concatenate([x for x, _ in series.values()]))
            heights = [np.interp(x, *_finite(x_, smooth(y)), 0, 0) for x_, y in series.values()]
            axes.stackplot(x, heights, labels=series, alpha=0.75, linewidth=0, colors=COLORS)
        elif panel.style == "depth":
            _plot_by_depth(axes, series)
        else:
            for (label, (x, y)), color in zip(series.items(), itertools.cycle(COLORS)):
                _plot_line(axes, x, y, label, color)
        if panel.style == "band":
            (key,) = keys
            (x, low), (_, high) = run.series(f"{key}_low"), run.series(f"{key}_high")
            if len(low) == len(high):
                axes.fill_between(x, low, high, alpha=0.18, linewidth=0)
        _finish(axes, panel)
        figure.savefig(path, dpi=160, facecolor="white")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline_svg(buffer.getvalue(), panel.title)


def _label(key: str) -> str:
    """The metric's own name in words; a dollar sign would start a formula."""
    name = key.split("/")[-1].removeprefix("agreement_")
    return name.replace("_", " ").replace("$", r"\$")


def _plot_line(axes, x: np.ndarray, y: np.ndarray, label: str, color: str) -> None:
    """Few points as they are; many as a faint line under their running mean."""
    if len(x) <= 40:
        axes.plot(x, y, color=color, label=label, marker="o", markersize=3)
    elif label == "|k1|":  # the mean of an absolute value would not be the KL
        axes.plot(*thin(x, y), color=color, label=label, alpha=0.45, linewidth=0.8, zorder=1.5)
    else:
        axes.plot(*thin(x, y), color=color, alpha=0.35, linewidth=0.8)
        axes.plot(*thin(x, smooth(y)), color=color, label=label, zorder=3)


def _plot_by_depth(axes, series: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Running means only, coloured from the first layer to the last."""
    ramp = matplotlib.colormaps["viridis"](np.linspace(0.25, 0.9, len(series)))
    for index, (label, (x, y)) in enumerate(series.items()):
        named = index in (0, len(series) - 1)
        axes.plot(*thin(x, smooth(y)), color=ramp[index], label=label if named else None)


def _finish(axes, panel: Panel) -> None:
    plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
    if panel.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        subs = (1,) if high > 30 * low else (1, 2, 5)
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    elif axes.get_ylim()[0] < 0 and panel.unit.startswith(("share", "seconds")):
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain)
    axes.xaxis.set_major_formatter(plain)
    named = len(axes.get_legend_handles_labels()[1]) > 1
    if named:  # in a row between title and plot, where it hides nothing
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=4,
            columnspacing=1,
            handlelength=1.2,
        )
    axes.set_title(panel.title, loc="left", pad=24 if named else 8)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel(panel.unit)


def smooth(y: np.ndarray) -> np.ndarray:
    """Centred running mean over 1/20 of the run, at least 5 points; NaNs are left out."""
    width = max(5, len(y) // 20) | 1
    finite = np.isfinite(y)
    total, count = (
        np.convolve(values, np.ones(width), "full")[width // 2 :][: len(y)]
        for values in (np.where(finite, y, 0), finite.astype(float))
    )
    return np.where(count > 0, total / np.maximum(count, 1), math.nan)


def thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most `POINTS` points, the lowest and highest of each stretch: spikes stay seen."""
    if len(x) <= POINTS:
        return x, y
    keep = {0, len(x) - 1}
    finite = np.isfinite(y)
    for part in np.array_split(np.arange(len(x)), POINTS // 2 - 1):
        keep.add(int(part[np.where(finite[part], y[part], np.inf).argmin()]))
        keep.add(int(part[np.where(finite[part], y[part], -np.inf).argmax()]))
    index = sorted(keep)
    return x[index], y[index]


def _finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _inline_svg(text: str, title: str) -> str:
    """Makes matplotlib's SVG part of the page: no size or address, the page's font and colours."""
    box = re.search(r'viewBox="[^"]*"', text)[0]
    text = text[text.index("<defs>") :]  # behind the header and the metadata
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # group names, the same in every plot
    text = re.sub(r"font-family:[^;\"]*", "font-family: inherit", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return f'<svg role="img" aria-label="{_escape(title)}" {box}>{text}'


# --- The page ------------------------------------------------------------------------------------

SPREAD, NEWEST = 4, 4  # samples shown: over the run, and of the last step
SHOWN_CHARACTERS, SHOWN_TOKENS = 20_000, 3_000
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
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
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

CURVES = "Faint: single steps. Strong: running mean over a twentieth of the run."
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def write_report(workdir: str | os.PathLike) -> pathlib.Path:
    """Writes `workdir/report.html` and `workdir/plots/*.png`; returns the path of the page.

    Raises:
      ValueError: one line, when the directory or its metrics are missing, empty or damaged.
    """
    workdir = pathlib.Path(workdir)
    run = read_run(workdir)
    (workdir / "plots").mkdir(exist_ok=True)
    plots = [draw(run, panel, workdir / "plots" / f"{panel.name}.png") for panel in PANELS]
    main, more = (
        "".join(f"<figure>{plot}</figure>" for plot in part if plot)
        for part in (plots[:MAIN_PANELS], plots[MAIN_PANELS:])
    )
    body = (
        _header(run),
        f'<div class="grid">{main}</div><p class="soft note">{CURVES}</p>',
        "<h2>What to watch</h2>",
        _metric_table(run),
        f'<h2>More curves</h2><div class="grid small">{more}</div>' if more else "",
        _samples(run.samples),
        _config(run.config),
        _other_keys(run),
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{_escape(run.name)}</title><style>{CSS}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )
    write_atomic(workdir / "report.html", page)
    return workdir / "report.html"


def _header(run: Run) -> str:
    facts = dict(run.summary)
    facts.pop("name", None)
    before, after = (
        _estimate(facts.pop(key, None)) or _evaluation(run, end)
        for key, end in (("score_before", 0), ("score_after", -1))
    )
    gain = _estimate(facts.pop("gain", None))
    cards = []
    if before and after:
        spread = [f"{low:.3f}–{high:.3f}" for _, low, high in (before, after) if _number(low)]
        note = f"95 %: {' → '.join(spread)}" if len(spread) == 2 else "no interval recorded"
        cards.append(("Held-out score", f"{before[0]:.3f} → {after[0]:.3f}", note))
        points = 100 * (gain[0] if gain else after[0] - before[0])
        paired = gain and _number(gain[1])
        note = f"95 %: {100 * gain[1]:+.1f} to {100 * gain[2]:+.1f}" if paired else "after − before"
        cards.append(("Points gained", f"{points:+.1f}", note))
    last = run.rows[-1]
    updates = last.get("gradient_steps")
    cards.append(
        ("Steps", f"{last['step']:,}", f"{updates:,.0f} updates" if _number(updates) else "")
    )
    stamps = [row["time"] for row in run.rows if _number(row.get("time"))]
    seconds = facts.pop("wall_time_s", None)
    if not _number(seconds):
        seconds = stamps[-1] - stamps[0] if stamps else math.nan
    cards.append(("Wall time", _duration(seconds), ""))
    skipped = facts.pop("skipped_updates", None)
    if not _number(skipped):
        skipped = run.last("gradient/skipped")
    if _number(skipped):
        cards.append(("Skipped updates", f"{skipped:,.0f}", "not finite"))
    boxes = "".join(
        f"<div><small>{name}</small><b>{value}</b><small>{note}</small></div>"
        for name, value, note in cards
    )
    listed = "".join(f"<dt>{_escape(k)}</dt><dd>{_escape(_text(v))}</dd>" for k, v in facts.items())
    return (
        f'<header><h1>{_escape(run.name)}</h1><div class="soft">jaxrl_stable training run</div>'
        f'<div class="cards">{boxes}</div>{f"<dl>{listed}</dl>" if listed else ""}</header>'
    )


def _evaluation(run: Run, end: int) -> tuple[float, float, float] | None:
    rows = [row for row in run.rows if _number(row.get("eval/avg_at_k"))]
    if len(rows) < 2:
        return None
    row = {f"eval/avg_at_k{part}": math.nan for part in ("_low", "_high")} | rows[end]
    return tuple(row[f"eval/avg_at_k{part}"] for part in ("", "_low", "_high"))


def _estimate(value: Any) -> tuple[float, float, float] | None:
    if not isinstance(value, dict) or not _number(value.get("value")):
        return None
    return value["value"], value.get("low", math.nan), value.get("high", math.nan)


def _metric_table(run: Run) -> str:
    rows, seen = [], set()
    for metric in METRICS:
        keys = [key for key in run.match(metric.keys) if key not in seen]
        seen.update(keys)
        if not keys or not metric.meaning:
            continue
        # A large family (a value per layer) takes one row: its pattern, the range of last values.
        families = {metric.keys: keys} if len(keys) > 4 else {key: [key] for key in keys}
        for name, members in families.items():
            low, high = (end(map(run.last, members)) for end in (min, max))
            verdict = ""
            if math.isfinite(metric.low):
                fine = metric.low <= low and high <= metric.high
                verdict = f'<b class="{"good" if fine else "bad"}">{"ok" if fine else "look"}</b>'
            shown = _figure(low) if low == high else f"{_figure(low)} … {_figure(high)}"
            rows.append(
                f'<tr><td><code>{_escape(name)}</code></td><td class="n">{shown}</td>'
                f'<td>{verdict}</td><td class="hide">{_escape(metric.meaning)}</td>'
                f"<td>{_escape(metric.healthy)}</td></tr>"
            )
    return (
        '<div class="scroll"><table><tr><th>Metric</th><th>Last value</th><th></th>'
        f'<th class="hide">What it is</th><th>Healthy</th></tr>{"".join(rows)}</table></div>'
    )


def _other_keys(run: Run) -> str:
    """Metrics that no table or plot above has: unknown ones, and those that never were finite."""
    patterns = [*(m.keys for m in METRICS), *(key for panel in PANELS for key in panel.keys)]
    finite = set(run.match("*"))
    known = {name for pattern in patterns for name in fnmatch.filter(finite, pattern)}
    names = {name for row in run.rows for name in row} - AXIS_KEYS - known
    rows = "".join(
        f"<tr><td><code>{_escape(name)}</code></td>"
        f'<td class="n">{_figure(run.last(name))}</td></tr>'
        for name in sorted(names, key=_natural)
    )
    return f"<h2>Other metrics</h2><table class=other>{rows}</table>" if names else ""


def _config(text: str) -> str:
    if not text:
        return ""
    text = _escape(SECRET.sub(r"\1 (left out)", text))
    return (
        f"<h2>Configuration</h2><details><summary>config.gin</summary><pre>{text}</pre></details>"
    )


def _samples(rows: Sequence[dict]) -> str:
    if not rows:
        return ""
    last = rows[-1].get("step")
    newest = [row for row in rows if row.get("step") == last][:NEWEST]
    earlier = [row for row in rows if row.get("step") != last]
    picks = np.linspace(0, len(earlier) - 1, min(SPREAD, len(earlier))).astype(int)
    spread = [earlier[index] for index in picks]
    legend = ""
    if any(row.get("tokens") for row in (*newest, *spread)):
        legend = (
            '<p class="soft">Background: importance weight π/μ, '
            '<span class="t" style="background:rgba(var(--warm),.5)">above 1</span> or '
            '<span class="t" style="background:rgba(var(--cool),.5)">below 1</span>, '
            'deepest from a factor of 2 on. <span class="t clipped">Underlined</span>: '
            "clipped, no gradient. "
            '<span class="t routed">Framed</span>: the experts of sampler and trainer differ. '
            "Point at a token for its figures.</p>"
        )
    shown, folded = ("".join(map(_sample, group)) for group in (newest, spread))
    if folded:
        folded = f"<details><summary>Earlier in the run</summary><br>{folded}</details>"
    return f"<h2>Samples</h2>{legend}{shown}{folded}"


def _sample(row: Mapping[str, Any]) -> str:
    score = row.get("score")
    color = ("good" if score > 0 else "bad") if _number(score) else ""
    facts = [f"step {_text(row.get('step'))}"] if row.get("step") is not None else []
    facts += [_text(row["status"])] if row.get("status") else []
    facts += [f"advantage {row['advantage']:+.3f}"] if _number(row.get("advantage")) else []
    parts = [("prompt", _block(row.get("prompt"))), ("response", _response(row))]
    if row.get("answer") is not None:
        parts.append(("reference answer", _block(row["answer"])))
    blocks = "".join(f"<small>{name}</small><pre>{text}</pre>" for name, text in parts)
    value = f"{score:g}" if _number(score) else "–"
    return (
        f'<article><b class="{color}">score {value}</b> <span class="soft">· '
        f"{_escape(' · '.join(facts))}</span><br>{blocks}</article>"
    )


def _response(row: Mapping[str, Any]) -> str:
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return _block(row.get("response"))
    columns = [row.get(key) or [] for key in ("log_weight", "clipped", "differs")]
    spans = []
    for index, token in enumerate(tokens[:SHOWN_TOKENS]):
        weight, clipped, differs = (c[index] if index < len(c) else None for c in columns)
        style, notes = "", []
        if _number(weight):
            # The square root makes everyday differences of a few per cent visible.
            depth = 0.6 * math.sqrt(min(1.0, abs(weight) / math.log(2)))
            style = f"background:rgba(var(--{'warm' if weight > 0 else 'cool'}),{depth:.2f})"
            notes.append(f"weight {math.exp(min(weight, 50.0)):.3g}")
        if clipped:
            notes.append("clipped")
        if differs:
            notes.append(f"experts differ in {_text(differs)} layer{'s' * (differs != 1)}")
        names = f"t{' clipped' * bool(clipped)}{' routed' * bool(differs)}"
        spans.append(
            f'<span class="{names}" style="{style}" data-t="{_escape(" · ".join(notes))}">'
            f"{_escape(_text(token))}</span>"
        )
    rest = len(tokens) - SHOWN_TOKENS
    return "".join(spans) + (f" <i>… {rest:,} more tokens</i>" if rest > 0 else "")


def _block(value: Any) -> str:
    text = _text(value)
    rest = len(text) - SHOWN_CHARACTERS
    tail = f" <i>… {rest:,} more characters</i>" if rest > 0 else ""
    return _escape(text[:SHOWN_CHARACTERS]) + tail


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


def _escape(text: str) -> str:
    return html.escape(visible(text), quote=True)


def _figure(value: float) -> str:
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds} s"
        if minutes
        else f"{seconds} s"
    )


def main(_: Sequence[str]) -> None:
    try:
        path = write_report(flags.FLAGS.workdir)
    except (OSError, ValueError) as error:
        raise SystemExit(f"report: {error}") from None
    print(path)


if __name__ == "__main__":
    # Defined here, not on import: the training program, which imports this file, has its own flag
    # of the same name.
    flags.DEFINE_string("workdir", None, "Directory of the run to report on.", required=True)
    app.run(main)
