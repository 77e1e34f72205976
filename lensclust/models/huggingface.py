"""Hugging Face models, wrapped: directories, hub ids, GGUF files, models in memory."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources import (
    build_bridge_config_from_hf,
    build_bridge_from_module,
    detect_tokenizer_bos_eos,
)
from transformer_lens.utilities.attn_implementation import force_eager_attention
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from lensclust.errors import InputError
from lensclust.models.devices import DeviceMap, require_placeable
from lensclust.models.faithfulness import bare, note_bare
from lensclust.models.weight_files import (
    gguf_contents,
    require_affordable,
    require_buildable,
    safetensors_contents,
)

_log = logging.getLogger(__name__)

# A directory without any of these has no tokenizer. transformers raises no error: for GPT-2 it
# returns a tokenizer with one token.
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
# Not pytorch_model.bin: it is a pickle, and reading one can run code.
_WEIGHT_FILES = ("*.safetensors",)


def read_pretrained(
    name: str,
    *,
    gguf: str | None = None,
    dtype: torch.dtype | None = None,
    device_map: DeviceMap | None = None,
    random_seed: int | None = None,
    trust_remote_code: bool = False,
    bars: bool = False,
) -> PreTrainedModel:
    """A causal language model with eager attention, from a directory, a GGUF file or the hub.

    Args:
        name: directory or hub id.
        gguf: name of a GGUF file in that directory; it is dequantised to ``dtype``.
        dtype: of the weights, float32 by default whatever the file holds.
        device_map: as transformers takes it: where to put which modules.
        random_seed: initialise from this seed instead of reading weights.
        trust_remote_code: run the code that comes with the model, if any.
        bars: show the progress bars of transformers.

    Raises:
        InputError: if it cannot be read, is not supported, or its weights do not match its
            configuration.
    """
    where: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        where["gguf_file"] = gguf
    folder = Path(name)
    held = None if gguf is None else gguf_contents(folder / gguf)
    with _reported(name), _quiet(bars):
        config = AutoConfig.from_pretrained(name, **where)
        options: dict[str, Any] = {
            "config": config,
            "dtype": dtype or torch.float32,
            # Only the eager implementation computes attention patterns, which hooks read.
            "attn_implementation": "eager",
            **where,
        }
        if gguf is None and folder.is_dir() and random_seed is None:
            held = safetensors_contents(folder)
        build = partial(randomly_initialised, seed=0, trust_remote_code=trust_remote_code)
        if random_seed is not None:
            require_buildable(config, build, name=name)
        elif held is not None:
            require_affordable(config, held, build, name=name)
        # The adapter's patches must be applied before this architecture is read.
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(
            build_bridge_config_from_hf(config, _architecture(config), name, options["dtype"])
        )
        adapter.prepare_loading(name, options)
        if device_map is not None:
            stateful = bool(getattr(adapter.cfg, "is_stateful", False))
            require_placeable(device_map, device=None, stateful=stateful)
            options["device_map"] = device_map if isinstance(device_map, str) else dict(device_map)
        if random_seed is not None:
            return randomly_initialised(
                options["config"],
                seed=random_seed,
                dtype=options["dtype"],
                trust_remote_code=trust_remote_code,
            )
        # Annotated as a model, but a pair with output_loading_info.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            **options,
            use_safetensors=None if gguf is not None else True,
            output_loading_info=True,
        )
        model, info = loaded
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise InputError(
            f"load: {name!r} lacks {len(missing)} of the model's weights, such as {missing[0]!r}"
        )
    if info["unexpected_keys"]:
        odd = sorted(info["unexpected_keys"])
        raise InputError(
            f"load: {name!r} holds {len(odd)} weights that its config.json does not define, such "
            f"as {odd[0]!r}: expected the configuration that they were saved with"
        )
    return _dequantised(model) if gguf is not None else model


def randomly_initialised(
    config: PretrainedConfig,
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A randomly initialised model of an architecture; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that would reseed the accelerators too.
        torch.default_generator.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=dtype,
            attn_implementation="eager",
            trust_remote_code=trust_remote_code,
        )


def read_tokenizer(
    name: str, *, gguf: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a directory, GGUF file or hub id; None if it has none.

    Raises:
        InputError: if there are tokenizer files that are unusable.
    """
    folder = Path(name)
    if gguf is None and folder.is_dir() and not _has(folder, _TOKENIZER_FILES):
        return None
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf is not None:
        options["gguf_file"] = gguf
    with _reported(f"tokenizer of {name}"), _quiet(False):
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    if len(tokenizer) < 2:
        _log.warning("load: %s: incomplete tokenizer files, loaded without tokenizer", name)
        return None
    return tokenizer


def require_model_folder(folder: Path, *, weights: bool) -> None:
    """Refuse a directory without a model, in one line.

    Raises:
        InputError: if there is no configuration, or no weights although ``weights`` is set.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"load: {str(folder)!r} is no model directory: no config.json in it")
    if weights and not _has(folder, _WEIGHT_FILES):
        raise InputError(
            f"load: {str(folder)!r} holds no weights: expected *.safetensors (pickled weights, "
            "*.bin, are not read)"
        )


def wrap_pretrained(model: PreTrainedModel, *, name: str) -> TransformerBridge:
    """A bridge around a Hugging Face model, which is modified in place; no tokenizer yet.

    Raises:
        InputError: if TransformerLens does not know the architecture, or has already wrapped it.
    """
    require_bare(model)
    force_eager_attention(model)
    before = bare(model.eval())
    architecture = type(model).__name__
    try:
        bridge = build_bridge_from_module(
            model, architecture, hf_config=model.config, model_name=name
        )
    except Exception as error:
        reason = _first_sentence(error)
        if "nsupported architecture" in reason:
            raise InputError(f"load: {name}: {reason}") from error
        raise InputError(
            f"load: TransformerLens cannot wrap this {architecture} ({reason}): expected the "
            "modules and sizes that it knows of this architecture; if modules were replaced, load "
            "the network before replacing them"
        ) from error
    note_bare(bridge, before)
    return bridge.eval()


def require_bare(model: nn.Module) -> None:
    """Refuse a network that is inside a bridge or contains adapters.

    Raises:
        InputError: says what to do.
    """
    kind = type(model).__name__
    for module in model.modules():
        if isinstance(module, GeneralizedComponent):
            raise InputError(
                f"load: this {kind} is already inside a bridge: pass the bridge itself"
            )
        # If TransformerLens splits a projection, it reads the weights below the adapters.
        if type(module).__module__.partition(".")[0] == "peft":
            raise InputError(
                f"load: {kind} with adapters of peft given, expected a network without: "
                "merge_and_unload() gives one (of a copy, to train on)"
            )


def attach_tokenizer(
    bridge: TransformerBridge, tokenizer: PreTrainedTokenizerBase
) -> TransformerBridge:
    """Give a bridge a tokenizer, such that its token ids equal the tokenizer's.

    TransformerLens would rebuild the tokenizer with ``add_bos_token=True`` and prepend a BOS to
    every string of models trained without one (SmolLM2). Here the bridge prepends by default
    exactly when the tokenizer does, so ``bridge.to_tokens(text)`` and ``bridge.generate(text)``
    use ``tokenizer(text)``; ``prepend_bos=True`` still works.
    """
    if tokenizer.pad_token_id is None:  # the bridge pads even a single string
        tokenizer = copy.deepcopy(tokenizer)
        stand_ins = (tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
        first = tokenizer.convert_ids_to_tokens(0)
        tokenizer.pad_token = next(filter(None, stand_ins), first)
    # Only the first assignment leaves the tokenizer unchanged.
    bridge.tokenizer = None
    bridge.tokenizer = tokenizer
    prepends, appends = detect_tokenizer_bos_eos(tokenizer)
    bridge.cfg.tokenizer_prepends_bos = bridge.cfg.default_prepend_bos = prepends
    bridge.cfg.tokenizer_appends_eos = appends
    return bridge


def save_converted(source: Path, folder: Path) -> None:
    """Write the model in a GGUF file as a directory of float32 safetensors, with its tokenizer."""
    model = read_pretrained(str(source.parent), gguf=source.name)
    tokenizer = read_tokenizer(str(source.parent), gguf=source.name)
    with _quiet(bars=False):
        model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """Remove quantisation marks from dequantised weights; save_pretrained would refuse them."""
    for owner in (model, model.config):
        for trace in ("hf_quantizer", "is_quantized", "quantization_method", "quantization_config"):
            vars(owner).pop(trace, None)
    return model


def _architecture(config: PretrainedConfig) -> str:
    if config.architectures:
        return config.architectures[0]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.__name__


def _has(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(next(folder.glob(pattern), None) for pattern in patterns)


@contextlib.contextmanager
def _reported(name: str) -> Iterator[None]:
    """Turn errors of transformers and TransformerLens about a source into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # a malformed file makes them raise anything
        raise InputError(f"load: {name}: {_first_sentence(error)}") from error


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Suppress transformers' progress bars and the hub's log line for every retry."""
    retries = logging.getLogger("huggingface_hub.utils._http")
    level = retries.level
    were_shown = transformers_logging.is_progress_bar_enabled()
    retries.setLevel(logging.ERROR)
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        # The GGUF reader has a separate bar that no option turns off.
        with contextlib.nullcontext() if bars else contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        retries.setLevel(level)
        if were_shown:
            transformers_logging.enable_progress_bar()
