"""Linear maps from one label's cluster to another's: state-dependent moves.

`probes.steering.shift` moves every state alike and `transport` uses the nearest known mean. A
linear map lies between the two: its moves depend on the state, also for conditions that it was
not fitted on.

- ``ridge``: the move of a condition's mean from source to target, predicted from the source's
  states by ridge regression. An infinite penalty gives the mean move.
- ``gaussian``: the optimal transport map between two normal distributions, which gives the moved
  source the target's mean and covariance at the least mean squared distance. Equal covariances
  give the shift of the mean.

Both are fitted in float64 and applied in float32 (or the states' own precision, if higher).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from lensclust.activations import prompt_labels, stored_values, with_labels
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import Site
from lensclust.prompts import label_text
from probes.steering.interventions import Edit, Intervention, Label, States

KINDS = ("ridge", "gaussian")
# Candidate penalties, in units of the mean eigenvalue of the source's covariance.
PENALTIES = (np.inf, *np.logspace(3, -3, 7).tolist())
# A spread below this share of the states' size is float32 rounding.
ROUNDING = 1e-6

Rows = Float[np.ndarray, "row d"]


@checked_arguments
def linear_transport(
    acts: xr.Dataset,
    source: Label,
    target: Label,
    *,
    by: str = "task",
    given: str = "input",
    fit: str = "ridge",
    penalty: float | int | None = 1e-2,
    position: str | None = None,
    name: str | None = None,
) -> Intervention:
    """Move states by a linear map fitted between two labels' states.

    Args:
        acts: states whose labels make the clusters, such as those of the training prompts.
        by: the label that ``source`` and ``target`` are values of.
        given: the condition (such as the input) that pairs the two labels' states; ``ridge``
            only. Each source state is paired with the move of its condition's mean, so a perfect
            fit keeps each state's offset from its mean; conditions weigh equally, whatever their
            number of states.
        fit: ``ridge`` or ``gaussian``.
        penalty: of the ridge, in units of the mean eigenvalue of the source's covariance;
            infinity is allowed. None: at each site the one of
            `probes.steering.linear_maps.PENALTIES` that best predicts the moves of left-out
            conditions (ties go to the largest). It falls back on the mean shift where moves of
            new conditions cannot be predicted, as with fewer than three shared conditions. The
            least squared error need not give the most target answers (`probes.steering.tune`
            counts those). ``edit_at(site).penalty`` is the chosen one.
        position: which read position, if the activations hold several.

    Returns:
        The intervention; at each site ``edit_at`` gives a `LinearMap`. It is fitted when a site
        is first used, in time ``O(n² d)`` and memory ``O(n d)`` for ``n`` states.

    Raises:
        InputError: at the call if a label, fit or penalty is unknown or no condition is
            shared; when a site is used if it does not exist, or the source's
            covariance is singular (``gaussian``: fewer than three different states).

    Source: the Gaussian map is Knott & Smith 1984, for steering Singh et al. 2024 (arXiv
    2402.09631), with covariances shrunk as in Ledoit & Wolf 2004.

    >>> import torch, lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> there = linear_transport(acts, "0", "1", fit="gaussian").edit_at(Site("resid", 3))
    >>> moved = there(torch.from_numpy(stored_values(acts, Site("resid", 3))[acts.task == 0]))
    >>> theirs = stored_values(acts, Site("resid", 3))[acts.task == 1]
    >>> bool(np.allclose(moved.mean(0), theirs.mean(0), atol=1e-5))
    True
    """
    if fit not in KINDS:
        raise InputError(f"linear_transport: fit {fit!r} is not known: expected one of {KINDS}")
    if penalty is not None and not penalty > 0:
        raise InputError(f"linear_transport: penalty={penalty}, expected a number above 0")
    pairing = {"given": given} if fit == "ridge" else {}
    acts = with_labels("linear_transport", acts, by=by, **pairing)
    labels = prompt_labels(acts, by)
    source, target = label_text(source), label_text(target)
    for label in (source, target):
        if label not in labels:
            known = np.unique(labels).tolist()
            raise InputError(
                f"linear_transport: {by} {label!r} is not in these activations: they have {known}"
            )
    if source == target:
        raise InputError(f"linear_transport: {by} {source!r} given twice: expected two labels")
    rows_a, rows_b = (np.flatnonzero(labels == label) for label in (source, target))

    def states(rows: np.ndarray, site: Site) -> np.ndarray:
        return stored_values(acts.isel(prompt=rows), site, position=position).astype(np.float64)

    def gaussian(site: Site) -> LinearMap:
        start, stop = states(rows_a, site), states(rows_b, site)
        return gaussian_map(start, stop, where=f"of {by} {source!r} at {str(site)!r}")

    def ridge() -> Callable[[Site], LinearMap]:
        conditions = prompt_labels(acts, given)
        shared = np.intersect1d(conditions[rows_a], conditions[rows_b])
        if len(shared) == 0:
            raise InputError(f"linear_transport: {source!r} and {target!r} share no {given}")
        kept = [rows[np.isin(conditions[rows], shared)] for rows in (rows_a, rows_b)]
        codes = [np.searchsorted(shared, conditions[rows]) for rows in kept]

        def at(site: Site) -> LinearMap:
            start, stop = (states(rows, site) for rows in kept)
            moves = condition_means(stop, codes[1]) - condition_means(start, codes[0])
            return ridge_map(start, moves, codes[0], penalty)

        return at

    fitted = gaussian if fit == "gaussian" else ridge()

    @cache
    def edit_at(site: Site) -> Edit:
        return fitted(site)

    return Intervention(name or f"{fit} map", edit_at)


@dataclass(frozen=True)
class LinearMap:
    """``x -> x + move + stretch (x - center) + (x - center) @ left @ right``.

    Attributes:
        center, move: mean of the source, and its move to the target ``(d)``.
        left, right: factors of the linear part ``(d, rank)``, ``(rank, d)``.
        stretch: factor of the linear part outside the factors' directions.
        penalty: of the ridge, in units of the mean eigenvalue; NaN for other fits.
    """

    center: Float[Tensor, " d"]
    move: Float[Tensor, " d"]
    left: Float[Tensor, "d rank"]
    right: Float[Tensor, "rank d"]
    stretch: float = 0.0
    penalty: float = float("nan")

    def __call__(self, states: States) -> States:
        exact = torch.promote_types(states.dtype, torch.float32)
        center, move, left, right = (
            part.to(states.device, exact)
            for part in (self.center, self.move, self.left, self.right)
        )
        x = states.to(exact)
        away = x - center
        return (x + move + self.stretch * away + away @ left @ right).to(states)

    @classmethod
    def of(
        cls,
        center: np.ndarray,
        move: np.ndarray,
        left: np.ndarray,
        right: np.ndarray,
        stretch: float = 0.0,
        penalty: float = float("nan"),
    ) -> LinearMap:
        """Make a map from numpy arrays."""
        parts = [torch.from_numpy(np.ascontiguousarray(a)) for a in (center, move, left, right)]
        return cls(*parts, stretch=float(stretch), penalty=float(penalty))


def condition_means(
    states: Rows, codes: Int[np.ndarray, " row"]
) -> Float[np.ndarray, "condition d"]:
    """Mean state of each condition; ``codes`` number the conditions from 0."""
    sums = np.zeros((codes.max() + 1, states.shape[1]))
    np.add.at(sums, codes, states)
    return sums / np.bincount(codes)[:, None]


def ridge_map(
    x: Rows,
    moves: Float[np.ndarray, "condition d"],
    codes: Int[np.ndarray, " row"],
    penalty: float | int | None,
) -> LinearMap:
    """Predict the move of each row's condition from the row by ridge regression.

    Conditions weigh equally and the intercept is not penalised, so an infinite penalty gives the
    mean of ``moves``.

    Args:
        penalty: in units of the mean eigenvalue of the rows' covariance; None: the one of
            `PENALTIES` that best predicts the moves of left-out conditions.
    """
    weight = 1 / (len(moves) * np.bincount(codes)[codes])  # sums to 1, alike for conditions
    root = np.sqrt(weight)[:, None]
    center, move = weight @ x, moves.mean(0)
    left, scale, right = np.linalg.svd(root * (x - center), full_matrices=False)
    unit = float((scale**2).sum()) / x.shape[1]
    wanted = root * (moves[codes] - move)
    if penalty is not None:
        chosen = float(penalty)
    elif len(moves) < 3:
        chosen = np.inf  # with one left out, the rest does not determine slopes
    else:
        kept = [_shrunk(scale, candidate * unit) * scale for candidate in PENALTIES]
        errors = np.array([_left_out(left, k, root, wanted, codes) for k in kept])
        # The largest penalty among equals, rounding apart.
        chosen = PENALTIES[int(np.argmax(errors <= (1 + 1e-9) * errors.min()))]
    inner = _shrunk(scale, chosen * unit)[:, None] * (left.T @ wanted)
    return LinearMap.of(center, move, right.T, inner, penalty=chosen)


def _shrunk(scale: np.ndarray, penalty: float) -> np.ndarray:
    """``s / (s² + penalty)``, and 0 where nothing varies or the penalty is infinite."""
    if not np.isfinite(penalty):
        return np.zeros_like(scale)
    return np.divide(scale, scale**2 + penalty, out=np.zeros_like(scale), where=scale > 0)


def _left_out(
    left: np.ndarray, kept: np.ndarray, root: np.ndarray, wanted: np.ndarray, codes: np.ndarray
) -> float:
    """Mean squared error on each left-out condition, from one fit on all of them.

    Residuals of a linear smoother with a block left out are ``(I - H_gg)⁻¹`` times those of the
    whole fit, where ``H`` takes targets to fitted values.
    """
    residual = wanted - left @ (kept[:, None] * (left.T @ wanted))
    total = 0.0
    for code in range(codes.max() + 1):
        rows = codes == code
        block, ones = left[rows], root[rows]
        hat = ones @ ones.T + (block * kept) @ block.T
        out = np.linalg.solve(np.eye(len(block)) - hat, residual[rows])
        total += float((out**2).sum())
    return total


def gaussian_map(a: Rows, b: Float[np.ndarray, "_other d"], where: str = "given") -> LinearMap:
    """``x -> m_b + A (x - m_a)`` with ``A S_a A = S_b``, A symmetric and not negative.

    Shrunk covariances are a multiple of the identity outside the span of the states, so only
    the span is decomposed. Constant states, on either side, give the shift.

    Raises:
        InputError: if the source's covariance is singular and there is something to transport;
            ``where`` names the source in the message.
    """
    center, move = a.mean(0), b.mean(0) - a.mean(0)
    if _still(a) and _still(b):
        return LinearMap.of(center, move, np.zeros((a.shape[1], 0)), np.zeros((0, a.shape[1])))
    centred = a - center, b - b.mean(0)
    span = np.linalg.svd(np.concatenate(centred), full_matrices=False)[2]
    (cov_a, rest_a), (cov_b, rest_b) = (_shrunk_covariance(x, span) for x in centred)
    values, vectors = np.linalg.eigh(cov_a)
    whole = len(span) == a.shape[1]
    if values[0] <= len(values) * np.finfo(float).eps * values[-1] or not (whole or rest_a > 0):
        raise InputError(
            f"linear_transport: the covariance {where} is singular ({len(a)} states); expected "
            "three different states or more"
        )
    half = vectors * np.sqrt(values) @ vectors.T
    inverse = vectors / np.sqrt(values) @ vectors.T
    inner = half @ cov_b @ half
    inner_values, inner_vectors = np.linalg.eigh((inner + inner.T) / 2)
    middle = inner_vectors * np.sqrt(inner_values.clip(0)) @ inner_vectors.T
    outside = 1.0 if whole else np.sqrt(rest_b / rest_a)
    change = inverse @ middle @ inverse - outside * np.eye(len(span))
    return LinearMap.of(center, move, span.T, change @ span, stretch=outside - 1)


def _still(x: Rows) -> bool:
    """Whether states are constant up to rounding."""
    return bool(np.ptp(x, axis=0).max() <= ROUNDING * np.abs(x).max())


def _shrunk_covariance(centred: Rows, span: np.ndarray) -> tuple[np.ndarray, float]:
    """Ledoit and Wolf's covariance within a span, and its only eigenvalue outside."""
    share = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
    outside = share * float((centred**2).sum()) / centred.size
    inside = centred @ span.T
    return (1 - share) * inside.T @ inside / len(centred) + outside * np.eye(len(span)), outside
