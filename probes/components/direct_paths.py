"""Scale components' direct effects on the logits, with unchanged inputs of later components."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.models import BLOCK_HOOKS, Site, hook_name, model_name, output_weights
from probes.components.frozen_norms import FrozenNorm, exact
from probes.components.label_logits import Multipliers, component_table, require_decomposable

Hook = Callable[[Tensor, Any], Tensor | None]


@contextmanager
def direct_paths(
    model: TransformerLensModel, weights: Mapping[str, float]
) -> Iterator[TransformerLensModel]:
    """Run a model with some components' direct effects on the logits scaled, at every position.

    A component ``a`` of weight ``w`` adds ``(w - 1) a`` to the unembedded state, with the final
    norm's scale unchanged. All else is unchanged, so logits change as in
    `probes.components.decompose`: those of a label become ``sum_j w_j g_j``, for every token of
    the vocabulary and at every position, also in generation.

    Args:
        weights: component (``embed``, ``head 3.12``, ``mlp 3``, ``bias``) -> weight; others
            keep 1.

    Raises:
        InputError: if the model has no such component, or cannot be decomposed.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="both")
    >>> tokens = prompts.tokens[:2]
    >>> with direct_paths(model, {"mlp 5": 0.0}):
    ...     after = model(tokens)
    >>> _, cache = model.run_with_cache(tokens)
    >>> scale = cache["ln_final.hook_scale"]
    >>> written = cache["blocks.5.hook_mlp_out"]
    >>> written = (written - written.mean(-1, keepdim=True)) / scale * model.ln_final.weight
    >>> torch.allclose(after, model(tokens) - written @ model.W_U, atol=1e-4)
    True
    """
    require_decomposable(model, caller="direct_paths")
    known = set(component_table(model)["component"])
    if unknown := sorted({*weights} - known):
        raise InputError(
            f"direct_paths: {model_name(model)} has no component {unknown[0]!r}, expected some of "
            "'embed', 'bias', its heads ('head 3.12') and MLPs ('mlp 3')"
        )
    changes = {name: float(weight) - 1 for name, weight in weights.items() if weight != 1}
    hooked: Any = model
    with hooked.hooks(fwd_hooks=_Writers(model, changes).hooks()):
        yield model


class _Writers:
    """Sum the changes of the scaled components' outputs over one forward."""

    def __init__(self, model: Any, changes: Mapping[str, float]) -> None:
        self.model, self.changes = model, changes
        self.norm = FrozenNorm.of(model.ln_final, model.W_U, model.cfg.d_model)
        self.multipliers = Multipliers.of(model)
        self.more: Tensor | None = None
        self.held: Tensor = torch.empty(0)

    def hooks(self) -> list[tuple[str, Hook]]:
        # The first hook of a forward resets the sum, also after an aborted forward.
        found: list[tuple[str, Hook]] = [(hook_name(self.model, Site("resid", 0)), self._begin)]
        for block in range(self.model.cfg.n_layers):
            found += self._of_block(block)
        found += [("ln_final.hook_in", self._hold), ("unembed.hook_in", self._end)]
        bias = self.model.b_U
        if (change := self.changes.get("bias")) is not None and bias is not None:
            found.append(("unembed.hook_out", lambda value, hook: value + change * bias.to(value)))
        return found

    def _begin(self, value: Tensor, hook: Any) -> None:
        self.more = self.changes.get("embed", 0.0) * value.to(exact(value.dtype))

    def _hold(self, value: Tensor, hook: Any) -> None:
        self.held = value

    def _end(self, value: Tensor, hook: Any) -> Tensor:
        norm, bias = self.norm, self.changes.get("bias", 0.0)
        assert self.more is not None
        inverse = norm.inverse_scale(self.held.to(value.device), value)
        more = norm.scaled_only(self.more.to(norm.gain)) * inverse[..., None]
        return value + (more + bias * norm.shift).to(value)

    def _add(self, more: Tensor) -> None:
        assert self.more is not None
        self.more = self.more + more.to(self.more)

    def _of_block(self, block: int) -> list[tuple[str, Hook]]:
        found: list[tuple[str, Hook]] = []
        if (change := self.changes.get(f"mlp {block}")) is not None:
            name = BLOCK_HOOKS["mlp_out"].format(block)
            found.append((name, lambda value, hook: self._add(change * value)))
        w_o, b_o = output_weights(self.model, block)
        factor = self.multipliers.attention[block]
        bias = self.changes.get("bias", 0.0)
        heads = [self.changes.get(str(Site("head", block, head)), 0.0) for head in range(len(w_o))]
        if not any([*heads, bias]):
            return found
        changes = torch.tensor(heads)
        more = torch.empty(0)

        def attend(z: Tensor, hook: Any) -> None:
            nonlocal more
            dtype = exact(z.dtype)
            scaled = z.to(dtype) * changes.to(z.device, dtype)[:, None]
            more = torch.einsum("bphd,hdm->bpm", scaled, w_o.to(scaled))
            if b_o is not None:
                more = more + bias * b_o.to(more)
            if after is None:
                self._add(factor * more)

        found.append((BLOCK_HOOKS["z"].format(block), attend))
        after = getattr(self.model.blocks[block], "ln1_post", None)
        if after is not None:
            norm = FrozenNorm.of(after, self.model.W_U.to(w_o.device), self.model.cfg.d_model)
            before = torch.empty(0)

            def hold(value: Tensor, hook: Any) -> None:
                nonlocal before
                before = value

            def write(value: Tensor, hook: Any) -> None:
                inverse = norm.inverse_scale(before, value)[..., None]
                written = norm.scaled_only(more.to(norm.gain)) * inverse + bias * norm.shift
                self._add(factor * written)

            stem = f"blocks.{block}.ln1_post"
            found += [(f"{stem}.hook_in", hold), (f"{stem}.hook_out", write)]
        return found
