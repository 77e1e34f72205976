"""Pages inside a notebook: a frame that runs our scripts and can fetch nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from lensclust.report.policy import content_policy
from lensclust.report.scripts import view_scripts, view_style
from lensclust.report.wording import embedded_json

if TYPE_CHECKING:
    from lensclust.run_directory import View


def view_frame(view: View, *, height: int = 900) -> str:
    """A view as a frame for a notebook, as it stands in the page of a run.

    >>> import numpy as np
    >>> from lensclust.views import ClusterView
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
    """A page of its own inside a frame without access to what is around it."""
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
