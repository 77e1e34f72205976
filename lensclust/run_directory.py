"""The run directory: what a study leaves behind, and the contract everything else reads.

``config.json provenance.json scores.parquet claims.json notes.json figures/ views/ report.html``,
and ``parts/``, from which a killed run continues. ``claims.json`` is written when all that it
rests on is there; the page is made from it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensclust.disk import (
    LOCK,
    created,
    is_vacant,
    locked,
    read_json,
    remove_partial,
    replacing,
    require_name,
    write_atomically,
    writing,
)
from lensclust.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.results import Claim
    from lensclust.views import View

LIBRARIES = ("lensclust", "transformer-lens", "transformers", "torch", "scikit-learn", "numpy")


@contextmanager
def claimed(out: Path, config: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Lock a folder for a run, against every other process, for as long as the block lasts.

    A block that raises before anything but the configuration was written leaves the folder as
    this call found it; nothing that this call did not make is ever removed.

    Raises:
        InputError: if it holds anything but, with ``resume``, a run of the same configuration;
            if another process works on it, or nothing can be written there.
    """
    require_place(out)
    with writing(f"output {out}"):
        foreign = out.exists() and not (out / "config.json").exists() and not is_vacant(out)
    if foreign:
        raise InputError(f"output {out}: is not empty and holds no run")
    with created(out, f"output {out}"), locked(out / LOCK, f"output {out}"):
        is_new = _begin(out, config, resume=resume)
        try:
            yield
        except BaseException:
            if is_new:
                _give_back(out)
            raise


def _begin(out: Path, config: Mapping[str, Any], *, resume: bool) -> bool:
    """Check the configuration that is there, or write it; whether it was written."""
    known = out / "config.json"
    if not known.exists():
        remove_partial(out)
        with writing(f"output {out}"):
            write_atomically(known, _encode(config))
        return True
    held, wanted = read_json(known), json.loads(_encode(config))
    if not isinstance(held, dict) or not isinstance(held.get("fields", {}), dict):
        raise InputError(f"output {out}: {known} is not the configuration of a run")
    if held != wanted:
        raise InputError(f"output {out}: holds another run ({_difference(held, wanted)})")
    if not resume:
        raise InputError(f"output {out}: holds this run already; continue it with --resume")
    remove_partial(out, out / "figures", out / "views")
    return False


def _give_back(out: Path) -> None:
    """Remove the configuration and folders of parts, unless anything else is there."""
    for folder in (*sorted((out / "parts").rglob("*"), reverse=True), out / "parts"):
        with suppress(OSError):  # a file, a link, or not empty
            folder.rmdir()
    if {path.name for path in out.iterdir()} <= {"config.json", LOCK}:
        (out / "config.json").unlink()


def require_place(out: Path) -> None:
    """Refuse what cannot be a folder to write to.

    Raises:
        InputError: if it has no name of its own (``.``, ``..``, ``/``), is a URL or no text that
            every system can show; if it or one of its parents is a file, or may not be written to.

    >>> require_place(Path("s3://bucket/a"))
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: output s3:/bucket/a: is a URL, expected a folder or file of ...
    """
    require_name(out, f"output {out}")
    with writing(f"output {out}"):
        there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"output {out}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"output {out}: no permission to write to {there}")


def finish(
    out: Path,
    *,
    scores: pd.DataFrame,
    claims: Sequence[Claim],
    figures: Mapping[str, Any],
    notes: Sequence[str],
    provenance: Mapping[str, Any],
    views: Mapping[str, View] | None = None,
) -> None:
    """Write everything a finished run consists of, the page included.

    Raises:
        InputError: if the disk is full or may not be written to.
    """
    from lensclust import figures as drawing
    from lensclust.report import write_page

    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise ValueError(f"claims: ids must differ, given {ids}")
    with writing(f"output {out}"):
        with replacing(out / "scores.parquet") as partial:
            scores.to_parquet(partial, index=False)
        for number, (name, chart) in enumerate(figures.items(), start=1):
            # The page shows figures by file name; the number keeps the order the study gave.
            drawing.save(chart, out / "figures", f"{number}_{name}")
        for number, (name, view) in enumerate((views or {}).items(), start=1):
            content = json.dumps(view.to_json(), sort_keys=True, ensure_ascii=False)
            write_atomically(out / "views" / f"{number}_{name}.json", content + "\n")
        write_atomically(out / "notes.json", _encode(list(notes)))
        write_atomically(out / "provenance.json", _encode({**provenance, **machine()}))
        write_atomically(out / "claims.json", _encode([claim.to_json() for claim in claims]))
        write_page([out])


def machine() -> dict[str, Any]:
    """Library versions and the kind of machine."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "versions": versions | {"python": platform.python_version()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
    }


def _encode(value: Any) -> str:
    text = json.dumps(value, indent=2, default=str, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def _difference(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    flat = [{**c, **c.get("fields", {}), "fields": None} for c in (held, wanted)]
    keys = [k for k in flat[1] if flat[0].get(k) != flat[1][k]]
    return ", ".join(f"{k} {flat[0].get(k)!r} instead of {flat[1][k]!r}" for k in keys) or "older"
