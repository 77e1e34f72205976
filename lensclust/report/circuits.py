"""CircuitsVis as a script that a page can hold: no request leaves it."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.resources import files


@lru_cache(maxsize=1)
def circuitsvis_script() -> str:
    """The library as one script that sets ``CircuitsVis``, safe inside a script element."""
    script = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    # The map lies in another file, which a browser's tools would ask for.
    script = re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE)
    return re.sub(r"</(script)", r"<\\/\1", script, flags=re.IGNORECASE)
