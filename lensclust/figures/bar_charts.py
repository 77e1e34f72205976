"""Bars: a measurement against its baselines."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from lensclust.arguments import checked_arguments
from lensclust.figures.data import distinct, inline, over_seeds, require_columns
from lensclust.figures.encodings import null_fill, panel_names, panels, seed_tips, tip
from lensclust.figures.style import NULL_LABEL, PALETTE, Picture, finish, how_to_read


@checked_arguments
def bars(
    frame: pd.DataFrame,
    *,
    name: str = "condition",
    value: str = "value",
    band: tuple[str, str] | None = None,
    facet: str | None = None,
    title: str,
    caption: str,
    value_title: str | None = None,
) -> Picture:
    """A measurement against its baselines: one bar per condition, labelled with its value.

    The first condition of the frame is the measurement and is coloured; the others are grey.
    A line spans the lowest to the highest seed.

    Args:
        name: column of conditions, kept in the order of the frame.
        band: columns with the mean and standard deviation of the null, drawn as a grey strip
            at each bar.

    Raises:
        InputError: if a column is missing, no row is left, or a condition has several rows for
            one seed.

    >>> frame = pd.DataFrame({"condition": ["best layer", "bag of tokens"], "value": [0.7, 0.68]})
    >>> chart = bars(frame, title="ARI", caption="The baseline is high.")
    >>> [row["name"] for row in next(iter(chart.to_dict()["datasets"].values()))]
    ['best layer', 'bag of tokens']
    """
    require_columns("bars", frame, [name, value, facet, *(band or ())])
    means = over_seeds("bars", frame, distinct([facet, name]), [value, *(band or ())], value)
    order = list(dict.fromkeys(frame[name].astype(str)))
    data = pd.DataFrame({"name": means[name].astype(str), "value": means[value]})
    data["low"], data["high"], data["seeds"] = means["low"], means["high"], means["seeds"]
    # The number is outside bar and range, on the side to which the bar points.
    data["end"] = np.maximum(data["high"], 0.0)
    if facet:
        data["panel"] = panel_names(means[facet])
    if band:
        data["null_low"] = means[band[0]] - 2 * means[band[1]]
        data["null_high"] = means[band[0]] + 2 * means[band[1]]
        data["end"] = np.maximum(data["end"], data["null_high"])
        data["null"] = NULL_LABEL
    label = value_title or value
    axis = alt.Axis(title=label, tickCount=5)
    data = data.iloc[np.argsort([order.index(condition) for condition in data["name"]])]
    base = alt.Chart().encode(
        y=alt.Y(field="name", type="nominal", sort=order, axis=alt.Axis(title=None, labelLimit=260))
    )
    tooltip = [tip("name", name), tip("value", label, ".3f")]
    tooltip += seed_tips(means["seeds"])

    def across(field: str) -> alt.X:
        return alt.X(field=field, type="quantitative", axis=axis)

    ranges = [PALETTE[0], *["#9a9a9a"] * (len(order) - 1)]
    bar = base.mark_bar(height={"band": 0.62}, aria=False).encode(
        x=across("value"),
        color=alt.Color(
            field="name",
            type="nominal",
            scale=alt.Scale(domain=order, range=ranges),
            legend=None,
        ),
        tooltip=tooltip,
    )
    layers = [bar]
    if band:
        strip = base.mark_bar(height={"band": 0.92}, opacity=0.35, aria=False).encode(
            x=across("null_low"), x2=alt.X2(field="null_high"), fill=null_fill("null")
        )
        layers.append(strip)
    if data["seeds"].max() > 1:
        span = base.mark_rule(strokeWidth=2, aria=False)
        layers.append(span.encode(x=across("low"), x2=alt.X2(field="high")))
    text = alt.Text(field="value", type="quantitative", format=".2f")
    layers.append(base.mark_text(align="left", dx=5, aria=False).encode(x=across("end"), text=text))
    chart = alt.LayerChart(data=inline(data), layer=layers)
    size = (400, max(60, 34 * len(order)))
    listing = ", ".join(
        f"{condition} {mean:.2f}"
        for condition, mean in zip(data["name"], data["value"], strict=True)
    )
    summary = f"Bars of {label}: {listing}"
    chart = panels(chart, data, size=size)
    reading = how_to_read("Line", data["seeds"], band)
    return finish(chart, title, caption, summary=summary, reading=reading)
