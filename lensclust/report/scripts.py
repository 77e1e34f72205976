"""The scripts and styles of views, which a page holds once and a frame in a notebook alone."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

_HERE = Path(__file__).parent


def view_scripts(kinds: Collection[str]) -> list[str]:
    """What draws views of some kinds, in order; nothing for none.

    >>> len(view_scripts([])), len(view_scripts(["heads"]))
    (0, 4)
    """
    if not kinds:
        return []
    names = ("scatter", *sorted(kinds), "views")
    return [circuitsvis_script()] * ("heads" in kinds) + [own_text(f"{name}.js") for name in names]


def view_style(kinds: Collection[str]) -> str:
    """The style sheet of the page, with that of heads where there are some."""
    return own_text("page.css") + (own_text("heads.css") if "heads" in kinds else "")


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """CircuitsVis as one script that sets ``CircuitsVis``, safe inside a script element."""
    script = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # The map lies in another file, which a browser's tools would ask for.
    script = re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE)
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)


def own_text(name: str) -> str:
    """A file that lies beside this one."""
    return (_HERE / name).read_text(encoding="utf-8")
