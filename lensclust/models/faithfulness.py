"""Whether a bridge computes the same as the network that it wraps.

In half precision rounding changes logits by percents, as a real fault may. So the effect of
rounding is measured on this network: every module's output is perturbed by its last bit, up or
down. In 85 families a correct bridge differed by at most 0.6 of that, in bfloat16 and float16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from lensclust.errors import InputError
from lensclust.models.added_code import added_code
from lensclust.models.agreement import relative_error, remembered, rounding_tolerance
from lensclust.models.blocks import hooked_points
from lensclust.models.wrapping import followed_network

# Two sequences of this many tokens are run.
_LENGTH = 9
_BARE = "logits before wrapping"
_PARTS = "parts"
# How many times the outputs of modules are perturbed.
_DRAWS = 2


@dataclass(frozen=True, eq=False)
class Bare:
    """Logits of an unwrapped network.

    Attributes:
        logits: of a few tokens, in single precision.
        rounding: the relative difference from them that rounding explains.
    """

    logits: Tensor
    rounding: float

    def difference(self, found: Tensor) -> float | None:
        """The relative difference of other logits; None if rounding explains it."""
        error = relative_error(found, self.logits)
        return error if error > self.rounding else None


def bare(network: nn.Module) -> Bare | None:
    """`bare_logits` and the effect of rounding on them; None if there are none."""
    logits = bare_logits(network)
    if logits is None:
        return None
    kind: Any = getattr(network, "dtype", logits.dtype)
    allowed = rounding_tolerance(kind)
    if kind.itemsize < 4:
        moved = [torch.finfo(kind).eps]
        for seed in range(_DRAWS):
            with _last_bits(network, seed):
                other = bare_logits(network)
            moved.append(torch.inf if other is None else relative_error(other, logits))
        allowed = min(allowed, max(moved))
    return Bare(logits, allowed)


@contextmanager
def _last_bits(network: nn.Module, seed: int) -> Iterator[None]:
    """Context in which the output of each module with weights is perturbed by its last bit."""
    generator = torch.Generator().manual_seed(seed)

    def move(_module: nn.Module, _given: Any, found: Any) -> Tensor | None:
        if not (isinstance(found, Tensor) and found.is_floating_point()):
            return None
        signs = torch.randint(2, found.shape, generator=generator).to(found) * 2 - 1
        return found * (1 + torch.finfo(found.dtype).eps * signs)

    parts = [part for part in network.modules() if any(True for _ in part.parameters(False))]
    handles = [part.register_forward_hook(move) for part in parts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def bare_logits(network: nn.Module) -> Tensor | None:
    """Logits of a few tokens; None if weights are offloaded or the network cannot run."""
    weights = list(network.parameters())
    if not weights or any(weight.is_meta for weight in weights):
        return None
    parts: Any = network
    ids = torch.arange(2 * _LENGTH).reshape(2, _LENGTH) * 7 + 3
    try:
        tokens = (ids % max(2, parts.config.get_text_config().vocab_size)).to(parts.device)
        with torch.no_grad():
            return parts(tokens, use_cache=False).logits.float()
    except Exception:  # a network's code may raise anything; the user sees it in a forward
        return None


def note_bare(bridge: TransformerBridge, given: Bare | None) -> None:
    """Store a network's logits from before it was wrapped, for `require_faithful`."""
    remembered(bridge, _BARE, lambda: given)


def _parts(bridge: TransformerBridge) -> list[int]:
    """Identities of the modules of the wrapped network."""
    return [id(part) for part in bridge.original_model.modules()]


def require_all_blocks(bridge: TransformerBridge) -> None:
    """Refuse a network whose number of blocks differs from its configuration's.

    The last layer of the residual stream would be missing, or be read in a block that never runs.

    Raises:
        InputError: with both numbers, and how to correct the configuration.
    """
    there, said = len(getattr(bridge, "blocks", ())), bridge.cfg.n_layers
    if there and there != said:
        raise InputError(
            f"load: {bridge.cfg.model_name} has {there} blocks, its configuration says {said}; "
            f"where blocks were cut or added by hand, set config.num_hidden_layers = {there}"
        )


def called_not_causal(network: Any) -> str:
    """The reason, if a network's configuration turns causal attention off; else empty."""
    config = getattr(network, "config", None)
    if getattr(config, "is_causal", True) is False:
        return "its config.is_causal is False, so that states see later tokens"
    return ""


def require_faithful(bridge: TransformerBridge, *, caller: str = "load") -> None:
    """Refuse a bridge whose logits differ from its network's.

    Checked when the bridge is made, and again when the weights have changed: a part that a bridge
    omits may have no effect at initialisation.

    Raises:
        InputError: with the relative difference.
    """
    made_of = remembered(bridge, _PARTS, lambda: _parts(bridge), lasting=True)
    if made_of == _parts(bridge):  # else the caller replaced modules
        remembered(bridge, "faithful", lambda: _require(bridge, caller))


def _require(bridge: TransformerBridge, caller: str) -> None:
    expected: Bare | None = remembered(bridge, _BARE, lambda: _of_own(bridge))
    if expected is None:
        return
    network: Any = bridge.original_model
    name, found = bridge.cfg.model_name, bare_logits(network)
    if found is None:
        raise InputError(
            f"{caller}: {name} runs alone and fails once TransformerLens has wrapped it: try "
            "another version of transformer-lens or transformers"
        )
    if (error := expected.difference(found)) is not None:
        if reason := called_not_causal(network):
            raise InputError(
                f"{caller}: {name} is not causal: {reason}; expected a decoder, such as "
                "...ForCausalLM with is_causal=True"
            )
        advice = (
            "build the network with attn_implementation='eager', or try another version of "
            "transformer-lens"
        )
        if added := added_code(network):
            advice = f"TransformerLens may not run the {added[0]}; take it off before load"
        raise InputError(
            f"{caller}: {name} gives other logits once TransformerLens has wrapped it (relative "
            f"difference {error:.2g}, rounding explains {expected.rounding:.2g}), so states "
            f"would be another network's: {advice}"
        )


def _of_own(bridge: TransformerBridge) -> Bare | None:
    """Logits of the network that a bridge was made of; None if the two may differ."""
    own = followed_network(bridge)
    if own is None or hooked_points(bridge) or added_code(bridge.original_model):
        return None
    return bare(own)
