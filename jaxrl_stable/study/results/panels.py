"""The plots of a study: the paper's four panels, survival, and the final score of each seed.

Every line has a number and a colour. From the seventh line on, colours repeat with other dashes.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import matplotlib.axes
import matplotlib.figure
import matplotlib.lines
import numpy as np
import scipy.optimize
from jaxtyping import Float

from jaxrl_stable.report.drawing import INK, STYLE, finish_axes, inline_svg
from jaxrl_stable.report.text import escape
from jaxrl_stable.statistics import mean_over_seeds
from jaxrl_stable.study.results.analysis import CellRuns, Outcome, band
from jaxrl_stable.study.results.survival import survival

# Okabe and Ito's hues, shifted until every pair can be told apart with normal, red-blind,
# green-blind and blue-blind vision (CIE76 difference at least 19 under Machado's simulation) and
# each contrasts with both the white and the dark page (ratio 2.9). INK is the page's text colour.
COLORS = ("#3668cc", "#f47106", "#1a9569", "#d761a6", "#cf2f15", INK)
DASHES = ("solid", (0, (4, 1.5)), (0, (1, 1.2)))
DRAWN_POINTS = 200
SURVIVAL, FINAL = "Survival", "Final score"


@dataclasses.dataclass(frozen=True)
class View:
    """A panel that shows one curve of the records."""

    curve: str
    title: str
    unit: str
    log: bool = False


# As in arXiv:2512.01374, Figs 1–4.
VIEWS = (
    View("score", "Held-out score", "fraction"),
    View("kl", "Training–inference KL", "nats per token", log=True),
    View("reward", "Training reward", "mean reward"),
    View("entropy", "Entropy", "nats per token"),
)


def panels(
    figure: str, cells: Sequence[CellRuns], outcomes: Mapping[str, Sequence[Outcome]]
) -> list[str]:
    """Returns all panels of a figure as inline SVG, except curves that were not recorded."""
    drawings: list[tuple[str, Callable[[matplotlib.axes.Axes], None]]] = [
        (view.title, lambda axes, view=view: draw_view(axes, cells, view))
        for view in VIEWS
        if any(
            view.curve == "score" or run["curves"].get(view.curve) for c in cells for run in c.runs
        )
    ]
    drawings += [
        (SURVIVAL, lambda axes: draw_survival(axes, [outcomes[c.name] for c in cells])),
        (FINAL, lambda axes: draw_final(axes, [outcomes[c.name] for c in cells])),
    ]
    found = []
    for title, drawing in drawings:
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": f"{figure} {title}"}):
            canvas = matplotlib.figure.Figure(figsize=(4.4, 3.0), layout="constrained")
            drawing(canvas.subplots())
            found.append(inline_svg(canvas, title))
    return found


def write_figure(cells: Sequence[CellRuns], path: pathlib.Path, title: str = "") -> None:
    """Writes the paper's four panels for some cells as one PNG, with a legend below."""
    with matplotlib.rc_context(STYLE):
        rows = math.ceil(len(cells) / 3)
        canvas = matplotlib.figure.Figure(figsize=(9, 6 + 0.25 * rows), layout="constrained")
        for axes, view in zip(canvas.subplots(2, 2).flat, VIEWS):
            draw_view(axes, cells, view)
        handles = [
            matplotlib.lines.Line2D(
                [], [], label=f"{i + 1}  {cell.name}".replace("$", r"\$"), **look(i)
            )
            for i, cell in enumerate(cells)
        ]
        canvas.legend(handles=handles, loc="outside lower center", ncols=3, handlelength=2.4)
        if title:
            canvas.suptitle(title, fontweight="bold")
        canvas.savefig(path, dpi=160, facecolor="white")


def legend(cells: Sequence[CellRuns]) -> str:
    """Returns the legend: number, line and name of each cell."""
    items = "".join(f"<li>{swatch(i)} {escape(cell.name)}</li>" for i, cell in enumerate(cells))
    return f'<ol class="legend">{items}</ol>'


def swatch(index: int) -> str:
    """Returns number and line sample of a cell in its figure."""
    style = look(index)
    color = "currentColor" if style["color"] == INK else style["color"]
    dashes = style["linestyle"]
    # Matplotlib gives dashes in line widths, SVG in user units; the line is 2 wide.
    gaps = "" if dashes == "solid" else " ".join(f"{2 * gap:g}" for gap in dashes[1])
    return (
        f'<b>{index + 1}</b> <svg class="swatch" viewBox="0 0 26 6" aria-hidden="true">'
        f'<path d="M0 3H26" stroke="{color}" stroke-width="2" stroke-dasharray="{gaps}"/></svg>'
    )


def look(index: int) -> dict:
    """Returns colour and dashes of the line of a cell."""
    return {
        "color": COLORS[index % len(COLORS)],
        "linestyle": DASHES[index // len(COLORS) % len(DASHES)],
    }


def draw_view(axes: matplotlib.axes.Axes, cells: Sequence[CellRuns], view: View) -> None:
    """Draws the mean over seeds of each cell, with its band."""
    if view.log:
        axes.set_yscale("log")
    ends = {}
    for index, cell in enumerate(cells):
        x, mean, low, high = thinned(band(cell, view.curve))
        if not len(x):
            continue
        axes.plot(x, mean, zorder=3, **look(index))
        axes.fill_between(x, low, high, color=look(index)["color"], alpha=0.16, linewidth=0)
        known = mean[np.isfinite(mean)]
        if len(known):
            ends[index] = known[-1]
    finish_axes(axes, view.log)
    number_lines(axes, ends)
    axes.set_title(view.title, loc="left", pad=8)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel(view.unit)


def draw_survival(axes: matplotlib.axes.Axes, groups: Sequence[Sequence[Outcome]]) -> None:
    """Draws Kaplan–Meier curves, offset slightly so that equal ones do not hide each other."""
    ends = {}
    for index, group in enumerate(groups):
        curve = survival(group)
        apart = 0.012 * (index - (len(groups) - 1) / 2)
        axes.step(curve.steps, curve.share + apart, where="post", zorder=3, **look(index))
        axes.fill_between(
            curve.steps,
            curve.low + apart,
            curve.high + apart,
            step="post",
            color=look(index)["color"],
            alpha=0.10,
            linewidth=0,
        )
        ends[index] = curve.share[-1] + apart
    axes.set_ylim(-0.06, 1.08)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1))
    finish_axes(axes)
    number_lines(axes, ends)
    axes.set_title("Runs without collapse", loc="left", pad=8)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel("share of runs")


def draw_final(axes: matplotlib.axes.Axes, groups: Sequence[Sequence[Outcome]]) -> None:
    """Draws every seed, marked by its state, and the mean with Student's interval."""
    marks = {"stable": "o", "not learned": "s", "collapsed": "x"}
    for index, group in enumerate(groups):
        color = look(index)["color"]
        for k, run in enumerate(group):
            y = index + 0.5 * ((k + 0.5) / len(group) - 0.5)
            axes.plot(run.final, y, marks[run.state], color=color, markersize=4, alpha=0.65)
        values = [run.final for run in group if math.isfinite(run.final)]
        if len(values) > 1:
            mean = mean_over_seeds(values)
            axes.plot((mean.low, mean.high), (index, index), color=color, linewidth=1.5)
            axes.plot((mean.value,) * 2, (index - 0.38, index + 0.38), color=color, linewidth=2.5)
    axes.set_yticks(range(len(groups)), [str(i + 1) for i in range(len(groups))])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_title("Final score by seed", loc="left", pad=8)
    axes.set_xlabel("mean of the last quarter of the evaluations")
    axes.set_ylabel("cell")


def number_lines(axes: matplotlib.axes.Axes, ends: Mapping[int, float]) -> None:
    """Writes the number of each line next to its right end, without overlaps."""
    low, high = axes.get_ylim()
    forward = axes.transData.transform
    bottom, top = (forward((0, value))[1] for value in (low, high))
    heights = {i: (forward((0, value))[1] - bottom) / (top - bottom) for i, value in ends.items()}
    for index, height in spread_out(heights, 0.065).items():
        axes.annotate(
            str(index + 1),
            (1.015, height),
            xycoords="axes fraction",
            color=look(index)["color"],
            fontsize=9,
            fontweight="bold",
            va="center",
        )


def spread_out(heights: Mapping[int, float], gap: float) -> dict[int, float]:
    """Moves heights in [0, 1] as little as needed to be `gap` apart, in the same order."""
    order = sorted(heights, key=heights.__getitem__)
    if not order:
        return {}
    gap = min(gap, 1 / max(1, len(order) - 1))
    steps = gap * np.arange(len(order))
    # Without the gaps, "in the same order" is isotonic regression.
    rising = scipy.optimize.isotonic_regression([heights[i] for i in order] - steps).x
    return dict(zip(order, np.clip(rising, 0, 1 - steps[-1]) + steps))


def thinned(
    columns: Sequence[Float[np.ndarray, "points"]],
) -> list[Float[np.ndarray, "points"]]:
    """Keeps at most `DRAWN_POINTS` points of each column; the columns are smooth already."""
    count = len(columns[0])
    keep = np.unique(np.linspace(0, count - 1, min(count, DRAWN_POINTS)).astype(int))
    return [column[keep] for column in columns]
