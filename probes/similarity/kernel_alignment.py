"""Linear CKA: similarity of geometry between sites of one or two models or checkpoints.

With centred states ``X (prompt, d)`` and ``Y (prompt, e)`` of the same prompts,
``CKA = |XᵀY|² / (|XᵀX| |YᵀY|)`` (Frobenius norms): 1 for states equal up to rotation and scale. It
is the same number as the cosine of the Gram matrices ``XXᵀ`` and ``YYᵀ``, and whichever needs
fewer operations is computed. Plain CKA is biased upwards when there are few prompts for the
number of dimensions; ``debiased=True`` takes the U-statistic instead, which is 0 on average for
unrelated states.

Standard of evidence: each value comes with the mean and standard deviation of the same score when
the prompts of one side are shuffled. Where prompts share wordings (`probes.design`), sites that
encode only the wording would exceed a null of single shuffled prompts: prompts of one wording and
task are then permuted together, matched by input, with others that have as many prompts of the same
inputs, and p is counted over such relabellings. Else all prompts are shuffled, and the moments are
exact over all permutations. High CKA means that the geometry is alike, not that the task is the
cause.

Sources: Kornblith et al. (ICML 2019); U-statistic: Song et al. (JMLR 2012), Nguyen et al. (ICLR
2021); moments under permutation: Kazi-Aoual et al. (1995), Josse et al. (2008).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats
from scipy.special import gammaln

from lensclust.activations import label_columns, require_axes
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Picture, Shown, finish, inline, tip
from lensclust.models import Site, found_device
from lensclust.prompts import require_same_prompts
from lensclust.results import permutation_p
from probes.design import INPUT, ROWS, TASK, Exchange, Units, exchangeable
from probes.similarity.gram_matrices import Side, products, relabelled, shuffled

log = logging.getLogger(__name__)


@dataclass(frozen=True, repr=False)
class CKA(Shown):
    """Linear CKA of every pair of sites, with its null of shuffled prompts.

    Attributes:
        frame: one row per pair: ``site_a, kind_a, layer_a, head_a``, the same of ``b``, ``metric``
            (``cka`` or ``cka_debiased``), ``value, null_mean, null_std, p, smallest_p,
            exchanged``; where ``exchanged`` is ``rows``, ``p`` is the tail of a Pearson type III
            curve through the null's moments.
        matrix: the values ``(site_a, site_b)``; NaN where a site's states do not vary.
        debiased: whether the U-statistic was taken.
        n: number of prompts.
        notes: caveats of p, one sentence each.
    """

    frame: pd.DataFrame
    matrix: xr.DataArray
    debiased: bool
    n: int
    notes: tuple[str, ...] = ()

    def plot(self) -> Picture:
        """Heat map with one cell per pair of sites."""
        names = ["site_a", "site_b", "value", "null_mean", "p"]
        data = self.frame.dropna(subset=["value"])[names]
        if data.empty:
            raise InputError("plot: no pair of sites has a value, their states do not vary")
        rows, columns = (list(self.matrix[side].values) for side in ("site_a", "site_b"))
        cell = int(np.clip(420 / max(len(rows), len(columns)), 3, 34))
        low = min(0.0, float(data["value"].min()))
        cells = (
            alt.Chart(inline(data))
            .mark_rect(aria=False)
            .encode(
                x=alt.X(field="site_b", type="ordinal", sort=columns, title="site b"),
                y=alt.Y(field="site_a", type="ordinal", sort=rows, title="site a"),
                color=alt.Color(
                    field="value",
                    type="quantitative",
                    scale=alt.Scale(scheme="viridis", domain=[low, 1]),
                    legend=alt.Legend(title="CKA", gradientLength=160),
                ),
                tooltip=[
                    tip("site_a", "site a"),
                    tip("site_b", "site b"),
                    tip("value", "CKA", ".3f"),
                    tip("null_mean", "shuffled prompts", ".3f"),
                ],
            )
            .properties(width=alt.Step(cell), height=alt.Step(cell))
        )
        null = float(data["null_mean"].mean())
        return finish(
            cells,
            f"{'Debiased linear' if self.debiased else 'Linear'} CKA between sites",
            f"{self.n} prompts; with shuffled prompts {null:.2f} on average.",
            summary=f"Values from {data['value'].min():.2f} to {data['value'].max():.2f}.",
        )

    def __repr__(self) -> str:
        sizes = " x ".join(str(self.matrix.sizes[side]) for side in ("site_a", "site_b"))
        return (
            f"CKA({sizes} sites, {self.n} prompts{', debiased' if self.debiased else ''}; mean "
            f"{self.frame['value'].mean():.2f}, shuffled prompts "
            f"{self.frame['null_mean'].mean():.2f})"
        )

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        return ()


@checked_arguments
def cka(
    acts: xr.Dataset,
    other: xr.Dataset | None = None,
    *,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    debiased: bool = False,
    units: Units = None,
    permutations: int = 100,
    seed: int = 0,
    device: Any = None,
) -> CKA:
    """Linear CKA between all sites of one activation set, or between those of two.

    Sites are read one at a time, so activations may stay on disk.

    Args:
        acts: activations from `lensclust.extract` (side a).
        other: activations of another model or checkpoint over the same prompts in the same order
            (side b); default ``acts`` itself.
        kinds: only these kinds of site.
        position: which read position, if the activations hold several.
        debiased: the U-statistic, 0 on average for unrelated states; it can be below 0.
        units: prompts that are permuted together under the null: a column, several, one value per
            prompt, or ``"rows"``. Default: those of one wording and task, from the columns.
        permutations: relabellings where prompts are permuted together, one Gram product each.
        seed: of the relabellings.
        device: of the products (`probes.arrays`), such as ``"cuda"``. Equal to the CPU's up to
            rounding.

    Returns:
        Values with the mean, spread and p under shuffled prompts. A site whose states do not
        vary (beyond float32's precision) has no geometry: NaN.

    Raises:
        InputError: if the two sets hold other prompts, there are fewer than 4, a site or position
            or device does not exist, ``units`` or ``permutations`` are not as above, or a state is
            not finite.

    >>> import lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> found = cka(acts)
    >>> round(float(found.matrix.sel(site_a="resid 2", site_b="resid 2")), 6)
    1.0
    """
    require_axes(acts)
    n = acts.sizes["prompt"]
    if n < 4:
        raise InputError(f"cka: {n} prompts given, expected at least 4")
    if permutations < 1:
        raise InputError(f"cka: permutations={permutations}, expected at least 1")
    if other is not None:
        _require_same_prompts(acts, other)
    there = None if device is None else found_device(device)
    a = Side(acts, kinds, position, there)
    b = a if other is None else Side(other, kinds, position, there)
    found = products(a, b, debiased=debiased)
    value = found / np.outer(a.size(debiased=debiased), b.size(debiased=debiased))
    exchange = _exchange(acts, units)
    if exchange is None:
        null_mean, null_std, skew = shuffled(a, b, debiased=debiased)
        with np.errstate(invalid="ignore", divide="ignore"):
            p = stats.pearson3.sf((value - null_mean) / null_std, skew)
    else:
        orders = exchange.orders(permutations, seed=seed)
        null = relabelled(a, b, orders[1:] if len(orders) > 1 else orders, debiased=debiased)
        null_mean, null_std = null.mean(0), null.std(0)
        counted = permutation_p(value, np.moveaxis(null[: len(orders) - 1], 0, -1))
        p = np.where(np.isnan(value), np.nan, counted)
        if exchange.coarse:
            log.warning("cka: %s", exchange.coarse)
    columns = {"value": value, "null_mean": null_mean, "null_std": null_std, "p": p}
    frame = pd.merge(_places(a.sites, "a"), _places(b.sites, "b"), how="cross")
    frame["metric"] = "cka_debiased" if debiased else "cka"
    least = np.exp(-gammaln(n + 1)) if exchange is None else exchange.smallest_p(permutations)
    frame["smallest_p"] = float(least)
    frame["exchanged"] = ROWS if exchange is None else exchange.exchanged
    return CKA(
        frame=frame.assign(**{name: matrix.ravel() for name, matrix in columns.items()}),
        matrix=xr.DataArray(
            value,
            {"site_a": frame["site_a"].unique(), "site_b": frame["site_b"].unique()},
            ("site_a", "site_b"),
        ),
        debiased=debiased,
        n=n,
        notes=() if exchange is None else exchange.notes,
    )


def _exchange(acts: xr.Dataset, units: Units) -> Exchange | None:
    """Units of prompts that are permuted together; None for single prompts."""
    named = TASK in acts.coords and acts[TASK].dims == ("prompt",)
    labels = acts[TASK].values if named else np.zeros(acts.sizes["prompt"])
    found = exchangeable(labels, acts, by=TASK, units=units, call="cka")
    if found.wording is None:
        return None
    # Both sides have the same units: as many prompts, of the same inputs.
    known = INPUT in label_columns(acts)
    inputs = acts[INPUT].values.astype(str) if known else np.zeros(len(labels))
    made_of = pd.Series(inputs).groupby(found.unit).agg(lambda rows: tuple(sorted(rows)))
    return found.as_units().within(pd.factorize(made_of)[0][found.unit])


def _places(sites: Sequence[Site], side: str) -> pd.DataFrame:
    rows = [
        {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
        for site in sites
    ]
    return pd.DataFrame(rows).astype({"head": "Int64"}).add_suffix(f"_{side}")


def _require_same_prompts(acts: xr.Dataset, other: xr.Dataset) -> None:
    require_axes(other)
    n, m = acts.sizes["prompt"], other.sizes["prompt"]
    if n != m:
        raise InputError(f"cka: {n} prompts given against {m}, expected the same prompts")
    one, two = label_columns(acts), label_columns(other)
    require_same_prompts("cka", one, two)
    # Other tokenizers give other digests, so shared labels also identify the prompts.
    digests = {a.attrs.get("prompts") for a in (acts, other)}
    if not one.keys() & two.keys() and (len(digests) > 1 or None in digests):
        raise InputError(
            "cka: the two sets have no label in common and other prompts by their digest, "
            "expected the same prompts"
        )
