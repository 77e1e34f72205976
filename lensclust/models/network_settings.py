"""What decides a network's output beside its weights: its configuration, constants, fixed tables.

Two networks of the same weights differ if one has another base of its rotary positions, another
epsilon in its norms or another scale of its scores. So a store notes both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import PretrainedConfig

from lensclust.models.devices import brought_in
from lensclust.models.native import config_to_json
from lensclust.models.parameters import WRAPPED
from lensclust.storage import tensors_digest

_PLAIN = (bool, int, float, str)


def settings_digest(model: nn.Module) -> str:
    """sha256 over everything but the weights that a forward depends on, as 64 hex digits.

    That is: what the class of a network adds to its configuration (not its name or dtype), the
    classes of its modules, plain numbers and texts among their attributes, buffers that no state
    dict holds and no forward writes, and the precision of `torch.autocast` where that is on.

    >>> import lensclust as lc
    >>> one, other = lc.load("native:sif-small"), lc.load("native:sif-small")
    >>> settings_digest(one) == settings_digest(other)
    True
    >>> other.original_model.layers[0].ln1.original_component.eps *= 2
    >>> settings_digest(one) == settings_digest(other)
    False
    """
    network = getattr(model, "original_model", model)
    kept = {*network.state_dict(keep_vars=True), *_rewritten(network)}
    tables = {
        name.replace(WRAPPED, ""): held
        for name, held in network.named_buffers(remove_duplicate=False)
        if name not in kept and isinstance(held, Tensor)
    }
    said = {**plain_settings(network), "tables": tensors_digest(tables.items(), brought_in(model))}
    if (precision := autocast_precision(network)) is not None:
        said["autocast"] = str(precision)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _rewritten(network: nn.Module) -> Iterator[str]:
    """Names of what rotary embeddings make again for the length of each forward.

    What they make it from is in the configuration, and in a table beside it.
    """
    for name, module in network.named_modules():
        found = getattr(module, "rope_type", None)
        for layers, kind in (found if isinstance(found, dict) else {"": found}).items():
            if kind == "longrope" or "dynamic" in str(kind):
                yield f"{name}.{layers}{'_' if layers else ''}inv_freq"
            if "dynamic" in str(kind):
                yield f"{name}.attention_scaling"


def autocast_precision(network: Any) -> torch.dtype | None:
    """To what `torch.autocast` rounds on the device of a network; None where it is off."""
    device = next((weight.device.type for weight in network.parameters()), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def plain_settings(network: nn.Module) -> dict[str, Any]:
    """The part of :func:`settings_digest` that is texts and numbers, each under its name."""
    return dict(sorted((*_configuration(network), *_constants(network))))


def _configuration(network: nn.Module) -> Iterator[tuple[str, Any]]:
    config = getattr(network, "config", None)
    if isinstance(network, NativeModel):
        yield "config", config_to_json(network.cfg)
    elif isinstance(config, PretrainedConfig):
        # What every configuration has is about names, files and formats of output.
        general = _general()
        for key, value in config.to_dict().items():
            if key not in general and _decides(key):
                yield f"config.{key}", value


@cache
def _general() -> frozenset[str]:
    return frozenset(PretrainedConfig().to_dict())


def _constants(network: nn.Module) -> Iterator[tuple[str, Any]]:
    rewritten = set(_rewritten(network))
    for name, module in network.named_modules():
        # The wrappers' own attributes change with what is read from them.
        if type(module).__module__.startswith("transformer_lens.model_bridge.generalized"):
            continue
        yield name.replace(WRAPPED, ""), type(module).__qualname__
        for key, value in vars(module).items():
            if f"{name}.{key}" in rewritten:
                continue
            if _decides(key) and isinstance(value, _PLAIN):
                yield f"{name}.{key}".replace(WRAPPED, ""), value


def _decides(name: str) -> bool:
    """Whether an attribute may decide what a forward without dropout or labels gives."""
    # How it is trained or generates, and the longest sequence that a table was made for so far.
    idle = ("training", "use_cache", "gradient_checkpointing")
    return not name.startswith("_") and not name.endswith(("_token_id", "_cached", *idle))
