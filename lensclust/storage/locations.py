"""Locations of a store: a folder, or any URL of fsspec (``s3://bucket/a``).

A folder has a lock and is created by one rename. Object storage has neither, so that
- two processes can write to one URL at the same time: the damage is not prevented, but checksums
  and digests detect it at reading;
- a store there is created in place, with a marker beside it until it is complete; after a kill an
  incomplete one is created again.
Objects are replaced atomically, like files in a folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import zarr
from upath import UPath

from lensclust.errors import InputError
from lensclust.storage.atomic import (
    LOCK,
    created,
    locked,
    publish,
    remove_partial,
    require_name,
    staging,
)

Place = Path | UPath
# A chunk may inflate to this many bytes, or to this many times its own.
_MAX_BYTES, _MAX_RATIO = 2**28, 100
_ZSTD, _BLOSC = b"\x28\xb5\x2f\xfd", (1, 2)


"""A folder (`pathlib.Path`) or a URL (`upath.UPath`)."""

# File systems on top of another one, which the URL does not name.
_WRAPPERS = {"reference", "dir", "zip", "tar", "libarchive", "generic", "data", "cached"}
_WRAPPERS |= {"simplecache", "filecache", "blockcache"}

ZARR_2 = zarr.__version__.startswith("2.")


def as_place(store: str | Path | UPath) -> Place:
    """A folder or URL as a path of `pathlib` or `universal_pathlib`.

    Raises:
        InputError: if the URL's file system is not known, not installed or on top of another one,
            or the URL names no store.

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
        # A cached listing would hide later writes.
        place = UPath(given, use_listings_cache=False)
        if place.protocol in ("", "file", "local"):
            return Path(place.path)
        _ = place.fs
    except Exception as error:  # a file system may raise anything
        raise InputError(f"store {store}: {error}") from error
    if ZARR_2:
        raise InputError(f"store {store}: a URL needs zarr 3, and so Python 3.11 or newer")
    if not place.name:
        raise InputError(f"store {store}: names no store, expected {store}/NAME")
    return place


def zarr_store(place: Place, *, read_only: bool) -> Any:
    """The store object that zarr and xarray open."""
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
def locked_place(place: Place, what: str) -> Iterator[None]:
    """Lock a folder against writes of other processes; a URL cannot be locked.

    Raises:
        InputError: if another process holds the lock, or the folder is not writable.
    """
    if isinstance(place, UPath):
        yield
        return
    require_name(place, what)
    # Beside the store, which is created by one rename and contains nothing else.
    with created(place.parent, what), locked(place.with_name(f".{place.name}{LOCK}"), what):
        yield


def is_free(place: Place) -> bool:
    """Whether a store can be created there: the place is empty, or holds an incomplete store."""
    if isinstance(place, UPath) and _marker(place).exists():
        return True
    return not place.exists() or not any(place.iterdir() if place.is_dir() else [place])


@contextmanager
def created_atomically(place: Place) -> Iterator[Place]:
    """A temporary place for a store, which is at ``place`` when the block ends, and not before."""
    if isinstance(place, UPath):
        _marker(place).write_text("half laid out")
        yield place
        _marker(place).unlink()
        return
    place = place.resolve()  # an existing empty folder is replaced in place
    remove_partial(place.parent)
    with staging(place.parent) as folder:
        yield folder / place.name
        publish(folder / place.name, place)


def _marker(place: UPath) -> UPath:
    return place.with_name(f".{place.name}.unfinished")


def inflated_bytes(head: bytes, size: int) -> int:
    """The decompressed size of a chunk of ``size`` bytes, from its first 18 bytes.

    >>> import numcodecs
    >>> [int(inflated_bytes(kind.encode(bytes(10**6))[:18], 99))
    ...  for kind in (numcodecs.Blosc(), numcodecs.Zstd(level=1, checksum=True))]
    [1000000, 1000000]
    """
    if len(head) > 8 and head.startswith(_ZSTD):
        # RFC 8878: flags, then a window or not, a dictionary's number, the size of the content.
        single, flag = head[4] >> 5 & 1, head[4] >> 6
        start = 6 - single + (0, 1, 2, 4)[head[4] & 3]
        width = (single, 2, 4, 8)[flag]
        if not width:
            return 2**63
        return int.from_bytes(head[start : start + width], "little") + 256 * (width == 2)
    if len(head) > 15 and head[0] in _BLOSC:
        return int.from_bytes(head[4:8], "little")
    return size


def require_plausible(key: str, content: Any) -> None:
    """Refuse a chunk that inflates to far more than data do.

    Raises:
        ValueError: names its size (`lensclust.activations.store.chunks.damage_named` adds the
            store).
    """
    if content is None or key.rpartition("/")[2].startswith("."):
        return
    values = content.as_numpy_array()
    asked = inflated_bytes(values[:18].tobytes(), values.nbytes)
    if asked > max(_MAX_BYTES, _MAX_RATIO * values.nbytes):
        raise ValueError(f"chunk {key} of {values.nbytes:,} bytes inflates to {asked:,} bytes")


@cache
def bounded(kind: Any) -> Any:
    """A subclass of a zarr store that refuses implausibly large chunks."""

    class Bounded(kind):
        async def get(self, key: str, *given: Any, **named: Any) -> Any:
            found = await super().get(key, *given, **named)
            require_plausible(key, found)
            return found

        if hasattr(kind, "get_sync"):

            def get_sync(self, key: str, *given: Any, **named: Any) -> Any:
                found = super().get_sync(key, *given, **named)
                require_plausible(key, found)
                return found

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            _, (_, *arguments), *rest = super().__reduce_ex__(2)
            return _made_again, (kind, *arguments), *rest

    return Bounded


def _made_again(kind: Any, *arguments: Any) -> Any:
    again = bounded(kind)
    return again.__new__(again, *arguments)
