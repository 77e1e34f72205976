"""Integrity: JSON with a checksum, and checksums of a folder's files.

A complete folder (a part of a run, a finished run, a download) has a file ``digests.json``,
written last: the sha256 of every file, and what the folder is *of*, such as the configuration and
the name of a part. So changed, missing or extra files are detected, and files of another run are
not mistaken for this one's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lensclust.errors import InputError
from lensclust.storage.atomic import LOCK, read_json, write_atomically

DIGESTS = "digests.json"


def digest_of(content: Any) -> str:
    """sha256 of JSON content as hex digits, independent of its formatting.

    >>> digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    True
    """
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file of any size, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def with_checksum(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add a checksum to JSON content.

    >>> verified(with_checksum({"step": 3}), "a.json")
    {'step': 3}
    """
    return {**content, "seal": digest_of(content)}


def verified(content: Any, said: str) -> dict[str, Any]:
    """Check and remove the checksum of JSON content; ``said`` names it in error messages.

    Raises:
        InputError: if the content does not match its checksum.

    >>> verified({**with_checksum({"step": 3}), "step": 4}, "a.json")
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: a.json is damaged: it does not match its own checksum
    """
    held = dict(content) if isinstance(content, dict) else {}
    if held.pop("seal", None) != digest_of(held):
        raise InputError(f"{said} is damaged: it does not match its own checksum")
    return held


def seal_folder(folder: Path, of: Any, names: Iterable[str] | None = None) -> None:
    """Write ``digests.json``: what a folder is of, and the digests of its files.

    Args:
        of: JSON, such as ``{"part": "seed-0"}``.
        names: files below the folder; all by default.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a.txt").write_text("whole")
    >>> seal_folder(folder, {"part": 1})
    >>> check_folder(folder, "part a", of={"part": 2})
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: part a: is of part 1 instead of 2
    >>> _ = (folder / "a.txt").write_text("wh")
    >>> check_folder(folder, "part a", of={"part": 1})
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: part a: /...a.txt is damaged: it changed since it was written
    """
    files = {name: file_digest(folder / name) for name in names or _all_files(folder)}
    noted = with_checksum({"of": of, "files": dict(sorted(files.items()))})
    write_atomically(folder / DIGESTS, json.dumps(noted, indent=1))


def check_folder(
    folder: Path,
    what: str,
    *,
    of: Any = None,
    names: Iterable[str] | None = None,
    chosen: Callable[[str], bool] = lambda name: True,
) -> None:
    """Compare a folder with the digests from :func:`seal_folder`.

    Args:
        what: start of the error message, with advice.
        of: what the folder must be of, unless None.
        names: existing files; all by default.
        chosen: which names to check.

    Raises:
        InputError: names the first file that is missing, changed or unexpected.
    """
    if not (folder / DIGESTS).exists():
        raise InputError(f"{what}: has no {DIGESTS}: it is incomplete or of an earlier version")
    noted = verified(read_json(folder / DIGESTS, what=f"{what}: "), f"{what}: {folder / DIGESTS}")
    files = noted.get("files")
    if not isinstance(files, dict):
        raise InputError(f"{what}: {folder / DIGESTS} holds no digests of files")
    if of is not None and noted.get("of") != of:
        raise InputError(f"{what}: is of {difference(noted.get('of'), of)}")
    there = {*(_all_files(folder) if names is None else names)}
    for name in sorted(filter(chosen, there | set(files))):
        file = f"{what}: {folder / name}"
        if not (folder / name).is_file():
            raise InputError(f"{file} is missing")
        if name not in files or name not in there:
            raise InputError(f"{file} does not belong there")
        try:
            same = file_digest(folder / name) == files[name]
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        if not same:
            raise InputError(f"{file} is damaged: it changed since it was written")


def difference(held: Any, wanted: Mapping[str, Any]) -> str:
    """Describe the entries in which one mapping differs from another.

    >>> difference({"seed": 1, "steps": 5}, {"seed": 2, "steps": 5})
    'seed 1 instead of 2'
    """
    held = held if isinstance(held, dict) else {}
    keys = [key for key in {**wanted, **held} if held.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {held.get(key)!r} instead of {wanted.get(key)!r}" for key in keys)


def _all_files(folder: Path) -> list[str]:
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in found if name not in (DIGESTS, LOCK)]
