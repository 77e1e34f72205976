"""Run directories -> one self-contained page: claims first, then figures, scores, provenance.

The page loads nothing: it contains Vega once, every figure has its interactive specification and
a static image (for print and for readers without scripts), and a content security policy forbids
network access and scripts of others. Labels are escaped everywhere. The same run directories give
the same bytes.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import jinja2
import vl_convert
from markupsafe import Markup

from lensclust.errors import InputError
from lensclust.report.content import CONTENT, Run, read_run
from lensclust.report.embed import content_policy, own_text, view_scripts, view_style
from lensclust.report.whiskers import whiskers
from lensclust.report.wording import number
from lensclust.runs import PAGE, seal
from lensclust.storage import DIGESTS, require_name, write_atomically, writing

_HERE = Path(__file__).parent
_SYMBOLS = {"supported": "✓", "negligible": "≈", "contradicted": "✗", "inconclusive": "?"}


def write_page(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page over one or several run directories; return its path.

    Reads ``config.json``, ``provenance.json``, ``claims.json``, ``scores.parquet``, every
    ``figures/NAME.vl.json`` and ``figures/NAME.svg``, and ``notes.json`` if there is one (a list
    of the study's notes). A run with ``digests.json`` is compared with it.

    Args:
        runs: run directories, in the order of the page.
        out: file to write; links are followed, and the mode of an existing file is kept. Default
            ``report.html`` in the run directory if there is a single run.

    Raises:
        InputError: if there is no run, several runs but no ``out``, a directory is not a run, or
            one of its files cannot be read; if the page cannot be written, or is a device or a
            file of a run.

    >>> import tempfile
    >>> import pandas as pd
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     run = Path(folder)
    ...     _ = (run / "config.json").write_text('{"study": "emergence", "preset": "smoke"}')
    ...     _ = (run / "provenance.json").write_text('{"device": "cpu"}')
    ...     _ = (run / "claims.json").write_text("[]")
    ...     pd.DataFrame({"layer": [0], "value": [0.5]}).to_parquet(run / "scores.parquet")
    ...     page = write_page([run])
    ...     print(page.name, "emergence" in page.read_text(encoding="utf-8"))
    report.html True
    """
    if not runs:
        raise InputError("report: no run directory given, expected at least one")
    if out is None and len(runs) > 1:
        raise InputError(f"report: {len(runs)} runs need a file to write to, given none")
    page = Path(runs[0]) / PAGE if out is None else Path(out)
    # A run may be from others: its links are not followed unless the caller names the file.
    if out is None and page.is_symlink():
        raise InputError(f"report: {page} is a link: name the file to write as out (--out)")
    what, then = f"report {page}", "put that right, then try again"
    with writing(what, then):
        target = _target(page, [Path(run) for run in runs])
    html = _render([read_run(Path(run), f"run{index}") for index, run in enumerate(runs)])
    with writing(what, then):
        write_atomically(target, html)
        for run in map(Path, runs):
            if (run / DIGESTS).exists() and target == Path(os.path.realpath(run / PAGE)):
                seal(run)
    return page


def _target(page: Path, runs: Sequence[Path]) -> Path:
    """The file to which a page is written, after links; not a file of a run and not a device.

    Raises:
        InputError: if it is one of these, or a directory.
    """
    require_name(page, f"report {page}")
    target = Path(os.path.realpath(page))
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if target.is_dir():
        raise InputError(f"report: cannot write {page}: it is a directory, expected a file")
    if target.exists() and not target.is_file():
        raise InputError(f"report: cannot write {page}: it is a device, expected a file")
    inputs = [
        path for run in runs for name in CONTENT for path in (run / name, *run.glob(name + "/*"))
    ]
    places = {Path(os.path.realpath(path)) for path in inputs}
    linked = target.exists() and any(p.is_file() and p.samefile(target) for p in inputs)
    if linked or not places.isdisjoint((target, *target.parents)):
        raise InputError(f"report: cannot write {page}: it is a file of a run, expected another")
    return target


def _render(read: Sequence[Run]) -> str:
    scripts = [own_text("stills.js"), own_text("tables.js")]
    if any(figure.spec is not None for run in read for figure in run.figures):
        scripts += [_vega(), own_text("page.js")]
    kinds = {view.kind for run in read for view in run.views}
    scripts += view_scripts(kinds)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        runs=read,
        title=", ".join(dict.fromkeys(run.study for run in read)),
        style=Markup(view_style(kinds)),
        scripts=[Markup(script) for script in scripts],
        policy=content_policy(scripts),
        symbols=_SYMBOLS,
        number=number,
        whiskers=whiskers,
    )


@lru_cache(maxsize=1)
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``vegaEmbed``."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return re.sub(r"</(script)", r"<\\/\1", bundle, flags=re.IGNORECASE)
