"""What a chunk of a store inflates to, read from its first bytes before any of it is inflated."""

from __future__ import annotations

from functools import cache
from typing import Any

# A chunk may inflate to this many bytes, or to this many times its own.
_MAX_BYTES, _MAX_RATIO = 2**28, 100
_ZSTD, _BLOSC = b"\x28\xb5\x2f\xfd", (1, 2)


def inflated_bytes(head: bytes, size: int) -> int:
    """How many bytes a chunk of ``size`` bytes says it inflates to, by the first 18 of them.

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
        ValueError: says how large it would be (`lensclust.checked_arrays.damage_named` says where).
    """
    if content is None or key.rpartition("/")[2].startswith("."):
        return
    values = content.as_numpy_array()
    asked = inflated_bytes(values[:18].tobytes(), values.nbytes)
    if asked > max(_MAX_BYTES, _MAX_RATIO * values.nbytes):
        raise ValueError(f"chunk {key} of {values.nbytes:,} bytes inflates to {asked:,} bytes")


@cache
def bounded(kind: Any) -> Any:
    """A kind of zarr store whose chunks inflate to what data may be."""

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
