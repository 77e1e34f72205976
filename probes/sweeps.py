"""The result of probing every site: scores beside their nulls, and probes that can be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from lensclust import figures
from lensclust.activations import VARIABLES, stored_values
from lensclust.errors import InputError
from lensclust.labels import in_type_of, label_text
from lensclust.showing import Shown
from lensclust.sites import KINDS, Site


@dataclass(frozen=True, repr=False)
class ProbeSweep(Shown):
    """Held-out scores of one kind of linear probe at each site, and the probes themselves.

    Attributes:
        frame: one row a site, penalty and metric: ``site, kind, layer, head, position, by,
            probe, penalty, metric, value, ci_low, ci_high, null_mean, null_std, p, p_corrected,
            smallest_p, n_folds, exchanged``. ``value`` is the mean over folds; the interval is
            over folds; ``exchanged`` says what the null permutes.
        directions: a linear score for each label, fitted to all rows with the first penalty, by
            variable of the activations: ``resid (layer, label, d_model)``, ``z (block, head,
            label, d_head)``, with intercepts ``resid_intercept``, ``z_intercept``. They apply to
            activations as stored: ``x @ direction + intercept``, the highest score wins.
        fold: the fold in which each prompt was tested; -1 where it was left out.
        notes: what a reader of the scores should know, one sentence each.
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
        """Unit vector that raises a label's score, to be added to the activations as stored.

        Probes of heads see a head's contribution to the residual stream, so theirs is the change
        of ``z`` whose contribution, ``direction @ W_O``, points along the probe.

        Raises:
            InputError: if the sweep does not hold the site or label, or nothing varies there.
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
        """The label that the probe of a site reads off each prompt of an activation set.

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
        """Score by layer over its permuted-label band; a heat map where there are heads."""
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
