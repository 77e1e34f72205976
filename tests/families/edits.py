"""Steering and generation; what a feature is, see `tests.families.methods`."""

from __future__ import annotations

from collections.abc import Callable

from tests.families.subjects import Subject

FEATURES: dict[str, Callable[[Subject], None]] = {
    # "steering": steering,
    # "generation": generation,
}
