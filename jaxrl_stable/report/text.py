"""Formats values as text for the page."""

from __future__ import annotations

import html
import json
import math
from typing import Any

from jaxrl_stable.text import visible


def escape(text: str) -> str:
    """Escapes text for use between tags or in quoted attributes; shows control characters."""
    return html.escape(visible(text), quote=True)


def plain(value: Any) -> str:
    """Formats a JSON value for a reader; does not escape it."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    return "–" if value is None else json.dumps(value, ensure_ascii=False)


def figure(value: int | float) -> str:
    """Formats a number with three significant digits, or as an integer with thousands commas."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"


def elapsed_time(seconds: int | float) -> str:
    """Formats a time as hours and minutes, or as minutes and seconds if it is below an hour."""
    if not math.isfinite(seconds):
        return "–"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
