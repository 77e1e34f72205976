"""Where a store lies: in a folder, or at any URL that fsspec understands (``s3://bucket/a``).

A folder has a lock and comes into being in one rename. Object storage has neither, so that
- nothing keeps two processes from writing to one URL: what they do to each other is noticed,
  by checksums and digests, when it is read, but not prevented;
- a store there is laid out in place, with a marker beside it until it is whole; what a kill left
  half laid out is laid out again.
An object is replaced whole or not at all, as a file in a folder is.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import zarr
from upath import UPath

from lensclust.chunk_sizes import bounded
from lensclust.disk import (
    LOCK,
    created,
    locked,
    publish,
    remove_partial,
    require_name,
    staging,
)
from lensclust.errors import InputError

Place = Path | UPath
"""A folder (`pathlib.Path`) or a URL (`upath.UPath`)."""

# File systems over another one, which the URL does not name.
_WRAPPERS = {"reference", "dir", "zip", "tar", "libarchive", "generic", "data", "cached"}
_WRAPPERS |= {"simplecache", "filecache", "blockcache"}

ZARR_2 = zarr.__version__.startswith("2.")


def as_place(store: str | Path | UPath) -> Place:
    """A folder or URL as `pathlib` or `universal_pathlib` has it.

    Raises:
        InputError: if the URL's file system is not known, not installed or over another one, or
            it names no store.

    >>> as_place("runs/a.zarr"), as_place("file:///runs/a.zarr")
    (PosixPath('runs/a.zarr'), PosixPath('/runs/a.zarr'))
    >>> as_place("file://localhost/runs/a.zarr"), as_place("file:/runs/a.zarr")
    (PosixPath('/runs/a.zarr'), PosixPath('/runs/a.zarr'))
    >>> str(as_place("memory://runs/a/"))
    'memory://runs/a'
    >>> as_place("file:a")
    Traceback (most recent call last):
    ...
    lensclust.errors.InputError: store file:a: names no folder here, expected file:///folder
    """
    if not isinstance(store, str | os.PathLike | UPath):
        raise InputError(f"store: {type(store).__name__} given, expected a folder or a URL")
    text = str(store)
    url = re.match(r"([A-Za-z][\w+.-]+):/(/?)", text) or re.match(".*(::).*://()", text)
    url = url or re.match(r"(?i)(file|local):()", text)
    if not isinstance(store, UPath):
        if url is None:
            return Path(store)
        if url[1].lower() in ("file", "local"):
            local = re.fullmatch(r"\w+:(?://(?:localhost)?)?(/[^/].*)", text)
            if local is None:
                raise InputError(f"store {store}: names no folder here, expected file:///folder")
            return Path(local[1])
        if not url[2] or url[1] in _WRAPPERS:
            raise InputError(f"store {store}: names no place, expected such as s3://bucket/a")
        if not text[url.end() :].strip("/"):
            raise InputError(f"store {store}: names no store, expected {url[1]}://bucket/NAME")
    given = store if isinstance(store, UPath) else str(store).rstrip("/")
    try:
        # A listing that was kept would hide what was written since.
        place = UPath(given, use_listings_cache=False)
        if place.protocol in ("", "file", "local"):
            return Path(place.path)
        _ = place.fs
    except Exception as error:  # whatever a file system raises that lacks an option or a network
        raise InputError(f"store {store}: {error}") from error
    if ZARR_2:
        raise InputError(f"store {store}: a URL needs zarr 3, and so Python 3.11 or newer")
    if not place.name:
        raise InputError(f"store {store}: names no store, expected {store}/NAME")
    return place


def zarr_store(place: Place, *, read_only: bool) -> Any:
    """What zarr and xarray open."""
    if isinstance(place, UPath):
        from zarr.storage import FsspecStore

        options: Any = dict(place.storage_options)
        remote = bounded(FsspecStore)
        return remote.from_url(str(place), storage_options=options, read_only=read_only)
    if ZARR_2:
        return str(place)
    from zarr.storage import LocalStore

    return bounded(LocalStore)(str(place), read_only=read_only)


@contextmanager
def held(place: Place, what: str) -> Iterator[None]:
    """Keep other processes from writing to a folder; nothing does that at a URL.

    Raises:
        InputError: if another process holds it, or nothing can be written there.
    """
    if isinstance(place, UPath):
        yield
        return
    require_name(place, what)
    # Beside the store: it is made whole, in one rename, and holds nothing but itself.
    with created(place.parent, what), locked(place.with_name(f".{place.name}{LOCK}"), what):
        yield


def vacant(place: Place) -> bool:
    """Whether a store can be made there: nothing is there, or what a kill left half laid out."""
    if isinstance(place, UPath) and _marker(place).exists():
        return True
    return not place.exists() or not any(place.iterdir() if place.is_dir() else [place])


@contextmanager
def made_whole(place: Place) -> Iterator[Place]:
    """Where to lay out a store that is at ``place`` when the block ends, and not before."""
    if isinstance(place, UPath):
        _marker(place).write_text("half laid out")
        yield place
        _marker(place).unlink()
        return
    place = place.resolve()  # an empty folder is filled where it lies
    remove_partial(place.parent)
    with staging(place.parent) as folder:
        yield folder / place.name
        publish(folder / place.name, place)


def _marker(place: UPath) -> UPath:
    return place.with_name(f".{place.name}.unfinished")
