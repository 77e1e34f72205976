"""What decides a network's output beside its weights: its configuration, constants, fixed tables.

Two networks of the same weights differ if one has another base of its rotary positions, another
epsilon in its norms or another scale of its scores. So a store notes both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import PretrainedConfig

from lensclust.chosen_weights import WRAPPED
from lensclust.native import config_to_json
from lensclust.placement import brought_in
from lensclust.sealed import tensors_digest

_PLAIN = (bool, int, float, str)


def settings_digest(model: nn.Module) -> str:
    """sha256 over everything but the weights that a forward depends on, as 64 hex digits.

    That is: what the class of a network adds to its configuration (not its name or dtype), the
    classes of its modules, plain numbers and texts among their attributes, and buffers that no
    state dict holds.

    >>> import lensclust as lc
    >>> one, other = lc.load("native:sif-small"), lc.load("native:sif-small")
    >>> settings_digest(one) == settings_digest(other)
    True
    >>> other.original_model.layers[0].ln1.original_component.eps *= 2
    >>> settings_digest(one) == settings_digest(other)
    False
    """
    network = getattr(model, "original_model", model)
    kept = set(network.state_dict(keep_vars=True))
    tables = {
        name.replace(WRAPPED, ""): held
        for name, held in network.named_buffers()
        if name not in kept and isinstance(held, Tensor)
    }
    said = {
        "configuration": _configuration(network),
        "constants": dict(sorted(_constants(network))),
        "tables": tensors_digest(tables.items(), brought_in(model)),
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def _configuration(network: nn.Module) -> Any:
    if isinstance(network, NativeModel):
        return config_to_json(network.cfg)
    config = getattr(network, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    # What every configuration has is about names, files and formats of output.
    general = PretrainedConfig().to_dict()
    return {
        key: value
        for key, value in config.to_dict().items()
        if key not in general and not key.startswith("_")
    }


def _constants(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        # The wrappers' own attributes change with what is read from them.
        if type(module).__module__.startswith("transformer_lens.model_bridge.generalized"):
            continue
        yield name.replace(WRAPPED, ""), type(module).__qualname__
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training" and isinstance(value, _PLAIN):
                yield f"{name}.{key}".replace(WRAPPED, ""), value
