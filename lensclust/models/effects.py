"""Whether an intervention at a hook changes the model's output.

A bridge that delegates a part of the network to its original code fires some hooks outside the
computation: such a hook holds the right tensor, but an edit of it is discarded.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.errors import InputError
from lensclust.models.agreement import relative_error, remembered
from lensclust.models.batching import default_budget, few_tokens, without_cache
from lensclust.models.blocks import unhooked
from lensclust.models.sites import model_name

# Tokens of the test sequences, and the size of the noise relative to the tensor.
LENGTH, AMOUNT = 5, 4.0


def require_effect(model: TransformerLensModel, names: Iterable[str], *, caller: str) -> None:
    """Refuse hooks at which an edit is discarded; checked once for each model and hook.

    Noise several times as large as the tensor is added to it; the logits must change. All hooks
    are checked in one forward, each in a separate row.

    Args:
        model: a hooked model, in eval mode.
        names: hook points that will be edited.
        caller: function name used in error messages.

    Raises:
        InputError: if the model has no such hook, it does not fire in a forward, or the logits
            do not change.

    >>> import lensclust as lc
    >>> model = lc.load("native:sif-small")
    >>> require_effect(model, ["blocks.0.attn.hook_pattern", "blocks.3.attn.hook_z"], caller="f")
    """
    wanted = list(dict.fromkeys(names))
    hooks: Any = getattr(model, "hook_dict")  # noqa: B009 - outside the protocol
    if unknown := [name for name in wanted if name not in hooks]:
        raise InputError(f"{caller}: {model_name(model)} has no hook {unknown[0]!r} to edit")
    found: dict[str, str | None] = remembered(model, ("effects", attention_kernel(model)), dict)
    untried = [name for name in wanted if name not in found]
    most = max(1, default_budget(model) // LENGTH)
    with unhooked(model):
        for start in range(0, len(untried), most):
            found |= _tried(model, untried[start : start + most])
    for name in wanted:
        if (fault := found[name]) is not None:
            raise InputError(f"{caller}: {model_name(model)} cannot be edited at {name!r}: {fault}")


def attention_kernel(model: TransformerLensModel) -> str | None:
    """The attention implementation of a Hugging Face network, on which its hooks depend.

    >>> import lensclust as lc
    >>> attention_kernel(lc.load("native:sif-small")) is None
    True
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "_attn_implementation", None)


@torch.no_grad()
def _tried(model: Any, names: Sequence[str]) -> dict[str, str | None]:
    """Why an edit at each hook fails; None where it works."""
    tokens = few_tokens(model, LENGTH).repeat(len(names), 1)
    fired: set[str] = set()

    def noise(row: int, name: str) -> Callable[[Tensor, Any], Tensor | None]:
        def hook(value: Any, hook: Any) -> Tensor | None:
            # Experts receive all tokens of a batch in one axis.
            if not isinstance(value, Tensor) or value.shape[0] % len(names):
                return None
            fired.add(name)
            rows = value.clone().unflatten(0, (len(names), -1))
            generator = torch.Generator().manual_seed(row)
            added = torch.randn(rows[row].shape, generator=generator).to(rows)
            # Tensors that are zero get noise of size 1.
            size = rows[row].float().square().mean().sqrt()
            rows[row] += added * (AMOUNT * size if size > 0 else 1.0)
            return rows.flatten(0, 1)

        return hook

    def logits(hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Tensor:
        with warnings.catch_warnings():
            # TransformerLens warns of some of these hooks itself.
            warnings.filterwarnings("ignore", message="A hook on", category=UserWarning)
            return model.run_with_hooks(
                tokens, fwd_hooks=list(hooks), return_type="logits", **without_cache(model)
            )

    # Batches of one shape give bit-identical results, except for GPU atomics.
    plain = logits([])
    try:
        edited = logits([(name, noise(row, name)) for row, name in enumerate(names)])
    except Exception as error:  # the network's code may raise anything
        if len(names) == 1:
            return {names[0]: f"a forward with an edit fails ({error})".replace("\n", " ")}
        return {key: fault for name in names for key, fault in _tried(model, [name]).items()}
    rounding = torch.finfo(plain.dtype).eps

    def fault(row: int, name: str) -> str | None:
        if name not in fired:
            return "it does not fire in a forward; load the model with eager attention"
        if relative_error(edited[row], plain[row]) > rounding:
            return None
        if _goes_on(model, name, lambda: logits([]), lambda: logits([(name, noise(row, name))])):
            return None
        return "the network does not use the edited tensor, or later weights are 0"

    return {name: fault(row, name) for row, name in enumerate(names)}


def _goes_on(
    model: Any, name: str, plain: Callable[[], Tensor], edited: Callable[[], Tensor]
) -> bool:
    """Whether an edit changes the input of the unembedding, or of heads' output projection.

    If the weights of these are 0, at initialisation or after pruning heads, logits do not change.
    """
    found = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_z", name)
    attention = model.blocks[int(found[1])].attn if found else None
    maps = [getattr(attention, "o", None), getattr(model, "unembed", None)]
    originals = [getattr(each, "original_component", None) for each in maps]
    return any(_enters(each, plain, edited) for each in originals if each is not None)


def _enters(
    projection: nn.Module, plain: Callable[[], Tensor], edited: Callable[[], Tensor]
) -> bool:
    entered: list[Tensor] = []
    handle = projection.register_forward_pre_hook(
        lambda _, given: entered.append(given[0].detach().clone())
    )
    try:
        for forward in (plain, edited):
            forward()
    finally:
        handle.remove()
    if len(entered) != 2:
        return False
    return relative_error(entered[1], entered[0]) > torch.finfo(entered[0].dtype).eps
