"""Run directories -> one self-contained page: claims first, then figures, scores, provenance.

The page loads nothing: Vega stands inside it once, every figure brings its interactive
specification and a still (for print and for readers without scripts), and a content security
policy forbids the browser to fetch anything or to run a script that is not ours. Labels are
escaped wherever they appear. The same run directories give the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import vl_convert
from markupsafe import Markup
from pandas.api.types import is_numeric_dtype

from lensclust.errors import InputError
from lensclust.figures import render_svg, write_whole
from lensclust.results import Claim

_HERE = Path(__file__).parent
_FILES = ("config.json", "provenance.json", "claims.json", "scores.parquet")
_MAX_ROWS = 500
_MAX_CSV_BYTES = 2_000_000
_CLAIM_KEYS = tuple(field.name for field in fields(Claim))
_SYMBOLS = {"supported": "✓", "contradicted": "✗", "inconclusive": "?"}


@dataclass(frozen=True)
class Figure:
    """A figure of a run: its still, and its interactive specification where there is one."""

    anchor: str
    title: str
    caption: str
    description: str
    still: str
    spec: Markup | None


@dataclass(frozen=True)
class Run:
    """What one run directory says, ready to be laid out."""

    anchor: str
    name: str
    study: str
    facts: tuple[str, ...]
    claims: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]
    n_rows: int
    csv: str | None
    settings: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]

    def count(self, verdict: str) -> int:
        """How many claims ended with a verdict."""
        return sum(claim["verdict"] == verdict for claim in self.claims)


def write_page(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write one page over one or several run directories; return its path.

    Reads ``config.json``, ``provenance.json``, ``claims.json``, ``scores.parquet``, every
    ``figures/NAME.vl.json`` and ``figures/NAME.svg``, and ``notes.json`` where there is one (a
    list of sentences that the study wants said plainly).

    Args:
        runs: run directories, in the order of the page.
        out: where to write; ``report.html`` in the run directory if there is a single run.

    Raises:
        InputError: if there is no run, several runs but no ``out``, a directory is not a run,
            or a file of it cannot be read.

    >>> import tempfile
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
    out = Path(runs[0]) / "report.html" if out is None else Path(out)
    if out.is_dir():
        raise InputError(f"report: cannot write {out}: it is a directory, expected a file")
    read = [_read_run(Path(run), f"run{index}") for index, run in enumerate(runs)]
    live = any(figure.spec is not None for run in read for figure in run.figures)
    scripts = [_vega(), _text("page.js")] if live else []
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.j2").render(
        runs=read,
        title=", ".join(dict.fromkeys(run.study for run in read)),
        style=Markup(_text("page.css")),
        scripts=[Markup(script) for script in scripts],
        policy=_policy(scripts),
        symbols=_SYMBOLS,
        number=_number,
        max_rows=_MAX_ROWS,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    return write_whole(out, html)


# -- reading a run ----------------------------------------------------------------------------


def _read_run(folder: Path, anchor: str) -> Run:
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        what = "a directory" if folder.is_dir() else "no directory"
        raise InputError(
            f"report: {folder} is {what} without {missing[0]}: expected a run directory with "
            f"{', '.join(_FILES)}"
        )
    config = _read_json(folder / "config.json", dict)
    provenance = _read_json(folder / "provenance.json", dict)
    claims = _read_claims(folder / "claims.json")
    notes_file = folder / "notes.json"
    notes = _read_json(notes_file, list) if notes_file.is_file() else []
    scores = _read_scores(folder / "scores.parquet")
    shown = scores.head(_MAX_ROWS)
    return Run(
        anchor=anchor,
        name=folder.resolve().name,
        study=str(config.get("study", folder.resolve().name)),
        facts=_facts(config, provenance),
        claims=claims,
        notes=tuple(str(note) for note in notes),
        figures=tuple(_read_figures(folder / "figures", anchor)),
        columns=tuple((str(name), is_numeric_dtype(scores[name])) for name in scores),
        rows=tuple(
            tuple(_number(item) for item in row)
            for row in zip(*(shown[name].tolist() for name in shown), strict=True)
        ),
        n_rows=len(scores),
        csv=_data_uri(scores.to_csv(index=False), "text/csv", limit=_MAX_CSV_BYTES),
        settings=tuple(_flatten(config)),
        provenance=tuple(_grouped(provenance)),
    )


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"report: {path} is not readable JSON: {error}") from error
    if not isinstance(content, kind):
        wanted = {dict: "an object", list: "a list"}[kind]
        raise InputError(f"report: {path} holds {type(content).__name__}, expected {wanted}")
    return content


def _read_claims(path: Path) -> tuple[dict[str, Any], ...]:
    claims = _read_json(path, list)
    for index, claim in enumerate(claims):
        if not isinstance(claim, dict):
            raise InputError(f"report: {path}: claim {index} is not an object")
        missing = [key for key in _CLAIM_KEYS if key not in claim]
        if missing:
            raise InputError(f"report: {path}: claim {index} has no {missing[0]!r}")
        if claim["verdict"] not in _SYMBOLS:
            raise InputError(
                f"report: {path}: claim {index} has verdict {claim['verdict']!r}, expected one of "
                f"{list(_SYMBOLS)}"
            )
        interval = claim["ci95"]
        if not (isinstance(interval, list) and len(interval) == 2):
            raise InputError(f"report: {path}: claim {index} has ci95 {interval!r}, expected two")
        if not isinstance(claim["control"], dict):
            raise InputError(f"report: {path}: claim {index} has a control that is no object")
    return tuple(claims)


def _read_scores(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are both
        reason = str(error).splitlines()[0]
        raise InputError(f"report: {path} is not a readable parquet file: {reason}") from error


def _read_figures(folder: Path, anchor: str) -> list[Figure]:
    stills = {path.name.removesuffix(".svg"): path for path in folder.glob("*.svg")}
    specs = {path.name.removesuffix(".vl.json"): path for path in folder.glob("*.vl.json")}
    return [
        _read_figure(name, specs.get(name), stills.get(name), f"{anchor}-{index}")
        for index, name in enumerate(sorted(stills.keys() | specs.keys()))
    ]


def _read_figure(name: str, spec_file: Path | None, svg_file: Path | None, anchor: str) -> Figure:
    spec = _read_json(spec_file, dict) if spec_file else {}
    try:
        svg = svg_file.read_text(encoding="utf-8") if svg_file else render_svg(spec)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"report: {svg_file or spec_file} cannot be drawn: {reason}") from error
    if "<svg" not in svg[:1000]:
        raise InputError(f"report: {svg_file} is not an SVG file")
    meta = spec.get("usermeta", {})
    title = str(meta.get("title", name.replace("_", " ")))
    return Figure(
        anchor=anchor,
        title=title,
        caption=str(meta.get("caption", "")),
        description=str(spec.get("description", title)),
        still=_data_uri(svg, "image/svg+xml") or "",
        spec=_embedded_json(spec) if spec else None,
    )


# -- values as text ---------------------------------------------------------------------------


def _number(value: Any) -> str:
    """A cell of a table: three decimals, more only where all three would be zero.

    >>> _number(0.91234), _number(0.00012), _number(None), _number(3), _number(12.0)
    ('0.912', '0.00012', '–', '3', '12')
    """
    if value is None or value is pd.NA or value is pd.NaT:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    if value == round(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.2g}" if abs(value) < 5e-4 or abs(value) >= 1e6 else f"{value:.3f}"


def _facts(config: dict[str, Any], provenance: dict[str, Any]) -> tuple[str, ...]:
    """The line under the heading: preset, seeds, when, where."""
    flat = dict(_flatten(provenance))

    def first(*names: str) -> str | None:
        found = [text for key, text in flat.items() if key.rsplit(".", 1)[-1] in names]
        return found[0] if found else None

    preset, seeds = config.get("preset"), config.get("seeds")
    count = len(seeds) if isinstance(seeds, list) else seeds
    facts = [
        f"preset {preset}" if preset is not None else None,
        f"{count} seed{'' if count == 1 else 's'}" if count is not None else None,
        first("finished", "started", "created", "date"),
        first("device", "machine"),
    ]
    return tuple(fact for fact in facts if fact)


def _flatten(node: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text) pairs.

    >>> _flatten({"a": 1, "b": {"c": [1, 2], "d": None}})
    [('a', '1'), ('b.c', '1, 2'), ('b.d', '–')]
    """
    pairs: list[tuple[str, str]] = []
    for key, item in node.items():
        if isinstance(item, dict):
            pairs += _flatten(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            simple = not any(isinstance(part, (dict, list)) for part in item)
            text = ", ".join(map(str, item)) if simple else json.dumps(item, ensure_ascii=False)
            pairs.append((f"{prefix}{key}", text))
        else:
            # As written, not rounded: a learning rate or a duration is quoted from here.
            pairs.append((f"{prefix}{key}", "–" if item is None else str(item)))
    return pairs


def _grouped(provenance: dict[str, Any]) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """One table for the plain values, one for each nested part."""
    plain = {key: item for key, item in provenance.items() if not isinstance(item, dict)}
    nested = {key: item for key, item in provenance.items() if isinstance(item, dict)}
    groups = {"run": plain, **nested} if plain else nested
    return [(name, tuple(_flatten(part))) for name, part in groups.items() if part]


# -- what stands inside the page --------------------------------------------------------------


def _data_uri(text: str, kind: str, *, limit: int | None = None) -> str | None:
    content = text.encode()
    if limit is not None and len(content) > limit:
        return None
    return f"data:{kind};charset=utf-8;base64,{base64.b64encode(content).decode()}"


def _embedded_json(spec: dict[str, Any]) -> Markup:
    """JSON for a script element, where ``</`` and ``<!--`` would end or change the element."""
    content = json.dumps(spec, sort_keys=True, ensure_ascii=False)
    return Markup(content.replace("<", "\\u003c").replace("\u2028", "\\u2028"))


@lru_cache(maxsize=1)
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that sets ``vegaEmbed``."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return re.sub(r"</(script)", r"<\\/\1", bundle, flags=re.IGNORECASE)


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _policy(scripts: Sequence[str]) -> str:
    """A content security policy: no network at all, and no script but ours.

    Vega compiles its expressions, hence ``unsafe-eval``.
    """
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    hashes = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    allowed = [*hashes, "'unsafe-eval'"] if scripts else ["'none'"]
    return (
        f"default-src 'none'; script-src {' '.join(allowed)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
