"""Moments of a site's activations by fold and label, for all linear probes.

One pass over the rows keeps, for each fold, the number of rows, their sum, their Gram matrix and
the sum of each class under each labelling. The moments of a training set are those of all rows
minus the fold held out; one eigendecomposition of its scatter then serves all penalties and all
labellings at once, since only the class sums depend on the labels.

With centred scatter ``T = U diag(λ) Uᵀ`` and centred class sums ``C`` (a column a class):

    ridge      W = U (diag(λ) + α)⁻¹ Uᵀ 2C                       targets -1 and 1, free intercept
    lda        W ∝ (T - B + αI)⁻¹ M,  M = C / n,  B = M diag(n) Mᵀ
               = D⁻¹ M (I - diag(n) Mᵀ D⁻¹ M)⁻¹,  D = T + αI       (a solve of class x class)
    mass_mean  W = M: the nearest class mean

The penalty is relative: ``α`` is the penalty times the mean eigenvalue of the training scatter
(for LDA of the scatter within classes), so that it means the same at every layer and head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from probes.arrays import Array, host, like, namespace, wide, zeros

# A variance below this share of the squared mean is rounding: the activations are constant.
ROUNDING = 1e-26
# Where classes are points, their within-class scatter is set to this share of the total.
COLLAPSED = 1e-10


@dataclass(frozen=True)
class Readout:
    """Linear class scores under one or several labellings; calling it predicts.

    Attributes:
        weights, offsets: ``score = (x - origin) @ weights[class] + offsets[class]``.
        origin: the point subtracted from states.
    """

    weights: Float[Array, "class d labelling"]
    offsets: Float[Array, "class labelling"]
    origin: Float[Array, " d"]

    def __call__(self, x: Float[Array, "row d"]) -> Int[Array, "row labelling"]:
        """Class of the highest score; ties go to the first."""
        centred = x - self.origin
        if not isinstance(centred, np.ndarray):  # on a device all classes are one product
            return (centred @ self.weights + self.offsets[:, None]).argmax(0)
        best = centred @ self.weights[0] + self.offsets[0]
        choice = np.zeros(best.shape, dtype=np.min_scalar_type(-len(self.weights)))
        for index in range(1, len(self.weights)):
            score = centred @ self.weights[index]
            score += self.offsets[index]
            np.copyto(choice, index, where=score > best)
            np.maximum(best, score, out=best)
        return choice

    def affine(self) -> tuple[Float[np.ndarray, "class d"], Float[np.ndarray, " class"]]:
        """Weights and intercepts of the first labelling, for raw activations."""
        weights = self.weights[:, :, 0]
        return host(weights), host(self.offsets[:, 0] - weights @ self.origin)


@dataclass(frozen=True)
class Training:
    """Moments of a training set, in the eigenbasis of its centred scatter.

    Attributes:
        n: rows.
        origin, mean: the mean row is ``origin + mean``.
        values, vectors: eigenvalues (ascending) and eigenvectors of the centred scatter.
        counts: rows of each class under each labelling.
        sums: centred class sums, in the eigenbasis.
    """

    n: int
    origin: Float[Array, " d"]
    mean: Float[Array, " d"]
    values: Float[Array, " d"]
    vectors: Float[Array, "d d"]
    counts: Float[Array, "class labelling"]
    sums: Float[Array, "class d labelling"]

    @property
    def scale(self) -> float:
        """Mean eigenvalue; 1 where the activations are constant."""
        return float(self.values.mean()) or 1.0

    def readout(
        self,
        weights: Float[Array, "class d labelling"],
        offsets: Float[Array, "class labelling"],
    ) -> Readout:
        """Scores around the training mean, from weights in the eigenbasis."""
        return Readout(self.vectors @ weights, offsets, self.origin + self.mean)


class Moments:
    """Accumulate moments batch by batch, in float64, on the rows' device (`probes.arrays`).

    Rows are relative to a point inside the first batch, so that a large common mean does not cost
    precision of the scatter. Holds ``fold x (d² + d x class x labelling)`` numbers.

    >>> rng = np.random.default_rng(0)
    >>> x, codes = rng.normal(size=(60, 4)), rng.integers(0, 2, (60, 1))
    >>> fold = np.arange(60) % 3
    >>> moments = Moments(n_folds=3, n_classes=2)
    >>> for part in (slice(0, 25), slice(25, 60)):
    ...     moments.update(x[part], codes[part], fold[part])
    >>> readout = ridge(moments.training(held_out=0), 0.1)
    >>> readout(x[fold == 0]).shape
    (20, 1)
    """

    def __init__(self, *, n_folds: int, n_classes: int) -> None:
        self.n_folds, self.n_classes = n_folds, n_classes
        self.origin: Array | None = None

    def update(
        self,
        x: Float[Array, "row d"],
        codes: Int[np.ndarray, "row labelling"],
        fold: Int[np.ndarray, " row"],
    ) -> None:
        """Add rows, with their class under each labelling and their fold."""
        x = wide(x)
        if self.origin is None:
            self.origin = _inside(x)
            # The last index of both is the sum over folds.
            shape = (self.n_folds + 1, x.shape[1] + 1)
            self.gram = zeros((*shape, x.shape[1] + 1), x)
            self.sums = zeros((shape[0], self.n_classes, shape[1], codes.shape[1]), x)
        for index in np.unique(fold):
            inside = fold == index
            own = like(codes[inside], x)
            # A column of ones adds counts and sums to the products.
            rows = zeros((len(own), x.shape[1] + 1), x) + 1
            rows[:, :-1] = x[like(inside, x)] - self.origin
            gram = rows.T @ rows
            self.gram[index] += gram
            self.gram[-1] += gram
            for label in range(self.n_classes):
                sums = rows.T @ wide(own == label)
                self.sums[index, label] += sums
                self.sums[-1, label] += sums

    def training(self, held_out: int | None = None, labellings: slice = slice(None)) -> Training:
        """Moments of all rows except one fold, for some labellings."""
        assert self.origin is not None, "no rows were added"
        gram, sums = self.gram[-1], self.sums[-1, :, :, labellings]
        if held_out is not None:
            gram, sums = gram - self.gram[held_out], sums - self.sums[held_out, :, :, labellings]
        xp = namespace(gram)
        n, mean = round(float(gram[-1, -1])), gram[:-1, -1] / gram[-1, -1]
        scatter = gram[:-1, :-1] - n * xp.outer(mean, mean)
        counts = xp.round(sums[:, -1])
        centred = sums[:, :-1] - mean[:, None] * counts[:, None]
        if xp.trace(scatter) <= ROUNDING * n * ((self.origin + mean) ** 2).sum():
            scatter, centred = xp.zeros_like(scatter), xp.zeros_like(centred)
        values, vectors = xp.linalg.eigh(scatter)
        return Training(
            n=n,
            origin=self.origin,
            mean=mean,
            values=values.clip(0),
            vectors=vectors,
            counts=counts,
            sums=vectors.T @ centred,
        )


def _inside(x: Float[Array, "row d"]) -> Float[Array, " d"]:
    """A point among the rows, around which constant features have exactly zero moments."""
    xp = namespace(x)
    return xp.where(xp.amin(x, 0) == xp.amax(x, 0), x[0], x.mean(0))


def ridge(training: Training, penalty: float) -> Readout:
    """Least squares onto -1 and 1 for each class; a class without rows is never predicted.

    Equals scikit-learn's ``RidgeClassifier(alpha=penalty * training.scale)``.
    """
    shrunk = 1 / (training.values + penalty * training.scale)
    weights = 2 * training.sums * shrunk[:, None]
    return training.readout(weights, 2 * training.counts / training.n - 1)


def lda(training: Training, penalty: float) -> Readout:
    """Linear discriminants: Gaussian classes with one covariance, and their frequencies.

    Equals scikit-learn's ``LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s)`` with
    ``s = penalty / (1 + penalty)``.
    """
    xp, counts, n, d = namespace(training.counts), training.counts, training.n, len(training.values)
    means = training.sums / counts.clip(1)[:, None]
    trace = training.values.sum()
    within = trace - xp.einsum("cl,cdl,cdl->l", counts, means, means)
    ridge_term = penalty * within.clip(COLLAPSED * trace) / d if trace else xp.ones_like(within)
    whitened = means / (training.values[:, None] + ridge_term)
    # Total and within-class scatter differ by a low-rank matrix per labelling: Woodbury.
    by_labelling = xp.moveaxis(whitened, 2, 0)
    overlap = xp.moveaxis(means, 2, 0) @ xp.swapaxes(by_labelling, 1, 2)
    system = like(np.eye(len(means)), means) - counts.T[:, :, None] * overlap
    weights = xp.linalg.solve(xp.swapaxes(system, 1, 2), by_labelling)
    weights = xp.moveaxis(weights, 0, 2) * (n * (1 + penalty))
    with np.errstate(divide="ignore"):
        frequency = xp.log(counts / n)
    offsets = frequency - xp.einsum("cdl,cdl->cl", weights, means) / 2
    return training.readout(weights, offsets)


def mass_mean(training: Training, penalty: float) -> Readout:
    """The nearest class mean, independent of the penalty; with the covariance it is `lda`.

    Equals scikit-learn's ``NearestCentroid``. Source: Marks & Tegmark 2023 (arXiv 2310.06824),
    whose probe of two classes is the difference of their means.
    """
    xp = namespace(training.counts)
    means = training.sums / training.counts.clip(1)[:, None]
    offsets = -xp.einsum("cdl,cdl->cl", means, means) / 2
    return training.readout(means, xp.where(training.counts > 0, offsets, -np.inf))


SOLVERS: dict[str, Callable[[Training, float], Readout]] = {
    "ridge": ridge,
    "lda": lda,
    "mass_mean": mass_mean,
}
