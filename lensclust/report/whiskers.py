"""Whisker plot of a claim: a dot, its interval, and its controls as ticks."""

from __future__ import annotations

import math
import sys
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT, _MARGIN = 150, 22, 6


def whiskers(claim: dict[str, Any]) -> Markup:
    """An SVG of an estimate with its 95 % interval and its controls; empty without numbers.

    It repeats the numbers beside it, so blind readers miss nothing.

    >>> claim = {"estimate": 0.5, "ci95": [0.4, 0.6], "control": {"permuted labels": 0.0}}
    >>> str(whiskers(claim))[:4], str(whiskers(claim | {"estimate": None}))
    ('<svg', '')
    """
    estimate, controls = _finite(claim["estimate"]), [*map(_finite, claim["control"].values())]
    low, high = (_finite(end) for end in claim["ci95"])
    if estimate is None:
        return Markup("")
    marks = [value for value in (estimate, low, high, 0.0, *controls) if value is not None]
    least, most = min(marks), max(marks)
    span = (most - least) or 1.0
    if not math.isfinite(span):
        return Markup("")

    def place(value: float) -> str:
        return f"{_MARGIN + (_WIDTH - 2 * _MARGIN) * (value - least) / span:.1f}"

    middle = _HEIGHT / 2
    parts = [f'<line class="zero" x1="{place(0.0)}" x2="{place(0.0)}" y1="0" y2="{_HEIGHT}"/>']
    parts += [
        f'<line class="tick" x1="{place(value)}" x2="{place(value)}" y1="3" y2="{_HEIGHT - 3}"/>'
        for value in controls
        if value is not None
    ]
    if low is not None and high is not None:
        parts.append(
            f'<line class="whisker" x1="{place(low)}" x2="{place(high)}" y1="{middle}" '
            f'y2="{middle}"/>'
        )
    parts.append(f'<circle cx="{place(estimate)}" cy="{middle}" r="4"/>')
    return Markup(
        f'<svg class="whiskers" aria-hidden="true" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        f'width="{_WIDTH}" height="{_HEIGHT}">{"".join(parts)}</svg>'
    )


def _finite(value: Any) -> float | None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    # An integer in a file may be larger than any float.
    return float(value) if abs(value) <= sys.float_info.max else None
