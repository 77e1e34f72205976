"""Files that survive: written whole or not at all, by one process at a time, read with care.

What a kill leaves behind is the old file or the new one. A fault of the disk (full, read-only,
no permission) is one line that says where it happened and what to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from upath import UPath

from lensclust.errors import InputError

# More than any task file or run has; a larger file is not read into memory.
MAX_JSON_BYTES = 256_000_000
_DIGESTS = "sha256.json"


@contextmanager
def locked(file: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that dies with the process; the lock's file is removed at the end.

    Args:
        file: the lock's file; its folder must exist.
        what: what is locked, for the message.
        wait: wait for the other process instead of refusing.

    Raises:
        InputError: if another process holds the lock and ``wait`` is false, or the file cannot
            be made.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / ".lock"
    >>> with locked(file, "store a"), locked(file, "store a"):
    ...     pass
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: store a: another process is writing to it (it holds ...)
    """
    lock = FileLock(str(file), timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{what}: another process is writing to it (it holds {file})") from None
    except OSError as error:
        raise InputError(f"{what}: cannot be written: {_reason(error)} ({file})") from error
    try:
        yield
    finally:
        # While it is held: whoever waits for this file finds it gone and makes a new one.
        with suppress(OSError):
            file.unlink()
        lock.release()


@contextmanager
def writing(what: str, then: str = "put that right, then resume") -> Iterator[None]:
    """Turn a fault of the disk inside the block into one line.

    Raises:
        InputError: where an OSError was raised, or a library's error about one.

    >>> with writing("store a"):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: store a: cannot be written: No space left on device; put ...
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise InputError(f"{what}: cannot be written: {reason}; {then}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of ``path``, which it replaces in one move at the end.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a" / "notes.txt"
    >>> with replacing(path) as partial:
    ...     _ = partial.write_text("whole")
    >>> path.read_text(), sorted(p.name for p in path.parent.iterdir())
    ('whole', ['notes.txt'])
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: a library may write beside the file it was given, and be killed too.
    staging = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        staging.mkdir(exist_ok=True)
        yield staging / path.name
        (staging / path.name).replace(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_partial(*folders: Path) -> None:
    """Remove what kills in the middle of a write left in folders that are ours alone."""
    for left in (path for folder in folders for path in folder.glob("*.partial")):
        shutil.rmtree(left, ignore_errors=True)
        with suppress(OSError):
            left.unlink()


def read_json(path: Path | UPath, *, what: str = "") -> Any:
    """Parse a JSON file.

    Args:
        what: said before the file's name in errors.

    Raises:
        InputError: if it is missing, malformed, nested too deeply or too large, or a text in it
            is no Unicode; names the file and the place.
    """
    said = f"{what}{path}"
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise InputError(f"{said}: holds {size:,} bytes, expected at most {MAX_JSON_BYTES:,}")
        return parse_json(path.read_text(encoding="utf-8"), said)
    except FileNotFoundError:
        raise InputError(f"{said}: no such file") from None
    except OSError as error:
        raise InputError(f"{said}: cannot be read: {_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{said} is not readable JSON: not UTF-8, {error.reason}") from None


def parse_json(text: str, said: str) -> Any:
    """Parse JSON; ``said`` names it in errors.

    Raises:
        InputError: as :func:`read_json`.

    >>> parse_json('{"a": [1, ', "b.json")
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: b.json is not readable JSON: line 1, column 11: Expecting value
    """
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # halves of a pair, which nothing can write
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{said} is not readable JSON: {place}: {error.msg}") from None
    except UnicodeEncodeError:
        raise InputError(f"{said} is not readable JSON: half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{said} is not readable JSON: {error}") from None
    return value


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that a kill leaves the old one or the new one, never half."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def seal_files(folder: Path) -> None:
    """Note the digests of a folder's files beside them."""
    names = sorted(path.name for path in folder.iterdir())
    text = json.dumps({name: file_digest(folder / name) for name in names}, indent=1)
    write_atomically(folder / _DIGESTS, text)


def check_files(folder: Path, names: Iterable[str], what: str) -> None:
    """Hold files against the digests noted by :func:`seal_files`.

    Raises:
        InputError: names the first file that is missing, new or changed.
    """
    noted = read_json(folder / _DIGESTS, what=f"{what}: ")
    there = set(names) - {_DIGESTS}
    if not isinstance(noted, dict) or set(noted) != there:
        odd = sorted(there ^ set(noted)) if isinstance(noted, dict) else [_DIGESTS]
        raise InputError(f"{what}: {folder / odd[0]} is damaged or does not belong there")
    for name, digest in noted.items():
        if file_digest(folder / name) != digest:
            raise InputError(f"{what}: {folder / name} is damaged: it changed since it was written")


def file_digest(path: Path) -> str:
    """sha256 of a file of any size, as hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _reason(error: Exception) -> str | None:
    """What the system said; None where the error is not about the system."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors has an error type of its own around the system's.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
