"""What a network's output depends on besides weights: configuration, constants, fixed tables.

Two networks with the same weights differ if the base of rotary positions, the epsilon of norms or
the scale of attention scores differs. So a store records both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Set
from functools import cache, partial
from types import CodeType
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import xxhash
from torch import Tensor, nn
from transformer_lens.model_bridge.sources.native import NativeModel
from transformers import PretrainedConfig

from lensclust.models.added_code import LIBRARIES, home_of
from lensclust.models.devices import brought_in
from lensclust.models.native import config_to_json
from lensclust.models.parameters import WRAPPED
from lensclust.storage import tensors_digest

_WRAPPERS = ("transformer_lens.model_bridge.generalized", "transformer_lens.hook_points")
_PLAIN = (bool, int, float, str, type(None))
# Attributes that forwards write, such as counters or caches: later forwards do not depend on them.
_WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def settings_digest(model: nn.Module) -> str:
    """sha256 over everything except weights that a forward depends on, as 64 hex digits.

    That is: the configuration fields of the network's class (not its name or dtype), the classes
    of its modules, numbers, texts, tensors and functions among their attributes (and in lists and
    dictionaries there), buffers that are in no state dict and that no forward writes, and the
    precision of `torch.autocast` if that is on.

    >>> import lensclust as lc
    >>> one, other = lc.load("native:sif-small"), lc.load("native:sif-small")
    >>> settings_digest(one) == settings_digest(other)
    True
    >>> other.original_model.layers[0].ln1.original_component.eps *= 2
    >>> settings_digest(one) == settings_digest(other)
    False
    """
    network = getattr(model, "original_model", model)
    kept = {*network.state_dict(keep_vars=True), *rewritten(network)}
    tables = {
        name.replace(WRAPPED, ""): held
        for name, held in network.named_buffers(remove_duplicate=False)
        if name not in kept and isinstance(held, Tensor)
    }
    said = {**plain_settings(network), "tables": tensors_digest(tables.items(), brought_in(model))}
    if (precision := autocast_precision(network)) is not None:
        said["autocast"] = str(precision)
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def rewritten(network: nn.Module) -> Iterator[str]:
    """Names of the values that rotary embeddings recompute for the length of each forward.

    They are computed from the configuration and from a table beside it.
    """
    for name, module in network.named_modules():
        found = getattr(module, "rope_type", None)
        for layers, kind in (found if isinstance(found, dict) else {"": found}).items():
            if kind == "longrope" or "dynamic" in str(kind):
                yield f"{name}.{layers}{'_' if layers else ''}inv_freq"
            if "dynamic" in str(kind):
                yield f"{name}.attention_scaling"


def autocast_precision(network: Any) -> torch.dtype | None:
    """The dtype of `torch.autocast` on the device of a network; None if it is off."""
    device = next((weight.device.type for weight in network.parameters()), "cpu")
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def plain_settings(network: nn.Module) -> dict[str, Any]:
    """The settings in :func:`settings_digest` that are not buffers, by name."""
    written = _WRITTEN.get(network, frozenset())
    found = sorted((*_configuration(network), *_constants(network)), key=lambda each: each[0])
    return {name: value for name, value in found if name not in written}


def note_written(network: nn.Module, names: Iterable[str]) -> None:
    """Exclude attributes that a network's forwards write from its settings."""
    _WRITTEN[network] = frozenset(names)


def _configuration(network: nn.Module) -> Iterator[tuple[str, Any]]:
    config = getattr(network, "config", None)
    if isinstance(network, NativeModel):
        yield "config", config_to_json(network.cfg)
    elif isinstance(config, PretrainedConfig):
        # The fields of every configuration concern names, files and output formats.
        general = _general()
        for key, value in config.to_dict().items():
            if key not in general and _decides(key):
                yield f"config.{key}", value


@cache
def _general() -> frozenset[str]:
    return frozenset(PretrainedConfig().to_dict())


def _constants(network: nn.Module) -> Iterator[tuple[str, Any]]:
    remade = set(rewritten(network))
    for name, module in network.named_modules():
        # Attributes of the wrappers change when they are read.
        if type(module).__module__.startswith(_WRAPPERS):
            continue
        yield name.replace(WRAPPED, ""), type(module).__qualname__
        for key, value in vars(module).items():
            # Functions in the place of methods: `added_code`.
            if f"{name}.{key}" in remade or callable(getattr(type(module), key, None)):
                continue
            if _decides(key) and (said := _described(value)) is not _UNKNOWN:
                yield f"{name}.{key}".replace(WRAPPED, ""), said


_UNKNOWN: Any = object()


def _described(value: Any) -> Any:
    """An attribute as JSON that identifies its value; `_UNKNOWN` for unsupported types.

    >>> _described({"scales": [1.0, torch.float16], "net": nn.ReLU()})
    {'scales': [1.0, 'torch.float16'], 'net': 'ReLU'}
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value).view(np.uint8))
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, Mapping):
        return {str(key): _inside(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_inside(each) for each in value]
    if isinstance(value, Set):
        return sorted(str(_inside(each)) for each in value)
    if isinstance(value, partial):
        return [_described(value.func), _inside(value.args), _inside(value.keywords)]
    if (named := getattr(value, "__qualname__", None)) is not None and callable(value):
        return [f"{getattr(value, '__module__', '')}.{named}", *_own_code(value)]
    return _UNKNOWN


def _inside(value: Any) -> Any:
    said = _described(value)
    return type(value).__qualname__ if said is _UNKNOWN else said


def _tensor(value: Tensor) -> Any:
    if isinstance(value, nn.Parameter) or value.requires_grad or value.is_meta:
        return _UNKNOWN
    content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return [str(value.dtype), *value.shape, xxhash.xxh3_128_hexdigest(content.data)]


def _own_code(function: Any) -> Iterator[str]:
    """A digest of a user's function: two lambdas have the same name."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if isinstance(code, CodeType) and home_of(function) not in LIBRARIES:
        yield _code_digest(code)


def _code_digest(code: CodeType) -> str:
    parts = [_code_digest(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    content = repr((code.co_code, code.co_names, parts))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _decides(name: str) -> bool:
    """Whether the output of a forward without dropout or labels may depend on an attribute."""
    # The folder it was read from, options of training and generation, and the longest sequence of
    # a cached table.
    idle = ("name_or_path", "training", "use_cache", "gradient_checkpointing")
    return not name.startswith("_") and not name.endswith(("_token_id", "_cached", *idle))
