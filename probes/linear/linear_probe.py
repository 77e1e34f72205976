"""Linear probes for a label at every site, with nulls and control tasks.

Standard of evidence: an accuracy alone is no evidence. Groups of prompts (templates) are held out
whole; every score comes with its null of labels permuted over exchangeable units
(`probes.design`, `probes.design.folds`); selectivity subtracts memorisation; and since a sweep
tests many sites, ``p_corrected`` is the rate at which the *best* site of a permuted sweep does as
well (Westfall & Young 1993), which is the p to report for a selected site.

Penalties are fixed in advance and all reported: choosing one by its score would leak.

Sources: Alain & Bengio 2016 (arXiv 1610.01644) for linear probes by layer; Hewitt & Liang 2019
(arXiv 1909.03368) for selectivity; Marks & Tegmark 2023 (arXiv 2310.06824) for mass-mean probes;
Nadeau & Bengio 2003 for intervals over folds that share training rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int
from joblib import delayed
from threadpoolctl import threadpool_limits

from lensclust import figures
from lensclust.activations import VARIABLES, dataset_sites, head_frame, labelled, stored_values
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.models import KINDS, Site, found_device
from lensclust.parallel import in_parallel
from lensclust.progress import progress_bar
from lensclust.prompts import in_type_of, label_text
from lensclust.results import mean_interval, permutation_p
from probes.design import Design, Units, design
from probes.linear.site_fits import PROBES, SiteFit, SiteRows, class_counts, fit_site

log = logging.getLogger(__name__)

# Relative to the mean eigenvalue; below this a rank-deficient scatter has no stable solution.
LEAST_PENALTY = 1e-9


@checked_arguments
def probe(
    acts: xr.Dataset,
    *,
    target: str = "task",
    groups: str | None = "template",
    kind: str = "ridge",
    penalties: Sequence[float | int] = (1e-2, 1e-4, 1.0),
    control: str | None = "input",
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    folds: int = 5,
    permutations: int = 100,
    exchange: str = "labels",
    units: Units = None,
    seed: int = 0,
    device: Any = None,
    jobs: int = -1,
    progress: bool = True,
) -> ProbeSweep:
    """Fit a linear probe for a label at every site and score it on held-out groups.

    Args:
        acts: activations from `lensclust.extract`, in memory or opened from disk (then the rows
            of each site are read twice, in batches).
        target: the label to read; a coordinate of ``prompt``.
        groups: rows that share this label stay on one side of every split; None splits rows.
        kind: ``ridge`` (least squares on -1 and 1), ``lda``, ``mass_mean`` (nearest class mean)
            or ``logistic`` (multinomial; every fold, control and permutation is a separate fit,
            so use fewer).
        penalties: all are reported; probes of the first are kept, plotted and ranked. In units
            of the mean eigenvalue of the training scatter. ``mass_mean`` has none.
        control: the label whose values get random targets in control tasks; None for no
            selectivity.
        kinds: only these kinds of site (``"resid"``, ``"head"``, ...).
        position: which read position, if the activations hold several.
        folds: number of splits.
        permutations: relabellings in the null; p is at least 1 / (permutations + 1) and 1 / the
            number of distinct relabellings. 0 for none.
        exchange: what the null exchanges: ``labels`` (of whole units) or ``rows`` (single rows
            within their group: valid only if labels were assigned row by row).
        units: rows that keep a common label under the null (`probes.design`): a column, several,
            one value per row, or ``"rows"``. Default: those of one wording, from the columns, else
            of one group.
        seed: of folds, control tasks and permutations.
        device: of the products and decompositions (`probes.arrays`), in this process alone; meant
            for a GPU with fast float64. Equal to the CPU's up to rounding. Not for ``logistic``.
        jobs: worker processes (joblib's ``n_jobs``).

    Returns:
        ``accuracy``, ``balanced_accuracy`` and ``selectivity`` (accuracy minus the mean accuracy
        on control tasks) by site and penalty, each with its permuted-label null.

    Raises:
        InputError: if a label does not exist or has one value, there are more folds than groups,
            nothing can be exchanged, activations are not finite, or there is no such device.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="both")
    >>> acts = lc.extract(lc.load("native:sif-small"), prompts, "resid")
    >>> sweep = probe(acts, target="input", groups=None, control=None, jobs=1)
    >>> bool((sweep.predict(acts, "resid 0") == acts.input.values).all())  # the last token's own
    True
    """
    if kind not in PROBES:
        raise InputError(f"probe: kind {kind!r} is not known: expected one of {PROBES}")
    used = [float("nan")] if kind == "mass_mean" else [float(penalty) for penalty in penalties]
    if not used or any(penalty < LEAST_PENALTY for penalty in used):
        raise InputError(f"probe: penalties={penalties}, expected numbers from {LEAST_PENALTY} on")
    if permutations < 0:
        raise InputError(f"probe: permutations={permutations}, expected 0 or more")
    if device is not None and kind == "logistic":
        raise InputError(f"probe: device={device!r}, but logistic probes are fitted on the CPU")
    there = None if device is None else found_device(device)
    every = acts.sizes.get("prompt", 0) if isinstance(acts, xr.Dataset) else 0
    kept, unlabelled = labelled("probe", acts, target=target, groups=groups, control=control)
    acts = acts.isel(prompt=kept) if unlabelled else acts
    plan = design(
        acts,
        target=target,
        groups=groups,
        control=control,
        folds=folds,
        permutations=permutations,
        exchange=exchange,
        units=units,
        seed=seed,
    )
    sites = dataset_sites(acts, kinds)
    calls = (
        delayed(fit_site)(SiteRows.of(acts, site, position, there), plan, kind, used)
        for site in sites
    )
    work = in_parallel(calls, jobs=jobs if there is None else 1)
    fits: list[SiteFit] = []
    # Matrices are small: a second thread costs more than it saves. (joblib limits its workers.)
    with threadpool_limits(1), progress_bar("probe", len(sites), enabled=progress) as advance:
        for fit in work:
            fits.append(fit)
            advance()
    notes = unlabelled + list(plan.notes)
    fold = np.full(every, -1)
    fold[kept] = plan.fold
    if stopped := sum(fit.unconverged for fit in fits):
        notes.append(f"{stopped} fits stopped before they converged")
    for note in notes:
        log.warning("probe: %s", note)
    place = {"position": position or str(acts["position"].values[0]), "by": target, "probe": kind}
    frame = pd.DataFrame(
        [
            {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
            | place
            | {"penalty": penalty}
            | row
            for index, penalty in enumerate(used)
            for metric, scores in _scores([fit.hits[index] for fit in fits], plan).items()
            for site, row in zip(sites, _against_null(metric, scores, plan), strict=True)
        ]
    ).astype({"head": "Int64"})
    return ProbeSweep(
        frame=frame,
        directions=_by_variable(acts, sites, fits, target, plan.names),
        fold=fold,
        notes=tuple(notes),
        target=target,
        probe=kind,
        penalty=used[0],
    )


def _scores(
    hits: Sequence[Int[np.ndarray, "fold class labelling"]], plan: Design
) -> dict[str, Float[np.ndarray, "site fold scored"]]:
    """Each metric of each site, fold and labelling (true first, then permuted)."""
    total = np.stack(
        [
            class_counts(plan.codes[plan.fold == fold], len(plan.names))
            for fold in range(plan.n_folds)
        ]
    )
    right = np.stack(hits)
    accuracy = right.sum(2) / total.sum(1)
    balanced = (right / np.maximum(total, 1)).sum(2) / (total > 0).sum(1)
    controls = slice(1, 1 + plan.n_controls)
    scores = {"accuracy": accuracy, "balanced_accuracy": balanced}
    if plan.n_controls:
        scores["selectivity"] = accuracy - accuracy[..., controls].mean(-1, keepdims=True)
    return {name: np.delete(values, controls, axis=-1) for name, values in scores.items()}


def _against_null(
    metric: str, scores: Float[np.ndarray, "site fold scored"], plan: Design
) -> list[dict[str, Any]]:
    """Mean over folds with its interval and its null of permuted labels."""
    means = scores.mean(1)
    value, null = means[:, 0], means[:, 1:]
    if not null.size and plan.smallest_p == 1:
        null = means[:, :1]  # without any other labelling the true one is the null
    # Folds share training rows: the variance of their mean is that of k scores plus k / (k - 1).
    widened = np.sqrt(1 + plan.n_folds / (plan.n_folds - 1))
    unknown = np.full(len(value), np.nan)
    p, corrected = (
        (permutation_p(value, reference) for reference in (null, null.max(0, keepdims=True)))
        if null.size
        else (unknown, unknown)
    )
    rows = []
    for index, over_folds in enumerate(scores[:, :, 0]):
        mean, low, high = mean_interval(over_folds)
        rows.append(
            {
                "metric": metric,
                "value": float(value[index]),
                "ci_low": mean - widened * (mean - low),
                "ci_high": mean + widened * (high - mean),
                "null_mean": float(null[index].mean()) if null.size else float("nan"),
                "null_std": float(null[index].std(ddof=1)) if null.shape[1] > 1 else float("nan"),
                "p": float(p[index]),
                "p_corrected": float(corrected[index]),
                "smallest_p": plan.smallest_p,
                "n_folds": plan.n_folds,
                "exchanged": plan.exchanged,
            }
        )
    return rows


def _by_variable(
    acts: xr.Dataset, sites: Sequence[Site], fits: Sequence[SiteFit], target: str, names: np.ndarray
) -> xr.Dataset:
    """Weights and intercepts of all sites, in the layout of the activations."""
    variables: dict[str, xr.DataArray] = {}
    for variable, axis in dict.fromkeys(VARIABLES[site.kind] for site in sites):
        pairs = zip(sites, fits, strict=True)
        own = [fit for site, fit in pairs if VARIABLES[site.kind][0] == variable]
        axes = [axis, "head"] if "head" in acts[variable].dims else [axis]
        sizes = [acts.sizes[name] for name in axes]
        coords = {name: acts[name].values for name in axes} | {target: names}
        weights = np.stack([fit.weights for fit in own])
        intercepts = np.stack([fit.intercepts for fit in own])
        variables[variable] = xr.DataArray(
            weights.reshape(*sizes, *weights.shape[1:]),
            dims=(*axes, target, "d_head" if variable == "z" else "d_model"),
            coords=coords,
        )
        variables[f"{variable}_intercept"] = xr.DataArray(
            intercepts.reshape(*sizes, -1), dims=(*axes, target), coords=coords
        )
    if any(site.kind == "head" for site in sites):
        variables["head_frame"] = head_frame(acts)
    return xr.Dataset(variables)


@dataclass(frozen=True, repr=False)
class ProbeSweep(Shown):
    """Held-out scores of one kind of linear probe at each site, and the probes.

    Attributes:
        frame: one row per site, penalty and metric: ``site, kind, layer, head, position, by,
            probe, penalty, metric, value, ci_low, ci_high, null_mean, null_std, p, p_corrected,
            smallest_p, n_folds, exchanged``. ``value`` is the mean over folds; the interval is
            over folds; ``exchanged`` names the units of the null.
        directions: a linear score for each label, fitted to all rows with the first penalty, by
            variable of the activations: ``resid (layer, label, d_model)``, ``z (block, head,
            label, d_head)``, with intercepts ``resid_intercept``, ``z_intercept``. They apply to
            activations as stored: ``x @ direction + intercept``, the highest score wins.
        fold: the fold in which each prompt was tested; -1 where it was left out.
        notes: caveats of the scores, one sentence each.
        target, probe, penalty: the label, the kind of probe and the first penalty (NaN without).
    """

    frame: pd.DataFrame
    directions: xr.Dataset
    fold: Int[np.ndarray, " prompt"]
    notes: tuple[str, ...]
    target: str
    probe: str
    penalty: float

    def best(self, kind: str = "resid", *, metric: str = "accuracy") -> Site:
        """The site of a kind with the highest score; ties go to the earliest layer.

        The best of many is biased upwards: report its ``p_corrected``, or choose on one set of
        prompts and report on another.
        """
        rows = self._scores(metric)
        rows = rows[rows["kind"] == kind]
        if rows.empty:
            raise InputError(f"best: no site of kind {kind!r}, only {set(self.frame['kind'])}")
        return Site.parse(str(rows.loc[rows["value"].idxmax(), "site"]))

    def direction(self, label: Any, site: Site | str) -> Float[np.ndarray, " d"]:
        """Unit vector that raises a label's score, in the coordinates of stored activations.

        Probes of heads read a head's contribution to the residual stream, so their direction is
        the change of ``z`` whose contribution, ``direction @ W_O``, points along the probe.

        Raises:
            InputError: if the sweep does not hold the site or label, or activations are constant.
        """
        kinds = isinstance(label, (str, Site)) and str(label).partition(" ")[0] in KINDS
        if kinds and " " in str(label) and str(site).partition(" ")[0] not in KINDS:
            raise InputError(
                f"direction: {str(label)!r} given as label and {str(site)!r} as site, expected the "
                f"label first: direction({str(site)!r}, {str(label)!r})"
            )
        weights, _ = self._at(place := Site.parse(site) if isinstance(site, str) else site)
        label = label_text(label)
        if label not in weights[self.target].values:
            known = weights[self.target].values.tolist()
            raise InputError(f"direction: {label!r} is not a {self.target}: {known}")
        vector = weights.sel({self.target: label}).values
        if place.kind == "head":
            found = self.directions["head_frame"].sel(block=place.layer, head=place.head)
            frame = found.transpose("d_head", "rank").values
            vector = np.linalg.pinv(frame.astype(np.float64) @ frame.T) @ vector
        length = np.linalg.norm(vector)
        if length == 0:
            raise InputError(f"direction: nothing varies at {str(place)!r}, so nothing points")
        return vector / length

    def predict(
        self, acts: xr.Dataset, site: Site | str, *, position: str | None = None
    ) -> np.ndarray:
        """Predict the label of each prompt of an activation set with a site's probe.

        Where the activations hold the label as numbers, numbers are returned, else texts.

        Raises:
            InputError: if the sweep or the activations do not hold the site.
        """
        place = Site.parse(site) if isinstance(site, str) else site
        weights, intercepts = self._at(place)
        values = stored_values(acts, place, position=position).astype(np.float64)
        scores = values @ weights.values.T + intercepts.values
        names = weights[self.target].values
        if self.target in acts.coords:
            names = in_type_of(acts[self.target].values, names)
        return names[scores.argmax(1)]

    def plot(self, metric: str = "accuracy") -> Any:
        """Score by layer with the band of permuted labels; a heat map for heads."""
        rows = self._scores(metric)
        caption = f"{self.probe} probe, mean over held-out folds."
        charts = [
            figures.curves(
                group,
                band=None if group["null_std"].isna().any() else ("null_mean", "null_std"),
                title=f"{metric.capitalize().replace('_', ' ')} of {self.target}, {kind}",
                caption=caption,
                y_title=metric,
            )
            if group["head"].isna().all()
            else figures.head_map(
                group,
                title=f"{metric.capitalize().replace('_', ' ')} of {self.target}, {kind}",
                caption=caption,
            )
            for kind, group in rows.groupby("kind", sort=False)
        ]
        return charts[0] if len(charts) == 1 else figures.stack(charts)

    def __repr__(self) -> str:
        best = self._scores("accuracy").nlargest(1, "value").iloc[0]
        return (
            f"ProbeSweep(target={self.target!r}, {self.probe}, {self.frame['site'].nunique()} "
            f"sites; best accuracy {best['value']:.2f} at {best['site']}, permuted labels "
            f"{best['null_mean']:.2f}, corrected p {best['p_corrected']:.2g})"
        )

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        shown = ["site", "value", "ci_low", "ci_high", "null_mean", "null_std", "p", "p_corrected"]
        return (self._scores("accuracy").nlargest(10, "value")[shown],)

    def _scores(self, metric: str) -> pd.DataFrame:
        known = list(self.frame["metric"].unique())
        if metric not in known:
            raise InputError(f"metric {metric!r} is not known: expected one of {known}")
        rows = self.frame[self.frame["metric"] == metric]
        return rows[rows["penalty"].isna() | (rows["penalty"] == self.penalty)]

    def _at(self, site: Site) -> tuple[xr.DataArray, xr.DataArray]:
        if str(site) not in set(self.frame["site"]):
            raise InputError(f"site {str(site)!r} was not probed: {sorted(set(self.frame.site))}")
        variable, axis = VARIABLES[site.kind]
        place = {axis: site.layer} | ({} if site.head is None else {"head": site.head})
        return (
            self.directions[variable].sel(place),
            self.directions[f"{variable}_intercept"].sel(place),
        )
