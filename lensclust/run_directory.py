"""The run directory: what a study leaves behind, and the contract everything else reads.

``config.json provenance.json scores.parquet claims.json notes.json figures/ report.html``,
and ``parts/``, from which a killed run continues. ``claims.json`` is written when all that it
rests on is there; the page is made from it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensclust.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.results import Claim

LIBRARIES = ("lensclust", "transformer-lens", "transformers", "torch", "scikit-learn", "numpy")


def begin(out: Path, config: Mapping[str, Any], *, resume: bool) -> None:
    """Claim a folder for a run.

    Raises:
        InputError: if it holds anything but, with ``resume``, a run of the same configuration.
    """
    require_place(out)
    known = out / "config.json"
    wanted = json.loads(_encode(config))
    if known.exists():
        held = read_json(known)
        if held != wanted:
            raise InputError(f"output {out}: holds another run ({_difference(held, wanted)})")
        if not resume:
            raise InputError(f"output {out}: holds this run already; continue it with --resume")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"output {out}: is not empty and holds no run")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(known, _encode(config))


def require_place(out: Path) -> None:
    """Refuse a folder that cannot be written to.

    Raises:
        InputError: if it or one of its parents is a file, or may not be written to.
    """
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise InputError(f"output {out}: {there} is a file, expected a folder")
    if not os.access(there, os.W_OK):
        raise InputError(f"output {out}: no permission to write to {there}")


def abandon(out: Path) -> None:
    """Take a claimed folder back, if nothing but its configuration was written yet."""
    if [path for path in out.rglob("*") if path.is_file()] == [out / "config.json"]:
        shutil.rmtree(out)


def finish(
    out: Path,
    *,
    scores: pd.DataFrame,
    claims: Sequence[Claim],
    figures: Mapping[str, Any],
    notes: Sequence[str],
    provenance: Mapping[str, Any],
) -> None:
    """Write everything a finished run consists of, the page included."""
    from lensclust import figures as drawing
    from lensclust.report import write_page

    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise ValueError(f"claims: ids must differ, given {ids}")
    scores.to_parquet(out / "scores.parquet", index=False)
    for number, (name, chart) in enumerate(figures.items(), start=1):
        # The page shows figures by file name; the number keeps the order the study gave them.
        drawing.save(chart, out / "figures", f"{number}_{name}")
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


def read_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        InputError: if it is missing or malformed; names the file and the place.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old one or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8", newline="\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _encode(value: Any) -> str:
    text = json.dumps(value, indent=2, default=str, ensure_ascii=False, allow_nan=False)
    return f"{text}\n"


def _difference(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    flat = [{**c, **c.get("fields", {}), "fields": None} for c in (held, wanted)]
    keys = [k for k in flat[1] if flat[0].get(k) != flat[1][k]]
    return ", ".join(f"{k} {flat[0].get(k)!r} instead of {flat[1][k]!r}" for k in keys) or "older"
