"""How much more attention relevant tokens get than irrelevant ones, by block and head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from lensclust import figures
from lensclust.errors import InputError
from lensclust.showing import Shown
from lensclust.stats import mean_interval, permutation_p
from probes.attention_spans import OVER_HEADS


@dataclass(frozen=True, repr=False)
class AttentionRatio(Shown):
    """Mean weight on a relevant and on an irrelevant token, at every head and for every prompt.

    Attributes:
        values: ``relevant`` and ``irrelevant (weighting, prompt, block, head)``; prompts have
            what ``rows`` said of them.
        null: the mean over prompts of the log ratio between random spans of the same lengths
            ``(weighting, block, heads, draw)``, ``heads`` being each head's number, ``mean`` and
            ``max``.
    """

    values: xr.Dataset
    null: xr.DataArray

    @cached_property
    def frame(self) -> pd.DataFrame:
        """By weighting, block and head, and over the heads of a block.

        One row for each head (``heads`` is ``"one"``) and two for each block: the weights'
        ``"mean"`` or ``"max"`` over its heads, taken for each span before the ratio. Columns:
        ``weighting, block, heads, head, relevant, irrelevant`` (means over prompts),
        ``log_ratio`` (mean over prompts of the natural logarithm of relevant / irrelevant) with
        its 95 % interval ``low, high``, ``share`` (mean of relevant / (relevant + irrelevant)),
        ``null_mean, null_std, p`` (one-sided: a larger ratio than between random spans) and
        ``n``, the prompts whose ratio is a number (a weight of exactly 0, as beyond a sliding
        window, gives none).
        """
        relevant, irrelevant = (self._over_heads(name) for name in ("relevant", "irrelevant"))
        ratio, share = log_ratio(relevant, irrelevant), _share(relevant, irrelevant)
        names = self.null["heads"].values.tolist()
        rows = []
        for w, weighting in enumerate(self.values["weighting"].values.tolist()):
            for b, block in enumerate(self.values["block"].values.tolist()):
                for h, name in enumerate(names):
                    at = (w, slice(None), b, h)
                    finite = ratio[at][np.isfinite(ratio[at])]
                    mean, low, high = mean_interval(finite) if finite.size else (np.nan,) * 3
                    null = self.null.values[w, b, h]
                    rows.append(
                        {
                            "weighting": weighting,
                            "block": block,
                            "heads": name if name in OVER_HEADS else "one",
                            "head": pd.NA if name in OVER_HEADS else int(name),
                            "relevant": relevant[at].mean(),
                            "irrelevant": irrelevant[at].mean(),
                            "log_ratio": mean,
                            "low": low,
                            "high": high,
                            "share": _mean_of_numbers(share[at]),
                            "null_mean": null.mean(),
                            "null_std": null.std(ddof=1),
                            "p": float(permutation_p(mean, null)) if finite.size else np.nan,
                            "n": finite.size,
                        }
                    )
        return pd.DataFrame(rows).astype({"head": "Int64"})

    def per_prompt(self, *, heads: str = "mean") -> pd.DataFrame:
        """One row a weighting, prompt and block, to be held against what the prompt's answer was.

        Args:
            heads: ``"mean"`` or ``"max"`` over the heads of a block, or a head's number.

        Returns:
            ``weighting, prompt`` (its index), ``block, relevant, irrelevant, log_ratio, share``;
            a ratio that is no number is NaN.

        Raises:
            InputError: if there is no such head.
        """
        names = self.null["heads"].values.tolist()
        if str(heads) not in names:
            raise InputError(f"per_prompt: heads={heads!r}, expected one of {names}")
        at = (..., names.index(str(heads)))
        relevant, irrelevant = (self._over_heads(name)[at] for name in ("relevant", "irrelevant"))
        sizes = relevant.shape
        weighting, prompt, block = (index.ravel() for index in np.indices(sizes))
        ratio = log_ratio(relevant, irrelevant)
        return pd.DataFrame(
            {
                "weighting": self.values["weighting"].values[weighting],
                "prompt": prompt,
                "block": self.values["block"].values[block],
                "relevant": relevant.ravel(),
                "irrelevant": irrelevant.ravel(),
                "log_ratio": np.where(np.isfinite(ratio), ratio, np.nan).ravel(),
                "share": _share(relevant, irrelevant).ravel(),
            }
        )

    def plot(self) -> Any:
        """Log ratio by block, averaged over heads, over the band of random spans."""
        means = self.frame[self.frame["heads"] == "mean"]
        columns = ["weighting", "block", "log_ratio", "null_mean", "null_std"]
        return figures.curves(
            means[columns],
            x="block",
            y="log_ratio",
            facet="weighting" if means["weighting"].nunique() > 1 else None,
            title="Attention on relevant against irrelevant tokens",
            caption=f"Mean over {self.values.sizes['prompt']} prompts; weights are averaged over "
            "the heads of a block. Random spans of the same lengths lie in the same text.",
            y_title="log ratio",
        )

    def __repr__(self) -> str:
        means = self.frame[self.frame["heads"] == "mean"]
        best = means.loc[means["log_ratio"].idxmax()] if means["log_ratio"].notna().any() else None
        says = (
            "no ratio is a number"
            if best is None
            else f"highest mean log ratio {best['log_ratio']:.2f} at block {best['block']} "
            f"({best['weighting']})"
        )
        sizes = self.values.sizes
        return (
            f"AttentionRatio({sizes['prompt']} prompts, {sizes['block']} blocks of "
            f"{sizes['head']} heads; {says})"
        )

    def _over_heads(self, name: str) -> Float[np.ndarray, "weighting prompt block heads"]:
        each = self.values[name].values.astype(np.float64)
        over = [each.mean(-1, keepdims=True), each.max(-1, keepdims=True)]
        return np.concatenate([each, *over], axis=-1)


def log_ratio(
    relevant: Float[np.ndarray, "*shape"], irrelevant: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """``log(relevant / irrelevant)``, infinite or NaN where a weight is 0.

    >>> log_ratio(np.array([2.0, 1.0]), np.array([2.0, 0.0])).tolist()
    [0.0, inf]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(relevant) - np.log(irrelevant)


def _share(relevant: np.ndarray, irrelevant: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return relevant / (relevant + irrelevant)


def _mean_of_numbers(values: np.ndarray) -> float:
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
