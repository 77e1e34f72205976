"""Views: what the page of a run lets its reader look around in, as files of the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lensclust.errors import InputError
from lensclust.views.head_views import HeadView


class View(Protocol):
    """What every kind of view has; `report/KIND.js` shows it."""

    kind: str

    @property
    def title(self) -> str: ...
    @property
    def caption(self) -> str: ...
    def to_json(self) -> dict[str, Any]: ...


KINDS: Mapping[str, Any] = {"heads": HeadView}


def read_view(held: Mapping[str, Any], *, where: str) -> View:
    """A view from its JSON.

    Raises:
        InputError: if it is of no known kind or not what its kind has to be; names ``where``.
    """
    kind = held.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise InputError(f"{where}: view of kind {kind!r}, expected one of {list(KINDS)}")
    return KINDS[kind].from_json(held, where=where)


__all__ = ["KINDS", "HeadView", "View", "read_view"]
