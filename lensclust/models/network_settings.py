"""What decides a network's output beside its weights: its configuration, constants, fixed tables.

Two networks of the same weights differ if one has another base of its rotary positions, another
epsilon in its norms or another scale of its scores. So a store notes both.
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

_PLAIN = (bool, int, float, str, type(None))
# Attributes that forwards write, as a counter or a cache: they decide nothing of the next.
_WRITTEN: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def settings_digest(model: nn.Module) -> str:
    """sha256 over everything but the weights that a forward depends on, as 64 hex digits.

    That is: what the class of a network adds to its configuration (not its name or dtype), the
    classes of its modules, numbers, texts, tensors and functions among their attributes (and in
    lists and dictionaries there), buffers that no state dict holds and no forward writes, and the
    precision of `torch.autocast` where that is on.

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
    """The part of :func:`settings_digest` that is no buffer, each under its name."""
    written = _WRITTEN.get(network, frozenset())
    found = sorted((*_configuration(network), *_constants(network)), key=lambda each: each[0])
    return {name: value for name, value in found if name not in written}


def note_written(network: nn.Module, names: Iterable[str]) -> None:
    """Leave out of a network's settings what its forwards write."""
    _WRITTEN[network] = frozenset(names)


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
    remade = set(rewritten(network))
    for name, module in network.named_modules():
        # The wrappers' own attributes change with what is read from them.
        if type(module).__module__.startswith("transformer_lens.model_bridge.generalized"):
            continue
        yield name.replace(WRAPPED, ""), type(module).__qualname__
        for key, value in vars(module).items():
            if f"{name}.{key}" in remade:
                continue
            if _decides(key) and (said := _described(value)) is not _UNKNOWN:
                yield f"{name}.{key}".replace(WRAPPED, ""), said


_UNKNOWN: Any = object()


def _described(value: Any) -> Any:
    """An attribute as JSON that another value would change, `_UNKNOWN` of what nobody knows here.

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
    """A digest of a function that no library names: another lambda has the same name."""
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if isinstance(code, CodeType) and home_of(function) not in LIBRARIES:
        yield _code_digest(code)


def _code_digest(code: CodeType) -> str:
    parts = [_code_digest(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    content = repr((code.co_code, code.co_names, parts))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _decides(name: str) -> bool:
    """Whether an attribute may decide what a forward without dropout or labels gives."""
    # Where it was read, how it is trained or generates, and the longest sequence that a table was
    # made for so far.
    idle = ("name_or_path", "training", "use_cache", "gradient_checkpointing")
    return not name.startswith("_") and not name.endswith(("_token_id", "_cached", *idle))
