"""The scripts and styles that a page needs for its kinds of views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lensclust.report.circuits import circuitsvis_script

_HERE = Path(__file__).parent


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


# Kind of view -> what it is made of, in the order in which it has to be there.
_SCRIPTS: Mapping[str, Sequence[Callable[[], str]]] = {
    "heads": (circuitsvis_script, lambda: _text("scatter.js"), lambda: _text("heads.js")),
}
_STYLES = {"heads": ("heads.css",)}


def view_scripts(kinds: Sequence[str]) -> list[str]:
    """Each script once, and last the one that shows the views; nothing if there are none.

    >>> len(view_scripts([])), len(view_scripts(["heads"]))
    (0, 4)
    """
    scripts = dict.fromkeys(make() for kind in kinds for make in _SCRIPTS[kind])
    return [*scripts, _text("views.js")] if scripts else []


def view_styles(kinds: Sequence[str]) -> list[str]:
    """The style sheets of these kinds."""
    return [_text(name) for name in dict.fromkeys(name for kind in kinds for name in _STYLES[kind])]
