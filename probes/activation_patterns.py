"""The pattern of a task over heads: how concentrated it is and how alike two of them are.

Concentration, of the pattern x over all n heads of the model:

    gini        sum_i (2i - n - 1) x_(i) / (n sum_i x_i), x sorted: 0 if all heads are equal
    cv          standard deviation over mean, both of the population (no n - 1)
    kurtosis    m4 / m2², 3 for a normal distribution (scipy's is 3 less unless told otherwise)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy import stats

from lensclust import figures
from lensclust.errors import InputError
from lensclust.showing import Shown
from lensclust.stats import mean_interval

AXES = ("prompt", "block", "head")


@dataclass(frozen=True, repr=False)
class HeadActivation(Shown):
    """How much each head is engaged by each of some prompts.

    Attributes:
        data: ``signed (prompt, block, head)``, the gradient of each prompt's loss with respect
            to a gate on the head, and ``loss (prompt)``, both in nats. Prompts have what
            ``rows`` said of them; attributes hold the provenance.
    """

    data: xr.Dataset

    @property
    def signed(self) -> xr.DataArray:
        """With its sign ``(prompt, block, head)``: above 0 where more of the head would hurt."""
        return self.data["signed"]

    @property
    def values(self) -> xr.DataArray:
        """Without its sign ``(prompt, block, head)``."""
        return abs(self.signed).rename("activation")

    @property
    def losses(self) -> xr.DataArray:
        """Each prompt's loss ``(prompt)``."""
        return self.data["loss"]

    @cached_property
    def pattern(self) -> xr.DataArray:
        """The activation pattern ``(block, head)``: the mean over prompts, in float64."""
        return self.values.astype(np.float64).mean("prompt")

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row a head: ``site, block, head, value, ci_low, ci_high, n``.

        Intervals are Student-t's over prompts, NaN for a single prompt.
        """
        values = self.values.values.astype(np.float64)
        rows = []
        blocks, heads = (self.values[axis].values.tolist() for axis in ("block", "head"))
        for at, head in np.ndindex(values.shape[1:]):
            value, low, high = mean_interval(values[:, at, head])
            block, head = blocks[at], heads[head]
            place = {"site": f"head {block}.{head}", "block": block, "head": head}
            rows.append({**place, "value": value, "ci_low": low, "ci_high": high})
        return pd.DataFrame(rows).assign(n=len(values))

    def concentration(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """How concentrated the pattern is on few heads.

        Args:
            resamples: of the prompts, for the percentile interval. Noise of few prompts makes a
                pattern look more concentrated than it is, and resampling adds as much again.
            confidence: of the interval.
            seed: of the resampling.

        Returns:
            One row a metric: ``metric, value, ci_low, ci_high, convention, n``; the metrics are
            ``gini``, ``cv`` and ``kurtosis``. The interval of one prompt is NaN.

        Raises:
            InputError: if the number of resamples or the confidence makes no sense, or the
                pattern is 0 everywhere.
        """
        if resamples < 1 or not 0 < confidence < 1:
            raise InputError(
                "concentration: expected resamples of at least 1 and a confidence between 0 and "
                f"1, given {resamples}, {confidence}"
            )
        values = self.values.values.astype(np.float64)
        n = len(values)
        if not values.any():
            raise InputError("concentration: no head is active at all: the pattern is 0")
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples) / n
        patterns = drawn @ values.reshape(n, -1)
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        rows = []
        for metric, (measure, convention) in CONCENTRATION.items():
            low, high = np.quantile(measure(patterns), tails) if n > 1 else (np.nan, np.nan)
            value = float(measure(self.pattern.values.ravel()))
            row = {"metric": metric, "value": value, "ci_low": float(low), "ci_high": float(high)}
            rows.append({**row, "convention": convention, "n": n})
        return pd.DataFrame(rows)

    def similarity(self, other: HeadActivation) -> pd.Series:
        """How alike two patterns of models of one shape are: ``pearson``, ``spearman``, ``mse``.

        Correlations do not see a common factor, such as that of a loss in other units; the mean
        squared difference does.

        Raises:
            InputError: if the patterns have not the same heads.
        """
        return pattern_similarity(self.pattern.values, other.pattern.values)

    def take(self, indices: Sequence[int] | np.ndarray) -> HeadActivation:
        """The prompts at ``indices``, in that order.

        Raises:
            InputError: if none is given.
        """
        if len(indices) == 0:
            raise InputError("head activation: no prompt taken, expected at least one")
        return replace(self, data=self.data.isel(prompt=np.asarray(indices)))

    def where(self, **labels: Any) -> HeadActivation:
        """The prompts with the given labels (a value or a list of values each).

        Raises:
            InputError: if a label does not exist or no prompt is left.
        """
        keep = np.ones(self.data.sizes["prompt"], dtype=bool)
        known = [str(c) for c in self.data.coords if self.data[c].dims == ("prompt",)]
        for name, wanted in labels.items():
            if name not in known:
                raise InputError(f"head activation: no label {name!r}: prompts have {known}")
            among = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
            keep &= np.isin(self.data[name].values, among)
        return self.take(np.flatnonzero(keep))

    def plot(self) -> Any:
        """A heat map of the pattern."""
        return figures.head_map(
            self.frame,
            title="Activation of each head",
            caption=f"Attention times gradient, magnitude; mean over {len(self)} prompts.",
            value_title="activation",
        )

    def __len__(self) -> int:
        return self.data.sizes["prompt"]

    def __repr__(self) -> str:
        most = self.frame.iloc[int(self.frame["value"].argmax())]
        sizes = self.pattern.sizes
        return (
            f"HeadActivation({len(self)} prompts, {sizes['block']} blocks x {sizes['head']} heads; "
            f"most {most['value']:.3g} at {most['site']}, mean {float(self.pattern.mean()):.3g})"
        )


def pattern_similarity(
    ours: Float[np.ndarray, "block head"], theirs: Float[np.ndarray, "_block _head"]
) -> pd.Series:
    """Pearson, Spearman and mean squared difference of two patterns over heads.

    Correlations with a pattern that is the same everywhere are NaN.

    Raises:
        InputError: if the shapes differ.

    >>> found = pattern_similarity(np.array([[1.0, 2.0, 4.0]]), np.array([[2.0, 4.0, 8.0]]))
    >>> found.round(6).to_dict()
    {'pearson': 1.0, 'spearman': 1.0, 'mse': 7.0}
    """
    if ours.shape != theirs.shape:
        raise InputError(
            f"similarity: patterns of {ours.shape} and {theirs.shape} blocks and heads, expected "
            "the same"
        )
    a, b = (each.astype(np.float64).ravel() for each in (ours, theirs))
    flat = np.ptp(a) == 0 or np.ptp(b) == 0
    pearson: Any = None if flat else stats.pearsonr(a, b)
    spearman: Any = None if flat else stats.spearmanr(a, b)
    return pd.Series(
        {
            "pearson": np.nan if flat else float(pearson.statistic),
            "spearman": np.nan if flat else float(spearman.statistic),
            "mse": float(np.mean((a - b) ** 2)),
        }
    )


def gini(x: Float[np.ndarray, "... n"]) -> Float[np.ndarray, ...]:
    """Gini coefficient along the last axis, of numbers of at least 0.

    >>> float(gini(np.array([1.0, 1.0, 1.0]))), float(gini(np.array([0.0, 0.0, 3.0])))
    (0.0, 0.6666666666666666)
    """
    n = x.shape[-1]
    place = 2 * np.arange(1, n + 1) - n - 1
    return np.sort(x, axis=-1) @ place / (n * x.sum(-1))


CONCENTRATION: dict[str, tuple[Any, str]] = {
    "gini": (gini, "0 for equal heads"),
    "cv": (lambda x: stats.variation(x, axis=-1), "of the population"),
    "kurtosis": (
        lambda x: stats.kurtosis(x, axis=-1, fisher=False),
        "m4 / m2², 3 for a normal distribution",
    ),
}
