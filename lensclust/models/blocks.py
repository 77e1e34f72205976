"""Blocks of a model: heads, their sizes, and whether outputs sum to the residual stream.

A configuration may be wrong about a tensor (latent attention has values of another size, a hybrid
has blocks without heads, some families normalise or scale a block's output), so this is measured
in one forward of a few tokens, once for each model.
"""

from __future__ import annotations

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.base import align_offloaded_subtree
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.models.agreement import relative_error, remembered, rounding_tolerance
from lensclust.models.batching import few_tokens, without_cache

BLOCK_HOOKS = {
    "resid_mid": "blocks.{}.hook_resid_mid",
    "z": "blocks.{}.attn.hook_z",
    "head": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "mlp_out": "blocks.{}.hook_mlp_out",
}
# Beginning of a hook's name in its block -> the kinds that cannot be read if it fires twice.
_HOLDS: dict[str, tuple[str, ...]] = {
    "hook_resid_mid": ("resid_mid",),
    "hook_resid": ("resid", *BLOCK_HOOKS),
    "attn": ("z", "head", "attn_out", "value", "pattern"),
    "hook_attn": ("z", "head", "attn_out", "value", "pattern"),
    "hook_mlp": ("mlp_out",),
}
# The terms of the sum are known, so only the rounding of the sum itself remains.
_SUM_ROUNDINGS = 4
# Rounding of `z @ W_O` in half precision or TF32; a norm or a factor in between exceeds it.
_HEADS_SHARE = 1e-2
_OFF: ContextVar[bool] = ContextVar("hooks of the caller are off", default=False)


@dataclass(frozen=True)
class Block:
    """One block, as measured in a forward.

    Attributes:
        heads: number of attention heads; 0 in a block without attention.
        d_head: size of a head's output before ``W_O``.
        d_model: size of a state of the residual stream.
        heads_error: ``|sum_h z_h W_O + b_O - attn_out|`` over the sum of the terms' norms.
        refused: kind of site -> why its hook does not hold that activation.
    """

    heads: int
    d_head: int
    d_model: int
    heads_error: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)


def blocks_of(model: TransformerLensModel) -> tuple[Block, ...]:
    """The blocks of a model, from one forward of eight tokens per model.

    >>> import lensclust as lc
    >>> [(block.heads, block.d_head) for block in blocks_of(lc.load("native:sif-small"))][:2]
    [(4, 16), (4, 16)]
    """
    return remembered(model, "blocks", partial(_examined, model))


@contextmanager
def unhooked(model: TransformerLensModel) -> Iterator[None]:
    """Context without the caller's hooks: a self-check runs other tokens than the caller's.

    >>> import lensclust as lc
    >>> model, tokens = lc.load("native:sif-small"), torch.tensor([[1, 2, 3]])
    >>> before = model(tokens)
    >>> with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]):
    ...     with unhooked(model):
    ...         same = torch.equal(model(tokens), before)
    ...     same, torch.equal(model(tokens), before)
    (True, False)
    """
    points: Any = getattr(model, "hook_dict")  # noqa: B009 - outside the protocol
    there = {point: point._forward_hooks for point in points.values()}
    before = _OFF.set(True)
    try:
        for point in there:
            # Hooks that are removed and added again would lose their order and contexts.
            placed = _placed(point) if point.fwd_hooks else ()
            kept = {key: hook for key, hook in there[point].items() if key not in placed}
            point._forward_hooks = OrderedDict(kept)
        yield
    finally:
        for point, hooks in there.items():
            point._forward_hooks = hooks
        _OFF.reset(before)


def hooks_are_off() -> bool:
    """Whether `unhooked` is active: the forward is not the caller's."""
    return _OFF.get()


def hooked_points(model: TransformerLensModel) -> list[str]:
    """Hook points with hooks of the caller, as inside `probes.steer`: the first name of each.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")
    >>> with model.hooks(fwd_hooks=[("blocks.0.hook_mlp_out", lambda value, hook: 0 * value)]):
    ...     hooked_points(model)
    ['blocks.0.hook_mlp_out']
    """
    points: Any = getattr(model, "hook_dict")  # noqa: B009 - outside the protocol
    found: dict[int, str] = {}
    for name, point in sorted(points.items()):
        if point.fwd_hooks and _placed(point):
            found.setdefault(id(point), name)
    return list(found.values())


def _placed(point: Any) -> set[Any]:
    """Keys of hooks that a user placed: by name, and not permanent."""
    return {each.hook.id for each in point.fwd_hooks if not each.is_permanent}


def contribution_scale(model: TransformerLensModel, block: int) -> float:
    """The factor of a block's outputs before they are added (Granite), 1 elsewhere."""
    stacked: Any = model
    return float(getattr(stacked.blocks[block], "residual_contribution_scale", 1.0))


def output_weights(
    model: TransformerLensModel, block: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"] | None]:
    """Output projection of each head into the residual stream, and the bias.

    ``W_O`` and ``b_O`` times the block's `contribution_scale`, in float32, also for offloaded
    weights.
    """
    return _output_weights(model, block, blocks_of(model)[block].heads)


def _output_weights(
    model: TransformerLensModel, block: int, heads: int
) -> tuple[Float[Tensor, "head d_head d_model"], Float[Tensor, " d_model"] | None]:
    stacked: Any = model
    attention, scale = stacked.blocks[block].attn, contribution_scale(model, block)
    with align_offloaded_subtree(attention):
        bias = getattr(attention, "b_O", None)
        try:
            weight = attention.W_O
        except ValueError:  # heads of another size than the configuration says
            weight = attention.o.original_component.weight
            if isinstance(attention.o.original_component, torch.nn.Linear):
                weight = weight.T
            weight = weight.unflatten(0, (heads, -1))
        # Copies: offloaded weights are released again at the end of the context.
        weight = scale * weight.detach().to(torch.float32, copy=True)
        return weight, None if bias is None else scale * bias.detach().to(torch.float32, copy=True)


def _examined(model: Any) -> tuple[Block, ...]:
    with unhooked(model), torch.no_grad():
        return _examined_unhooked(model)


def _examined_unhooked(model: Any) -> tuple[Block, ...]:
    hooks = model.hook_dict
    numbers = range(len(getattr(model, "blocks", ())) or model.cfg.n_layers)
    parts = r"hook_(resid_(pre|mid|post)|(attn|mlp)_out)|attn\.hook_(z|pattern|out)"
    parts += r"|(ln\w*|mlp)\.hook_in"
    looked_at = [name for name in hooks if re.fullmatch(rf"blocks\.\d+\.({parts})", name)]
    found: dict[str, Tensor] = {}
    fired, dtypes = Counter[str](), {torch.float32}

    def keep(name: str) -> Callable[[Tensor, Any], None]:
        def hook(value: Tensor, hook: Any) -> None:
            fired[name] += 1
            if isinstance(value, Tensor) and value.is_floating_point():
                dtypes.add(value.dtype)
                found[name] = value.detach().to("cpu", torch.float32, copy=True)

        return hook

    # Dropout would make the sum differ from its terms.
    training = [part for part in model.modules() if part.training]
    try:
        for part in training:
            part.training = False
        model.run_with_hooks(
            few_tokens(model),
            fwd_hooks=[(name, keep(name)) for name in looked_at],
            return_type=None,
            **without_cache(model),
        )
    finally:
        for part in training:
            part.training = True
    coarsest = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    return tuple(_Block(model, number, found, fired, coarsest).examined() for number in numbers)


class _Block:
    """Activations of one block in the test forward, and the checks on them."""

    def __init__(
        self,
        model: Any,
        number: int,
        found: Mapping[str, Tensor],
        fired: Mapping[str, int],
        dtype: torch.dtype,
    ) -> None:
        self.model, self.number, self.dtype = model, number, dtype
        here = f"blocks.{number}."
        self.seen = {
            name.removeprefix(here): value for name, value in found.items() if name.startswith(here)
        }
        self.refused: dict[str, str] = {}
        self.twice: dict[str, str] = {}
        for name, times in fired.items():
            point = name.removeprefix(here)
            if times > 1 and point != name:
                reason = (
                    f"{name} fires {times} times in one forward: a module stands at several "
                    "depths, or the network runs its blocks several times"
                )
                kinds = next((k for start, k in _HOLDS.items() if point.startswith(start)), ())
                self.twice |= dict.fromkeys(kinds, reason)

    def examined(self) -> Block:
        states = self.seen.get("hook_resid_pre")
        if states is None:
            states = self.seen.get("hook_resid_post")
        if states is None or states.ndim != 3:
            for kind in ("resid", *BLOCK_HOOKS):
                self.refused[kind] = "its residual stream is not one vector per token"
            return Block(0, 0, self.model.cfg.d_model, refused=self.refused)
        direct = self._sums()
        heads, d_head, error = self._heads(direct)
        return Block(heads, d_head, states.shape[-1], error, self.refused | self.twice)

    def _sums(self) -> bool:
        """Refuse outputs that are not added to the stream; return whether attention's is."""
        before, middle, after, attn, mlp = (
            self.seen.get(f"hook_{name}")
            for name in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        )
        if middle is None:
            added = [each for each in (attn, mlp) if each is not None]
            if not added or self._adds_up([before, *added], [after]):
                return True
            self.refused |= dict.fromkeys(
                ("attn_out", "mlp_out"),
                "its blocks add something other than the outputs of attention and MLP",
            )
            return False
        normed = [value for name, value in self.seen.items() if name.startswith("ln")]
        first = attn is None or self._adds_up([before, attn], [middle])
        second = mlp is None or self._adds_up([middle, mlp], [after])
        if not first and not self._adds_up([before, attn], normed):
            self.refused["attn_out"] = (
                "the state between attention and MLP is not the state before plus attn_out"
            )
        inner = self.seen.get("mlp.hook_in")
        if not second and not any(self._adds_up([s, mlp], normed) for s in (middle, inner)):
            self.refused["mlp_out"] = "a block's output is not the state before plus mlp_out"
        checked = [ok for ok, out in ((first, attn), (second, mlp)) if out is not None]
        if checked and not any(checked):
            self.refused["resid_mid"] = (
                "it is not the state before plus attn_out: a norm follows the sum"
            )
        return first

    def _heads(self, direct: bool) -> tuple[int, int, float]:
        z, pattern, out = (
            self.seen.get(name) for name in ("attn.hook_z", "attn.hook_pattern", "hook_attn_out")
        )
        if z is None:
            return 0, 0, 0.0
        width = z.flatten(2).shape[-1]
        heads = z.shape[-2] if z.ndim == 4 else self.model.cfg.n_heads
        if pattern is not None and pattern.ndim == 4:
            heads = pattern.shape[1]
        if z.ndim != 4 or z.shape[-2] != heads:
            self.refused |= dict.fromkeys(
                ("z", "head"), f"its hook does not hold {heads} heads but {tuple(z.shape[2:])}"
            )
            return heads, width // heads, torch.inf
        try:
            weight, bias = (
                None if each is None else each.cpu()
                for each in _output_weights(self.model, self.number, heads)
            )
        except AttributeError:  # a user's module without a known weight
            self.refused |= dict.fromkeys(
                ("head", "value"), "its output projection is not a linear map with readable weight"
            )
            return heads, width // heads, torch.inf
        if weight is None or weight.shape[:2] != z.shape[-2:]:
            shape = None if weight is None else tuple(weight.shape[:2])
            self.refused |= dict.fromkeys(
                ("z", "head"), f"its hook holds {tuple(z.shape[2:])}, but W_O is for {shape}"
            )
            return heads, width // heads, torch.inf
        bias = torch.zeros(()) if bias is None else bias
        each = torch.einsum("bphd,hdm->bphm", z, weight)
        total = each.sum(2) + bias
        self._projection(total, out)
        if out is None:
            self.refused["head"] = "there is no attn_out that its heads add up to"
            return heads, width // heads, torch.inf
        size = each.norm(dim=-1).sum(-1) + bias.norm()
        error = float(((total - out).norm(dim=-1) / size.clamp_min(1e-30)).max())
        if not error <= min(rounding_tolerance(self.dtype), _HEADS_SHARE):  # a NaN is refused, too
            self.refused["head"] = (
                "its heads pass through a norm or a factor before the residual stream and do not "
                f"add up to attn_out (relative error {error:.2g})"
            )
        elif "attn_out" in self.refused:
            self.refused["head"] = self.refused["attn_out"]
        elif not direct:
            self.refused["head"] = "a norm follows the sum of the state and its heads"
        return heads, width // heads, error

    def _projection(self, made: Tensor, out: Tensor | None) -> None:
        """Refuse values weighted by ``W_O`` if attention's output is not ``made``, ``z W_O``.

        What the module gives may pass through a norm before it is ``attn_out`` (Gemma-2), or hold
        the state that it was added to (Bloom): one of the two has to agree.
        """
        given = self.seen.get("attn.hook_out")
        scale = contribution_scale(self.model, self.number)
        if given is None or given.shape != made.shape:
            return
        told = [given * factor for factor in {1.0, scale}]
        told += [] if out is None or out.shape != made.shape else [out]
        errors = [relative_error(made, each) for each in told]
        if not min(errors) <= min(rounding_tolerance(self.dtype), _HEADS_SHARE):
            self.refused["value"] = (
                "the output of its projection is not its weight times the heads "
                f"(relative error {min(errors):.2g})"
            )

    def _adds_up(self, terms: Iterable[Tensor | None], sums: Iterable[Tensor | None]) -> bool:
        """Whether one of the sums equals the sum of the terms, up to rounding."""
        there = [term for term in terms if term is not None]
        total = sum(there[1:], there[0])
        room = _SUM_ROUNDINGS * torch.finfo(self.dtype).eps
        room = room * sum(term.norm(dim=-1) for term in there)
        return any(
            each is not None
            and each.shape == total.shape
            and bool(((each - total).norm(dim=-1) <= room).all())
            for each in sums
        )
