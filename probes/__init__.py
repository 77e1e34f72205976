"""Probes: what the activations of a model say about the task, each beside its control."""

from __future__ import annotations

from typing import Any

import lazy_loader

from lensclust import own_packages

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _public(name)
    raise own_packages.missing("probes", name)
