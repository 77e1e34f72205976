"""Temporary fine-tuning of a loaded model, undone at the end of a block.

The model is trained in place and restored bit for bit, whatever happens inside the block.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.statistics import derive_generator

from lensclust.errors import InputError, check_counts
from lensclust.inference import (
    FrozenBlocks,
    require_answers,
    require_fits,
    require_one_side,
    scored_logits,
    with_gradients,
)
from lensclust.models import (
    Site,
    chosen_parameters,
    hook_name,
    named_parameters,
    parameter_names,
    resolve,
    restored_afterwards,
)
from lensclust.prompts import Prompts
from lensclust.training.losses import StateLoss, contrast, pull

__all__ = ["Finetuned", "StateLoss", "contrast", "finetuned", "parameter_names", "pull"]


@dataclass(frozen=True)
class Finetuned:
    """Record of a temporary fine-tuning.

    Attributes:
        losses: at each step, before it: the cross-entropy of the batch's answers in nats, and
            the additional loss (0 if there is none), not weighted.
        parameters: number of trained parameters.
        seconds: duration.
    """

    losses: tuple[tuple[float, float], ...]
    parameters: int
    seconds: float


@contextmanager
def finetuned(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    steps: int = 30,
    lr: float = 1e-3,
    only: str | Sequence[str | Site] | None = None,
    extra: StateLoss | None = None,
    batch_size: int = 16,
    seed: int = 0,
    frozen: FrozenBlocks | None = None,
) -> Iterator[Finetuned]:
    """Fine-tune a model on the answers of prompts; its weights are restored at the block's end.

    AdamW without decay, at a constant learning rate; dropout stays off. Prompts are reshuffled
    every epoch. Blocks below all trained parameters run once.

    Args:
        model: a hooked model, in eval mode.
        prompts: training prompts with target answers.
        only: which parameters to train: a regular expression that is searched in their names
            (`parameter_names`), or names, or heads (``"head 3.1"``, or sites); all by default.
            A head's parameters are its slices of the query and output weights, and of the key and
            value weights unless other heads share them; biases and norms are not trained.
        extra: an additional loss on the prompts' states.
        batch_size: prompts per step.
        seed: of the order of the prompts; the global random state is unchanged.
        frozen: output of the blocks below all trained parameters on these prompts
            (`FrozenBlocks.run`), if several trainings share it; computed here by default.

    Yields:
        Losses, the number of parameters, and seconds.

    Raises:
        InputError: if a hyperparameter is invalid, no parameter is chosen, a head or layer does
            not exist, the model cannot be trained head by head, prompts have no answers or are
            not compatible with the model, or the model is in training mode.
        RuntimeError: if the loss is no longer finite. The weights are restored then too.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="both", task=0)
    >>> before = lc.fingerprint(model)
    >>> with finetuned(model, prompts, steps=3, only=["head 5.0", "head 5.1"]) as done:
    ...     print(done.parameters, lc.fingerprint(model) == before)
    8192 False
    >>> lc.fingerprint(model) == before
    True
    """
    _check(model, prompts, steps, lr, batch_size, extra)
    named = named_parameters(model)
    masks = chosen_parameters(model, named, only, caller="finetuned")
    with restored_afterwards(model, [named[name] for name in masks]):
        for name, parameter in named.items():
            parameter.requires_grad_(name in masks)
            parameter.grad = None
        yield _train(model, prompts, named, masks, steps, lr, extra, batch_size, seed, frozen)


# -- training -----------------------------------------------------------------------------


@with_gradients
def _train(
    model: TransformerBridge,
    prompts: Prompts,
    named: dict[str, nn.Parameter],
    masks: dict[str, Tensor | None],
    steps: int,
    lr: float,
    extra: StateLoss | None,
    batch_size: int,
    seed: int,
    frozen: FrozenBlocks | None,
) -> Finetuned:
    began = time.perf_counter()
    device = torch.device(model.cfg.device or "cpu")
    tokens, lengths, answers = prompts.with_answers()
    # Every batch is padded to the longest of all.
    require_one_side(model, lengths - 1, caller="finetuned")
    tokens, answers = tokens.to(device), answers.to(device)
    lowest = _lowest_block(model, {id(named[name]) for name in masks})
    if extra is not None and extra.layer <= lowest:
        raise InputError(
            f"finetuned: the extra loss reads layer {extra.layer}, but training begins at block "
            f"{lowest}: expected layer {lowest + 1} or above"
        )
    if frozen is None and lowest:
        frozen = FrozenBlocks.run(model, tokens[:, :-1], lowest)
    elif frozen is not None and len(frozen.blocks) > lowest:
        raise InputError(
            f"finetuned: {len(frozen.blocks)} blocks given as frozen, but training begins at "
            f"block {lowest}"
        )
    optimizer = torch.optim.AdamW([named[name] for name in masks], lr=lr, weight_decay=0.0)
    order = torch.empty(0, dtype=torch.int64)
    losses = []
    for step in range(steps):
        while len(order) < min(batch_size, len(prompts)):
            generator = derive_generator(seed, "finetuning", step)
            order = torch.cat([order, torch.randperm(len(prompts), generator=generator)])
        rows, order = order[:batch_size].unique(), order[batch_size:]
        optimizer.zero_grad(set_to_none=True)
        parts = _losses(model, prompts, tokens[rows], answers[rows], rows, extra, frozen)
        total = parts[0] + (extra.weight if extra else 0) * parts[1]
        total.backward()
        for name, mask in masks.items():
            gradient = named[name].grad
            if mask is not None and gradient is not None:
                gradient.mul_(mask)
        losses.append((float(parts[0].detach()), float(parts[1].detach())))
        if not all(map(math.isfinite, losses[-1])):
            raise RuntimeError(f"finetuned: loss is {losses[-1]} at step {step}: lr={lr} too large")
        optimizer.step()
    # Joint projections hold the weights of their parts a second time and get no gradient.
    moved = {name: named[name] for name in masks if named[name].grad is not None}
    free = sum(
        p.numel() if (mask := masks[name]) is None else int(mask.sum()) for name, p in moved.items()
    )
    for parameter in named.values():
        parameter.grad = None
    return Finetuned(tuple(losses), free, time.perf_counter() - began)


def _losses(
    model: TransformerBridge,
    prompts: Prompts,
    tokens: Tensor,
    answers: Tensor,
    rows: Tensor,
    extra: StateLoss | None,
    frozen: FrozenBlocks | None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the answers, and the additional loss."""
    states: list[Tensor] = []
    hooks = []
    if extra is not None:
        place = prompts.position(extra.at)[rows].to(tokens.device)

        def keep(value: Tensor, hook: Any) -> Tensor:
            states.append(value[torch.arange(len(rows), device=value.device), place])
            return value  # returned, so that it is part of the graph

        hooks = [(hook_name(model, Site("resid", extra.layer)), keep)]
    scored = answers[:, 1:]
    with model.hooks(fwd_hooks=hooks):
        if frozen is None:
            logits = scored_logits(model, tokens[:, :-1], scored)
        else:
            with frozen.reused(rows):
                logits = scored_logits(model, tokens[:, :-1], scored)
    answered = F.cross_entropy(logits, tokens[:, 1:][scored])
    return answered, extra.loss(states[0], rows) if extra else answered.new_zeros(())


def _lowest_block(model: TransformerBridge, trained: set[int]) -> int:
    """The first block that holds a trained parameter; 0 also if anything below is trained."""
    stacked: Any = model
    in_block = [{id(p) for p in block.parameters()} & trained for block in stacked.blocks]
    parts = [getattr(model, name, None) for name in ("ln_final", "unembed")]  # GPT-1 has no norm
    above = {id(p) for part in parts if part is not None for p in part.parameters()}
    below = {id(p) for p in stacked.embed.parameters()}
    if trained & below or trained - above - set().union(*in_block):
        return 0
    return next((index for index, found in enumerate(in_block) if found), len(in_block))


# -- checks -------------------------------------------------------------------------------


def _check(
    model: TransformerBridge,
    prompts: Prompts,
    steps: int,
    lr: float,
    batch_size: int,
    extra: StateLoss | None,
) -> None:
    check_counts("finetuned", steps=steps, batch_size=batch_size)
    if not (lr > 0 and math.isfinite(lr)):
        raise InputError(f"finetuned: lr={lr}, expected a positive number")
    require_fits(model, prompts, caller="finetuned")
    require_answers(model, prompts, caller="finetuned")
    if extra is not None:
        resolve(model, Site("resid", extra.layer))
        if not math.isfinite(extra.weight):
            raise InputError(f"finetuned: weight={extra.weight} of the extra loss, not a number")
