"""Probes: what the activations of a model say about the task, each beside its control."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from probes.baselines import bag_of_tokens
    from probes.clustering import Clustering, cluster
    from probes.similarity import nearest_neighbour

_HOMES = {
    "Clustering": "probes.clustering",
    "bag_of_tokens": "probes.baselines",
    "cluster": "probes.clustering",
    "nearest_neighbour": "probes.similarity",
}

__all__ = ["Clustering", "bag_of_tokens", "cluster", "nearest_neighbour"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'probes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
