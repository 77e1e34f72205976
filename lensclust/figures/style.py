"""Style of figures: colours, shapes, theme, titles and captions."""

from __future__ import annotations

import textwrap
from typing import Any

import altair as alt
import pandas as pd

Picture = alt.Chart | alt.LayerChart | alt.FacetChart | alt.VConcatChart

# Okabe & Ito (2008) without black and yellow, which are invisible on one of the two backgrounds.
# Eight colours and five shapes are coprime: forty labels before a pair repeats.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#A05A2C")
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross")
NULL_LABEL = "permuted labels ± 2 sd"

THEME: dict[str, Any] = {
    # vl-convert measures text in Liberation Sans, which is as wide as Arial.
    "font": "Arial, 'Liberation Sans', Helvetica, sans-serif",
    "title": {"anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 12},
    "axis": {
        "gridColor": "#e6e6e6",
        "domainColor": "#888888",
        "tickColor": "#888888",
        "labelColor": "#333333",
        "titleColor": "#333333",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "labelOverlap": True,
    },
    "legend": {
        "labelColor": "#333333",
        "titleColor": "#333333",
        "titleFontWeight": "normal",
        "labelFontSize": 11,
        "titleFontSize": 12,
        "labelLimit": 220,
        "symbolLimit": 60,
    },
    "header": {"labelFontSize": 12, "labelColor": "#333333", "labelLimit": 240},
    "view": {"stroke": "#dddddd"},
    "text": {"color": "#333333"},
    "rule": {"color": "#333333"},
    # The last step is the most visible, so it is dark (the page inverts this in dark mode).
    "range": {"ordinal": {"scheme": "viridis", "extent": [0.9, 0.05]}},
}


def how_to_read(mark: str, seeds: pd.Series, band: tuple[str, str] | None) -> str:
    """Explanation of mean, range and grey band."""
    most = int(seeds.max())
    sentences = []
    if most > 1:
        spread = f"; {mark.lower()}: lowest to highest seed" if mark else ""
        sentences.append(f"Mean of {most} seeds{spread}.")
    if band:
        sentences.append("Grey: the same score with permuted labels, mean ± 2 sd.")
    return " ".join(sentences)


def finish(chart: Picture, title: str, caption: str, *, summary: str, reading: str = "") -> Picture:
    """Add title, alternative text and theme; the caption is stored in the chart for the page.

    ``reading`` explains the marks (and which are not drawn), ``summary`` starts the alternative
    text.
    """
    heading = alt.TitleParams(text=textwrap.wrap(title, 70) or [""])
    sentences = [text.rstrip(". ") + "." for text in (title, caption, reading, summary) if text]
    if reading:
        caption = " ".join(text.rstrip(". ") + "." for text in (caption, reading) if text)
    return chart.properties(
        title=heading,
        description=" ".join(sentences),
        background="white",
        # Room at the sides in case the reader's font is wider than the measured one.
        padding={"left": 14, "right": 28, "top": 8, "bottom": 8},
        usermeta={"caption": caption, "title": title},
    ).configure(**THEME)
