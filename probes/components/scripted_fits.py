"""The source script's fit of weights, with its stopping rules.

Plain gradient steps over all examples, from weights of 1. A fit ends when every example is right
(checked in steps 0, 100, 200, ...), or after a total of three steps, not consecutive, whose
cross-entropy is not below the lowest so far (initially 100).

So the number of zero weights depends on the length of a run, not on the penalty alone: a weight
without gradient falls by ``rate x penalty`` per step. With few examples the model may be right on
all of them at the start, and the weights then stay at 1.

Source: behaviour of the script that comes with Chang, Thomason & Jia 2024 (arXiv 2406.13131).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.components.labelled_examples import Examples

CHECKED_EVERY, PATIENCE, FIRST_BEST = 100, 3, 100.0


@torch.no_grad()
def scripted_fits(
    examples: Examples,
    *,
    rate: float,
    penalty: float,
    steps: int,
    clipped: bool,
    check_first: bool,
) -> Float[Tensor, "problem weight"]:
    """Weights of every problem after the scripted schedule.

    Args:
        rate: learning rate.
        penalty: of the sum of absolute weights, before they are clipped.
        steps: maximum number of steps.
        clipped: use weights clipped to 0..1 in the logits; a weight outside gets no gradient from
            the examples.
        check_first: check whether all are right before the step (as for Calib+), else after it.

    >>> import numpy as np
    >>> idle = Examples.of([np.zeros((2, 2, 1))], [np.zeros((2, 2))], [np.array([1, 0])])
    >>> options = dict(rate=0.05, penalty=0.01, clipped=True, check_first=False)
    >>> scripted_fits(idle, steps=1, **options)
    tensor([[0.9995]])
    """
    weights = torch.ones(len(examples.targets), examples.features.shape[-1], dtype=torch.float32)
    active = torch.arange(len(weights))
    best, patience = (
        torch.full((len(weights),), FIRST_BEST, dtype=torch.float32),
        torch.full((len(weights),), PATIENCE),
    )
    some = examples
    for step in range(steps):
        now = weights[active]
        used = now.clamp(0, 1) if clipped else now
        logits = some.logits(used[..., None])
        loss = (some.shares * some.losses(logits)[..., 0]).sum(1)
        done = torch.zeros(len(active), dtype=torch.bool)
        if step % CHECKED_EVERY == 0 and check_first:
            done = _all_right(some, logits)
        slope = some.pull(logits, some.shares[..., None])[..., 0]
        if clipped:
            slope = slope * ((now >= 0) & (now <= 1))
        moved = now.sub(slope + penalty * now.sign(), alpha=rate)
        weights[active] = torch.where(done[:, None], now, moved)
        if step % CHECKED_EVERY == 0 and not check_first:
            used = moved.clamp(0, 1) if clipped else moved
            done = _all_right(some, some.logits(used[..., None]))
        patience[active] -= (best[active] <= loss).long()
        best[active] = torch.minimum(best[active], loss)
        going_on = ~done & (patience[active] > 0)
        if not bool(going_on.all()):
            active = active[going_on]
            if len(active) == 0:
                break
            some = examples.take(active)
    return weights


def _all_right(
    examples: Examples, logits: Float[Tensor, "problem example label 1"]
) -> Bool[Tensor, " problem"]:
    right = logits[..., 0].argmax(2) == examples.targets
    return (right | (examples.shares == 0)).all(1)
