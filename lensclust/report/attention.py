"""Attention patterns in a notebook, drawn by CircuitsVis without network access."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from markupsafe import Markup

from lensclust.report.embed import circuitsvis_script, framed
from lensclust.report.wording import embedded_json

# Tokens and patterns are separate data, so that the script's text and digest are fixed.
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
    """Attention patterns of some heads on one prompt as a notebook frame, of at least 1.3 MB.

    CircuitsVis sends a request to a third-party host each time it is shown, and interprets tokens
    as markup; so it runs in a frame without network access.

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
        # CircuitsVis draws dark on a transparent background.
        style="body { background: #fff; font-family: sans-serif; color-scheme: light; }",
        height=height,
    )
