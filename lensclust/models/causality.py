"""Whether a model is causal: states depend on earlier tokens only."""

from __future__ import annotations

import logging
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lensclust.errors import InputError
from lensclust.models.agreement import agrees, remembered
from lensclust.models.batching import without_cache
from lensclust.models.devices import model_device
from lensclust.models.faithfulness import called_not_causal
from lensclust.models.frequencies import length_steps

_log = logging.getLogger(__name__)

# Tokens of a prefix, and of the sequences that continue it.
_LENGTHS = ((3, 7), (13, 33))


def require_causal(model: TransformerBridge, *, caller: str = "load") -> None:
    """Refuse a model in which a state depends on later tokens, or on their number.

    A prefix is run alone and in two longer sequences with different continuations; the states of
    every layer must agree, and no attention pattern may attend to a later token. Checked once per
    model; not if weights are offloaded.

    Raises:
        InputError: names the first layer that saw later tokens.

    >>> import lensclust as lc
    >>> require_causal(lc.load("native:sif-small"))
    """
    network: Any = model.original_model
    name = model.cfg.model_name
    if any(weight.device.type == "meta" for weight in network.parameters()):
        _log.info("%s: %s has offloaded weights: not tested to be causal", caller, name)
        return
    if getattr(getattr(network, "config", None), "is_encoder_decoder", False):
        raise InputError(f"{caller}: {name} has an encoder, expected a causal language model")
    where = remembered(model, "causal", lambda: _sees_later_tokens(model, caller))
    if where is not None:
        reason = called_not_causal(network)
        raise InputError(
            f"{caller}: {name} is not causal{reason and f' ({reason})'}: states {where} depend on "
            "later tokens, so that padding would change them; expected a decoder, such as "
            "...ForCausalLM"
        )


def _sees_later_tokens(model: TransformerBridge, caller: str) -> str | None:
    """The first layer whose states depend on later tokens; None if none do."""
    vocabulary, context = model.cfg.d_vocab, model.cfg.n_ctx or _LENGTHS[-1][1]
    dtype = next((weight.dtype for weight in model.original_model.parameters()), torch.float32)
    for short, long in _LENGTHS:
        if long > context and (short, long) != _LENGTHS[0]:
            break
        # Both on the same side of a length at which all states legitimately change.
        steps = (step for step in length_steps(model) if step >= short)
        long = min(long, context, *steps)
        short = min(short, long - 1)
        # Not the first ids, which are often special.
        tokens = (torch.arange(2 * long).reshape(2, long) + vocabulary // 3) % vocabulary
        tokens[1, :short] = tokens[0, :short]
        try:
            alone, continued = (_states(model, each) for each in (tokens[:1, :short], tokens))
        except Exception as error:  # a network that cannot run them fails in use, too
            _log.warning("%s: not tested to be causal (%s)", caller, str(error).split("\n")[0])
            return None
        for layer, states in continued.items():
            expected = alone[layer].expand(2, -1, -1)
            # States that are 0, or overflow, carry no information.
            if not bool(states.isfinite().all()):
                continue
            if not agrees(states[:, :short], expected, dtype=dtype):
                return f"at {layer!r}"
        # Some weights hide the dependence: 0 before the residual stream, or below the rounding
        # of half precision.
        if (layer := _attends_ahead(model, tokens)) is not None:
            return f"at {layer!r}"
    return None


def _attends_ahead(model: TransformerBridge, tokens: Int[Tensor, "row token"]) -> str | None:
    """Where a token attends to a later one, as far as patterns are accessible."""
    patterns = _states(model, tokens, site="attn.hook_pattern")
    patterns.pop("logits", None)
    return next((name for name, pattern in patterns.items() if pattern.triu(1).any()), None)


@torch.no_grad()
def _states(
    model: TransformerBridge, tokens: Int[Tensor, "row token"], site: str = "hook_resid_post"
) -> dict[str, Float[Tensor, "row ..."]]:
    states: dict[str, Tensor] = {}

    def keep(state: Tensor, hook: Any) -> None:
        states[hook.name] = state.detach().float()

    names = [
        name
        for layer in range(model.cfg.n_layers)
        if (name := f"blocks.{layer}.{site}") in model.hook_dict
    ]
    network: Any = model.original_model
    with model.hooks(fwd_hooks=[(name, keep) for name in names]):
        out = network(tokens.to(model_device(model)), **without_cache(model))
    logits = getattr(out, "logits", out)
    return states | ({"logits": logits.detach().float()} if isinstance(logits, Tensor) else {})
