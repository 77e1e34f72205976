"""Where, when and how a causal language model represents the identity of its task.

Names are imported on first use (``__init__.pyi`` lists them), so that ``import lensclust`` and
``lensclust --help`` do not wait for torch.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from lensclust import own_packages

_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name in __all__:
        return _public(name)
    if name == "__version__":
        from importlib.metadata import version

        return version("lensclust")
    if name in own_packages.NAMES:
        return own_packages.own(name)
    raise own_packages.missing("lensclust", name)


own_packages.report()
