"""Sequence lengths beyond which rotary frequencies change for all tokens of a forward.

LongRoPE switches to other frequencies as soon as one token is beyond the pretraining length.
Dynamic NTK raises the base with every token beyond the context. So a prompt batched with a longer
one gets other states than alone, and keys in a cache keep outdated frequencies.
"""

from __future__ import annotations

from typing import Any

from transformer_lens.model_protocol import TransformerLensModel


def length_steps(model: TransformerLensModel) -> tuple[int, ...]:
    """Lengths beyond which LongRoPE switches frequencies.

    >>> import lensclust as lc
    >>> length_steps(lc.load("native:sif-small"))
    ()
    """
    return tuple(
        kind["original_max_position_embeddings"]
        for kind in _rotary_kinds(_config(model))
        if kind.get("rope_type") == "longrope" and "original_max_position_embeddings" in kind
    )


def cached_up_to(model: TransformerLensModel, start: int, stop: int) -> int | None:
    """The length up to which a key/value cache is right; None if up to ``stop``.

    Args:
        start: tokens in the first forward, which fills the cache.
        stop: tokens that are run in total.

    >>> import lensclust as lc
    >>> cached_up_to(lc.load("native:sif-small"), 8, 20) is None
    True
    """
    config = _config(model)
    ends = [step for step in length_steps(model) if start <= step < stop]
    if any("dynamic" in str(kind.get("rope_type")) for kind in _rotary_kinds(config)):
        context = config.max_position_embeddings
        ends += [max(start, context)] if start < stop and stop > context else []
    return min(ends, default=None)


def _config(model: TransformerLensModel) -> Any:
    config: Any = getattr(getattr(model, "original_model", None), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else None


def _rotary_kinds(config: Any) -> list[dict[str, Any]]:
    """Rotary parameters of the model, or of each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [found, *(each for each in found.values() if isinstance(each, dict))]
