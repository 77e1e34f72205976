"""Several charts in one picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from lensclust.errors import InputError
from lensclust.figures.files import renamed, specification
from lensclust.figures.style import Picture

# What only the whole picture may have; the look is the same in every chart.
_LOOK = ("$schema", "background", "config", "padding")
_WORDS = ("description", "usermeta")


def stack(charts: Sequence[Picture]) -> Picture:
    """Charts below each other, each with its own title, scales, legends and selection.

    Captions and alternative texts follow each other, once each.

    Raises:
        InputError: if there is no chart.

    >>> import pandas as pd
    >>> from lensclust import figures
    >>> frame = pd.DataFrame({"condition": ["a", "b"], "value": [0.7, 0.1]})
    >>> one, two = (figures.bars(frame, title=title, caption="") for title in ("One", "Two"))
    >>> [part["title"]["text"] for part in stack([one, two]).to_dict()["vconcat"]]
    [['One'], ['Two']]
    """
    if not charts:
        raise InputError("stack: no chart given, expected at least one")
    # Altair's own vconcat takes selections of one name for one selection, and fails on panels
    # of layers (altair 6.3), so the parts are put together as specifications.
    parts = [_own_names(specification(chart), index) for index, chart in enumerate(charts)]
    datasets, params = {}, []
    for part in parts:
        datasets |= part.get("datasets", {})
        params += part.get("params", [])
    apart = ("datasets", "params", *_LOOK, *_WORDS)
    whole = {key: parts[0][key] for key in _LOOK if key in parts[0]}
    whole |= {
        "vconcat": [{k: v for k, v in part.items() if k not in apart} for part in parts],
        "datasets": datasets,
        "params": params,
        "resolve": {"scale": dict.fromkeys(("color", "fill", "shape"), "independent")},
        "spacing": 28,
        "description": _joined(part.get("description", "") for part in parts),
        "usermeta": {
            "caption": _joined(part.get("usermeta", {}).get("caption", "") for part in parts),
            "title": _joined(
                (part.get("usermeta", {}).get("title", "") for part in parts), between="; "
            ),
        },
    }
    return alt.VConcatChart.from_dict(whole)


def _own_names(spec: dict[str, Any], index: int) -> dict[str, Any]:
    """``spec`` with views and selections that no other chart of the stack has."""
    held = spec.get("params", [])
    names = {name for param in held for name in (param["name"], *param.get("views", []))}
    return renamed(spec, {name: f"{name}_{index}" for name in names})


def _joined(texts: Iterable[str], *, between: str = " ") -> str:
    return between.join(dict.fromkeys(text for text in texts if text))
