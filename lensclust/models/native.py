"""Small models built from scratch: named presets of TransformerLens' own architecture."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from typing import Any

import psutil
import torch
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import boot_native, build_bridge_from_module
from transformer_lens.model_bridge.sources.native import NativeModel

from lensclust.errors import InputError

NATIVE = "TransformerLensNative"

PRESETS: dict[str, dict[str, Any]] = {
    # Sized for the synthetic instruction-following task: pre-LN, learned positions, GELU.
    "sif-small": {
        "n_layers": 6,
        "n_heads": 4,
        "d_model": 64,
        "d_head": 16,
        "d_mlp": 256,
        "d_vocab": 128,
        "n_ctx": 64,
        "act_fn": "gelu",
        "normalization_type": "LN",
        "positional_embedding_type": "standard",
    },
}

# Every block holds a separate causal mask, a byte for each pair of positions.
_MAX_MASK_BYTES = 2**32
# Several times as many blocks as any model has.
_MAX_LAYERS = 1000

# Fields that the native model reads. TransformerBridgeConfig has sixty more, for other
# architectures, which it would silently ignore.
_FIELDS = frozenset(
    {
        "act_fn",
        "attention_dir",
        "attn_only",
        "attn_scale",
        "attn_scores_soft_cap",
        "d_head",
        "d_mlp",
        "d_model",
        "d_vocab",
        "d_vocab_out",
        "dtype",
        "eps",
        "final_rms",
        "gated_mlp",
        "init_mode",
        "init_weights",
        "initializer_range",
        "n_ctx",
        "n_heads",
        "n_key_value_heads",
        "n_layers",
        "normalization_type",
        "output_logits_soft_cap",
        "positional_embedding_type",
        "rope_scaling",
        "rotary_base",
        "rotary_dim",
        "seed",
        "use_attn_scale",
    }
)


def native_config(preset: str, **overrides: Any) -> TransformerBridgeConfig:
    """The configuration of a native preset, with some fields changed.

    ``d_head`` and ``d_mlp`` follow ``d_model`` and ``n_heads`` unless they are given too.

    Raises:
        InputError: if the preset or a field does not exist, or the values are inconsistent.

    >>> config = native_config("sif-small", d_vocab=97, n_heads=8)
    >>> config.n_layers, config.d_head, config.d_vocab
    (6, 8, 97)
    """
    if preset not in PRESETS:
        raise InputError(f"native_config: no preset {preset!r}: there are {sorted(PRESETS)}")
    unknown = sorted(set(overrides) - _FIELDS)
    if unknown:
        raise InputError(
            f"native_config: a native model has no field {unknown[0]!r}: it has {sorted(_FIELDS)}"
        )
    fields = {**PRESETS[preset], **overrides}
    derived: dict[str, Any] = {}
    if {"d_model", "n_heads"} & set(overrides):
        derived["d_head"] = fields["d_model"] // max(fields["n_heads"], 1)
    if "d_model" in overrides:
        derived["d_mlp"] = 4 * fields["d_model"]
    return _config({**fields, **derived, **overrides})


def native_bridge(
    source: str | TransformerBridgeConfig | Mapping[str, Any],
    *,
    seed: int,
    device: str | torch.device,
    dtype: torch.dtype | None = None,
    reseed: bool = False,
) -> TransformerBridge:
    """A freshly initialised native model from ``"native:PRESET"`` or a configuration.

    The weights are drawn from the configuration's seed; from ``seed`` if it has none or with
    ``reseed``. The global random state is unchanged.

    Raises:
        InputError: if the native architecture cannot be built from the configuration.

    >>> native_bridge("native:sif-small", seed=0, device="cpu").cfg.n_layers
    6
    """
    if isinstance(source, str):
        config = native_config(source.removeprefix("native:"), seed=seed)
        name = source
    else:
        mapping = isinstance(source, Mapping)
        config = _config(dict(source)) if mapping else copy.deepcopy(source)
        name = "native"
    if reseed or config.seed is None:
        config.seed = seed
    try:
        _require_buildable(config)
        return boot_native(
            config, device=device, dtype=dtype or config.dtype, model_name=name
        ).eval()
    except (ValueError, NotImplementedError, ArithmeticError, RuntimeError, TypeError) as error:
        raise InputError(f"load: no native model from this configuration: {error}") from error


def native_bridge_with(
    config: TransformerBridgeConfig, weights: Mapping[str, torch.Tensor], *, name: str
) -> TransformerBridge:
    """A native model with the given ``weights`` (names of the unwrapped model; dtype is kept).

    Raises:
        InputError: if names or shapes are not those of ``config``.
    """
    _require_fit(config, weights, name)
    # Building a module draws random numbers, which are discarded here.
    with torch.random.fork_rng(devices=[]):
        model = NativeModel(copy.deepcopy(config))
    model.load_state_dict(dict(weights), assign=True)
    return wrap_native(model, name=name)


def _require_buildable(config: TransformerBridgeConfig) -> None:
    """Refuse a configuration with implausibly many layers, masks or weights."""
    mlp, width = config.d_mlp or 0, config.n_heads * config.d_head
    blocks = config.n_layers * config.d_model * (4 * width + 2 * mlp)
    weights = blocks + config.d_model * (2 * config.d_vocab + config.n_ctx)
    masks = config.n_layers * config.n_ctx**2
    memory = psutil.virtual_memory().total
    if config.n_layers > _MAX_LAYERS or masks > _MAX_MASK_BYTES or 4 * weights > memory:
        raise ValueError(
            f"n_layers={config.n_layers} and n_ctx={config.n_ctx} ask for {weights:,} weights and "
            f"{masks:,} bytes of masks, expected at most {_MAX_LAYERS} layers and what fits into "
            "memory"
        )


def _require_fit(
    config: TransformerBridgeConfig, weights: Mapping[str, torch.Tensor], name: str
) -> None:
    """Refuse a configuration that does not match the weights, before memory is allocated."""
    said = f"load: {name}: weights do not fit their config:"
    try:
        masks = config.n_layers * config.n_ctx**2
        if config.n_layers > len(weights) or masks > _MAX_MASK_BYTES:
            raise InputError(
                f"{said} n_layers={config.n_layers}, n_ctx={config.n_ctx}, {len(weights)} weights"
            )
        with torch.device("meta"):
            expected = NativeModel(copy.deepcopy(config)).state_dict()
    except InputError:
        raise
    except Exception as error:  # the fields come from a file and may be anything
        raise InputError(f"load: {name}: no model of this config: {error}") from error
    sizes = {key: tuple(weight.shape) for key, weight in expected.items()}
    given = {key: tuple(weight.shape) for key, weight in weights.items()}
    for key in sorted(sizes | given):
        if sizes.get(key) != given.get(key):
            wanted = sizes.get(key, "no such weight")
            raise InputError(f"{said} {key!r} is {given.get(key, 'missing')}, expected {wanted}")


def wrap_native(model: NativeModel, *, name: str = "native") -> TransformerBridge:
    """A bridge around a bare native model, which is modified in place."""
    return build_bridge_from_module(model, NATIVE, tl_config=model.cfg, model_name=name).eval()


def config_to_json(config: TransformerBridgeConfig) -> str:
    """The fields of a native configuration that define the model, without the device."""
    fields = {name: getattr(config, name, None) for name in sorted(_FIELDS)}
    fields["dtype"] = str(config.dtype).removeprefix("torch.")
    # numpy floats come from TransformerLens' default for the initialiser's range.
    return json.dumps(fields, default=lambda value: value.item())


def config_from_json(text: str, *, where: str = "native_config") -> TransformerBridgeConfig:
    """Inverse of :func:`config_to_json`.

    Raises:
        InputError: if the text is not the configuration of a native model; the message starts
            with ``where``.

    >>> config = native_config("sif-small", seed=3)
    >>> config_from_json(config_to_json(config)).to_dict() == config.to_dict()
    True
    """
    fields = json.loads(text)
    if not isinstance(fields, dict) or not set(fields) <= _FIELDS:
        raise InputError(f"{where}: holds no configuration of a native model")
    dtype = getattr(torch, str(fields.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"{where}: dtype {fields.get('dtype')!r} is not known to torch")
    return _config({**fields, "dtype": dtype})


def _config(fields: dict[str, Any]) -> TransformerBridgeConfig:
    rope_scaling = fields.pop("rope_scaling", None)
    if any(isinstance(value, torch.Tensor) for value in fields.values()):
        raise InputError(
            "load: weights given (a dictionary of tensors), expected the network that they belong "
            "to: network.load_state_dict(weights), then load(network)"
        )
    known = inspect.signature(TransformerBridgeConfig).parameters.values()
    needed = [p.name for p in known if p.kind != p.VAR_KEYWORD and p.default is p.empty]
    lacking = [name for name in needed if name not in fields]
    if lacking:
        raise InputError(
            f"native_config: the configuration lacks {', '.join(lacking)}; "
            f"native_config({min(PRESETS)!r}, ...) fills in what is not given"
        )
    try:
        config = TransformerBridgeConfig(**fields)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"native_config: {error}") from error
    if rope_scaling is not None:
        # Read by the native model, but not a parameter of the constructor.
        config.rope_scaling = rope_scaling  # pyright: ignore[reportAttributeAccessIssue]
    return config
