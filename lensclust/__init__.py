"""Where, when and how a causal language model holds the identity of the task it was asked to do.

The public face of the package: every name is imported on first use, so that
``import lensclust`` (and ``lensclust --help``) does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lensclust import own_packages

if TYPE_CHECKING:
    pass
    from lensclust.activations.dataset import head_residual
    from lensclust.activations.extraction import extract
    from lensclust.activations.pooling import pooled
    from lensclust.activations.ray import extract_with_ray
    from lensclust.activations.store.writing import open_activations
    from lensclust.errors import InputError
    from lensclust.inference.prefix_sharing.sharing import plan_prefixes
    from lensclust.models.checkpoints import fingerprint
    from lensclust.models.loading import load
    from lensclust.models.sites import Site
    from lensclust.models.wrapping import release
    from lensclust.prompts.prompts import Prompts
    from lensclust.results.claims import Claim
    from lensclust.training.finetuning import finetune
    from lensclust.training.lora import Lora
    from lensclust.training.pretraining import train

# A module may not share its name with a function listed here (hence `extraction`, `training`):
# importing the submodule would put the module in the function's place.
_HOMES = {
    "Claim": "lensclust.results.claims",
    "InputError": "lensclust.errors",
    "Lora": "lensclust.training.lora",
    "Prompts": "lensclust.prompts.prompts",
    "Site": "lensclust.models.sites",
    "extract": "lensclust.activations.extraction",
    "extract_with_ray": "lensclust.activations.ray",
    "finetune": "lensclust.training.finetuning",
    "fingerprint": "lensclust.models.checkpoints",
    "head_residual": "lensclust.activations.dataset",
    "load": "lensclust.models.loading",
    "open_activations": "lensclust.activations.store.writing",
    "plan_prefixes": "lensclust.inference.prefix_sharing.sharing",
    "pooled": "lensclust.activations.pooling",
    "release": "lensclust.models.wrapping",
    "train": "lensclust.training.pretraining",
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
