"""Tidy frame -> Altair chart -> files, with neither a browser nor a network.

Every chart carries a title, a caption and a description (its alternative text), spells its data
inside itself in rounded numbers, and draws the null or the baseline beside the measurement.
Colours are told apart by colour-blind readers and never stand alone: shape repeats them.
Pictures stay small: repeated seeds become one line with its range, and what has more points
than pixels is averaged (lines) or thinned (scatter, which then says so).
"""

from lensclust.figures.bar_charts import bars
from lensclust.figures.files import render_svg, save, specification, stack
from lensclust.figures.heat_maps import head_map
from lensclust.figures.line_charts import curves
from lensclust.figures.scatter_plots import scatter
from lensclust.figures.style import NULL_LABEL, PALETTE, SHAPES, Picture

__all__ = [
    "NULL_LABEL",
    "PALETTE",
    "SHAPES",
    "Picture",
    "bars",
    "curves",
    "head_map",
    "render_svg",
    "save",
    "scatter",
    "specification",
    "stack",
]
