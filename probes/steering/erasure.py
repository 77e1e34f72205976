"""Linear concept erasure of a label (LEACE), and its controls.

With centred states ``x`` of covariance Σ and one-hot labels ``z`` (Σ_xz their cross-covariance),
LEACE is

    x - W⁺ U Uᵀ W x        W = Σ^(-1/2), columns of U an orthonormal basis of W Σ_xz

After it every class has the overall mean, so that no linear classifier beats a constant, and of
all such affine maps it changes states least. It has two controls:

    erase_random       removes as much variance, in random directions
    erase_reassigned   the same erasure of labels permuted over wordings

*Removed variance* is the mean squared distance of erased from original states, over their total
variance. The removed part is uncorrelated with the rest (up to the shrinkage of Σ), so this is
also the loss of total variance.

Standard of evidence: an accuracy lost by erasure shows that something in the removed directions is
used; that it is the label, only if both controls lose less. Removed variance is matched on the rows
given here; on other rows approximately.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import xarray as xr
from concept_erasure import LeaceEraser, LeaceFitter
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.utilities.statistics import derive_generator

from lensclust.activations import labelled, prompt_labels, stored_values, with_labels
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models import Site
from probes.design import Units, exchangeable, only_renamed
from probes.steering.interventions import Edit, Intervention, States

log = logging.getLogger(__name__)

MATCHED = ("variance", "dimensions")
# Removed variance agrees to this share of the total variance.
TOLERANCE = 1e-6
# Number of relabellings, one of which is chosen.
RELABELLINGS = 99
# Each tilting step spreads variances apart by at most this factor; the number of steps.
SPREAD, STEPS = 1e6, 200


@checked_arguments
def erase(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = None,
    position: str | None = None,
    shrinkage: bool = True,
    name: str = "erase",
) -> Intervention:
    """Erase a label for all linear classifiers (LEACE, Belrose et al. 2023).

    Args:
        acts: states to fit on, with the label ``by``.
        given: fit a separate eraser within each condition; a state gets the eraser of the nearest
            condition mean. This removes the label *within* the condition.
        position: read position, if the activations hold several.
        shrinkage: estimate Σ by optimal linear shrinkage towards a multiple of the identity
            (Bodnar et al. 2014, the package's default) rather than by the sample covariance.
            It changes how far states move, not what is erased: Σ_xz is not shrunk, so either way
            class means are equal on the rows given here, and on any rows a linear classifier is
            left with the same. Without shrinkage states move least on the rows given here, but
            with few rows per dimension new states move further.
        name: in tables.

    Either way directions whose singular value in ``W Σ_xz`` is at most 0.01 (``svd_tol`` of the
    package) are kept, so that class means may differ slightly there. Shrinkage makes singular
    values smaller where states vary little.

    Raises:
        InputError: at the call if the label does not exist; when it is used if the site or
            position does not exist.

    Source: arXiv 2306.03819, by the authors' package ``concept-erasure``; shrinkage: arXiv
    1308.2608.
    """
    acts = with_labels("erase", acts, by=by, given=given)
    labels = prompt_labels(acts, by)
    conditions = None if given is None else prompt_labels(acts, given)

    return _erasure(acts, labels, conditions, position, shrinkage, name)


@checked_arguments
def erase_random(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = None,
    position: str | None = None,
    matched: str = "variance",
    shrinkage: bool = True,
    seed: int = 0,
    name: str = "erase, random subspace",
) -> Intervention:
    """Control of `erase`: project out random directions that hold as much variance.

    Within each condition the states' principal components are scaled by a power of their
    variances, and m Gaussian directions of that shape are projected out:

        span of V Λ^τ G        V, Λ principal components and variances, G ~ N(0, 1), (d, m)

    With τ = 0 directions are isotropic, with τ = 1/2 they are distributed like the states. The
    removed variance rises with τ, which is solved for that of `erase` on the same rows (those
    nearest to a condition's mean, which its edit changes). ``m`` is the number of isotropic
    directions that remove as much on average, rounded down, and at least the rank of `erase`.
    Then τ stays near 0, and the control removes a little from many directions where `erase`
    removes much from a few: equally few could match its variance only close to the label's
    directions. The control damages more beside the label, so the difference from it is
    conservative.

    Args:
        matched: ``"variance"``, or ``"dimensions"`` for one random direction fewer than labels,
            which may hold far less variance than the label's directions.
        shrinkage: of the `erase` that is matched.
        seed: of the directions.

    Raises:
        InputError: at the call if ``matched`` is unknown or the label does not exist; when it is
            used if no orthogonal projection removes as much variance as `erase`.
    """
    if matched not in MATCHED:
        raise InputError(f"erase_random: matched={matched!r}, expected one of {MATCHED}")
    acts = with_labels("erase_random", acts, by=by, given=given)
    labels = prompt_labels(acts, by)
    conditions = None if given is None else prompt_labels(acts, given)

    @lru_cache(maxsize=1)
    def edit_at(site: Site) -> Edit:
        x = _states(acts, site, position)
        generator = derive_generator(seed, "subspace", str(site))

        def fit(rows: np.ndarray, edited: np.ndarray) -> Edit:
            mean = x[rows].mean(0)
            if matched == "dimensions":
                rank = min(len(np.unique(labels[rows])) - 1, x.shape[1])
                drawn = torch.randn(x.shape[1], rank, generator=generator, dtype=x.dtype)
                basis = torch.linalg.qr(drawn).Q
            else:
                eraser = _leace(x[rows], labels[rows], shrinkage)
                basis = _as_much(x[edited], mean, eraser, generator, str(site))
            if not basis.shape[1]:
                return _unchanged

            def projected(states: States) -> States:
                directions, origin = basis.to(states.device), mean.to(states.device)
                return states - (states - origin) @ directions @ directions.T

            return projected

        return _grouped(x, conditions, fit)

    return Intervention(name, edit_at)


@checked_arguments
def erase_reassigned(
    acts: xr.Dataset,
    *,
    by: str = "task",
    given: str | None = None,
    position: str | None = None,
    units: Units = None,
    shrinkage: bool = True,
    seed: int = 0,
    name: str = "erase, reassigned labels",
) -> Intervention:
    """Control of `erase`: the same erasure of labels permuted over exchangeable units.

    Labels are permuted as in all nulls of `probes.design`: whole wordings change labels where
    each has one, labels are permuted within each wording where it has several, and one
    relabelling serves all conditions. It removes real differences between wordings that are not
    the label. If wordings of one label happen to stay together, some of the label remains in it.

    Args:
        units: rows that keep a common label, instead of the rule of `probes.design`: a column,
            several, one value per row or ``"rows"``.
        shrinkage: as in `erase`.
        seed: of the relabelling: one of `RELABELLINGS` draws that is not a renaming of the true
            labels.

    Raises:
        InputError: if the label does not exist or there is no other labelling. If there are so
            few that seeds repeat them, a warning gives their number.
    """
    kept, notes = labelled("erase_reassigned", acts, by=by, given=given)
    for note in notes:
        log.warning("erase_reassigned: %s", note)
    values = prompt_labels(acts, by)
    condition = None if given is None else prompt_labels(acts, given)
    found = exchangeable(
        values, acts, by=by, condition=condition, units=units, among=kept, call="erase_reassigned"
    )
    acts = acts.isel(prompt=kept)
    conditions = None if condition is None else condition[kept]
    wanted = found.labellings(RELABELLINGS, seed=seed)
    codes, renamed = np.empty_like(wanted), np.ones(len(wanted), dtype=bool)
    for rows in _rows_of(conditions, len(kept)):
        # The same number of wordings of each label as in the condition.
        codes[:, rows] = found.fitted(wanted, rows, seed=seed)
        renamed &= only_renamed(codes[:, rows])
    others = np.flatnonzero(~renamed)
    if not others.size:
        raise InputError(
            f"erase_reassigned: exchanging {found.exchanged} gives no labelling of {by!r} but the "
            "true one: give units=, or more wordings of each label"
        )
    if found.coarse:
        log.warning("erase_reassigned: %s", found.coarse)
    labels = codes[np.random.default_rng(seed).choice(others)]

    return _erasure(acts, labels, conditions, position, shrinkage, name)


def _erasure(
    acts: xr.Dataset,
    labels: np.ndarray,
    conditions: np.ndarray | None,
    position: str | None,
    shrinkage: bool,
    name: str,
) -> Intervention:
    """LEACE of the labels within each condition."""

    @lru_cache(maxsize=1)
    def edit_at(site: Site) -> Edit:
        x = _states(acts, site, position)
        return _grouped(
            x, conditions, lambda rows, _: _leace_edit(x[rows], labels[rows], shrinkage)
        )

    return Intervention(name, edit_at)


def _states(acts: xr.Dataset, site: Site, position: str | None) -> Float[Tensor, "row d"]:
    return torch.from_numpy(stored_values(acts, site, position=position).astype(np.float64))


def _unchanged(states: States) -> States:
    return states


def _leace(x: Float[Tensor, "row d"], labels: np.ndarray, shrinkage: bool) -> LeaceEraser | None:
    """The fitted eraser; None where there is nothing to erase."""
    if len(np.unique(labels)) == 1:
        return None
    return LeaceFitter.fit(x, _one_hot(labels), shrinkage=shrinkage).eraser


def _leace_edit(x: Float[Tensor, "row d"], labels: np.ndarray, shrinkage: bool) -> Edit:
    fitted = _leace(x, labels, shrinkage)
    if fitted is None:
        return _unchanged
    assert fitted.bias is not None  # it is affine
    left, right, bias = fitted.proj_left, fitted.proj_right, fitted.bias

    def erased(states: States) -> States:
        to = states.device
        return LeaceEraser(left.to(to), right.to(to), bias.to(to))(states)

    return erased


def _as_much(
    x: Float[Tensor, "row d"],
    mean: Float[Tensor, " d"],
    eraser: LeaceEraser | None,
    generator: torch.Generator,
    site: str,
) -> Float[Tensor, "d m"]:
    """Random orthonormal directions that hold the variance an eraser removes from rows."""
    nothing = x.new_zeros(x.shape[1], 0)
    if eraser is None or not len(x):
        return nothing
    _, singular, components = torch.linalg.svd(x - mean, full_matrices=False)
    spread = singular > singular[0] * max(x.shape) * torch.finfo(x.dtype).eps
    variances, components = singular[spread] ** 2 / len(x), components[spread].T
    total = variances.sum()
    removed = (eraser(x) - x).square().sum(1).mean()
    # Identical states have no variance to remove.
    if not len(variances) or removed <= TOLERANCE * total:
        return nothing
    rank = int((eraser.proj_left.norm(dim=0) > 0).sum())
    size = _how_many(variances, float(removed), rank)
    tilted = None
    if size is not None:
        drawn = torch.randn(len(variances), size, generator=generator, dtype=x.dtype)
        tilted = _tilted(drawn, variances, float(removed))
    if tilted is None:
        raise InputError(
            f"erase_random: erase moves states at {site!r} by {float(removed / total):.3g} of "
            "their variance, which no random projection can match there: give "
            "matched='dimensions', or shrinkage=False"
        )
    return components @ tilted


def _how_many(variances: Float[Tensor, " r"], removed: float, rank: int) -> int | None:
    """The feasible number of directions nearest to ``rank`` that can hold the variance."""
    total = float(variances.sum())
    most = variances.cumsum(0)
    least = variances.flip(0).cumsum(0)
    slack = TOLERANCE * total
    able = torch.nonzero((least <= removed + slack) & (removed - slack <= most))[:, 0] + 1
    wanted = max(rank, int(removed / total * len(variances)))
    return min(able.tolist(), key=lambda m: abs(m - wanted), default=None)


def _tilted(
    drawn: Float[Tensor, "r m"], variances: Float[Tensor, " r"], removed: float
) -> Float[Tensor, "r m"] | None:
    """Tilt directions towards large or small variances until they hold the given variance.

    With ``Q(τ)`` an orthonormal basis of ``Λ^τ G``, ``tr QᵀΛQ`` rises with τ: its derivative is
    a sum over pairs of ``P_ij² (log λ_i - log λ_j)(λ_i - λ_j)``, P = QQᵀ.
    """
    logs = (variances / variances.max()).log()

    def turned(basis: Tensor, power: float) -> Tensor:
        return torch.linalg.qr((power * logs).exp()[:, None] * basis).Q

    def excess(basis: Tensor) -> float:
        return float((variances[:, None] * basis.square()).sum()) - removed

    basis = torch.linalg.qr(drawn).Q
    sign = -1.0 if excess(basis) > 0 else 1.0
    apart = float(logs.max() - logs.min())
    step = sign * np.log(SPREAD) / apart if apart > 0 else 0.0
    slack = TOLERANCE * float(variances.sum())
    for _ in range(STEPS):
        if abs(excess(basis)) <= slack:
            break
        further = turned(basis, step)
        if sign * excess(further) > 0:
            power: Any = brentq(lambda p, at=basis: excess(turned(at, p)), 0.0, step, xtol=1e-14)
            basis = turned(basis, power)
            break
        basis = further
    return basis if abs(excess(basis)) <= slack else None


def _rows_of(conditions: np.ndarray | None, n: int) -> list[Int[np.ndarray, " some"]]:
    """The rows of each condition; all rows without conditions."""
    if conditions is None:
        return [np.arange(n)]
    return [np.flatnonzero(conditions == value) for value in np.unique(conditions)]


def _grouped(
    x: Float[Tensor, "row d"],
    conditions: np.ndarray | None,
    fit: Callable[[np.ndarray, np.ndarray], Edit],
) -> Edit:
    """One edit fitted on all rows, or one by condition, applied by the nearest condition mean.

    ``fit`` gets the rows of a condition, and those that are nearest to its mean.
    """
    everything = np.arange(len(x))
    if conditions is None:
        edit = fit(everything, everything)
        return lambda states: edit(_exact(states)).to(states)
    rows_of = _rows_of(conditions, len(x))
    means = torch.stack([x[rows].mean(0) for rows in rows_of])
    own = torch.cdist(x, means).argmin(1).numpy()
    edits = [fit(rows, np.flatnonzero(own == index)) for index, rows in enumerate(rows_of)]

    def by_condition(states: States) -> States:
        given = _exact(states)
        # One transfer of each row's condition to the host, not one per condition.
        nearest = torch.cdist(given, means.to(given.device)).argmin(1).cpu()
        out = given.clone()
        for index in nearest.unique().tolist():
            chosen = (nearest == index).nonzero()[:, 0].to(given.device)
            out[chosen] = edits[index](given[chosen])
        return out.to(states)

    return by_condition


def _exact(states: States) -> States:
    """States in double precision, on their device if it has it."""
    return states.double() if states.device.type != "mps" else states.cpu().double()


def _one_hot(labels: np.ndarray) -> Tensor:
    names, code = np.unique(labels, return_inverse=True)
    return F.one_hot(torch.from_numpy(code), len(names)).double()
