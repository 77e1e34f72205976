"""Pages inside a notebook: a sandboxed frame without network access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from lensclust.report.wording import embedded_json

if TYPE_CHECKING:
    from lensclust.runs import View

import base64
import hashlib
import re
from collections.abc import Collection
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

_HERE = Path(__file__).parent


def view_frame(view: View, *, height: int = 900) -> str:
    """A view as a notebook frame, as in the page of a run.

    >>> import numpy as np
    >>> from lensclust.report.views import ClusterView
    >>> view = ClusterView("A <title>", "c", (0,), (0,), np.eye(2)[None, None], np.ones((1, 1)),
    ...                    np.ones((1, 1)), "ARI", {"task": ("a", "b")}, ("x", "y"))
    >>> view_frame(view).startswith("<iframe sandbox=")
    True
    """
    held = view.to_json()
    body = Markup(
        '<section class="view" data-kind="{kind}"><h3>{title}</h3><div class="stage"></div>'
        '<p class="caption">{caption}</p><script type="application/json">{data}</script></section>'
    ).format(
        **{name: held[name] for name in ("kind", "title", "caption")}, data=embedded_json(held)
    )
    kinds = [held["kind"]]
    return framed(
        body, title=view.title, scripts=view_scripts(kinds), style=view_style(kinds), height=height
    )


def framed(body: Markup, *, title: str, scripts: Sequence[str], style: str, height: int) -> str:
    """A separate page inside a frame without access to its surroundings."""
    page = Markup(
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="color-scheme" content="light dark">'
        "<style>{style}</style></head><body>{body}{scripts}</body></html>"
    ).format(
        title=title,
        policy=content_policy(scripts),
        style=Markup(style),
        body=body,
        scripts=Markup("".join(f"<script>{script}</script>" for script in scripts)),
    )
    return (
        f'<iframe sandbox="allow-scripts" title="{escape(title)}" srcdoc="{escape(str(page))}" '
        f'style="width: 100%; height: {height}px; border: 0"></iframe>'
    )


def content_policy(scripts: Sequence[str]) -> str:
    """A content security policy: no network, only the given scripts, no code from text.

    >>> "script-src 'none'" in content_policy([]), "unsafe-eval" in content_policy(["let a;"])
    (True, False)
    """
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    allowed = hashes or ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def view_scripts(kinds: Collection[str]) -> list[str]:
    """The scripts that draw views of some kinds, in order.

    >>> len(view_scripts([])), len(view_scripts(["heads"]))
    (0, 4)
    """
    if not kinds:
        return []
    names = ("scatter", *sorted(kinds), "views")
    return [circuitsvis_script()] * ("heads" in kinds) + [own_text(f"{name}.js") for name in names]


def view_style(kinds: Collection[str]) -> str:
    """The style sheet of the page, with that of head views if there are any."""
    return own_text("page.css") + (own_text("heads.css") if "heads" in kinds else "")


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """CircuitsVis as one script that sets ``CircuitsVis``, safe inside a script element."""
    script = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # The source map is a separate file, which a browser's tools would request.
    script = re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE)
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)


def own_text(name: str) -> str:
    """The text of a file in this folder."""
    return (_HERE / name).read_text(encoding="utf-8")
