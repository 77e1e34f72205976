"""Compute label logits of components from a model's states, batch by batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensclust.errors import InputError
from lensclust.inference import States
from lensclust.models import (
    BLOCK_HOOKS,
    Site,
    blocks_of,
    few_tokens,
    head_blocks,
    hook_name,
    model_name,
    output_weights,
    unhooked,
    without_cache,
)
from probes.components.frozen_norms import FrozenNorm, exact


def require_decomposable(model: Any, *, caller: str) -> None:
    """Raise InputError for a model whose label logits are no sum over heads and MLPs.

    Raises:
        InputError: if a block has no heads, or there is no final norm right before an unembedding
            of ``d_model`` rows; ``caller`` is named in the message.
    """
    having = head_blocks(model)
    if without := sorted({*range(model.cfg.n_layers)} - {*having}):
        raise InputError(
            f"{caller}: block {without[0]} of {model_name(model)} has no heads: what it adds to "
            "the residual stream is no sum over heads and MLPs"
        )
    rows = model.W_U.shape[0]
    if rows != model.cfg.d_model or not hasattr(model, "ln_final"):
        raise InputError(
            f"{caller}: {model_name(model)} has states of {model.cfg.d_model} numbers and "
            f"unembeds {rows}, expected as many, right after a final norm"
        )


def component_table(model: Any) -> pd.DataFrame:
    """Every component of a model in order: ``component, kind, block, head`` (-1 for none).

    >>> import lensclust as lc
    >>> component_table(lc.load("native:sif-small")).component[[0, 1, 25, 31]].tolist()
    ['embed', 'head 0.0', 'mlp 0', 'bias']
    """
    blocks = range(model.cfg.n_layers)
    heads = [
        (str(Site("head", block, head)), "head", block, head)
        for block in blocks
        for head in range(blocks_of(model)[block].heads)
    ]
    mlps = [(f"mlp {b}", "mlp", b, -1) for b in blocks if _mlp_hook(b) in model.hook_dict]
    rows = [("embed", "embed", -1, -1), *heads, *mlps, ("bias", "bias", -1, -1)]
    return pd.DataFrame(rows, columns=["component", "kind", "block", "head"])


@dataclass(frozen=True)
class Multipliers:
    """A model's multipliers of attention outputs and logits, measured in one forward.

    Attributes:
        attention: multiplier of each block's attention output (Granite's residual multiplier); 1
            in most models.
        logits: multiplier of the logits (Cohere, Granite); 1 in most models.
    """

    attention: tuple[float, ...]
    logits: float

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any) -> Multipliers:
        """Measure the multipliers as the best-fitting factors.

        >>> import lensclust as lc
        >>> Multipliers.of(lc.load("native:sif-small")).logits
        1.0
        """
        blocks = range(model.cfg.n_layers)
        behind = {b: f"blocks.{b}.ln1_post.hook_out" for b in blocks}
        behind = {b: name for b, name in behind.items() if name in model.hook_dict}
        names = [BLOCK_HOOKS[kind].format(b) for kind in ("z", "attn_out") for b in blocks]
        names += [*behind.values(), "unembed.hook_out"]
        tokens = few_tokens(model)
        shown: dict[str, Tensor] = {}

        def keep(name: str) -> tuple[str, Any]:
            return name, lambda value, hook: shown.__setitem__(name, value)

        with unhooked(model):
            logits = model.run_with_hooks(
                tokens,
                fwd_hooks=[keep(name) for name in names],
                return_type="logits",
                **without_cache(model),
            )
        found = []
        for block in blocks:
            if block in behind:
                before = shown[behind[block]]
            else:
                weight, bias = output_weights(model, block)
                z = shown[BLOCK_HOOKS["z"].format(block)].float()
                before = torch.einsum("bphd,hdm->bpm", z, weight.to(z))
                before = before if bias is None else before + bias.to(before)
            found.append(_factor(before, shown[BLOCK_HOOKS["attn_out"].format(block)]))
        cap = soft_cap(model)
        logits = logits.double()
        if cap is not None:
            logits = cap * (logits / cap).clamp(-1 + 1e-7, 1 - 1e-7).atanh()
        return cls(tuple(found), _factor(shown["unembed.hook_out"], logits))


def soft_cap(model: Any) -> float | None:
    """``c`` of a model whose logits are ``c tanh(logits / c)``, else None."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def _factor(before: Tensor, after: Tensor) -> float:
    """Least-squares ``f`` of ``f before = after``; 1 where the difference is rounding."""
    rounding = max(torch.finfo(each.dtype).eps for each in (before, after))
    before, after = before.double().flatten(), after.to(before.device).double().flatten()
    found = float(before @ after / (before @ before).clamp(min=1e-30))
    return 1.0 if abs(found - 1) < 16 * rounding else found


class LabelLogits:
    """Convert the states of a forward into label logits of every component."""

    def __init__(self, model: Any, labels: Int[Tensor, " label"]) -> None:
        cfg, hooks = model.cfg, model.hook_dict
        self.weight = model.W_U.detach()
        self.labels = labels
        chosen = self.weight[:, labels.to(self.weight.device)].to(exact(self.weight.dtype))
        self.norm = FrozenNorm.of(model.ln_final, self.weight, cfg.d_model)
        self.matrix = self.norm.pulled_back(chosen)
        self.bias = self.norm.shift @ chosen
        if (unembedding_bias := model.b_U) is not None:
            self.bias = self.bias + unembedding_bias.detach()[labels.to(self.bias.device)]
        self.embed = hook_name(model, Site("resid", 0))
        self.blocks = range(cfg.n_layers)
        self.mlps = [name for name in map(_mlp_hook, self.blocks) if name in hooks]
        multipliers = Multipliers.of(model)
        self.scale = multipliers.logits
        self.writing = [
            _Writing.from_model(model, block, self.matrix, multipliers.attention[block])
            for block in self.blocks
        ]
        self.hooks = [self.embed, "ln_final.hook_in", "ln_final.hook_out", *self.mlps]
        self.hooks += [hook for each in self.writing for hook in each.hooks]

    def of(self, states: States) -> Float[Tensor, "row component label"]:
        def logits(name: str) -> Tensor:
            return (states[name].to(self.matrix) @ self.matrix)[:, None]

        heads, biases = zip(*(each.of(states) for each in self.writing), strict=True)
        mlps = [logits(name) for name in self.mlps]
        bias = torch.stack([each.to(self.bias) for each in biases]).sum(0)
        parts = [logits(self.embed), *(each.to(self.matrix) for each in heads), *mlps, bias]
        inverse = self.norm.inverse_scale(states["ln_final.hook_in"], states["ln_final.hook_out"])
        scaled = torch.cat(parts, dim=1) * inverse[:, None, None]
        scaled[:, -1] += self.bias
        return scaled * self.scale


class _Writing:
    """Map from one block's heads to label logits, before the final norm's scale."""

    def __init__(
        self,
        z: str,
        bracket: Float[Tensor, "head d_head label"],
        bias: Float[Tensor, " label"],
        norm: tuple[FrozenNorm, str, str] | None,
        shift: Float[Tensor, " label"],
    ) -> None:
        self.z, self.bracket, self.bias, self.shift = z, bracket, bias, shift
        self.norm = norm
        self.hooks = [z, *(norm[1:] if norm else ())]

    @classmethod
    def from_model(
        cls, model: Any, block: int, matrix: Float[Tensor, "d_model label"], factor: float
    ) -> _Writing:
        module = model.blocks[block]
        w_o, b_o = output_weights(model, block)
        after = getattr(module, "ln1_post", None)
        matrix = factor * matrix
        norm, shift = None, torch.zeros_like(matrix[0])
        if after is not None:
            frozen = FrozenNorm.of(after, model.W_U.to(w_o.device), model.cfg.d_model)
            names = [f"blocks.{block}.ln1_post.hook_{side}" for side in ("in", "out")]
            norm, shift = (frozen, names[0], names[1]), frozen.shift @ matrix.to(frozen.shift)
            matrix = frozen.pulled_back(matrix.to(frozen.gain))
        here = matrix.to(w_o.device)
        bias = torch.zeros_like(here[0]) if b_o is None else b_o.to(here) @ here
        return cls(
            BLOCK_HOOKS["z"].format(block),
            torch.einsum("hdm,my->hdy", w_o.to(here), here),
            bias,
            norm,
            shift,
        )

    def of(
        self, states: States
    ) -> tuple[Float[Tensor, "row head label"], Float[Tensor, "row 1 label"]]:
        """Label logits of each head, and of the bias of the block's attention."""
        z = states[self.z].to(self.bracket)
        heads = torch.einsum("rhd,hdy->rhy", z, self.bracket)
        bias = self.bias.expand(len(z), 1, -1)
        if self.norm is None:
            return heads, bias
        frozen, before, after = self.norm
        inverse = frozen.inverse_scale(states[before], states[after])[:, None, None]
        return heads * inverse, bias * inverse + self.shift


def _mlp_hook(block: int) -> str:
    return BLOCK_HOOKS["mlp_out"].format(block)
