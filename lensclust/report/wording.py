"""Values of a run as text in the page."""

from __future__ import annotations

import base64
import json
import math
from decimal import Decimal
from typing import Any

import pandas as pd
from markupsafe import Markup


def number(value: Any) -> str:
    """A number in a table: three decimals, more only if all three would be zero.

    >>> number(0.91234), number(0.00012), number(None), number(3), number(12.0), number(-math.inf)
    ('0.912', '0.00012', '–', '3', '12', '−∞')
    """
    if value is None or value is pd.NA or value is pd.NaT:
        return "–"
    if isinstance(value, int) and abs(value) >= 10**30:
        return f"{Decimal(value):.3g}"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == round(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 5e-4 or abs(value) >= 1e6 else f"{value:.3f}"


def facts(config: dict[str, Any], provenance: dict[str, Any]) -> tuple[str, ...]:
    """The line below the heading: preset, seeds, date, machine."""
    flat = dict(flatten(provenance))

    def first(*names: str) -> str | None:
        found = [text for key, text in flat.items() if key.rsplit(".", 1)[-1] in names]
        return found[0] if found else None

    preset, seeds = config.get("preset"), config.get("seeds")
    count = len(seeds) if isinstance(seeds, list) else seeds
    facts = [
        f"preset {preset}" if preset is not None else None,
        f"{count} seed{'' if count == 1 else 's'}" if count is not None else None,
        first("finished", "started", "created", "date"),
        first("device", "machine"),
    ]
    return tuple(fact for fact in facts if fact)


def flatten(node: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs.

    >>> flatten({"a": 1, "b": {"c": [1, 2], "d": None}})
    [('a', '1'), ('b.c', '1, 2'), ('b.d', '–')]
    """
    pairs: list[tuple[str, str]] = []
    for key, item in node.items():
        if isinstance(item, dict):
            pairs += flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            simple = not any(isinstance(part, (dict, list)) for part in item)
            text = ", ".join(map(str, item)) if simple else json.dumps(item, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
        else:
            # Unrounded: a learning rate or a duration is quoted from here.
            pairs.append((f"{prefix}{key}", "–" if item is None else str(item)))
    return pairs


def grouped(provenance: dict[str, Any]) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """One table for the plain values, one for each nested part."""
    plain = {key: item for key, item in provenance.items() if not isinstance(item, dict)}
    nested = {key: item for key, item in provenance.items() if isinstance(item, dict)}
    groups = {"run": plain, **nested} if plain else nested
    return [(name, tuple(flatten(part))) for name, part in groups.items() if part]


def data_uri(text: str, kind: str) -> str:
    """A text as a ``data:`` URI."""
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def embedded_json(spec: dict[str, Any]) -> Markup:
    r"""JSON for a script element, where ``</`` and ``<!--`` would end or change the element.

    Numbers that JSON cannot represent are null.

    >>> embedded_json({"a": "</script>", "b": [math.nan, math.inf]})
    Markup('{"a": "\\u003c/script>", "b": [null, null]}')
    """
    try:
        content = json.dumps(spec, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except ValueError:
        known = json.loads(json.dumps(spec), parse_constant=lambda _: None)
        content = json.dumps(known, sort_keys=True, ensure_ascii=False)
    return Markup(content.replace("<", "\\u003c").replace("\u2028", "\\u2028"))
