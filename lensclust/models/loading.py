"""Loading of hooked models from every supported source: ``load``."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.native import NativeModel
from transformer_lens.utilities.devices import get_device
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import checkpoints as weights, huggingface as pretrained
from lensclust.models.agreement import forget_outdated
from lensclust.models.cached_generation import require_right_library
from lensclust.models.causality import require_causal
from lensclust.models.devices import DeviceMap, note_placement, require_placeable
from lensclust.models.downloads import PINS, fetch
from lensclust.models.faithfulness import bare, bare_logits, require_all_blocks, require_faithful
from lensclust.models.mended_bridges import mended
from lensclust.models.native import PRESETS, native_bridge, native_config, wrap_native
from lensclust.models.sites import model_name
from lensclust.models.tokenizers import same_tokenizer, tokenizer_fingerprint
from lensclust.models.wrapping import (
    keep_up,
    known_bridge,
    own_network,
    release,
    remember,
    wrapped_copy,
)

__all__ = ["load", "native_config", "release"]

Source = (
    str
    | Path
    | Mapping[str, Any]
    | TransformerBridgeConfig
    | PreTrainedModel
    | NativeModel
    | TransformerBridge
)


@dataclass(frozen=True, kw_only=True)
class _Request:
    source: Any
    tokenizer: PreTrainedTokenizerBase | str | Path | None
    device: str | torch.device | None
    dtype: torch.dtype | None
    device_map: DeviceMap | None
    seed: int
    random_weights: bool
    trust_remote_code: bool
    progress: bool


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave Python's and numpy's global random states as they were; torch's is kept below."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


@checked_arguments
@_random_states_kept()
def load(
    source: Source,
    *,
    tokenizer: PreTrainedTokenizerBase | str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    seed: int = 0,
    random_weights: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> TransformerBridge:
    """Load a hooked model in eval mode.

    Args:
        source: one of

            - ``"native:sif-small"`` (a preset), a ``TransformerBridgeConfig`` or a dict of its
              fields: a small model initialised from the configuration's seed, else ``seed``;
            - ``"smollm2-135m-instruct"``: pretrained weights from the package index, cached;
            - a GGUF file, dequantised on every load;
            - a lensclust checkpoint (``.safetensors``, see ``weights.save_checkpoint``);
            - a Hugging Face directory, with or without tokenizer files;
            - a Hugging Face model in memory, or a bare native one, which is put in eval mode and
              otherwise unchanged: the bridge wraps a copy of its modules that shares its
              weights (with eager attention, so that patterns exist). Train it, save it, load
              other weights into it: the bridge always has its weights. A second `load` returns
              the same bridge; `release` detaches it. Once the model's configuration, constants
              (a window, an epsilon), hooks or replaced forwards have changed, the bridge refuses
              to run until the model is loaded again. Weights trained through the bridge reach
              joint projections (``query_key_value``) at the model's next forward or
              ``state_dict()``, or at the next call of lensclust: a ``copy.deepcopy`` right after
              an optimizer's step does not have them yet. A network whose own forwards write into
              its weights (RWKV) is not shared: its bridge has a copy of them.
              Models that accelerate has spread over devices and quantised ones are wrapped
              **in place**, as TransformerLens does;
            - a bridge, which is returned as it is;
            - a hub id.
        tokenizer: used instead of the source's; or the directory or hub id of one. A model in
            memory that was loaded with another one is refused, since its bridge would tokenize
            differently from then on. Give the bridge itself to replace its tokenizer.
        device: where to put it. Default: an accelerator if there is one; a model in memory stays.
        dtype: of the weights. Default: float32; a model in memory or checkpoint keeps its own.
            With another device or dtype than a model in memory has, the bridge gets separate
            weights, and refuses to run once the model's have changed.
        device_map: instead of ``device``, for models larger than one device: ``"auto"``,
            ``"balanced"`` or a mapping from modules to devices, ``"cpu"`` or ``"disk"``, as
            transformers takes it (accelerate places the weights). For models read from a
            directory or the hub. GPUs cannot be mixed with ``"cpu"`` and ``"disk"``:
            TransformerLens does not support it. Each state stays on its block's device until it
            is read; offloaded weights are loaded for every forward, which is slow.
        seed: of random weights.
        random_weights: a randomly initialised copy from ``seed`` (the control model of a study);
            reads no weights and does not touch the global random state.
        trust_remote_code: run Python code that comes with a hub id or directory.
        progress: show a bar for downloads.

    Text is tokenized as the tokenizer does it, with a BOS only if the tokenizer adds one:
    ``model.to_tokens(text)[0] == model.tokenizer(text).input_ids``.

    A model must be causal: a self-check changes tokens and compares the states before them, once
    per model. It is skipped for offloaded weights, where a forward takes long.

    Raises:
        InputError: if the source does not exist or is unusable, its number of blocks differs
            from its configuration's, or states depend on later tokens, as in BERT: padding would
            make them wrong.

    >>> model = load("native:sif-small", seed=1)
    >>> model(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 128])
    """
    _require_device(device)
    if not (dtype is None or isinstance(dtype, torch.dtype)):
        raise InputError(f"load: dtype={dtype!r}, expected a torch type such as torch.bfloat16")
    request = _Request(
        source=source,
        tokenizer=tokenizer,
        device=device,
        dtype=dtype,
        device_map=device_map,
        seed=seed,
        random_weights=random_weights,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    for recognise, loader in _KINDS:
        if recognise(source):
            if device_map is not None:
                _require_spreadable(request, loader)
            with torch.inference_mode(False):  # inference tensors never have a gradient
                model = loader(request)
            break
    else:
        raise InputError(f"load: {_misfit(source)}")
    if tokenizer is not None:
        read = _read_tokenizer(tokenizer, request)
        if not isinstance(source, TransformerBridge):
            _require_same_tokenizer(model, read)
        pretrained.attach_tokenizer(model, read)
    if (own := own_network(model)) is not None:
        own.eval()
    require_all_blocks(model)
    forget_outdated(model)
    require_faithful(mended(model).eval())
    require_causal(model)
    require_right_library(model)
    return model


def _require_device(device: str | torch.device | None) -> None:
    """Refuse an unavailable device before anything is read."""
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"load: device {str(device)!r} cannot be used here ({reason}); expected 'cpu' or an "
            "accelerator that torch finds"
        ) from error


def _misfit(source: Any) -> str:
    """The error message for an unusable source: what it is and what was expected."""
    if isinstance(source, (str, Path)) and Path(source).is_file():
        return (
            f"{str(source)!r} is not a model file: expected .gguf, .safetensors or a "
            "directory with config.json"
        )
    if isinstance(source, (str, Path)):
        return (
            f"{str(source)!r} does not exist: expected a file, a directory, a hub id, one of "
            f"{sorted(PINS)} or one of {['native:' + name for name in sorted(PRESETS)]}"
        )
    kind = type(source).__name__
    expected = "expected a transformers model, a native one, a bridge, or the name or path of one"
    if isinstance(source, PretrainedConfig):
        advice = "AutoModelForCausalLM.from_config makes one"
        return f"a configuration ({kind}) given, {expected}: {advice}"
    if isinstance(source, PreTrainedTokenizerBase):
        return f"a tokenizer ({kind}) given, {expected}; a tokenizer goes to tokenizer="
    if isinstance(source, torch.nn.Module):
        pretrained.require_bare(source)
        return f"{kind} given, which TransformerLens cannot wrap, {expected}"
    return f"{kind} given, {expected}"


def _read_tokenizer(tokenizer: Any, request: _Request) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        return tokenizer
    found = None
    if isinstance(tokenizer, (str, Path)):
        if not Path(tokenizer).exists() and not _is_hub_id(str(tokenizer)):
            raise InputError(
                f"load: tokenizer={str(tokenizer)!r} does not exist, expected the directory or hub "
                "id of one"
            )
        found = pretrained.read_tokenizer(
            str(tokenizer), trust_remote_code=request.trust_remote_code
        )
    if found is None:
        raise InputError(
            f"load: tokenizer={_shown(tokenizer)} given, expected a transformers tokenizer, or the "
            "hub id or directory of one"
        )
    return found


def _require_same_tokenizer(model: TransformerBridge, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse to replace the tokenizer of a bridge that may be in use."""
    known = model.tokenizer
    if known is None:
        return
    # A fingerprint does not cover special tokens around a text.
    around, wanted = ((each("").input_ids, each.chat_template) for each in (known, tokenizer))
    same = same_tokenizer(tokenizer_fingerprint(known), tokenizer_fingerprint(tokenizer))
    if around != wanted or not same:
        raise InputError(
            f"load: {model_name(model)} was loaded with another tokenizer, expected the same: give "
            "the bridge itself, lensclust.load(bridge, tokenizer=...), to replace it there"
        )


def _native(request: _Request) -> TransformerBridge:
    return native_bridge(
        request.source,
        seed=request.seed,
        device=request.device or get_device(),
        dtype=request.dtype,
        reseed=request.random_weights,
    )


def _checkpoint(request: _Request) -> TransformerBridge:
    if request.random_weights:
        config = weights.checkpoint_config(request.source)
        return native_bridge(
            config,
            seed=request.seed,
            device=request.device or get_device(),
            dtype=request.dtype,
            reseed=True,
        )
    return _moved(weights.load_checkpoint(request.source), request, request.device or get_device())


def _pinned(request: _Request) -> TransformerBridge:
    folder = fetch(
        request.source,
        PINS[request.source],
        pretrained.save_converted,
        progress=request.progress,
    )
    return _read(request, str(folder), title=request.source)


def _gguf(request: _Request) -> TransformerBridge:
    path = Path(request.source)
    return _read(request, str(path.parent), gguf=path.name, title=path.stem)


def _directory(request: _Request) -> TransformerBridge:
    folder = Path(request.source)
    pretrained.require_model_folder(folder, weights=not request.random_weights)
    return _read(request, str(folder), title=folder.resolve().name)


def _hub(request: _Request) -> TransformerBridge:
    try:
        return _read(request, request.source, title=request.source)
    except InputError as error:
        raise InputError(f"{error} (without the hub there is {sorted(PINS)})") from error


def _read(
    request: _Request, name: str, *, title: str, gguf: str | None = None
) -> TransformerBridge:
    console = Console(stderr=True)
    watched = request.progress and (console.is_terminal or console.is_jupyter)
    model = pretrained.read_pretrained(
        name,
        gguf=gguf,
        dtype=request.dtype,
        device_map=request.device_map,
        random_seed=request.seed if request.random_weights else None,
        trust_remote_code=request.trust_remote_code,
        bars=watched and not Path(name).is_dir(),
    )
    if request.device_map is None:
        place = torch.device(request.device or get_device())
        model.to(place)  # pyright: ignore[reportArgumentType]
    bridge = note_placement(pretrained.wrap_pretrained(model, name=title))
    if request.tokenizer is not None:
        return bridge
    tokenizer = pretrained.read_tokenizer(
        name, gguf=gguf, trust_remote_code=request.trust_remote_code
    )
    return bridge if tokenizer is None else pretrained.attach_tokenizer(bridge, tokenizer)


def _in_memory(request: _Request) -> TransformerBridge:
    model = request.source
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    if request.random_weights:
        model = pretrained.randomly_initialised(model.config, seed=request.seed, dtype=model.dtype)
        model.to(request.source.device)
        return pretrained.wrap_pretrained(_placed(model, request), name=name)
    return _wrapped(request, partial(pretrained.wrap_pretrained, name=name))


def _bare_native(request: _Request) -> TransformerBridge:
    if request.random_weights:
        config, device = request.source.cfg, next(request.source.parameters()).device
        return native_bridge(config, seed=request.seed, device=device, reseed=True)
    return _wrapped(request, wrap_native)


def _wrapped(request: _Request, wrap: Callable[[Any], TransformerBridge]) -> TransformerBridge:
    """A bridge of a user's network: the existing one, or a new one."""
    own = request.source
    where: Any = {"device": request.device, "dtype": request.dtype}
    if (known := known_bridge(own, **where)) is not None:
        own.eval()
        if _in_step(known, own):
            return known
        with suppress(InputError):
            release(known)
    pretrained.require_bare(own)
    # Weights placed by accelerate, and quantised ones, are tied to their modules.
    if getattr(own, "hf_device_map", None) or getattr(own, "is_quantized", False):
        return remember(note_placement(wrap(_placed(own, request))), own)
    return wrapped_copy(own, wrap, **where)


def _in_step(bridge: TransformerBridge, own: Any) -> bool:
    """Whether a bridge still computes the same as its network.

    It follows weights; not modules, hooks and attributes that have changed since it was made.
    """
    try:
        keep_up(bridge)
    except InputError:
        return False
    network: Any = bridge.original_model
    finer, coarser = sorted((network, own), key=lambda each: torch.finfo(each.dtype).eps)
    found, expected = bare_logits(finer), bare(coarser)
    if found is None or expected is None:
        return found is expected
    return expected.difference(found) is None


def _bridge(request: _Request) -> TransformerBridge:
    bridge = request.source
    if request.random_weights:
        raise InputError("load: random_weights needs the source of a model, not a bridge")
    own = own_network(bridge)
    if own is None:
        return _moved(bridge, request, request.device)
    # Moving or casting this bridge would move and cast the user's own network.
    weight = next(bridge.original_model.parameters())
    wanted = request.dtype or weight.dtype, torch.device(request.device or weight.device)
    if wanted == (weight.dtype, weight.device):
        return bridge
    load_own = _in_memory if isinstance(own, PreTrainedModel) else _bare_native
    other = load_own(replace(request, source=own))
    if bridge.tokenizer is not None:
        pretrained.attach_tokenizer(other, bridge.tokenizer)
    return other


def _require_spreadable(request: _Request, loader: Callable[[_Request], TransformerBridge]) -> None:
    if loader not in (_pinned, _directory, _hub) or request.random_weights:
        raise InputError(
            "load: device_map is for weights that are read from a directory or the hub, given "
            f"{'random weights' if request.random_weights else _shown(request.source)}"
        )
    assert request.device_map is not None
    require_placeable(request.device_map, device=request.device)


def _shown(source: Any) -> str:
    return repr(str(source)) if isinstance(source, (str, Path)) else type(source).__name__


def _placed(model: Any, request: _Request) -> Any:
    return model.to(device=request.device, dtype=request.dtype)


def _moved(
    bridge: TransformerBridge, request: _Request, device: str | torch.device | None
) -> TransformerBridge:
    if device is not None:
        bridge.to(torch.device(device), print_details=False)
    if request.dtype is not None:
        bridge.to(request.dtype, print_details=False)
    return bridge


def _is_file(suffix: str) -> Callable[[Any], bool]:
    return lambda source: (
        isinstance(source, (str, Path)) and Path(source).suffix == suffix and Path(source).is_file()
    )


def _is_directory(source: Any) -> bool:
    return isinstance(source, (str, Path)) and Path(source).is_dir()


def _is_hub_id(source: Any) -> bool:
    if not isinstance(source, str) or source.endswith((".gguf", ".safetensors")):
        return False
    # transformers would read a file of that name as a configuration.
    return not Path(source).is_file() and bool(re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", source))


_KINDS: tuple[tuple[Callable[[Any], bool], Callable[[_Request], TransformerBridge]], ...] = (
    (lambda source: isinstance(source, TransformerBridge), _bridge),
    (lambda source: isinstance(source, PreTrainedModel), _in_memory),
    (lambda source: isinstance(source, NativeModel), _bare_native),
    (lambda source: isinstance(source, (TransformerBridgeConfig, Mapping)), _native),
    (lambda source: isinstance(source, str) and source.startswith("native:"), _native),
    (lambda source: isinstance(source, str) and source in PINS, _pinned),
    (_is_file(".gguf"), _gguf),
    (_is_file(".safetensors"), _checkpoint),
    (_is_directory, _directory),
    (_is_hub_id, _hub),
)
