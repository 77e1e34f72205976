"""What a network's output depends on besides weights: configuration, constants, fixed tables.

Two networks with the same weights differ if the base of rotary positions, the epsilon of norms or
the scale of attention scores differs. So a store records both.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import cache, partial
from numbers import Number
from types import CodeType, FunctionType, SimpleNamespace
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
    dictionaries there), attributes, code and globals of a user's classes, buffers that are in no
    state dict and that no forward writes, and the precision of `torch.autocast` if that is on.

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
            prefix = f"{name}.{layers}{'_' if layers else ''}"
            if kind == "longrope" or "dynamic" in str(kind):
                yield f"{prefix}inv_freq"
            if kind == "longrope":
                yield f"{prefix}long_inv_freq"
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
        kind = type(module)
        # Attributes of the wrappers change when they are read.
        if kind.__module__.startswith(_WRAPPERS):
            continue
        path = name.replace(WRAPPED, "")
        # A class whose forward was replaced by another function is another class.
        yield path, f"{kind.__qualname__} {kind.forward.__qualname__}"
        is_own = is_of_user(kind)
        for key, value in vars(module).items():
            if key in _OF_MODULES or not (_decides(key) or (is_own and key.startswith("_"))):
                continue
            # Functions in the place of methods: `added_code`.
            if f"{name}.{key}" in remade or callable(getattr(kind, key, None)):
                continue
            found = value if isinstance(value, _PLAIN) else _described(value)
            if found is not _UNKNOWN:
                yield f"{path}.{key}", found
    for kind in {each for module in network.modules() for each in type(module).__mro__}:
        if is_of_user(kind):
            yield from _of_class(kind)


def _of_class(kind: type) -> Iterator[tuple[str, Any]]:
    """Attributes of a user's class, the code of its methods, and the globals that these name."""
    seen: dict[str, Any] = {}
    for key, value in vars(kind).items():
        value = getattr(value, "fget", None) or getattr(value, "__func__", value)
        if isinstance(value, FunctionType):
            seen |= _named_globals(value, set())
            yield f"class {kind.__qualname__}.{key}", _code_digest(value.__code__)
        elif not key.startswith("__") and (found := _described(value)) is not _UNKNOWN:
            yield f"class {kind.__qualname__}.{key}", found
    for name, value in seen.items():
        yield f"class {kind.__qualname__}: global {name}", value


def _named_globals(function: FunctionType, known: set[CodeType]) -> dict[str, Any]:
    """Globals that a user's function names, itself or through other functions of the user."""
    found: dict[str, Any] = {}
    known.add(function.__code__)
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if isinstance(value, FunctionType):
            if home_of(value) not in LIBRARIES and value.__code__ not in known:
                found[name] = _code_digest(value.__code__)
                found |= _named_globals(value, known)
        elif value is not None and (said := _described(value)) is not _UNKNOWN:
            found[name] = said
    return found


def _names(code: CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*map(_names, inner))


_UNKNOWN: Any = object()
_OF_MODULES = frozenset(vars(nn.Module()))
# How far containers and objects inside attributes are followed.
_DEPTH = 6


def _described(value: Any, depth: int = _DEPTH) -> Any:
    """An attribute as JSON that identifies its value; `_UNKNOWN` for unsupported types.

    >>> _described({"scales": [1.0, torch.float16], "net": nn.ReLU()})
    {'scales': [1.0, 'torch.float16'], 'net': 'ReLU'}
    """
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, np.generic) and value.dtype != object:
        return value.item() if isinstance(value.item(), _PLAIN) else repr(value)
    if isinstance(value, (torch.dtype, torch.device, Number, range)):
        return str(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value).view(np.uint8))
    if isinstance(value, Tensor):
        return _tensor(value)
    if depth == 0 or isinstance(value, (nn.Module, PretrainedConfig)):
        return _UNKNOWN
    inside = partial(_inside, depth=depth - 1)
    if isinstance(value, Mapping):
        return {str(key): inside(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [inside(each) for each in value]
    if isinstance(value, Set):
        return sorted(str(inside(each)) for each in value)
    if isinstance(value, partial):
        return [inside(value.func), inside(value.args), inside(value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        return _function(value, inside)
    if is_of_user(type(value)) and hasattr(value, "__dict__"):
        return [type(value).__qualname__, inside(vars(value))]
    return _UNKNOWN


def _inside(value: Any, depth: int) -> Any:
    found = _described(value, depth)
    return type(value).__qualname__ if found is _UNKNOWN else found


@cache
def is_of_user(kind: type) -> bool:
    """Whether a class is a user's, or a bare namespace, and none of a library."""
    home = kind.__module__.partition(".")[0]
    return kind is SimpleNamespace or home not in {*LIBRARIES, *sys.stdlib_module_names, "numpy"}


def _tensor(value: Tensor) -> Any:
    if isinstance(value, nn.Parameter) or value.is_meta:
        return _UNKNOWN
    kind = [str(value.dtype), *value.shape]
    if value.layout != torch.strided or value.is_nested:
        return kind
    content = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return [*kind, xxhash.xxh3_128_hexdigest(content.view(torch.uint8).numpy().data)]


def _function(function: Any, inside: Callable[[Any], Any]) -> Any:
    """A function by its name; a user's by its code, defaults and what it closes over."""
    plain = getattr(function, "__func__", function)
    code = getattr(plain, "__code__", None)
    if not isinstance(code, CodeType) or home_of(function) in LIBRARIES:
        return f"{getattr(function, '__module__', '')}.{function.__qualname__}"
    around = [_contents(cell) for cell in plain.__closure__ or ()]
    given = [plain.__defaults__, plain.__kwdefaults__, around]
    return [function.__qualname__, _code_digest(code), inside(given)]


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _code_digest(code: CodeType) -> str:
    content = repr((code.co_code, code.co_names, [_constant(each) for each in code.co_consts]))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _constant(value: Any) -> str:
    if isinstance(value, CodeType):
        return _code_digest(value)
    # The order of a set's elements differs between processes.
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


@cache
def _decides(name: str) -> bool:
    """Whether the output of a forward without dropout or labels may depend on an attribute."""
    # The folder it was read from, options of training and generation, and the longest sequence of
    # a cached table.
    idle = ("name_or_path", "model_tags", "training", "use_cache", "gradient_checkpointing")
    return not name.startswith("_") and not name.endswith(("_token_id", "_cached", *idle))
