"""The run directory: layout, locking and checksums of a study's results.

``config.json provenance.json scores.parquet claims.json notes.json figures/ views/ report.html``,
and ``parts/``, from which a killed run continues. ``claims.json`` is written after its data; the
page is made from it; ``digests.json`` is written last, and detects later changes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from lensclust.errors import InputError
from lensclust.storage import (
    DIGESTS,
    LOCK,
    check_folder,
    created,
    difference,
    digest_of,
    is_vacant,
    locked,
    read_json,
    remove_partial,
    replacing,
    require_name,
    seal_folder,
    write_atomically,
    writing,
)

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.results import Claim

_log = logging.getLogger(__name__)

# Files of a finished run; runs of an earlier version lack some of these.
FILES = ("config.json", "provenance.json", "claims.json", "scores.parquet")
PAGE = "report.html"
LIBRARIES = ("lensclust", "transformer-lens", "transformers", "torch", "scikit-learn", "numpy")


@runtime_checkable
class View(Protocol):
    """An interactive view of a page."""

    @property
    def title(self) -> str: ...

    def to_json(self) -> dict[str, Any]:
        """Plain values, including ``kind``, ``title`` and ``caption``."""
        ...


@contextmanager
def claimed(out: Path, config: Mapping[str, Any], *, resume: bool) -> Iterator[None]:
    """Lock a folder for a run, against other processes, inside the block.

    If the block raises before anything except the configuration was written, the folder is
    restored; files that this call did not create are never removed.

    Raises:
        InputError: if the folder is not empty, unless it holds a run of the same configuration and
            ``resume`` is set; if another process works on it, or it is not writable.
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
    """Check the existing configuration, or write it; return whether it was written."""
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
        flat = [{**c, **c.get("fields", {}), "fields": None} for c in (held, wanted)]
        raise InputError(f"output {out}: holds another run ({difference(*flat)})")
    if not resume:
        raise InputError(f"output {out}: holds this run already; continue it with --resume")
    remove_partial(out, out / "figures", out / "views")
    try:
        check(out, f"output {out}")
    except InputError as error:
        _log.warning("%s; all but its parts is written again", error)
    return False


def _give_back(out: Path) -> None:
    """Remove the configuration and folders of parts, unless there is anything else."""
    for folder in (*sorted((out / "parts").rglob("*"), reverse=True), out / "parts"):
        with suppress(OSError):  # a file, a link, or not empty
            folder.rmdir()
    if {path.name for path in out.iterdir()} <= {"config.json", LOCK}:
        (out / "config.json").unlink()


def contents(out: Path) -> list[str]:
    """Names of the files of a finished run, including its page."""
    flat = [out / name for name in (*FILES, "notes.json", PAGE)]
    found = [*flat, *(out / "figures").glob("*"), *(out / "views").glob("*")]
    return [path.relative_to(out).as_posix() for path in found if path.is_file()]


def check(out: Path, what: str, chosen: Callable[[str], bool] = lambda name: True) -> None:
    """Compare a finished run, or some of its files, with its digests, if it has any.

    Runs of an earlier version, or made by other means, have none.

    Raises:
        InputError: names the file that is missing, changed or unexpected.
    """
    if (out / DIGESTS).exists():
        check_folder(out, what, names=contents(out), chosen=chosen)


def seal(out: Path) -> None:
    """Write the digests of a finished run."""
    run = digest_of(read_json(out / "config.json"))
    seal_folder(out, {"run": run}, contents(out))


def require_place(out: Path) -> None:
    """Refuse a path that cannot be an output folder.

    Raises:
        InputError: if it has no name (``.``, ``..``, ``/``), is a URL or not portable text; if it
            or one of its parents is a file, or not writable.

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
    """Write all files of a finished run except the page, which is made from them.

    Raises:
        InputError: if the disk is full or not writable.
    """
    from lensclust import figures as drawing

    ids = [claim.id for claim in claims]
    if len(set(ids)) != len(ids):
        raise ValueError(f"claims: ids must differ, given {ids}")
    with writing(f"output {out}"):
        (out / DIGESTS).unlink(missing_ok=True)
        with replacing(out / "scores.parquet") as partial:
            scores.to_parquet(partial, index=False)
        for number, (name, chart) in enumerate(figures.items(), start=1):
            # The page shows figures by file name; the number keeps the study's order.
            drawing.save(chart, out / "figures", f"{number}_{name}")
        for number, (name, view) in enumerate((views or {}).items(), start=1):
            content = json.dumps(view.to_json(), sort_keys=True, ensure_ascii=False)
            write_atomically(out / "views" / f"{number}_{name}.json", content + "\n")
        write_atomically(out / "notes.json", _encode(list(notes)))
        write_atomically(out / "provenance.json", _encode({**provenance, **machine()}))
        write_atomically(out / "claims.json", _encode([claim.to_json() for claim in claims]))
        seal(out)


def machine() -> dict[str, Any]:
    """Library versions and the type of machine."""
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
