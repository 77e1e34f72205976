"""Minimise cross-entropy plus an L1 penalty, for many problems and penalties at once.

A primal-dual interior-point method (Boyd & Vandenberghe 2004, section 11.7): few Newton steps
at any scales of the components, which differ by orders of magnitude. There are fewer examples than
weights, so a step solves a system of examples x (labels - 1) unknowns. Without a box a weight is
the difference of two nonnegative ones. Convergence is certified: with ``h`` the gradient of the
loss, the objective is above its minimum by at most

    box       sum_j  (h_j + λ) w_j - min(h_j + λ, 0)
    no box    h · w + λ |w|_1 + R max(max_j |h_j| - λ, 0)              R = objective / λ

since the loss is convex and, without a box, better weights have ``λ |w|_1`` below the objective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from probes.components.labelled_examples import Examples

# Target share of the duality gap after a step, and share of the distance to a bound.
CENTRING, TO_THE_BOUND = 0.1, 0.99


@dataclass(frozen=True, eq=False)
class SparseFits:
    """Weights of every problem and column, and a bound of the objective above its minimum."""

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
    max_steps: int = 100,
) -> SparseFits:
    """Minimise ``sum of shares x cross-entropy + penalty x |w|_1`` for every problem and column.

    Args:
        shares: weight of each example in each column's loss (0 leaves it out).
        penalties: ``λ``; above 0 without a box.
        box: keep every weight between 0 and 1.
        tolerance: gap (nats) at which a column has converged.
        max_steps: maximum number of steps; the gap then bounds the remaining error.

    >>> examples = Examples.of([torch.eye(2)[:, :, None].repeat(1, 1, 3).numpy()],
    ...                        [torch.zeros(2, 2).numpy()], [torch.tensor([0, 1]).numpy()])
    >>> found = sparse_fits(examples, examples.shares[..., None], torch.tensor([[0.01]]))
    >>> found.weights.flatten(), bool(found.gap < 1e-4)
    (tensor([1., 1., 1.]), True)
    """
    weights = torch.empty(
        len(shares), examples.features.shape[-1], shares.shape[-1], dtype=torch.float32
    )
    gap = torch.empty_like(penalties)
    for number in range(len(shares)):
        columns = _Columns.of(examples, number, shares[number], penalties[number], box)
        point, active = _Point.inside(columns, box), torch.arange(shares.shape[-1])
        for step in range(max_steps + 1):
            found = columns.certified(point.x)
            done = (found.gap <= tolerance) | (step == max_steps)
            if bool(done.any()):
                # A weight closer to its bound than the size of its multiplier is set to the bound,
                # unless that is worse.
                rounded = columns.certified(point.rounded())
                better = rounded.gap <= found.gap.clamp_min(tolerance)
                final = torch.where(better[:, None], rounded.weights, found.weights)
                weights[number, :, active[done]] = final[done].T.float()
                gap[number, active[done]] = torch.where(better, rounded.gap, found.gap)[
                    done
                ].float()
                if bool(done.all()):
                    break
                active, columns, point = active[~done], columns.take(~done), point.take(~done)
                found = columns.certified(point.x)
            point = point.stepped(columns, found.slope)
    return SparseFits(weights, gap)


@dataclass(frozen=True, eq=False)
class _Certified:
    """The gradient of the loss by ``x``, the weights that ``x`` encodes, and their gap."""

    slope: Float[Tensor, "column x"]
    weights: Float[Tensor, "column weight"]
    gap: Float[Tensor, " column"]


@dataclass(frozen=True, eq=False)
class _Columns:
    """The columns of one problem, each with its examples, in float64."""

    features: Float[Tensor, "column example label weight"]
    offsets: Float[Tensor, "column example label"]
    targets: Int[Tensor, "column example"]
    shares: Float[Tensor, "column example"]
    penalties: Float[Tensor, " column"]
    box: bool

    @classmethod
    def of(
        cls,
        examples: Examples,
        number: int,
        shares: Float[Tensor, "example column"],
        penalties: Float[Tensor, " column"],
        box: bool,
    ) -> _Columns:
        counted = int((shares > 0).sum(0).max())
        rows = shares.argsort(dim=0, descending=True, stable=True)[:counted].T
        real = examples.offsets[number].isfinite().any(0)
        return cls(
            examples.features[number][:, real].double()[rows],
            examples.offsets[number][:, real].double()[rows],
            examples.targets[number][rows],
            shares.T.gather(1, rows).double(),
            penalties.double(),
            box,
        )

    def take(self, some: Bool[Tensor, " column"]) -> _Columns:
        return replace(
            self,
            features=self.features[some],
            offsets=self.offsets[some],
            targets=self.targets[some],
            shares=self.shares[some],
            penalties=self.penalties[some],
        )

    def certified(self, x: Float[Tensor, "column x"]) -> _Certified:
        weights = self._weights(x)
        logits = self._logits(weights)
        right = F.one_hot(self.targets, logits.shape[2])
        residual = (logits.softmax(2) - right) * self.shares[:, :, None]
        slope = torch.einsum("cny,cnyj->cj", residual, self.features)
        penalties = self.penalties[:, None]
        if self.box:
            whole = slope + penalties
            return _Certified(slope, weights, (whole * weights - whole.clamp(max=0)).sum(1))
        penalty = self.penalties * weights.abs().sum(1)
        losses = -(logits.log_softmax(2) * right).sum(2)
        objective = (self.shares * losses).sum(1) + penalty
        excess = (slope.abs().amax(1) - self.penalties).clamp_min(0)
        gap = (slope * weights).sum(1) + penalty + objective / self.penalties * excess
        return _Certified(torch.cat([slope, -slope], dim=1), weights, gap)

    def bend(self, x: Float[Tensor, "column x"]) -> Float[Tensor, "column row x"]:
        """``A`` with the loss's second derivative ``AᵀA``.

        For an example it is the covariance of its label's features under the model, which has a
        triangular root in closed form (Tanabe & Sagae 1992).
        """
        chances = self._logits(self._weights(x)).softmax(2)
        seen = chances[..., None] * self.features
        after = (seen.flip(2).cumsum(2).flip(2) - seen)[:, :, :-1]
        # Probabilities of the labels after each, without and with itself.
        tail = chances.flip(2).cumsum(2).flip(2).clamp_min(1e-300)
        chance, left, rest = chances[:, :, :-1], tail[:, :, :-1], tail[:, :, 1:]
        own = (chance * rest / left).sqrt()[..., None] * self.features[:, :, :-1]
        root = own - (chance / (left * rest)).sqrt()[..., None] * after
        rows = (self.shares.sqrt()[:, :, None, None] * root).flatten(1, 2)
        return rows if self.box else torch.cat([rows, -rows], dim=2)

    def _weights(self, x: Float[Tensor, "column x"]) -> Float[Tensor, "column weight"]:
        if self.box:
            return x
        plus, minus = x.chunk(2, dim=1)
        return plus - minus

    def _logits(
        self, weights: Float[Tensor, "column weight"]
    ) -> Float[Tensor, "column example label"]:
        return torch.einsum("cnyj,cj->cny", self.features, weights) + self.offsets


@dataclass(frozen=True, eq=False)
class _Point:
    """Variables inside their bounds, and the multipliers of both bounds."""

    x: Float[Tensor, "column x"]
    low: Float[Tensor, "column x"]
    high: Float[Tensor, "column x"]

    @classmethod
    def inside(cls, columns: _Columns, box: bool) -> _Point:
        size = columns.features.shape[-1]
        x = columns.shares.new_full((len(columns.shares), size if box else 2 * size), 0.5)
        forces = torch.full_like(x, 0.1)
        return cls(x, forces, forces if box else torch.zeros_like(x))

    def take(self, some: Bool[Tensor, " column"]) -> _Point:
        return _Point(self.x[some], self.low[some], self.high[some])

    @property
    def room(self) -> Float[Tensor, "column x"]:
        """Distance to the upper bound; unused where there is none."""
        return torch.where(self.high > 0, 1 - self.x, 1.0)

    def stepped(self, columns: _Columns, slope: Float[Tensor, "column x"]) -> _Point:
        x, low, high, room = self.x, self.low, self.high, self.room
        bounded = (high > 0).to(x)
        left = (x * low + room * high).sum(1, keepdim=True)
        aim = CENTRING * left / (1 + bounded).sum(1, keepdim=True)
        pull = slope + columns.penalties[:, None] - aim / x + bounded * aim / room
        stiff = low / x + high / room
        root = columns.bend(x)
        # Woodbury: (S + AᵀA)⁻¹ = S⁻¹ - S⁻¹Aᵀ (1 + A S⁻¹ Aᵀ)⁻¹ A S⁻¹
        eased = root / stiff[:, None]
        inner = eased @ root.mT
        inner.diagonal(dim1=1, dim2=2).add_(1)
        inner_solved = torch.cholesky_solve(
            (eased @ -pull[..., None]), torch.linalg.cholesky(inner)
        )
        move = (-pull / stiff) - (eased.mT @ inner_solved)[..., 0]
        low_move = aim / x - low - low / x * move
        high_move = bounded * aim / room - high + high / room * move
        stride = torch.minimum(_furthest(x, move), _furthest(room, -bounded * move))
        force = torch.minimum(_furthest(low, low_move), _furthest(high, high_move))
        return _Point(x + stride * move, low + force * low_move, high + force * high_move)

    def rounded(self) -> Float[Tensor, "column x"]:
        at_zero = self.x < self.low
        at_one = (self.high > 0) & (self.room < self.high)
        return torch.where(at_zero, 0.0, torch.where(at_one, 1.0, self.x))


def _furthest(
    values: Float[Tensor, "column x"], move: Float[Tensor, "column x"]
) -> Float[Tensor, "column 1"]:
    """Largest share of a step that keeps every value above 0."""
    ratio = torch.where((move < 0) & (values > 0), values / -move, torch.inf)
    return (TO_THE_BOUND * ratio.amin(1, keepdim=True)).clamp(max=1.0)
