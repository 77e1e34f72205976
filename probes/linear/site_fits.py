"""Cross-validated probes of one site, for every labelling and penalty."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from lensclust.activations import head_frame, select
from lensclust.errors import InputError
from lensclust.models import Site
from probes.arrays import Array, host, like, placed, wide
from probes.design import Design
from probes.linear.logistic import logistic
from probes.linear.moments import SOLVERS, Moments, Readout

PROBES = (*SOLVERS, "logistic")
BATCH_ROWS = 4096


@dataclass(frozen=True)
class SiteRows:
    """The rows of one site, read in batches on each iteration.

    Attributes:
        name: the site, for messages.
        stored: activations ``(prompt, d)``, in memory or still on disk.
        frame: factor of heads' ``z`` that gives the geometry of their contributions.
        device: of the rows; None for numpy.
    """

    name: str
    stored: xr.Variable
    frame: Float[np.ndarray, "d rank"] | None
    device: Any = None

    @classmethod
    def of(cls, acts: xr.Dataset, site: Site, position: str | None, device: Any = None) -> SiteRows:
        """One site of a dataset, read lazily."""
        stored = select(acts, site, position=position).variable
        if site.kind != "head":
            return cls(str(site), stored, None, device)
        frame = head_frame(acts, site).transpose("d_head", "rank").values
        return cls(str(site), stored, frame.astype(np.float64), device)

    def __iter__(self) -> Iterator[tuple[slice, Float[Array, "row d"]]]:
        """Slice of each batch, and its rows in float64.

        Raises:
            InputError: after the last batch, if a value was not finite.
        """
        bad = 0
        frame = None if self.frame is None else placed(self.frame, self.device)
        for start in range(0, len(self.stored), BATCH_ROWS):
            part = slice(start, min(start + BATCH_ROWS, len(self.stored)))
            stored = self.stored[part].values
            bad += int((~np.isfinite(stored).all(1)).sum())
            if not bad:
                x = wide(placed(stored, self.device))
                yield part, x if frame is None else x @ frame
        if bad:
            raise InputError(
                f"probe: {self.name} has NaN or infinite values in {bad} of {len(self.stored)} rows"
            )


@dataclass(frozen=True)
class SiteFit:
    """Held-out hits of one site's probes, and the probe fitted to all rows.

    Attributes:
        hits: number of held-out rows of each class that are predicted right.
        weights, intercepts: of the first penalty, for activations as stored.
        unconverged: fits that stopped early.
    """

    hits: Int[np.ndarray, "penalty fold class labelling"]
    weights: Float[np.ndarray, "class d"]
    intercepts: Float[np.ndarray, " class"]
    unconverged: int = 0


def fit_site(rows: SiteRows, plan: Design, kind: str, penalties: Sequence[float]) -> SiteFit:
    """Fit and test one kind of probe at one site; reads the rows twice."""
    if kind == "logistic":
        return _fit_logistic(rows, plan, penalties)
    return _fit_moments(rows, plan, penalties, kind)


def held_out_labels(
    rows: SiteRows, plan: Design, kind: str, penalty: float
) -> Int[np.ndarray, "row labelling"]:
    """Held-out prediction (label index) of each row, under each labelling."""
    solve = SOLVERS[kind]
    moments = Moments(n_folds=plan.n_folds, n_classes=len(plan.names))
    for part, x in rows:
        moments.update(x, plan.codes[part], plan.fold[part])
    readouts = [solve(moments.training(held_out=fold), penalty) for fold in range(plan.n_folds)]
    found = np.empty(plan.codes.shape, dtype=plan.codes.dtype)
    for part, x in rows:
        for fold in np.unique(plan.fold[part]):
            inside = np.flatnonzero(plan.fold[part] == fold)
            found[part.start + inside] = host(readouts[fold](x[like(inside, x)]))
    return found


def class_counts(
    codes: Int[np.ndarray, "row labelling"], n_classes: int, keep: np.ndarray | None = None
) -> Int[np.ndarray, "class labelling"]:
    """Rows of each class under each labelling, optionally only where ``keep``."""
    labellings = codes.shape[1]
    cell = codes + n_classes * np.arange(labellings, dtype=np.int32)
    counts = np.bincount(
        cell.ravel() if keep is None else cell[keep], minlength=n_classes * labellings
    )
    return counts.reshape(labellings, n_classes).T


def _fit_moments(rows: SiteRows, plan: Design, penalties: Sequence[float], kind: str) -> SiteFit:
    solve, n_classes = SOLVERS[kind], len(plan.names)
    moments = Moments(n_folds=plan.n_folds, n_classes=n_classes)
    for part, x in rows:
        moments.update(x, plan.codes[part], plan.fold[part])
    trainings = [moments.training(held_out=fold) for fold in range(plan.n_folds)]
    readouts = [[solve(training, penalty) for penalty in penalties] for training in trainings]
    hits = np.zeros((len(penalties), plan.n_folds, n_classes, plan.codes.shape[1]), dtype=np.int64)
    for part, x in rows:
        for fold in np.unique(plan.fold[part]):
            inside = plan.fold[part] == fold
            tested, codes = x[like(inside, x)], plan.codes[part][inside]
            for index, readout in enumerate(readouts[fold]):
                right = host(readout(tested)) == codes
                hits[index, fold] += class_counts(codes, n_classes, right)
    whole = solve(moments.training(labellings=slice(0, 1)), penalties[0])
    return SiteFit(hits, *_as_stored(whole, rows.frame))


def _fit_logistic(rows: SiteRows, plan: Design, penalties: Sequence[float]) -> SiteFit:
    n_classes = len(plan.names)
    x = np.concatenate([values for _, values in rows])
    hits = np.zeros((len(penalties), plan.n_folds, n_classes, plan.codes.shape[1]), dtype=np.int64)
    stopped = 0
    for fold in range(plan.n_folds):
        tested = plan.fold == fold
        for labelling, codes in enumerate(plan.codes.T):
            for index, penalty in enumerate(penalties):
                readout, converged = logistic(
                    x[~tested], codes[~tested], penalty, n_classes=n_classes
                )
                stopped += not converged
                own = codes[tested, None]
                right = class_counts(own, n_classes, readout(x[tested]) == own)
                hits[index, fold, :, labelling] = right[:, 0]
    whole, converged = logistic(x, plan.codes[:, 0], penalties[0], n_classes=n_classes)
    return SiteFit(hits, *_as_stored(whole, rows.frame), stopped + (not converged))


def _as_stored(
    readout: Readout, frame: Float[np.ndarray, "d rank"] | None
) -> tuple[Float[np.ndarray, "class d"], Float[np.ndarray, " class"]]:
    """Weights for stored activations: ``(z F) w = z (F w)``."""
    weights, intercepts = readout.affine()
    return weights if frame is None else weights @ frame.T, intercepts
