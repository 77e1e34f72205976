"""Kinds of interactive views.

A run directory holds views as ``views/NAME.json`` beside its figures; the page draws each with
the script of its kind. Numbers are packed, so that a view is far below a megabyte.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lensclust.errors import InputError
from lensclust.report.views.clusters import ClusterView
from lensclust.report.views.heads import HeadView

KINDS: Mapping[str, Any] = {"clusters": ClusterView, "heads": HeadView}


def check_view(held: Mapping[str, Any], *, where: str) -> None:
    """Refuse a view that no script of the page can draw.

    Raises:
        InputError: if the kind is not known, or a part is missing or of the wrong size; names
            ``where``.
    """
    kind = held.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: kind {kind!r} is not known: expected one of {list(KINDS)}")
    KINDS[kind].from_json(held, where=where)
