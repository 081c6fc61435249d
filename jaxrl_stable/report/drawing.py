"""Drawing code shared by all pages: colours, axes, and inline SVG from matplotlib."""

from __future__ import annotations

import io
import re

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.ticker
import numpy as np
from jaxtyping import Float

from jaxrl_stable.report.text import escape

Points = Float[np.ndarray, "points"]

# Mid-tones, legible on light and dark pages. In the SVG, the page's colours replace INK and
# GRID, so that plots follow its light and dark modes.
COLORS = ("#3a7fc8", "#d9792f", "#2f9d7b", "#9169c9", "#c9505f", "#8a929c")
INK, GRID = "#24292e", "#d4d8de"
STYLE = {
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
MAX_POINTS = 600


def thin(x: Points, y: Points) -> tuple[Float[np.ndarray, "kept"], Float[np.ndarray, "kept"]]:
    """Keeps at most `MAX_POINTS` points: the extremes of each stretch, so spikes stay visible."""
    if len(x) <= MAX_POINTS:
        return x, y
    keep = {0, len(x) - 1}
    finite = np.isfinite(y)
    for part in np.array_split(np.arange(len(x)), MAX_POINTS // 2 - 1):
        keep.add(int(part[np.where(finite[part], y[part], np.inf).argmin()]))
        keep.add(int(part[np.where(finite[part], y[part], -np.inf).argmax()]))
    index = sorted(keep)
    return x[index], y[index]


def finish_axes(axes: matplotlib.axes.Axes, log: bool = False, share: bool = False) -> None:
    """Formats ticks and limits; logarithmic axes get suitable ticks, and shares start at ≥ 0."""
    if log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high > 5 * low:
            subs = (1,) if high > 30 * low else (1, 2, 5)
            axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=subs))
        else:  # the range is too small for powers of ten
            axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(5))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    elif share and axes.get_ylim()[0] < 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(tick)
    axes.yaxis.set_major_formatter(tick_log if log else tick)


def tick(value: int | float, _: int | None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:g}"


def tick_log(value: int | float, _: int | None) -> str:
    """Formats a tick as 1e-3 instead of 0.001, and as 1e-5 instead of 1e-05."""
    if not 0 < value < 0.01:
        return tick(value, _)
    mantissa, exponent = f"{value:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def inline_svg(figure: matplotlib.figure.Figure, title: str) -> str:
    """Returns a figure as inline SVG, without a fixed size, in the page's font and colours.

    Draw it under `STYLE` with its own `svg.hashsalt`, so that no two plots share an id.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)[0]
    text = text[text.index("<defs>") :]  # skips the header and the metadata
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r' id="[\w.]+_\d+"', "", text)  # group names repeat in every plot
    text = re.sub(r"font-family:[^;\"]*", "font-family: inherit", text)
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return f'<svg role="img" aria-label="{escape(title)}" {box}>{text}'
