"""Replace states of a model, with many edits in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensclust.inference import upload
from lensclust.models import Site, hook_name, model_device, model_name

# A site, and its new state for each prompt.
Edit = tuple[Site, Float[Tensor, "_prompt _d"]]


class EditHooks:
    """One hook for each edited hook point, for any number of edits.

    Args:
        rows: the prompt behind each column of ``place``.
        place, column: batch row and sequence position of each edit of each prompt ``(edit,
            prompt)``.
    """

    def __init__(
        self,
        model: Any,
        edits: Sequence[Edit | None],
        rows: Int[Tensor, " prompt"],
        place: Int[Tensor, "edit prompt"],
        column: Int[Tensor, "edit prompt"],
    ) -> None:
        self.model = model
        by_hook: dict[str, list[int]] = {}
        for number, edit in enumerate(edits):
            if edit is not None:
                by_hook.setdefault(hook_name(model, edit[0]), []).append(number)
        self.fired = dict.fromkeys(by_hook, 0)
        self.pairs = []
        device = model_device(model)
        for name, numbers in by_hook.items():
            chosen = [edit for number in numbers if (edit := edits[number]) is not None]
            where: list[Tensor] = [place[numbers], column[numbers]]
            if chosen[0][0].head is not None:
                heads = torch.tensor([[site.head] for site, _ in chosen], device=place.device)
                where.append(heads.expand_as(where[0]))
            values = torch.stack([value[rows.to(value.device)] for _, value in chosen])
            # Here and not in the hooks, where each upload would delay later layers.
            where, values = [upload(axis, device) for axis in where], upload(values, device)
            self.pairs.append((name, self._hook(name, where, values)))

    def _hook(self, name: str, where: list[Tensor], values: Tensor) -> Callable[..., Tensor]:
        def hook(value: Tensor, hook: Any) -> Tensor:
            self.fired[name] += 1
            edited = value.clone()  # the model may still use the tensor it passed
            index = tuple(axis.to(value.device) for axis in where)
            edited[index] = values.to(edited)
            return edited

        return hook

    def require_fired(self) -> None:
        odd = [name for name, times in self.fired.items() if times != 1]
        if odd:
            raise RuntimeError(
                f"replay: hook {odd[0]!r} of {model_name(self.model)} fired "
                f"{self.fired[odd[0]]} times in one forward, expected once"
            )
