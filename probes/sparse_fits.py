"""Weights that minimise cross-entropy plus an L1 penalty: many problems and penalties at once.

Accelerated proximal gradient steps (FISTA, Beck & Teboulle 2009) with restarts (O'Donoghue &
Candès 2015), from weights of 1. Convergence is certified, not assumed: with ``h`` the gradient,
no weights allowed can do better than the current ones by more than

    box       sum_j  h_j w_j - min(h_j, 0)                             (λ is part of h)
    no box    h · w + λ |w|_1 + R max(max_j |h_j| - λ, 0)              R = objective / λ

since the loss is convex and, without a box, better weights have ``λ |w|_1`` below the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from probes.labelled_examples import Examples

# Steps between two looks at the gap.
STRIDE = 25


@dataclass(frozen=True, eq=False)
class SparseFits:
    """Weights of every problem and column, and by how much the objective may exceed its least."""

    weights: Float[Tensor, "problem weight column"]
    gap: Float[Tensor, "problem column"]


@torch.no_grad()
def sparse_fits(
    examples: Examples,
    shares: Float[Tensor, "problem example column"],
    penalties: Float[Tensor, "problem column"],
    *,
    box: bool = True,
    tolerance: float = 1e-4,
    max_steps: int = 20_000,
) -> SparseFits:
    """Minimise ``sum of shares x cross-entropy + penalty x |w|_1`` for every problem and column.

    Args:
        shares: weight of each example in each column's loss (0 leaves it out).
        penalties: ``λ``; above 0 without a box.
        box: keep every weight between 0 and 1.
        tolerance: largest gap at which a column counts as done.
        max_steps: when to give up; the gap then says how far it may still be.

    >>> examples = Examples.of([torch.eye(2)[:, :, None].repeat(1, 1, 3).numpy()],
    ...                        [torch.zeros(2, 2).numpy()], [torch.tensor([0, 1]).numpy()])
    >>> found = sparse_fits(examples, examples.shares[..., None], torch.tensor([[0.01]]))
    >>> found.weights.flatten(), bool(found.gap < 1e-4)
    (tensor([1., 1., 1.]), True)
    """
    made = SparseFits(
        torch.ones(len(shares), examples.features.shape[-1], shares.shape[-1]),
        torch.full_like(penalties, torch.inf),
    )
    active = torch.arange(len(shares))
    state = _State.at(made.weights)
    for _ in range(0, max_steps, STRIDE):
        problem = _Problem.of(examples.take(active), shares[active], penalties[active], box)
        for _ in range(STRIDE):
            state = problem.step(state)
        made.weights[active], made.gap[active] = state.weights, problem.gap(state.weights)
        going_on = made.gap[active].amax(1) > tolerance
        if not bool(going_on.any()):
            break
        active, state = active[going_on], state.take(going_on)
    return made


@dataclass(frozen=True, eq=False)
class _State:
    """Where the steps stand: the weights, the point ahead of them, and the momentum."""

    weights: Float[Tensor, "problem weight column"]
    ahead: Float[Tensor, "problem weight column"]
    momentum: Float[Tensor, "problem 1 column"]

    @classmethod
    def at(cls, weights: Float[Tensor, "problem weight column"]) -> _State:
        return cls(weights, weights, torch.ones_like(weights[:, :1]))

    def take(self, problems: Bool[Tensor, " problem"]) -> _State:
        return _State(self.weights[problems], self.ahead[problems], self.momentum[problems])


@dataclass(frozen=True, eq=False)
class _Problem:
    examples: Examples
    shares: Float[Tensor, "problem example column"]
    penalties: Float[Tensor, "problem 1 column"]
    size: Float[Tensor, "problem 1 column"]
    box: bool

    @classmethod
    def of(cls, examples: Examples, shares: Tensor, penalties: Tensor, box: bool) -> _Problem:
        # What is common to all labels changes no softmax, and only makes the steps shorter.
        real = examples.offsets.isfinite()[..., None]
        mean = examples.features.sum(2, keepdim=True) / real.sum(2, keepdim=True)
        centred = (examples.features - mean) * real
        examples = replace(examples, features=centred)
        # The softmax bends by 1/2 at most.
        norms = torch.linalg.matrix_norm(centred.flatten(1, 2), 2)
        bend = 0.5 * norms.square()[:, None] * shares.amax(1)
        return cls(examples, shares, penalties[:, None], 1 / bend.clamp_min(1e-12)[:, None], box)

    def step(self, state: _State) -> _State:
        ahead = state.ahead
        slope = self.examples.pull(self.examples.logits(ahead), self.shares)
        weights = self._nearest(ahead - self.size * slope, self.size * self.penalties)
        move = weights - state.weights
        # The momentum carries uphill: begin anew.
        uphill = ((ahead - weights) * move).sum(1, keepdim=True) > 0
        grown = (1 + (1 + 4 * state.momentum.square()).sqrt()) / 2
        share = torch.where(uphill, 0, (state.momentum - 1) / grown)
        return _State(weights, weights + share * move, torch.where(uphill, 1, grown))

    def _nearest(self, weights: Tensor, shrink: Tensor) -> Tensor:
        if self.box:
            return (weights - shrink).clamp(0, 1)
        return weights - weights.clamp(-shrink, shrink)

    def gap(
        self, weights: Float[Tensor, "problem weight column"]
    ) -> Float[Tensor, "problem column"]:
        logits = self.examples.logits(weights)
        slope, penalties = self.examples.pull(logits, self.shares), self.penalties[:, 0]
        if self.box:
            slope = slope + self.penalties
            return (slope * weights - slope.clamp(max=0)).sum(1)
        penalty = penalties * weights.abs().sum(1)
        objective = (self.shares * self.examples.losses(logits)).sum(1) + penalty
        excess = (slope.abs().amax(1) - penalties).clamp_min(0)
        return (slope * weights).sum(1) + penalty + objective / penalties * excess
