"""Reading and checking of a run directory for the page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from markupsafe import Markup

from lensclust.bounded import Bounded
from lensclust.errors import InputError
from lensclust.report.tables import ScoreTable, score_table
from lensclust.report.views import check_view
from lensclust.report.wording import data_uri, embedded_json, facts, flatten, grouped
from lensclust.results import Claim, Verdict
from lensclust.runs import FILES, PAGE, check
from lensclust.storage import DIGESTS, LOCK, read_frame, read_json

# Files and folders of a run, besides its page.
CONTENT = (*FILES, "notes.json", "figures", "views", "parts", DIGESTS, LOCK)
# A specification is a program, and might generate more rows than fit into memory.
_drawn = Bounded("lensclust.figures.files", "render_svg", seconds=60, memory=2**31)
# Keys of a specification that generate rows.
_MAKERS = {"sequence", "graticule", "density", "impute"}
# Defaults of fields that claims of earlier versions lack.
_CLAIM_KEYS = tuple(field.name for field in fields(Claim) if field.default is MISSING)
_VERDICTS = get_args(Verdict)


@dataclass(frozen=True)
class Figure:
    """A figure of a run: its static image, and its interactive specification if there is one."""

    name: str
    anchor: str
    title: str
    caption: str
    description: str
    still: str
    spec: Markup | None
    claims: tuple[str, ...]


@dataclass(frozen=True)
class ExploredView:
    """An interactive view of a run: its data, for the script of its kind."""

    kind: str
    anchor: str
    title: str
    caption: str
    content: Markup


@dataclass(frozen=True)
class Run:
    """The contents of one run directory, ready for the page."""

    anchor: str
    name: str
    study: str
    facts: tuple[str, ...]
    claims: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    figures: tuple[Figure, ...]
    views: tuple[ExploredView, ...]
    table: ScoreTable
    settings: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]

    def count(self, verdict: str) -> int:
        """Number of claims with a verdict."""
        return sum(claim["verdict"] == verdict for claim in self.claims)

    def pictures(self, claim: dict[str, Any]) -> list[tuple[str, str]]:
        """Anchor and title of the figures that show a claim."""
        found = {figure.name: (figure.anchor, figure.title) for figure in self.figures}
        return [found[name] for name in claim.get("figures", []) if name in found]


def read_run(folder: Path, anchor: str) -> Run:
    """Read and check a run directory for the page; ``anchor`` is its prefix for links."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        what = f"is a directory without {missing[0]}" if folder.is_dir() else "is no directory"
        raise InputError(
            f"report: {folder} {what}: expected a run directory with {', '.join(FILES)}"
        )
    what = f"report: {folder}: resume the run to have it written again"
    check(folder, what, lambda name: name != PAGE)
    config = _read_json(folder / "config.json", dict)
    provenance = _read_json(folder / "provenance.json", dict)
    claims = _read_claims(folder / "claims.json")
    notes_file = folder / "notes.json"
    notes = _read_json(notes_file, list) if notes_file.is_file() else []
    scores = read_frame(folder / "scores.parquet", what="report: ")
    return Run(
        anchor=anchor,
        name=folder.resolve().name,
        study=str(config.get("study", folder.resolve().name)),
        facts=facts(config, provenance),
        claims=claims,
        notes=tuple(str(note) for note in notes),
        figures=tuple(_read_figures(folder / "figures", anchor, claims)),
        views=tuple(_read_views(folder / "views", anchor)),
        table=score_table(scores),
        settings=tuple(flatten(config)),
        provenance=tuple(grouped(provenance)),
    )


def _read_json(path: Path, kind: type) -> Any:
    content = read_json(path, what="report: ")
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
        if claim["verdict"] not in _VERDICTS:
            raise InputError(
                f"report: {path}: claim {index} has verdict {claim['verdict']!r}, expected one of "
                f"{list(_VERDICTS)}"
            )
        interval = claim["ci95"]
        if not (isinstance(interval, list) and len(interval) == 2):
            raise InputError(f"report: {path}: claim {index} has ci95 {interval!r}, expected two")
        if not isinstance(claim["control"], dict):
            raise InputError(f"report: {path}: claim {index} has a control that is no object")
        figures = claim.get("figures", [])
        if not (isinstance(figures, list) and all(isinstance(name, str) for name in figures)):
            raise InputError(f"report: {path}: claim {index} has figures that are no list of names")
    return tuple(claims)


def _read_views(folder: Path, anchor: str) -> list[ExploredView]:
    found = []
    for index, path in enumerate(sorted(folder.glob("*.json"))):
        content = _read_json(path, dict)
        check_view(content, where=f"report: {path}")
        found.append(
            ExploredView(
                kind=content["kind"],
                anchor=f"{anchor}-view{index}",
                title=content["title"],
                caption=content["caption"],
                content=embedded_json(content),
            )
        )
    return found


def _read_figures(folder: Path, anchor: str, claims: Sequence[dict[str, Any]]) -> list[Figure]:
    stills = {path.name.removesuffix(".svg"): path for path in folder.glob("*.svg")}
    specs = {path.name.removesuffix(".vl.json"): path for path in folder.glob("*.vl.json")}
    return [
        _read_figure(name, specs.get(name), stills.get(name), f"{anchor}-{index}", claims)
        for index, name in enumerate(sorted(stills.keys() | specs.keys()))
    ]


def _read_figure(
    file: str,
    spec_file: Path | None,
    svg_file: Path | None,
    anchor: str,
    claims: Sequence[dict[str, Any]],
) -> Figure:
    # A leading number keeps the study's order of figures.
    name = re.sub(r"^\d+_", "", file)
    spec = _read_json(spec_file, dict) if spec_file else {}
    try:
        svg = svg_file.read_text(encoding="utf-8") if svg_file else _drawn(spec)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"report: {svg_file or spec_file} cannot be drawn: {reason}") from error
    if "<svg" not in svg[:1000]:
        raise InputError(f"report: {svg_file} is not an SVG file")
    meta = spec.get("usermeta", {})
    meta = {k: meta[k] for k in ("title", "caption") if k in meta} if isinstance(meta, dict) else {}
    # Other metadata could set options of Vega, including styles of the whole page.
    spec = {**spec, "usermeta": meta} if spec else {}
    title = str(meta.get("title", name.replace("_", " ")))
    description = str(spec.get("description", title))
    caption = str(meta.get("caption", ""))
    if _reaches_out(spec):
        spec = {}
        caption = f"{caption or title} (Its data are not in it: only its still is shown.)"
    return Figure(
        name=name,
        anchor=anchor,
        title=title,
        caption=caption,
        description=description,
        still=data_uri(svg, "image/svg+xml"),
        spec=embedded_json(spec) if spec else None,
        claims=tuple(str(claim["id"]) for claim in claims if name in claim.get("figures", [])),
    )


def _reaches_out(spec: dict[str, Any]) -> bool:
    """Whether a specification loads data from a URL, or generates rows itself."""
    left: list[Any] = [spec]  # no recursion: it may be nested as deeply as JSON can be
    while left:
        node = left.pop()
        if isinstance(node, list):
            left += node
        elif isinstance(node, str):
            if re.search(r"sequence\s*\(", node):
                return True
        elif isinstance(node, dict):
            if not {"url", "href", *_MAKERS}.isdisjoint(node):
                return True
            # The values of these keys are data: a column may have any name.
            left += [item for key, item in node.items() if key not in ("values", "datasets")]
    return False
