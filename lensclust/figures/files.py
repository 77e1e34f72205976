"""Saving of charts, without browser or network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

import altair as alt
import vl_convert

from lensclust.errors import InputError
from lensclust.figures.style import Picture
from lensclust.storage import write_atomically

# Keys that only the top level of a figure may have; the style is the same in every chart.
_LOOK = ("$schema", "background", "config", "padding")
_WORDS = ("description", "usermeta")


def save(chart: Picture, folder: str | Path, name: str) -> Path:
    """Write ``name.vl.json`` (interactive) and ``name.svg`` (static); return the SVG's path.

    Each file is written atomically, and the same data give the same bytes.

    Raises:
        InputError: if ``name`` is not a plain file name.

    >>> import tempfile
    >>> import pandas as pd
    >>> from lensclust.figures import bars
    >>> frame = pd.DataFrame({"condition": ["best layer"], "value": [0.7]})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = save(bars(frame, title="ARI", caption=""), folder, "baselines")
    ...     print(path.name, sorted(p.name for p in path.parent.iterdir()))
    baselines.svg ['baselines.svg', 'baselines.vl.json']
    """
    if not re.fullmatch(r"[\w][\w.-]*", name):
        raise InputError(f"save: figure name {name!r} is not a plain file name")
    spec = specification(chart)
    content = json.dumps(spec, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_atomically(Path(folder) / f"{name}.vl.json", content + "\n")
    still = Path(folder) / f"{name}.svg"
    write_atomically(still, render_svg(spec))
    return still


def specification(chart: Picture) -> dict[str, Any]:
    """The Vega-Lite JSON of a chart, deterministic across processes.

    >>> import pandas as pd
    >>> from lensclust.figures import bars
    >>> frame = pd.DataFrame({"condition": ["a", "b"], "value": [0.7, 0.1]})
    >>> one, two = (bars(frame, title="t", caption="c") for _ in range(2))
    >>> specification(one) == specification(two)
    True
    """
    with alt.data_transformers.enable("default", max_rows=None):
        spec = chart.to_dict()
    # Altair numbers views in the order in which the process created them.
    names = dict.fromkeys(re.findall(r'"(view_\w+)"', json.dumps(spec)))
    stable = {name: f"view_{index}" for index, name in enumerate(names)}
    return renamed(spec, stable)


def render_svg(spec: dict[str, Any]) -> str:
    """Render a Vega-Lite specification as SVG, with stable ids and without network.

    >>> import pandas as pd
    >>> from lensclust.figures import bars
    >>> frame = pd.DataFrame({"condition": ["a"], "value": [0.7]})
    >>> render_svg(specification(bars(frame, title="t", caption="c")))[:4]
    '<svg'
    """
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    # Vega counts clip paths and gradients over the life of the process.
    seen: dict[str, str] = {}

    def renumber(match: re.Match[str]) -> str:
        new = seen.setdefault(match[2], f"{match[2].rstrip('0123456789')}{len(seen)}")
        return match[1] + new

    svg = re.sub(r"""(\bid="|url\(#)((?:clip|gradient_)\d+)""", renumber, svg)
    # Vega puts the description on the element around the figure, which a file lacks.
    description = str(spec.get("description", ""))
    return svg.replace("<svg", f'<svg role="img" aria-label={quoteattr(description)}', 1)


def renamed(node: Any, names: dict[str, str]) -> Any:
    """``node`` with views and selections renamed."""
    if isinstance(node, list):
        return [renamed(item, names) for item in node]
    if not isinstance(node, dict):
        return node
    copy = {key: renamed(item, names) for key, item in node.items() if key != "datasets"}
    if "datasets" in node:
        copy["datasets"] = node["datasets"]
    for key in ("name", "param"):
        if isinstance(node.get(key), str):
            copy[key] = names.get(node[key], node[key])
    if isinstance(node.get("views"), list):
        copy["views"] = [names.get(view, view) for view in node["views"]]
    return copy


def stack(charts: Sequence[Picture]) -> Picture:
    """Stack charts vertically, each with separate title, scales, legends and selection.

    Captions and alternative texts are concatenated without duplicates.

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
    # Altair's vconcat merges selections with the same name, and fails on panels of layers
    # (altair 6.3), so the parts are joined as specifications.
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
    """``spec`` with names of views and selections that are unique in the stack."""
    held = spec.get("params", [])
    names = {name for param in held for name in (param["name"], *param.get("views", []))}
    return renamed(spec, {name: f"{name}_{index}" for name in names})


def _joined(texts: Iterable[str], *, between: str = " ") -> str:
    return between.join(dict.fromkeys(text for text in texts if text))
