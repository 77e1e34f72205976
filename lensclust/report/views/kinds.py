"""What a page lets its reader explore: data of a picture that the browser draws.

A run directory holds views as ``views/NAME.json`` beside its figures; the page draws each with
the script of its kind. Numbers are packed, so that a view stays far below a megabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lensclust.errors import InputError
from lensclust.report.views.clusters import ClusterView
from lensclust.report.views.heads import HeadView

__all__ = ["KINDS", "ClusterView", "HeadView", "check_view"]


KINDS: Mapping[str, Any] = {"clusters": ClusterView, "heads": HeadView}


def check_view(held: Mapping[str, Any], *, where: str) -> None:
    """Refuse what no script of the page could draw.

    Raises:
        InputError: if the kind is not known, or a part is missing or of the wrong size; names
            ``where`` it stands.
    """
    kind = held.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: kind {kind!r} is not known: expected one of {list(KINDS)}")
    KINDS[kind].from_json(held, where=where)
