"""Change of the decodability of a prompt component by demonstrations.

Standard of evidence: both conditions use the same kind of probe and the same folds, in which the
nuisance item (the name, when the activity is decoded) is held out whole; the paired difference is
reported, with an interval over resampled items. Its p is the larger of two: from exchanging the two
conditions within items, and from relabelling both conditions alike, with new probes. The first
alone is too small where items are few: an item that is tested in one fold trains the probes of
another, so two items that are alike are right or wrong together. For each condition against
permuted labels, see `probes.probe`. Decodability of a component does not mean that the model uses
it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from threadpoolctl import threadpool_limits

from lensclust.activations import dataset_sites, labelled, prompt_labels, require_axes
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.prompts import require_same_prompts
from lensclust.results import permutation_p
from probes.design import Units, design, exchangeable, flipped_p, nested, smallest_flip_p
from probes.linear.moments import SOLVERS
from probes.linear.site_fits import SiteRows, held_out_labels

log = logging.getLogger(__name__)

CONDITIONS = ("without", "with")


@dataclass(frozen=True, repr=False)
class PairedDecoding(Shown):
    """Held-out accuracy of one target at each site, in two conditions of the same prompts.

    Attributes:
        frame: one row per site: ``site, kind, layer, head, by, probe, penalty, accuracy_without,
            accuracy_with, value`` (the difference), ``ci_low, ci_high`` (95 %, over items), ``p,
            p_corrected`` (two-sided), ``smallest_p, n, n_items``.
        right: whether each prompt is decoded right, ``(condition, site, prompt)``.
    """

    frame: pd.DataFrame
    right: xr.DataArray

    def __repr__(self) -> str:
        best = self.frame.iloc[int(np.abs(self.frame["value"]).argmax())]
        return (
            f"PairedDecoding(by={best['by']!r}, {len(self.frame)} sites; largest change "
            f"{best['value']:+.2f} [{best['ci_low']:+.2f}, {best['ci_high']:+.2f}] at "
            f"{best['site']})"
        )


@checked_arguments
def decode(
    without: xr.Dataset,
    with_demonstrations: xr.Dataset,
    *,
    target: str,
    groups: str,
    kind: str = "ridge",
    penalty: float = 1e-2,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    folds: int = 5,
    units: Units = None,
    resamples: int = 1000,
    permutations: int = 99,
    seed: int = 0,
) -> PairedDecoding:
    """Decode a component of the prompts at every site, with and without demonstrations.

    Also `decodability`.

    Args:
        without, with_demonstrations: activations of the same queries in the same order.
        target: the component; a label. Numbers are classes too.
        groups: the nuisance item, held out whole; a label.
        kind: ``ridge``, ``lda`` or ``mass_mean``, as in `probes.probe`.
        penalty: in units of the mean eigenvalue of the training scatter.
        kinds: only these kinds of site.
        position: which read position, if the activations hold several.
        folds: number of splits.
        units: rows that form one item of the interval and of p: a column, several or one value
            per row. Default: those of one group, or of one wording where groups are finer.
        resamples: of the items for the interval, and exchanges of conditions for p (at most all).
        permutations: relabellings for p, as in `probes.probe`; 0 for none.
        seed: of folds, resamples, exchanges and relabellings.

    Raises:
        InputError: if the two sets differ in prompts, target, groups or sites, or an option or
            label does not exist, or the folds cannot be made (`probes.probe`).

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="both")
    >>> model = lc.load("native:sif-small")
    >>> first, last = (
    ...     lc.extract(model, prompts, "resid 0", at=at).assign_coords(position=["here"])
    ...     for at in ("instruction_start", "answer")
    ... )
    >>> found = decode(first, last, target="input", groups="template")
    >>> bool(found.frame.ci_low[0] > 0.5)  # the input's own token against one before it
    True
    """
    if kind not in SOLVERS:
        raise InputError(f"decode: kind {kind!r} is not known: expected one of {list(SOLVERS)}")
    if resamples < 2:
        raise InputError(f"decode: resamples={resamples}, expected at least 2")
    _require_pairs((without, with_demonstrations), (target, groups))
    kept, unlabelled = labelled("decode", without, target=target, groups=groups)
    for note in unlabelled:
        log.warning("decode: %s", note)
    if unlabelled:
        without, with_demonstrations = (
            side.isel(prompt=kept) for side in (without, with_demonstrations)
        )
    sides = (without, with_demonstrations)
    sites = dataset_sites(without, kinds)
    if sites != dataset_sites(with_demonstrations, kinds):
        raise InputError("decode: the two sets hold other sites, expected the same")
    plan = design(
        without,
        target=target,
        groups=groups,
        control=None,
        folds=folds,
        permutations=permutations,
        seed=seed,
    )
    for note in plan.notes:
        log.info("decode: %s", note)
    with threadpool_limits(1):
        hits = np.array(
            [
                [
                    held_out_labels(SiteRows.of(a, s, position), plan, kind, penalty) == plan.codes
                    for s in sites
                ]
                for a in sides
            ]
        )
    right = hits[..., 0]
    item = _items(without, target, groups, units)
    value, low, high, *exchanged = _paired(right, item, resamples, seed)
    change = np.abs(hits[1].mean(1) - hits[0].mean(1))
    relabelled = [
        permutation_p(change[:, 0], null)
        for null in (change[:, 1:], change[:, 1:].max(0, keepdims=True))
    ]
    p, corrected = np.maximum(exchanged, relabelled) if permutations else exchanged
    smallest = smallest_flip_p(int(item.max()) + 1, resamples)
    frame = pd.DataFrame(
        {
            "site": [str(site) for site in sites],
            "kind": [site.kind for site in sites],
            "layer": [site.layer for site in sites],
            "head": pd.array([site.head for site in sites], dtype="Int64"),
            "by": target,
            "probe": kind,
            "penalty": penalty,
            "accuracy_without": right[0].mean(1),
            "accuracy_with": right[1].mean(1),
            "value": value,
            "ci_low": low,
            "ci_high": high,
            "p": p,
            "p_corrected": corrected,
            "smallest_p": max(smallest, plan.smallest_p) if permutations else smallest,
            "n": right.shape[2],
            "n_items": item.max() + 1,
        }
    )
    coords = {"condition": list(CONDITIONS), "site": frame["site"].to_numpy(dtype=object)}
    labels = {name: ("prompt", prompt_labels(without, name)) for name in (target, groups)}
    return PairedDecoding(
        frame, xr.DataArray(right, coords | labels, ("condition", "site", "prompt"))
    )


# The same function under a name that is clear out of context.
decodability = decode


def _paired(
    right: np.ndarray, item: Int[np.ndarray, " prompt"], resamples: int, seed: int
) -> tuple[Float[np.ndarray, " site"], ...]:
    """Difference of accuracies, its interval over items, and p from exchanging conditions."""
    change = right[1].astype(np.float64) - right[0]
    sizes = np.bincount(item)
    of_item = np.stack([np.bincount(item, row) for row in change])
    value = of_item.sum(1) / sizes.sum()
    drawn = np.random.default_rng(seed).multinomial(
        len(sizes), np.full(len(sizes), 1 / len(sizes)), resamples
    )
    means = (of_item @ drawn.T) / (drawn @ sizes)
    low, high = np.quantile(means, [0.025, 0.975], axis=1)
    return value, low, high, *flipped_p(change, item, resamples, seed=seed)


def _items(acts: xr.Dataset, target: str, groups: str, units: Units) -> Int[np.ndarray, " prompt"]:
    """Items: the rows of a group, or of the wording that contains groups."""
    labels = prompt_labels(acts, target)
    if units is not None:
        return exchangeable(labels, acts, by=target, units=units, call="decode").unit
    group = np.unique(prompt_labels(acts, groups), return_inverse=True)[1]
    wording = exchangeable(labels, acts, by=target).wording
    return wording if wording is not None and nested(group, wording) else group


def _require_pairs(sides: tuple[xr.Dataset, xr.Dataset], names: tuple[str, str]) -> None:
    for each in sides:
        require_axes(each)
    n, m = (each.sizes["prompt"] for each in sides)
    if n != m:
        raise InputError(f"decode: {n} prompts without and {m} with, expected pairs")
    one, other = ({name: prompt_labels(each, name) for name in names} for each in sides)
    require_same_prompts("decode", one, other)
