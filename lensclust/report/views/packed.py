"""Views as JSON: compact encoding of arrays, and checked decoding."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from lensclust.errors import InputError


def number(value: float) -> float | None:
    """Round to five digits; null if not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def packed(values: UInt8[np.ndarray, "*size"]) -> str:
    """Bytes as base64 text."""
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def quantised(values: Float[np.ndarray, "*size"]) -> dict[str, Any]:
    """Encode an array in 16 bits per number: ``low + step * n``, little-endian.

    >>> held = quantised(np.array([[0.0, 0.5], [1.0, 0.25]]))
    >>> held["shape"], held["low"], round(held["step"] * 65535, 6), len(held["data"])
    ([2, 2], 0.0, 1.0, 12)
    """
    low = float(values.min()) if values.size else 0.0
    step = (float(values.max()) - low) / 65535 if values.size else 0.0
    counts = np.round((values - low) / (step or 1.0)).astype("<u2")
    data = base64.b64encode(counts.tobytes()).decode()
    return {"shape": list(values.shape), "low": low, "step": step, "data": data}


class Parts:
    """Checked access to the parts of a view that was read from a file.

    Args:
        held: the JSON object.
        where: its place, used in error messages.
    """

    def __init__(self, held: Mapping[str, Any], where: str) -> None:
        self.held, self.where = held, where

    def error(self, part: str, expected: str) -> InputError:
        return InputError(f"{self.where}: {part} is missing or wrong, expected {expected}")

    def of(self, part: str, kind: type | tuple[type, ...], expected: str) -> Any:
        value = self.held.get(part)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(repr(part), expected)
        return value

    def text(self, part: str) -> str:
        return self.of(part, str, "a text")

    def list(self, part: str) -> list[Any]:
        return self.of(part, list, "a list")

    def each(self, part: str) -> Iterator[Parts]:
        """The objects of a list."""
        for index, item in enumerate(self.list(part)):
            if not isinstance(item, dict):
                raise self.error(f"{part!r} {index}", "an object")
            yield Parts(item, f"{self.where}: {part} {index}")

    def texts(self, part: str, length: int | None = None) -> tuple[str, ...]:
        values = self.list(part)
        if not all(isinstance(v, str) for v in values) or length not in (None, len(values)):
            raise self.error(repr(part), f"{'' if length is None else f'{length} '}texts")
        return tuple(values)

    def numbers(self, part: str, length: int) -> Float[np.ndarray, " number"]:
        """Numbers, NaN for null."""
        values = self.list(part)
        fine = all(
            v is None or (isinstance(v, (int, float)) and type(v) is not bool) for v in values
        )
        if not fine or len(values) != length:
            raise self.error(repr(part), f"{length} numbers")
        return np.array([np.nan if v is None else float(v) for v in values])

    def whole(self, part: str, length: int) -> tuple[int, ...]:
        """Whole numbers of 0 or more."""
        values = self.list(part)
        if len(values) != length or not all(type(v) is int and v >= 0 for v in values):
            raise self.error(repr(part), f"{length} whole numbers")
        return tuple(values)

    def bytes(self, part: str, length: int) -> UInt8[np.ndarray, " byte"]:
        try:
            found = base64.b64decode(self.text(part), validate=True)
        except (binascii.Error, ValueError):
            found = None
        if found is None or len(found) != length:
            raise self.error(repr(part), f"{length} bytes in base64")
        return np.frombuffer(found, dtype=np.uint8)

    def array(self, part: str, shape: tuple[int, ...]) -> Float[np.ndarray, "*size"]:
        """Inverse of `quantised` for a known shape."""
        held = Parts(self.of(part, dict, "an object"), f"{self.where}: {part}")
        if held.whole("shape", len(shape)) != shape:
            raise held.error("'shape'", f"{list(shape)}")
        low, step = (held.of(name, (int, float), "a number") for name in ("low", "step"))
        if not (math.isfinite(low) and math.isfinite(step)):
            raise held.error("'low' or 'step'", "finite numbers")
        counts = held.bytes("data", 2 * math.prod(shape)).view("<u2")
        return low + step * counts.reshape(shape).astype(np.float64)
