"""Attention patterns in a notebook, by CircuitsVis: nothing is asked of anybody."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from lensclust.report.embed import circuitsvis_script, framed
from lensclust.report.wording import embedded_json

# Tokens and patterns lie beside it as data: a script of fixed text has a fixed digest.
_SHOW = """
const data = JSON.parse(document.getElementById("data").textContent);
CircuitsVis.render("stage", CircuitsVis.AttentionHeads, data);
"""


def attention_frame(
    tokens: Sequence[str],
    patterns: Float[np.ndarray, "head query key"],
    names: Sequence[str],
    *,
    height: int = 640,
) -> str:
    """Patterns of some heads on one prompt as a frame for a notebook, of 1.3 MB and more.

    CircuitsVis asks a host of its own choice whether there is a network each time it shows
    itself, and takes tokens for markup; so it is put into a frame that can ask nobody.

    >>> html = attention_frame(["a", "</script>"], np.eye(2)[None], ["head 0.0"])
    >>> html.startswith("<iframe sandbox="), "</script>" in html
    (True, False)
    """
    data = {
        "tokens": list(tokens),
        "attention": np.round(patterns.astype(np.float64), 3).tolist(),
        "attentionHeadNames": list(names),
        "minValue": 0,
        "maxValue": 1,
        "positiveColor": "#0b5cad",
    }
    body = Markup('<div id="stage"></div><script type="application/json" id="data">{}</script>')
    return framed(
        body.format(embedded_json(data)),
        title="Attention patterns",
        scripts=[circuitsvis_script(), _SHOW],
        # It draws dark on nothing.
        style="body { background: #fff; font-family: sans-serif; color-scheme: light; }",
        height=height,
    )
