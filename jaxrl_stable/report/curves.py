"""A run's curves: which metrics are drawn together, and how."""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping

import matplotlib
import matplotlib.axes
import matplotlib.figure
import numpy as np
from jaxtyping import Float

from jaxrl_stable.report.drawing import COLORS, STYLE, Points, finish_axes, inline_svg, thin
from jaxrl_stable.report.explanations import interval_names
from jaxrl_stable.report.run import LAYER, Run
from jaxrl_stable.statistics import smooth


@dataclasses.dataclass(frozen=True)
class Panel:
    """One plot.

    Attributes:
      name: name of its PNG file.
      title: title above the plot.
      unit: label of the vertical axis.
      lines: maps metrics to labels; labels are shown if there is more than one line.
      style: "lines"; "band", which adds a metric's interval; "depth", which colours the layers of a
        metric from first to last; or "stack", which stacks the metrics.
      log: whether the axis is logarithmic; it then shows absolute values.
    """

    name: str
    title: str
    unit: str
    lines: Mapping[str, str]
    style: str = "lines"
    log: bool = False


# As in arXiv:2512.01374, Figs 1–4.
PAPER_PANELS = (
    Panel("score", "Held-out score", "avg@k, fraction", {"eval/avg_at_k": "avg@k"}, style="band"),
    Panel(
        "mismatch_kl",
        "Training–inference KL",
        "nats per token",
        # Two estimators of one KL. The paper plots k1, whose mean over a batch can be negative, so
        # this axis shows |k1|. k3 = e^Δ − 1 − Δ is never negative.
        {"mismatch/kl_k3_token_mean": "k3", "mismatch/kl_k1_token_mean": "|k1|"},
        log=True,
    ),
    Panel(
        "reward",
        "Reward",
        "mean reward",
        {"reward/mean": "training", "eval/reward": "held-out"},
    ),
    Panel("entropy", "Entropy", "nats per token", {"entropy": "entropy"}),
)
MORE_PANELS = (
    Panel(
        "length",
        "Response length",
        "tokens",
        {"response/length": "training", "eval/length": "held-out"},
    ),
    Panel(
        "truncated",
        "Truncated responses",
        "share",
        {"response/truncated_share": "training", "eval/truncated_share": "held-out"},
    ),
    Panel(
        "invalid",
        "Responses without a readable answer",
        "share",
        {"reward/invalid_share": "training", "eval/invalid_share": "held-out"},
    ),
    Panel(
        "zero_variance",
        "Groups without gradient",
        "share of groups",
        {"reward/zero_variance_share": "equal scores"},
    ),
    Panel("weight_max", "Largest importance weight", "π/μ", {"weight/raw_max": "raw"}, log=True),
    Panel("ess", "Effective sample size", "share of tokens", {"weight/ess": "ESS"}),
    Panel(
        "clip",
        "Clipped and truncated tokens",
        "share of tokens",
        {
            "clip/high_share": "clipped, high",
            "clip/low_share": "clipped, low",
            "weight/truncated_share": "truncated",
        },
    ),
    Panel(
        "staleness",
        "Staleness, KL",
        "nats per token",
        {"staleness/kl_k3_token_mean": "k3"},
        log=True,
    ),
    Panel(
        "validity",
        "First-order approximation",
        "error of the value",
        {
            "validity/value_error": "whole",
            "validity/mismatch_value_error": "mismatch",
            "validity/staleness_value_error": "staleness",
        },
        log=True,
    ),
    Panel("gradient_norm", "Gradient norm", "before clipping", {"gradient/norm": "norm"}, log=True),
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
        {f"routing/agreement_layer_{LAYER}": "layer"},
        style="depth",
    ),
    Panel(
        "expert_load", "Expert load, worst", "load × E − 1", {"experts/max_violation": "violation"}
    ),
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
        {
            "time/rollout": "rollout",
            "time/reward": "reward",
            "time/score": "score",
            "time/update": "update",
        },
        style="stack",
    ),
    Panel("throughput", "Throughput", "tokens/s", {"throughput/tokens_per_s": "tokens"}),
    Panel(
        "cold_start", "Cold start", "nats per token", {"sft/loss": "loss", "sft/entropy": "entropy"}
    ),
)


def draw(run: Run, panel: Panel, path: pathlib.Path) -> str:
    """Draws a panel to a PNG file.

    Returns:
      The panel as inline SVG; "" if the run lacks its metrics.
    """
    series = {
        label if layer == name else f"{label} {layer.removeprefix(name.removesuffix(LAYER))}": (
            run.series(layer)
        )
        for name, label in panel.lines.items()
        for layer in run.layers(name)
    }
    if panel.log:
        series = {label: (x, np.abs(y)) for label, (x, y) in series.items() if np.any(y != 0)}
    if not series:
        return ""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": panel.name}):
        size = (5.4, 3.1) if panel in PAPER_PANELS else (4.4, 2.8)
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
            (name,) = panel.lines
            (x, low), (_, high) = map(run.series, interval_names(name))
            if len(low) == len(high):
                axes.fill_between(x, low, high, alpha=0.18, linewidth=0)
        _finish(axes, panel)
        figure.savefig(path, dpi=160, facecolor="white")
        return inline_svg(figure, panel.title)


def _plot_line(axes: matplotlib.axes.Axes, x: Points, y: Points, label: str, color: str) -> None:
    """Plots a few points as they are, and many points as a faint line with their running mean."""
    if len(x) <= 40:
        axes.plot(x, y, color=color, label=label, marker="o", markersize=3)
    elif label == "|k1|":  # a running mean of absolute values would not estimate the KL
        axes.plot(*thin(x, y), color=color, label=label, alpha=0.45, linewidth=0.8, zorder=1.5)
    else:
        axes.plot(*thin(x, y), color=color, alpha=0.35, linewidth=0.8)
        axes.plot(*thin(x, smooth(y)), color=color, label=label, zorder=3)


def _plot_by_depth(axes: matplotlib.axes.Axes, series: Mapping[str, tuple[Points, Points]]) -> None:
    """Plots only running means, coloured from the first layer to the last."""
    ramp = matplotlib.colormaps["viridis"](np.linspace(0.25, 0.9, len(series)))
    for index, (label, (x, y)) in enumerate(series.items()):
        named = index in (0, len(series) - 1)
        axes.plot(*thin(x, smooth(y)), color=ramp[index], label=label if named else None)


def _finish(axes: matplotlib.axes.Axes, panel: Panel) -> None:
    finish_axes(axes, panel.log, panel.unit.startswith(("share", "seconds")))
    named = len(axes.get_legend_handles_labels()[1]) > 1
    if named:  # in a row between title and plot, where it covers nothing
        legend = axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=4,
            columnspacing=1,
            handlelength=1.2,
        )
        for handle in legend.get_lines():  # opaque, even if the line is faint
            handle.set(alpha=1, linewidth=1.5)
    axes.set_title(panel.title, loc="left", pad=24 if named else 8)
    axes.set_xlabel("gradient steps")
    axes.set_ylabel(panel.unit)


def _finite(
    x: Points, y: Points
) -> tuple[Float[np.ndarray, "finite"], Float[np.ndarray, "finite"]]:
    return x[np.isfinite(y)], y[np.isfinite(y)]
