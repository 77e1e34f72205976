"""Whether what is changed at a hook changes what the model computes.

A bridge that delegates a part of the network to its own code fires some hooks beside the
computation: such a hook shows the right tensor, and an edit of it is thrown away.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.agreement import relative_error, remembered
from lensclust.batching import default_budget, model_device, without_cache
from lensclust.errors import InputError
from lensclust.sites import model_name

# Of the sequences that are run, and what is added to a tensor over its own size.
LENGTH, AMOUNT = 5, 4.0


def require_effect(model: TransformerLensModel, names: Iterable[str], *, caller: str) -> None:
    """Refuse hooks at which an edit is thrown away; tried once for each model and hook.

    Noise several times as large as the tensor is added to it; the logits must move. All hooks
    are tried in one forward, each in a row of its own.

    Args:
        model: a hooked model, in eval mode.
        names: hook points that are going to be edited.
        caller: function name used in error messages.

    Raises:
        InputError: if the model has no such hook, it does not fire in a forward, or the logits
            are those without the edit.

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
    """By what a Hugging Face network computes attention: hooks inside fire with some alone.

    >>> import lensclust as lc
    >>> attention_kernel(lc.load("native:sif-small")) is None
    True
    """
    config = getattr(getattr(model, "original_model", None), "config", None)
    return getattr(config, "_attn_implementation", None)


@contextmanager
def unhooked(model: TransformerLensModel) -> Iterator[None]:
    """Inside, hooks that are on the model do not fire: a check runs other tokens than theirs.

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
    try:
        for point in there:
            # Taken off and put back, hooks would lose their order and their contexts. What is
            # not placed by name belongs to the model.
            placed = {handle.hook.id for handle in point.fwd_hooks}
            kept = {key: hook for key, hook in there[point].items() if key not in placed}
            point._forward_hooks = OrderedDict(kept)
        yield
    finally:
        for point, hooks in there.items():
            point._forward_hooks = hooks


@torch.no_grad()
def _tried(model: Any, names: Sequence[str]) -> dict[str, str | None]:
    """What is wrong with an edit at each hook, None where nothing is."""
    length = min(LENGTH, model.cfg.n_ctx or LENGTH)
    # Distinct tokens: attention to equal ones can be exchanged without effect.
    tokens = (3 + 7 * torch.arange(length, device=model_device(model))) % model.cfg.d_vocab
    tokens = tokens.repeat(len(names), 1)
    fired: set[str] = set()

    def noise(row: int, name: str) -> Callable[[Tensor, Any], Tensor | None]:
        def hook(value: Any, hook: Any) -> Tensor | None:
            # Experts see all tokens of a batch in one axis.
            if not isinstance(value, Tensor) or value.shape[0] % len(names):
                return None
            fired.add(name)
            rows = value.clone().unflatten(0, (len(names), -1))
            generator = torch.Generator().manual_seed(row)
            added = torch.randn(rows[row].shape, generator=generator).to(rows)
            # Of tensors that are zero, too.
            size = rows[row].float().square().mean().sqrt()
            rows[row] += added * (AMOUNT * size if size > 0 else 1.0)
            return rows.flatten(0, 1)

        return hook

    def logits(hooks: Sequence[tuple[str, Callable[..., Any]]]) -> Tensor:
        with warnings.catch_warnings():
            # What is found out here, TransformerLens says of some of the hooks.
            warnings.filterwarnings("ignore", message="A hook on", category=UserWarning)
            return model.run_with_hooks(
                tokens, fwd_hooks=list(hooks), return_type="logits", **without_cache(model)
            )

    # Batches of one shape are computed alike to the bit, but for atomics of a GPU.
    plain = logits([])
    try:
        edited = logits([(name, noise(row, name)) for row, name in enumerate(names)])
    except Exception as error:  # whatever the network's own code raises
        if len(names) == 1:
            return {names[0]: f"a forward with an edit fails ({error})".replace("\n", " ")}
        return {key: fault for name in names for key, fault in _tried(model, [name]).items()}
    rounding = torch.finfo(plain.dtype).eps

    def fault(row: int, name: str) -> str | None:
        if name not in fired:
            return "it does not fire in a forward; load the model with eager attention"
        if not relative_error(edited[row], plain[row]) > rounding:
            return "what is changed there is not what the network goes on with"
        return None

    return {name: fault(row, name) for row, name in enumerate(names)}
