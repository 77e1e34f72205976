"""Norms with a frozen scale, which makes them linear.

``norm(x) = γ ⊙ (x - c mean(x)) / σ(x) + β`` with ``c`` 1 for LayerNorm and 0 for RMSNorm. With
``σ`` frozen at its value for the whole state, the norm of a sum is the sum of its parts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Far above any epsilon under a norm's root, and exact in every floating-point type.
AMPLITUDE = 64.0


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """Gain, centring and shift of a norm, inferred from its outputs for two states.

    Attributes:
        gain: ``γ``, including an offset of 1 where the model stores it without.
        shift: ``β``.
        centred: whether the mean is subtracted first.
    """

    gain: Float[Tensor, " d_model"]
    shift: Float[Tensor, " d_model"]
    centred: bool

    @classmethod
    @torch.no_grad()
    def of(cls, norm: Any, weight: Float[Tensor, ...], d_model: int) -> FrozenNorm:
        """Infer from a model's norm; ``weight`` gives its device and type.

        >>> import lensclust as lc
        >>> model = lc.load("native:sif-small")
        >>> found = FrozenNorm.of(model.ln_final, model.W_U, model.cfg.d_model)
        >>> torch.allclose(found.gain, model.ln_final.weight, atol=1e-6), found.centred
        (True, True)
        """
        # Zero mean, no zero, and exact: alternating +1 and -1, ending in 1, 1, -2 if odd.
        probe = torch.ones(d_model, dtype=torch.float32)
        probe[1::2] = -1
        if d_model % 2:
            probe[-3:] = torch.tensor([1.0, 1.0, -2.0])
        probe *= AMPLITUDE
        states = torch.stack([torch.zeros_like(probe), probe, probe + AMPLITUDE])
        zero, plain, moved = norm(states.to(weight)[None])[0].to(exact(weight.dtype))
        unit = (probe / probe.square().mean().sqrt()).to(plain)
        gain = (plain - zero) / unit
        return cls(gain, zero, bool((moved - plain).norm() < 0.01 * (plain - zero).norm()))

    def scaled_only(self, states: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """The norm of states without its scale and shift."""
        centred = states - states.mean(-1, keepdim=True) if self.centred else states
        return self.gain * centred

    def inverse_scale(
        self, before: Float[Tensor, "*rows d_model"], after: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, " *rows"]:
        """``1 / σ`` of each state, from its norm's output."""
        unscaled = self.scaled_only(before.to(self.gain))
        made = after.to(self.gain) - self.shift
        return (made * unscaled).sum(-1) / unscaled.square().sum(-1)

    def pulled_back(self, weights: Float[Tensor, "d_model out"]) -> Float[Tensor, "d_model out"]:
        """``M`` with ``(norm(x) - β) · weights = x · M / σ``: ``γ`` and the centring in one."""
        scaled = self.gain[:, None] * weights
        return scaled - scaled.mean(0) if self.centred else scaled


def exact(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)
