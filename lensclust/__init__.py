"""Where, when and how a causal language model holds the identity of the task it was asked to do.

The public face of the package: every name is imported on first use, so that
``import lensclust`` (and ``lensclust --help``) does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lensclust import own_packages

if TYPE_CHECKING:
    from lensclust import figures, report, tasks
    from lensclust.activations import head_residual
    from lensclust.adapters import Lora
    from lensclust.distributed import extract_with_ray
    from lensclust.errors import InputError
    from lensclust.extraction import extract
    from lensclust.models import load
    from lensclust.pooling import pooled
    from lensclust.prompts import Prompts
    from lensclust.results import Claim
    from lensclust.sharing import plan_prefixes
    from lensclust.sites import Site
    from lensclust.store import open_activations
    from lensclust.supervised import finetune
    from lensclust.training import train
    from lensclust.weights import fingerprint
    from lensclust.wrapping import release

# A module may not share its name with a function listed here (hence `extraction`, `training`):
# importing the submodule would put the module in the function's place.
_HOMES = {
    "Claim": "lensclust.results",
    "InputError": "lensclust.errors",
    "Lora": "lensclust.adapters",
    "Prompts": "lensclust.prompts",
    "Site": "lensclust.sites",
    "extract": "lensclust.extraction",
    "extract_with_ray": "lensclust.distributed",
    "finetune": "lensclust.supervised",
    "fingerprint": "lensclust.weights",
    "head_residual": "lensclust.activations",
    "load": "lensclust.models",
    "open_activations": "lensclust.store",
    "plan_prefixes": "lensclust.sharing",
    "pooled": "lensclust.pooling",
    "release": "lensclust.wrapping",
    "train": "lensclust.training",
}
_MODULES = ("figures", "report", "tasks")

__all__ = [
    "Claim",
    "InputError",
    "Lora",
    "Prompts",
    "Site",
    "extract",
    "extract_with_ray",
    "figures",
    "finetune",
    "fingerprint",
    "head_residual",
    "load",
    "open_activations",
    "plan_prefixes",
    "pooled",
    "release",
    "report",
    "tasks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("lensclust")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _MODULES:
        return import_module(f"lensclust.{name}")
    if name in own_packages.NAMES:
        return own_packages.own(name)
    raise own_packages.missing("lensclust", name)


def __dir__() -> list[str]:
    return sorted(__all__)


own_packages.report()
