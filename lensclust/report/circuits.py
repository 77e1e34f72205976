"""CircuitsVis inside our pages and notebooks: no request leaves them, no token becomes markup."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files

import numpy as np
from jaxtyping import Float
from markupsafe import escape

from lensclust.report.policy import content_policy
from lensclust.report.wording import embedded_json

# Its tokens and patterns lie beside it as data: a script of fixed text has a fixed digest.
_SHOW = """
const data = JSON.parse(document.getElementById("data").textContent);
CircuitsVis.render("stage", CircuitsVis.AttentionHeads, data);
"""


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """The library as one script that sets ``CircuitsVis``, safe inside a script element."""
    script = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # The map lies in another file, which a browser's tools would ask for.
    script = re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE)
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)


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
    data = embedded_json(
        {
            "tokens": list(tokens),
            "attention": np.round(patterns, 3).tolist(),
            "attentionHeadNames": list(names),
            "minValue": 0,
            "maxValue": 1,
            "positiveColor": "#0b5cad",
        }
    )
    scripts = [circuitsvis_script(), _SHOW]
    body = "".join(f"<script>{script}</script>" for script in scripts)
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Attention</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{content_policy(scripts)}"></head>'
        '<body style="background: #fff; font-family: sans-serif"><div id="stage"></div>'
        f'<script type="application/json" id="data">{data}</script>{body}</body></html>'
    )
    return (
        f'<iframe sandbox="allow-scripts" title="Attention patterns" srcdoc="{escape(page)}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )
