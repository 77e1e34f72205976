"""Heat maps: one cell per head."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.figures.data import distinct, inline, over_seeds, require_columns
from lensclust.figures.encodings import panel_names, panels, seed_tips, tip
from lensclust.figures.style import Picture, finish, how_to_read


@checked_arguments
def head_map(
    frame: pd.DataFrame,
    *,
    value: str = "value",
    facet: str | None = None,
    title: str,
    caption: str,
    value_title: str | None = None,
) -> Picture:
    """A heat map of every head: block (or layer) down, head across; means over seeds.

    Raises:
        InputError: if a column is missing, no row is left, or a head has several rows for a seed.

    >>> frame = pd.DataFrame({"block": [0, 0, 1, 1], "head": [0, 1, 0, 1],
    ...                       "value": [0.0, 0.1, 0.7, 0.2]})
    >>> head_map(frame, title="Heads", caption="Tiny model.").to_dict()["layer"][0]["mark"]["type"]
    'rect'
    """
    block = "layer" if "layer" in frame and "block" not in frame else "block"
    require_columns("head_map", frame, [block, "head", value, facet])
    means = over_seeds("head_map", frame, distinct([facet, block, "head"]), [value], value)
    data = pd.DataFrame({"block": means[block], "head": means["head"], "value": means[value]})
    data["low"], data["high"] = means["low"], means["high"]
    label = value_title or value
    if facet:
        data["panel"] = panel_names(means[facet])
    low, high = min(0.0, float(data["value"].min())), float(data["value"].max())
    domain = [low, high if high > low else low + 1.0]
    widest = max(data["head"].nunique(), data["block"].nunique())
    cell = int(np.clip((260 if facet else 420) / widest, 10, 34))
    base = alt.Chart().encode(
        x=alt.X(field="head", type="ordinal", axis=alt.Axis(title="head", labelAngle=0)),
        y=alt.Y(field="block", type="ordinal", axis=alt.Axis(title=block)),
    )
    tooltip = [tip("block", block), tip("head", "head"), tip("value", label, ".3f")]
    tooltip += seed_tips(means["seeds"])
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color(
            field="value",
            type="quantitative",
            scale=alt.Scale(scheme="viridis", domain=domain),
            legend=alt.Legend(title=label, gradientLength=160),
        ),
        tooltip=tooltip,
    )
    layers = [cells]
    if cell >= 28:
        middle = domain[0] + 0.6 * (domain[1] - domain[0])
        ink = alt.condition(f"datum.value > {middle!r}", alt.value("#111111"), alt.value("#ffffff"))
        text = alt.Text(field="value", type="quantitative", format=".2f")
        layers.append(base.mark_text(fontSize=10, aria=False).encode(text=text, color=ink))
    chart = alt.LayerChart(data=inline(data), layer=layers).properties(width=alt.Step(cell))
    best = data.iloc[int(data["value"].argmax())]
    summary = (
        f"Heat map of {label} by {block} and head; the highest is {best['value']:.3f} "
        f"at {block} {best['block']}, head {best['head']}."
    )
    chart = panels(chart.properties(height=alt.Step(cell)), data, size=None)
    reading = how_to_read("", means["seeds"], None)
    return finish(chart, title, caption, summary=summary, reading=reading)
