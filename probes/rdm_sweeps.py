"""The result of holding hypotheses against every site: scores beside their nulls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lensclust import figures
from lensclust.errors import InputError
from lensclust.showing import Shown


@dataclass(frozen=True, repr=False)
class RSA(Shown):
    """How well hypotheses fit the RDMs of each site, beside the same under permuted prompts.

    Attributes:
        frame: one row a site and way of scoring: ``site, kind, layer, head, position,
            hypothesis, distance, compare, standardised, controlled`` (nuisances taken out),
            ``value, null_mean, null_std, p, p_corrected, ceiling_low, ceiling_high, n,
            permutations``.
        notes: what a reader of the scores should know, one sentence each.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]

    def plot(self, **choice: Any) -> Any:
        """Score by layer, a line a hypothesis; heat maps where there are heads.

        Ways of scoring are chosen by column (``compare="pearson"``); the first of each
        otherwise, with nuisances taken out where that was done.
        """
        rows = self._chosen(choice)
        first = rows.iloc[0]
        caption = (
            f"{first['compare']}, {first['distance']} distance, "
            f"{'standardised, ' if first['standardised'] else ''}"
            f"nuisances {'taken out' if first['controlled'] else 'left in'}."
        )
        charts = []
        for kind, group in rows.groupby("kind", sort=False):
            if group["head"].isna().all():
                chart = figures.curves(
                    group,
                    color="hypothesis",
                    title=f"Fit of hypotheses, {kind}",
                    caption=caption,
                    y_title=str(first["compare"]),
                )
                charts.append(chart)
                continue
            charts += [
                figures.head_map(each, title=f"Fit of {name}, {kind}", caption=caption)
                for name, each in group.groupby("hypothesis", sort=False)
            ]
        return charts[0] if len(charts) == 1 else figures.stack(charts)

    def _chosen(self, choice: Mapping[str, Any]) -> pd.DataFrame:
        rows = self.frame
        for column in ("distance", "compare", "standardised", "controlled"):
            known = list(rows[column].unique())
            value = choice.get(column, True if column == "controlled" and True in known else None)
            value = known[0] if value is None else value
            if value not in known:
                raise InputError(f"plot: {column}={value!r}, expected one of {known}")
            rows = rows[rows[column] == value]
        return rows

    def __repr__(self) -> str:
        rows = self._chosen({}).dropna(subset=["value"])
        best = [
            f"{name} {group['value'].max():.2f} at {group.loc[group['value'].idxmax(), 'site']}"
            for name, group in rows.groupby("hypothesis", sort=False)
        ]
        return f"RSA({self.frame['site'].nunique()} sites; best {', '.join(best) or 'none'})"

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        shown = ["site", "hypothesis", "value", "null_mean", "null_std", "p", "p_corrected"]
        return (self._chosen({}).nlargest(10, "value")[shown],)
