"""Atomic writes, locks, and checked reading of JSON.

After a kill or a power cut there is the old file or the new one. A disk error (full, read-only, no
permission) is one line that says where it happened and what to do. Only temporary files of this
library are removed: their names contain the process that writes them.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from upath import UPath

from lensclust.errors import InputError

# Larger than any file of a task or run; larger files are not read into memory.
MAX_JSON_BYTES = 256_000_000
# The lock of a folder, inside it.
LOCK = ".lensclust.lock"
# Name of a temporary folder: host, process, and letters that make it unique.
_STAGING = re.compile(r"\.lensclust\.(.*)\.(\d+)\.\w+\.partial")


@contextmanager
def locked(file: Path, what: str, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock that ends with the process; the lock file is removed at the end.

    Args:
        file: the lock's file; its folder must exist.
        what: what is locked, for the message.
        wait: wait for the other process instead of refusing.

    Raises:
        InputError: if another process holds the lock and ``wait`` is false, or the file cannot
            be created.

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
        with writing(what, "give another place"):  # includes errors of a folder without permission
            os.close(os.open(file, os.O_RDWR | os.O_CREAT))
        raise InputError(f"{what}: another process is writing to it (it holds {file})") from None
    except OSError as error:
        raise InputError(f"{what}: cannot be written: {_reason(error)} ({file})") from error
    try:
        yield
    finally:
        # Removed under the lock: waiting processes find the file gone and create a new one.
        with suppress(OSError):
            file.unlink()
        lock.release()


@contextmanager
def writing(what: str, then: str = "put that right, then resume") -> Iterator[None]:
    """Turn a disk error inside the block into one line.

    Raises:
        InputError: if an OSError was raised, or a library's error about one.

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
def created(folder: Path, what: str = "") -> Iterator[None]:
    """Create a folder for the block; remove it if the block raises and leaves it empty.

    Args:
        folder: created with its missing parents, and removed only with those.
        what: named in the error if it cannot be created; without it that error is an OSError.

    >>> top = Path(tempfile.mkdtemp())
    >>> with suppress(KeyError), created(top / "a" / "b"):
    ...     raise KeyError
    >>> list(top.iterdir())
    []
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(what) if what else nullcontext():
            folder.mkdir(parents=True, exist_ok=True)
            for path in missing:
                _flush(path.parent)
        yield
    except BaseException:
        for path in missing:
            with suppress(OSError):  # others may have written to it
                path.rmdir()
        raise


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A temporary folder inside another, removed with its contents at the end."""
    prefix = f".lensclust.{platform.node()}.{os.getpid()}."
    made = Path(tempfile.mkdtemp(dir=folder, prefix=prefix, suffix=".partial"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that atomically replaces ``path`` at the end.

    >>> path = Path(tempfile.mkdtemp()) / "a" / "notes.txt"
    >>> with replacing(path) as partial:
    ...     _ = partial.write_text("whole")
    >>> path.read_text(), sorted(p.name for p in path.parent.iterdir())
    ('whole', ['notes.txt'])
    """
    # In a separate folder: a library may write other files beside it, and be killed.
    with created(path.parent), staging(path.parent) as folder:
        yield folder / path.name
        publish(folder / path.name, path)


def publish(made: Path, path: Path) -> None:
    """Move a file or folder to its final name, with the mode of the existing file or folder.

    The contents are flushed to disk before the move, and the name before this returns: a power cut
    leaves the old or the new one.
    """
    if path.exists():
        made.chmod(stat.S_IMODE(path.stat().st_mode))
    flush(made)
    if path.is_dir() and os.name != "posix":  # no folder replaces an empty one there
        path.rmdir()
    made.replace(path)
    _flush(path.parent)


def flush(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to disk."""
    for inner in (*path.rglob("*"), path) if path.is_dir() else (path,):
        _flush(inner)


def _flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    if path.is_dir() and os.name != "posix":
        return
    file = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not on every file system
            raise
    finally:
        os.close(file)


def remove_partial(*folders: Path) -> None:
    """Remove temporary files of dead processes, at the top level of these folders."""
    for left in (path for folder in folders for path in folder.glob(".lensclust.*.partial")):
        made = _STAGING.fullmatch(left.name)
        if made and made[1] == platform.node() and not _is_alive(int(made[2])):
            shutil.rmtree(left, ignore_errors=True)


def is_vacant(folder: Path) -> bool:
    """Whether a folder is empty, except for a lock and temporary files."""
    return all(
        path.name == LOCK or (_STAGING.fullmatch(path.name) and path.is_dir())
        for path in folder.iterdir()
    )


def require_name(path: Path, what: str) -> None:
    """Refuse an output path without a name, or outside the file system.

    Raises:
        InputError: if it is ``""``, ``.``, ``..``, ``/`` or a URL, contains a NUL character or is
            not Unicode.
    """
    reason = ""
    if "\0" in str(path):
        reason = "holds a NUL character"
    elif re.search("[\ud800-\udfff]", str(path)):
        reason = "is not UTF-8"
    elif path.name in ("", ".."):
        reason = "has no name, expected one such as runs/mine"
    elif re.fullmatch(r"[A-Za-z][\w+.-]+:", path.parts[0]):
        reason = "is a URL, expected a folder or file of this machine"
    if reason:
        raise InputError(f"{what}: {reason}")


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not harmless
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def read_json(path: Path | UPath, *, what: str = "") -> Any:
    """Parse a JSON file.

    Args:
        what: prefix of the file's name in error messages.

    Raises:
        InputError: if it is missing, malformed, nested too deeply or too large, or contains a
            text that is not Unicode; names the file and the position.
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
    """Parse JSON; ``said`` names it in error messages.

    Raises:
        InputError: as :func:`read_json`.

    >>> parse_json('{"a": [1, ', "b.json")
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: b.json is not readable JSON: line 1, column 11: Expecting value
    """
    try:
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # lone surrogates, which cannot be written
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
    """Write a text file atomically: a kill leaves the old one or the new one, never half."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def _reason(error: Exception) -> str | None:
    """The message of the operating system; None if the error is not from it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors wraps the system's error in its own type.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
