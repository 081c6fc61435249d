"""Sampled responses; the background of each token shows its weight π_old/μ."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrl_stable.report.run import is_number
from jaxrl_stable.report.text import escape, plain

SPREAD, NEWEST = 4, 4  # samples shown: spread over the run, and from the last step
SHOWN_CHARACTERS, SHOWN_TOKENS = 20_000, 3_000
NO_TEXT = "∎"  # shown for a token that decodes to nothing, such as EOS
LEGEND = {
    "log_weight": (
        "Background: π_old/μ, the mismatch part of the importance weight, "
        '<span class="t" style="background:rgba(var(--warm),.5)">above 1</span> or '
        '<span class="t" style="background:rgba(var(--cool),.5)">below 1</span>, '
        "deepest for factors of 2 and more."
    ),
    "clipped": '<span class="t clipped">Underlined</span>: clipped, no gradient.',
    "differs": '<span class="t routed">Framed</span>: the experts of sampler and trainer differ.',
    "tokens": f"{NO_TEXT}: a token without text. Hover over a token for its values.",
}


def samples_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns samples from the last recorded step and, folded, a few earlier ones."""
    if not rows:
        return ""
    last = rows[-1].get("step")
    newest = [row for row in rows if row.get("step") == last][:NEWEST]
    earlier = [row for row in rows if row.get("step") != last]
    picks = np.linspace(0, len(earlier) - 1, min(SPREAD, len(earlier))).astype(int)
    spread = [earlier[index] for index in picks]
    shown, folded = map(articles, (newest, spread))
    if folded:
        folded = f"<details><summary>Earlier in the run</summary><br>{folded}</details>"
    return f"<h2>Samples</h2>{legend((*newest, *spread))}{shown}{folded}"


def legend(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the meaning of the token marks that occur in the rows."""
    notes = [note for key, note in LEGEND.items() if any(row.get(key) for row in rows)]
    return f'<p class="soft">{" ".join(notes)}</p>' if notes else ""


def articles(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns samples, grouped by problem."""
    return "".join(article(list(group)) for _, group in itertools.groupby(rows, _problem))


def article(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns one problem: its prompt, each response with its score, and the reference answer."""
    parts = [f"<small>prompt</small><pre>{block(rows[0].get('prompt'))}</pre>"]
    for row in rows:
        score = row.get("score")
        color = ("good" if score > 0 else "bad") if is_number(score) else ""
        facts = [f"step {plain(row['step'])}"] if row.get("step") is not None else []
        facts += [plain(row["status"])] if row.get("status") else []
        facts += [f"advantage {row['advantage']:+.3f}"] if is_number(row.get("advantage")) else []
        parts.append(
            f'<b class="{color}">score {f"{score:g}" if is_number(score) else "–"}</b> '
            f'<span class="soft">{escape(" · ".join(["", *facts]))}</span>'
            f"<pre>{response(row)}</pre>"
        )
    if rows[0].get("answer") is not None:
        parts.append(f"<small>reference answer</small><pre>{block(rows[0]['answer'])}</pre>")
    return f"<article>{''.join(parts)}</article>"


def response(row: Mapping[str, Any]) -> str:
    """Returns the response token by token if tokens were recorded, else as text."""
    tokens = row.get("tokens")
    if not isinstance(tokens, list) or not tokens:
        return block(row.get("response"))
    columns = [row.get(key) or [] for key in ("log_weight", "clipped", "differs")]
    spans = [
        token_span(plain(token), *(c[index] if index < len(c) else None for c in columns))
        for index, token in enumerate(tokens[:SHOWN_TOKENS])
    ]
    rest = len(tokens) - SHOWN_TOKENS
    return "".join(spans) + (f" <i>… {rest:,} more tokens</i>" if rest > 0 else "")


def token_span(
    text: str,
    log_weight: int | float | None,
    clipped: bool | None,
    differs: int | list[int] | None,
) -> str:
    """Returns a token as HTML, with its marks.

    Args:
      text: the decoded token.
      log_weight: log π_old − log μ, in nats.
      clipped: whether the objective's clipping removed its gradient.
      differs: layers in which sampler and trainer chose different experts, or their number.
    """
    style, notes = "", []
    if is_number(log_weight):
        # The square root makes typical differences of a few percent visible.
        depth = 0.6 * math.sqrt(min(1.0, abs(log_weight) / math.log(2)))
        style = f"background:rgba(var(--{'warm' if log_weight > 0 else 'cool'}),{depth:.2f})"
        notes.append(f"weight {math.exp(min(log_weight, 50.0)):.3g}")
    if clipped:
        notes.append("clipped")
    if differs:
        notes.append(f"experts differ in {_layers(differs)}")
    names = f"t{' clipped' * bool(clipped)}{' routed' * bool(differs)}"
    return (
        f'<span class="{names}" style="{style}" data-t="{escape(" · ".join(notes))}">'
        f"{escape(text or NO_TEXT)}</span>"
    )


def block(value: Any) -> str:
    """Returns a value as escaped text, truncated if it is too long to read."""
    text = plain(value)
    rest = len(text) - SHOWN_CHARACTERS
    tail = f" <i>… {rest:,} more characters</i>" if rest > 0 else ""
    return escape(text[:SHOWN_CHARACTERS]) + tail


def _layers(differs: int | list[int]) -> str:
    """Returns "2 layers" for a number, "layers 0, 3" for a list."""
    if isinstance(differs, list):
        return f"layer{'s' * (len(differs) != 1)} {', '.join(map(plain, differs))}"
    return f"{plain(differs)} layer{'s' * (differs != 1)}"


def _problem(row: Mapping[str, Any]) -> tuple:
    return row.get("prompt"), row.get("answer")
