"""Files that survive: written whole or not at all, by one process at a time, read with care.

What a kill or a power cut leaves behind is the old file or the new one. A fault of the disk (full,
read-only, no permission) is one line that says where it happened and what to do. Nothing is
removed that was not made here: what is in the making has a name that says which process makes it.
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

# More than any task file or run has; a larger file is not read into memory.
MAX_JSON_BYTES = 256_000_000
# The lock of a folder, inside it.
LOCK = ".lensclust.lock"
# A folder in which something is being made: host, process, and letters that make it unique.
_STAGING = re.compile(r"\.lensclust\.(.*)\.(\d+)\.\w+\.partial")


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
        with writing(what, "give another place"):  # also what comes of a folder without permission
            os.close(os.open(file, os.O_RDWR | os.O_CREAT))
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
def created(folder: Path, what: str = "") -> Iterator[None]:
    """A folder that is there inside the block; given back if the block raises and left it empty.

    Args:
        folder: made with its parents where they are missing, and removed with those alone.
        what: named in the error where it cannot be made; without it that error is an OSError.

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
            with suppress(OSError):  # somebody else's things are in it by now
                path.rmdir()
        raise


@contextmanager
def staging(folder: Path) -> Iterator[Path]:
    """A folder below another to make things in, removed with all that is in it at the end."""
    prefix = f".lensclust.{platform.node()}.{os.getpid()}."
    made = Path(tempfile.mkdtemp(dir=folder, prefix=prefix, suffix=".partial"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write instead of ``path``, which it replaces in one move at the end.

    >>> path = Path(tempfile.mkdtemp()) / "a" / "notes.txt"
    >>> with replacing(path) as partial:
    ...     _ = partial.write_text("whole")
    >>> path.read_text(), sorted(p.name for p in path.parent.iterdir())
    ('whole', ['notes.txt'])
    """
    # A folder of its own: a library may write beside the file it was given, and be killed too.
    with created(path.parent), staging(path.parent) as folder:
        yield folder / path.name
        publish(folder / path.name, path)


def publish(made: Path, path: Path) -> None:
    """Move a file or folder to its final name, with the mode of the file or empty folder there.

    What was made is on the disk before it has the name, and the name is there before this
    returns: a power cut leaves the old or the new.
    """
    if path.exists():
        made.chmod(stat.S_IMODE(path.stat().st_mode))
    flush(made)
    if path.is_dir() and os.name != "posix":  # where no folder replaces an empty one
        path.rmdir()
    made.replace(path)
    _flush(path.parent)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder and all that is below it, to the disk."""
    for inner in (*path.rglob("*"), path) if path.is_dir() else (path,):
        _flush(inner)


def _flush(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
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
    """Remove what processes that are gone left in the making, at the top of these folders."""
    for left in (path for folder in folders for path in folder.glob(".lensclust.*.partial")):
        made = _STAGING.fullmatch(left.name)
        if made and made[1] == platform.node() and not _is_alive(int(made[2])):
            shutil.rmtree(left, ignore_errors=True)


def is_vacant(folder: Path) -> bool:
    """Whether a folder holds nothing, or nothing but a lock and what was in the making."""
    return all(
        path.name == LOCK or (_STAGING.fullmatch(path.name) and path.is_dir())
        for path in folder.iterdir()
    )


def require_name(path: Path, what: str) -> None:
    """Refuse a path to write to that names nothing of its own, or nothing in a file system.

    Raises:
        InputError: if it is ``""``, ``.``, ``..``, ``/`` or a URL, or holds a NUL character or
            what is no Unicode.
    """
    reason = ""
    if "\0" in str(path):
        reason = "holds a NUL character"
    elif re.search("[\ud800-\udfff]", str(path)):
        reason = "is not UTF-8"
    elif path.name in ("", ".."):
        reason = "has no name of its own, expected one such as runs/mine"
    elif re.fullmatch(r"[A-Za-z][\w+.-]+:", path.parts[0]):
        reason = "is a URL, expected a folder or file of this machine"
    if reason:
        raise InputError(f"{what}: {reason}")


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is not a harmless question
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


def _reason(error: Exception) -> str | None:
    """What the system said; None where the error is not about the system."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # safetensors has an error type of its own around the system's.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return os.strerror(int(found[1])) if found else None
