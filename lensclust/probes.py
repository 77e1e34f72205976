"""Alias of `probes`: ``from lensclust.probes import steer``."""

from __future__ import annotations

from typing import Any

from lensclust import own_packages

_OURS = own_packages.own("probes")
__all__ = [*_OURS.__all__]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    return getattr(_OURS, name)
