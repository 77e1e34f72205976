"""Representational similarity analysis (RSA): fit of hypotheses to the RDMs of sites.

Standard of evidence: each value comes with its null of permuted prompts (the same permutations at
every site; prompts of one wording and value are permuted together, `probes.design`, and p uses
their means where they differ in size), the value with nuisances (length, template, first token)
partialled out, and, since a sweep tests many sites, ``p_corrected``: the rate at which the best
site of a permuted sweep does as well (Westfall & Young 1993). `probes.similarity.mantel` describes
permutations with nuisances. A supported hypothesis means that states are arranged so, not that the
model uses it.

Sources: Kriegeskorte et al. 2008 (RSA); Nili et al. 2014 (tau-a for tied hypotheses, noise
ceiling); Diedrichsen et al. 2016 (crossnobis).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float, Int

from lensclust import figures
from lensclust.activations import dataset_sites, prompt_labels, site_values
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.models import Site
from lensclust.progress import progress_bar
from lensclust.results import permutation_p
from probes.design import Exchange, Units
from probes.similarity.dissimilarity import crossnobis, pair_index, standardised, state_distances
from probes.similarity.mantel import TRANSFORMS, MatrixTest, Scores, relabellings
from probes.similarity.representational_checks import (
    checked_hypotheses,
    checked_nuisances,
    checked_options,
    exchange_of,
    item_columns,
    item_layout,
    only_labelled,
)

log = logging.getLogger(__name__)

# Entries of the RDMs held at once.
ENTRIES = 2**24
SCORED = ["hypothesis", "distance", "compare", "standardised", "controlled"]
METHODS = {"spearman": "spearman", "tau-a": "tau-a", "pearson": "corr"}


@dataclass(frozen=True)
class _Column:
    """The RDMs of one site, one per repeat, for one distance and standardisation."""

    site: Site
    distance: str
    standardised: bool
    rdms: Float[np.ndarray, "repeat pair"]


@checked_arguments
def rsa(
    acts: xr.Dataset,
    hypotheses: str | Sequence[str] | Mapping[str, Float[np.ndarray, "prompt prompt"]],
    *,
    kinds: str | Sequence[str] | None = None,
    position: str | None = None,
    distance: str | Sequence[str] = "cosine",
    compare: str | Sequence[str] = ("spearman", "tau-a", "pearson"),
    standardise: bool | str = False,
    nuisance: Sequence[str] | Mapping[str, Float[np.ndarray, "prompt prompt"]] | None = (
        "length",
        "template",
        "first_token",
    ),
    items: str | None = None,
    repeats: str | None = None,
    within: str | None = None,
    units: Units = None,
    permutations: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> RSA:
    """Compare the RDM of every site with hypotheses, with and without nuisances partialled out.

    Args:
        acts: activations from `lensclust.extract` or `lensclust.pooled`.
        hypotheses: name -> dissimilarities of the prompts (`hypothesis`, `combine_hypotheses`),
            or names of labels, for 0 where shared and 1 elsewhere.
        kinds: only these kinds of site.
        position: which read position, if the activations hold several.
        distance: between states: ``cosine``, ``correlation``, ``euclidean`` (not squared) or
            ``crossnobis`` (needs repeats), one or several.
        compare: ``spearman``, ``tau-a`` (Kendall's, ties in the denominator) or ``pearson``
            (of the raw entries), one or several.
        standardise: z-score each feature over the prompts first; ``"both"`` reports both.
        nuisance: labels (numbers by difference, others equal or not) or name -> matrix to partial
            out; constant ones are left out with a note. None for none. `with_nuisances` labels
            activations with ``length`` and ``first_token``.
        items: the label shared by the repeats of one item (with ``repeats``).
        repeats: the label that distinguishes the repeats of an item, such as ``template``; every
            item must occur once in each. RDMs are then item x item, one per repeat (crossnobis:
            one over all), the value is the mean over repeats, and the noise ceiling is given.
        within: permute single prompts within values of this label.
        units: prompts that keep a common value of the hypothesis under the null
            (`probes.design`): a column, several, one value per item, or ``"rows"``. Default:
            those of one wording and value, from the columns.
        permutations: relabellings in the null, at most all; p is at least
            1 / (permutations + 1) and 1 / the number of distinct relabellings.
        seed: of permutations.
        progress: show a bar.

    Returns:
        Scores of each site, with one-sided p. A site with constant states, or whose RDM the
        nuisances explain, has NaN.

    Raises:
        InputError: if a hypothesis or nuisance has the wrong size, is constant, not symmetric or
            not finite, the nuisances leave nothing of a hypothesis, a label or site does not
            exist, items do not stand once in each repeat, or a state is not finite.

    >>> import lensclust as lc
    >>> acts = lc.extract(lc.load("native:sif-small"), lc.tasks.sif().where(split="both"), "resid")
    >>> found = rsa(acts, ["input", "task"], nuisance=["template"], compare="spearman")
    >>> rows = found.frame.query("site == 'resid 0' and controlled").set_index("hypothesis")
    >>> bool(rows.value["input"] > 0.3 and rows.p["input"] < 0.01)  # the last token is the input
    True
    """
    distances, compares, scales = checked_options(
        distance, compare, standardise, repeats, permutations
    )
    named = () if nuisance is None else nuisance
    acts, hypotheses, named, unlabelled = only_labelled(
        acts, hypotheses, named, items=items, repeats=repeats, within=within
    )
    layout = item_layout(acts, items, repeats)
    matrices = checked_hypotheses(acts, hypotheses, layout)
    unwanted, notes = checked_nuisances(acts, named, layout)
    notes = unlabelled + notes
    warned = list(notes)
    options = {"permutations": permutations, "seed": seed}
    found: dict[str, Exchange] = {}
    if within is not None:
        block = np.unique(prompt_labels(acts, within)[layout[0]], return_inverse=True)[1]
        same = relabellings(layout.shape[1], block=block, **options)
        orders = dict.fromkeys(matrices, same)
        smallest = dict.fromkeys(matrices, 1 / (permutations + 1))
    else:
        columns = item_columns(acts, layout)
        found = {n: exchange_of(m, columns, name=n, units=units) for n, m in matrices.items()}
        orders = {name: each.orders(**options) for name, each in found.items()}
        smallest = {name: each.smallest_p(permutations) for name, each in found.items()}
        notes += [note for each in found.values() for note in each.notes]
        warned += [each.coarse for each in found.values() if each.coarse]
    tests = {
        (name, method, controlled): MatrixTest.of(
            matrix, unwanted if controlled else (), method, name=name
        )
        for name, matrix in matrices.items()
        for method in compares
        for controlled in ([False, True] if unwanted else [False])
    }
    of_units = {
        name: UnitTests.of(each, matrices[name], unwanted, compares, options)
        for name, each in found.items()
        if np.ptp(np.bincount(each.unit)) > 0
    }
    for note in warned:
        log.warning("rsa: %s", note)
    sites = dataset_sites(acts, kinds)
    measured = _columns(acts, sites, position, distances, scales, layout)
    rows, nulls = [], []
    pairs = layout.shape[1] * (layout.shape[1] - 1) // 2
    total = len(sites) * len(distances) * len(scales)
    with progress_bar("rsa", total, enabled=progress) as advance:
        for chunk in _chunks(measured, max(1, ENTRIES // (pairs * len(layout)))):
            for row, null in _scored(chunk, tests, orders, of_units, seed):
                rows.append(row)
                nulls.append(null)
            advance(len(chunk))
    frame = pd.DataFrame(rows)
    frame["p_corrected"] = _corrected(frame, nulls)
    frame["smallest_p"] = frame["hypothesis"].map(smallest)
    frame["position"] = position or str(acts["position"].values[0])
    frame["n"], frame["permutations"] = layout.shape[1], permutations
    places = ["site", "kind", "layer", "head", "position"]
    scores = ["value", "null_mean", "null_std", "p", "p_corrected", "smallest_p"]
    scores += ["ceiling_low", "ceiling_high", "n", "permutations"]
    ordered = frame[[*places, *SCORED, *scores]].astype({"head": "Int64"})
    return RSA(frame=ordered, notes=tuple(notes))


@dataclass(frozen=True)
class UnitTests:
    """Tests on mean distances between units, for p where units differ in size.

    Under relabelling a large unit would take its many pairs to another label; between means every
    pair of units weighs equally.

    Attributes:
        unit: of each item.
        tests: by comparison and whether nuisances are partialled out; missing where, between
            units, they leave nothing of the hypothesis.
        orders: of the units.
    """

    unit: Int[np.ndarray, " item"]
    tests: Mapping[tuple[str, bool], MatrixTest]
    orders: Int[np.ndarray, "labelling unit"]

    @classmethod
    def of(
        cls,
        exchange: Exchange,
        hypothesis: Float[np.ndarray, "item item"],
        nuisances: Sequence[Float[np.ndarray, "item item"]],
        compares: Sequence[str],
        options: Mapping[str, Any],
    ) -> UnitTests:
        """Average a hypothesis and nuisances over the items of each pair of units."""
        unit, n = exchange.unit, len(exchange.label)
        own, *others = (_between(np.asarray(each), unit) for each in (hypothesis, *nuisances))
        varying = [each for each in others if np.ptp(each[pair_index(n)]) > 0]
        tests = {}
        for method in compares:
            for controlled in [False, True] if nuisances else [False]:
                # A hypothesis that nuisances explain between units is tested between items.
                with suppress(InputError):
                    tests[method, controlled] = MatrixTest.of(
                        own, varying if controlled else (), method, name=exchange.by
                    )
        place = np.zeros(n, dtype=np.int64)
        single = replace(exchange, unit=np.arange(n), place=place, wording=None)
        return cls(unit, tests, single.orders(**options))

    def scores(
        self,
        entries: Float[np.ndarray, "matrix pair"],
        compare: str,
        controlled: bool,
        *,
        seed: int,
    ) -> Scores | None:
        """The statistic of p and its null; None where there is no test between units."""
        test = self.tests.get((compare, controlled))
        if test is None:
            return None
        items, pairs = len(self.unit), pair_index(len(self.orders[0]))
        square = np.zeros((len(entries), items, items))
        first, second = pair_index(items)
        square[:, first, second] = entries
        square += square.transpose(0, 2, 1)
        means = np.stack([_between(each, self.unit)[pairs] for each in square])
        return test.scores(test.transformed(means), self.orders, seed=seed)


def _between(
    matrix: Float[np.ndarray, "item item"], unit: Int[np.ndarray, " item"]
) -> Float[np.ndarray, "unit unit"]:
    """Mean over the items of each pair of units."""
    share = np.zeros((len(unit), int(unit.max()) + 1))
    share[np.arange(len(unit)), unit] = 1 / np.bincount(unit)[unit]
    return share.T @ matrix @ share


def _columns(
    acts: xr.Dataset,
    sites: Sequence[Site],
    position: str | None,
    distances: Sequence[str],
    scales: Sequence[bool],
    layout: Int[np.ndarray, "repeat item"],
) -> Iterator[_Column]:
    for site in sites:
        states = site_values(acts, site, position=position).astype(np.float64)
        for scale in scales:
            x = (standardised(states) if scale else states)[layout]
            for name in distances:
                if name == "crossnobis":
                    found = crossnobis(x)[None]
                else:
                    found = np.stack([state_distances(each, name, site=str(site)) for each in x])
                yield _Column(site, name, scale, found)


def _chunks(columns: Iterator[_Column], size: int) -> Iterator[list[_Column]]:
    chunk: list[_Column] = []
    for column in columns:
        chunk.append(column)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _scored(
    chunk: Sequence[_Column],
    tests: Mapping[tuple[str, str, bool], MatrixTest],
    orders: Mapping[str, Int[np.ndarray, "_labelling item"]],
    of_units: Mapping[str, UnitTests],
    seed: int,
) -> Iterator[tuple[dict[str, Any], Float[np.ndarray, " labelling"]]]:
    """One row per column and test, and the statistic under each labelling (true first)."""
    entries = np.concatenate([column.rdms for column in chunk])
    starts = np.cumsum([0, *(len(column.rdms) for column in chunk)])
    ceilings = {
        (index, method): noise_ceiling(column.rdms, method)
        for index, column in enumerate(chunk)
        for method in TRANSFORMS
        if len(column.rdms) > 1 and any(key[1] == method for key in tests)
    }
    residuals: dict[tuple[str, bool], np.ndarray] = {}
    for (name, method, controlled), test in tests.items():
        kept = ("rank" if method != "pearson" else method, controlled)
        if kept not in residuals:
            residuals[kept] = test.transformed(entries)
        found = test.scores(residuals[kept], orders[name], seed=seed)
        tested = found
        if name in of_units:
            tested = of_units[name].scores(entries, method, controlled, seed=seed) or found
        for index, column in enumerate(chunk):
            part = slice(starts[index], starts[index + 1])
            value, statistic = found.value[part].mean(), tested.statistic[part].mean()
            null = found.null[part].mean(0)
            low, high = ceilings.get((index, method), (np.nan, np.nan))
            site = column.site
            row = {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
            row |= {"hypothesis": name, "distance": column.distance, "compare": method}
            row |= {"standardised": column.standardised, "controlled": controlled}
            # Without any other relabelling, the true one is the null.
            shown = null if null.size else np.array([found.statistic[part].mean()])
            null = tested.null[part].mean(0)
            row |= {"value": float(value), "null_mean": float(shown.mean())}
            row |= {"null_std": float(shown.std(ddof=1)) if shown.size > 1 else 0.0}
            row["p"] = float(permutation_p(statistic, null)) if np.isfinite(value) else np.nan
            row |= {
                "ceiling_low": np.nan if controlled else low,
                "ceiling_high": np.nan if controlled else high,
            }
            yield row, np.concatenate([[statistic], null])


def _corrected(
    frame: pd.DataFrame, statistics: Sequence[Float[np.ndarray, " _labelling"]]
) -> Float[np.ndarray, " row"]:
    """Rate at which the best site of a permuted sweep does as well as each site."""
    p = np.full(len(frame), np.nan)
    for members in frame.groupby(SCORED, sort=False).indices.values():
        known = [each for each in members if np.isfinite(statistics[each][0])]
        if known:
            found = np.stack([statistics[each] for each in known])
            null = found[:, 1:].max(0, keepdims=True)
            p[known] = permutation_p(found[:, 0], null)
    return p


@dataclass(frozen=True, repr=False)
class RSA(Shown):
    """Fit of hypotheses to the RDMs of each site, with its null of permuted prompts.

    Attributes:
        frame: one row per site and scoring: ``site, kind, layer, head, position,
            hypothesis, distance, compare, standardised, controlled`` (nuisances partialled out),
            ``value, null_mean, null_std, p, p_corrected, ceiling_low, ceiling_high, n,
            permutations``.
        notes: caveats of the scores, one sentence each.
    """

    frame: pd.DataFrame
    notes: tuple[str, ...]

    def plot(self, **choice: Any) -> Any:
        """Score by layer, one line per hypothesis; heat maps for heads.

        Scorings are chosen by column (``compare="pearson"``); default the first of each, with
        nuisances partialled out where that was done.
        """
        rows = self._chosen(choice)
        first = rows.iloc[0]
        caption = (
            f"{first['compare']}, {first['distance']} distance, "
            f"{'standardised, ' if first['standardised'] else ''}"
            f"nuisances {'partialled out' if first['controlled'] else 'not partialled out'}."
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


def noise_ceiling(rdms: Float[np.ndarray, "repeat pair"], compare: str) -> tuple[float, float]:
    """Lower and upper bound of the mean score over repeats: rsatoolbox's ``boot_noise_ceiling``.

    Each repeat is compared with the mean of the others (lower) and of all, itself included
    (upper), pooled in ranks where the comparison ranks. NaN where a repeat's RDM is constant.
    Source: Nili et al. 2014.
    """
    if (np.ptp(rdms, axis=1) == 0).any():
        return float("nan"), float("nan")
    from rsatoolbox.inference.noise_ceiling import boot_noise_ceiling
    from rsatoolbox.rdm.rdms import RDMs

    with warnings.catch_warnings():
        # Silences the warning that the mean of ranks is not the best RDM for tau-a.
        warnings.simplefilter("ignore")
        low, high = boot_noise_ceiling(RDMs(rdms), method=METHODS[compare])
    return float(low), float(high)
