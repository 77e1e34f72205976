"""Activation patching: replace a prompt's state by another's and measure the answer.

The effect of a site at a position is the gain of the metric when the base prompt's state is
replaced by its source's: 0 if the state does not matter, the whole gap between the two prompts if
everything the metric depends on passes through it. Every value is exact, not first-order
(`probes.patching.attribution` ranks sites first if there are too many). Effects come with a
bootstrap interval over pairs and a sign-flip p, with common signs for base prompts of one wording;
p is not corrected for the number of sites.

Source: Meng et al. (arXiv 2202.05262) and Wang et al. (arXiv 2211.00593) for the normalised logit
difference; interval, and p where no wording is shared, are TransformerLens' `PatchingResult`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel
from transformer_lens.patching import PatchingResult

from lensclust import figures
from lensclust.activations import extract, stored_values
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import Readout, answers, require_fits
from lensclust.models import Site, SiteSelector, resolve
from lensclust.prompts import Prompts
from probes.design import COARSE, TASK, Units, exchangeable, flipped_p, smallest_flip_p
from probes.patching.metrics import DIFFERENCE, metric_of
from probes.patching.replay import replay

log = logging.getLogger(__name__)

EVERY = "every"


@dataclass(frozen=True, repr=False)
class Patching(Shown):
    """Exact patching effects of each site and position, for every pair of prompts.

    Attributes:
        frame: one row per site and position: ``site, kind, layer, head, position, metric, value,
            normalized, ci_low, ci_high, p, n, n_units``. ``value`` is the mean effect over the
            ``n`` pairs, in the metric's units, ``ci_*`` its 95 % bootstrap interval, ``p`` that of
            effects sign-flipped in ``n_units`` units; ``normalized`` is the mean effect over the
            mean gap.
        effects: patched minus unpatched metric ``(site, position, prompt)``; NaN where a pair has
            no such position.
        baseline: metric of the unpatched base prompts ``(prompt)``.
        source_baseline: metric of the source prompts ``(prompt)``.
    """

    frame: pd.DataFrame
    effects: xr.DataArray
    baseline: xr.DataArray
    source_baseline: xr.DataArray

    def best(self, kind: str = "resid", *, position: str | int | None = None) -> Site:
        """The site of a kind with the largest mean effect; ties go to the earliest.

        Choose on one set of pairs and report on another: the best of many is biased upwards.
        """
        rows = self.frame[self.frame["kind"] == kind]
        if position is not None:
            rows = rows[rows["position"] == position]
        if rows.empty:
            known = self.frame[["kind", "position"]].drop_duplicates().to_numpy().tolist()
            raise InputError(f"best: no site of kind {kind!r} at {position or 'any'!r}, in {known}")
        return Site.parse(str(rows.loc[rows["value"].idxmax(), "site"]))

    def to_patching_result(self) -> PatchingResult:
        """The same numbers as TransformerLens' result, in the rows of ``frame``."""
        cells = self.effects.transpose("site", "position", "prompt").values
        return _result(
            cells.reshape(len(self.frame), -1),
            self.baseline.values,
            self.frame[["site", "kind", "layer", "head", "position"]],
            str(self.frame["metric"].iloc[0]),
        )

    def plot(self) -> Any:
        """Mean effect by layer, one line per position; a heat map for heads."""
        several = self.frame["position"].nunique() > 1
        metric = str(self.frame["metric"].iloc[0])
        label = f"effect on {metric.replace('_', ' ')}"
        gap = float((self.source_baseline - self.baseline).mean())
        charts = []
        for kind, rows in self.frame.groupby("kind", sort=False):
            words = {
                "title": f"Patching {kind}",
                "caption": f"Mean over {rows['n'].max()} pairs; the whole gap is {gap:.3g}.",
            }
            if rows["head"].isna().all():
                color = "position" if several else None
                charts.append(figures.curves(rows, color=color, band=None, y_title=label, **words))
            else:
                facet = "position" if several else None
                charts.append(figures.head_map(rows, facet=facet, value_title=label, **words))
        return charts[0] if len(charts) == 1 else figures.stack(charts)

    def __repr__(self) -> str:
        best = self.frame.iloc[int(self.frame["value"].argmax())]
        return (
            f"Patching({self.frame['site'].nunique()} sites, {self.effects.sizes['prompt']} pairs; "
            f"largest effect on {best['metric']} {best['value']:.3g} "
            f"[{best['ci_low']:.3g}, {best['ci_high']:.3g}] at {best['site']}, "
            f"{best['position']}, {best['normalized']:.0%} of the gap)"
        )


@checked_arguments
def patch(
    model: TransformerLensModel,
    base: Prompts,
    source: Prompts,
    sites: SiteSelector,
    *,
    at: str | Sequence[str] = "answer",
    metric: str | Readout = DIFFERENCE,
    units: Units = None,
    resamples: int = 1000,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Patching:
    """Replace states of each base prompt by those of its source, one site at a time.

    Args:
        model: a hooked model, in eval mode.
        base: the prompts to run.
        source: the donors: row i gives its states to row i of ``base``.
        sites: kinds or places to patch (`lensclust.models.sites`).
        at: positions by name, resolved in each prompt, so that lengths may differ; ``"every"``
            for each token, by its index, which needs pairs of equal length.
        metric: ``logit_difference`` (first token of the source's answer minus that of the
            base's), ``probability`` or ``accuracy`` (of the source's first token), or a function
            of logits ``(row, vocab)`` and pair numbers that gives one number per row.
        units: pairs with dependent effects in p (`probes.design`): a column of the base prompts,
            several, one value per pair, or ``"rows"``. Default: those whose base prompts share
            wording and task, from the columns.
        resamples: of the bootstrap and of the sign flips (at most all).
        seed: of both.
        batch_tokens: as in `replay`, which describes the cost by model.
        progress: show bars.

    Raises:
        InputError: if the prompts are not pairs, a site or position does not exist, answers that
            the metric needs are missing or equal, a metric is not a number, or the model is in
            training mode.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> base, source = prompts.take(range(4)), prompts.take(range(9, 13))
    >>> result = patch(model, base, source, ["resid 0", "resid 6"], metric="probability")
    >>> bool(np.isclose(result.frame.normalized.iloc[-1], 1))  # the last state decides the answer
    True
    """
    chosen = require_pairs(model, base, source, sites, caller="patch")
    if resamples < 1:
        raise InputError(f"patch: resamples={resamples}, expected at least 1")
    name, readout = metric_of(metric, base, source, caller="patch")
    unit = _units(base, units)
    places, held, base, source = _places(base, source, at)
    budget: dict[str, Any] = {"batch_tokens": batch_tokens}
    before, gap_end = (_numbers(answers(model, p, readout, **budget)) for p in (base, source))
    acts = extract(model, source, chosen, at=list(places), progress=progress, **budget)
    effects = np.full((len(chosen), len(places), len(base)), np.nan)
    tables = []
    for index, (place, shown) in enumerate(places.items()):
        rows = np.flatnonzero(held[:, index])
        edits = [
            (site, torch.from_numpy(stored_values(acts, site, position=place)[rows]))
            for site in chosen
        ]
        here = torch.from_numpy(rows)
        patched = replay(
            model,
            base.take(rows),
            edits,
            lambda logits, numbers, here=here: readout(logits, here[numbers]),
            at=place,
            progress=progress,
            **budget,
        )
        effects[:, index, rows] = _numbers(patched, chosen) - before[rows]
        tables.append(
            _table(
                effects[:, index, rows],
                before[rows],
                gap_end[rows],
                chosen,
                None if unit is None else np.unique(unit[rows], return_inverse=True)[1],
                resamples,
                seed,
            )
        )
        tables[-1].insert(4, "position", shown)
    frame = pd.concat(tables, ignore_index=True).assign(metric=name)
    return Patching(
        frame=_in_order(frame, chosen, list(places.values())),
        effects=xr.DataArray(
            effects,
            dims=("site", "position", "prompt"),
            coords={"site": [str(s) for s in chosen], "position": list(places.values())},
        ),
        baseline=xr.DataArray(before, dims="prompt"),
        source_baseline=xr.DataArray(gap_end, dims="prompt"),
    )


def require_pairs(
    model: TransformerLensModel, base: Prompts, source: Prompts, sites: SiteSelector, *, caller: str
) -> list[Site]:
    """Check that prompts are pairs and compatible with the model; return the sites.

    Raises:
        InputError: if they are not; names ``caller``.
    """
    if len(base) != len(source):
        raise InputError(
            f"{caller}: {len(base)} base prompts and {len(source)} sources given, expected pairs"
        )
    for prompts in (base, source):
        require_fits(model, prompts, caller=caller)
    return resolve(model, sites)


def _units(base: Prompts, units: Units) -> Int[np.ndarray, " pair"] | None:
    """Units of pairs with dependent effects; None for independent pairs."""
    labels = base.rows[TASK].to_numpy() if TASK in base.rows else np.zeros(len(base))
    found = exchangeable(labels, base.rows, by=TASK, units=units, call="patch")
    if found.wording is None:
        return None
    number = int(found.unit.max()) + 1
    if number == len(base):
        return None
    if (least := smallest_flip_p(number, 10**9)) > COARSE:
        log.warning("patch: %d wordings of base prompts: p cannot be below %.2g", number, least)
    return found.unit


def _places(
    base: Prompts, source: Prompts, at: str | Sequence[str]
) -> tuple[dict[str, str | int], Bool[np.ndarray, "pair position"], Prompts, Prompts]:
    """Names and labels of the positions, pairs that have them, and prompts with these names."""
    if at != EVERY:
        names = [at] if isinstance(at, str) else list(at)
        if not names or len(set(names)) < len(names):
            raise InputError(f"patch: positions must be given and differ, given {names}")
        for prompts in (base, source):
            for name in names:
                prompts.position(name)
        return {n: n for n in names}, np.ones((len(base), len(names)), bool), base, source
    odd = (base.lengths != source.lengths).nonzero()[:, 0]
    if len(odd):
        pair = int(odd[0])
        raise InputError(
            f"patch: at={EVERY!r} needs pairs of equal length, but in pair {pair} the base has "
            f"{int(base.lengths[pair])} tokens and the source {int(source.lengths[pair])}; a named "
            "position (at='answer') aligns them"
        )
    longest = int(base.lengths.max())
    # A pair without the token uses its last one and is left out afterwards.
    index = torch.arange(longest).expand(len(base), longest).minimum(base.lengths[:, None] - 1)
    spans = {f"token {i}": torch.stack([index[:, i], index[:, i] + 1], 1) for i in range(longest)}
    held = (torch.arange(longest) < base.lengths[:, None]).numpy()
    named = [replace(p, spans={**(p.spans or {}), **spans}) for p in (base, source)]
    return {f"token {i}_start": i for i in range(longest)}, held, named[0], named[1]


def _numbers(values: Tensor, sites: Sequence[Site] = ()) -> np.ndarray:
    """A metric's values, checked to be finite."""
    if values.ndim != (2 if sites else 1):
        raise InputError(
            f"patch: the metric gave shape {tuple(values.shape)}, expected a number a row"
        )
    odd = (~values.isfinite()).nonzero()
    if len(odd):
        where = f"site {sites[int(odd[0, 0])]}, " if sites else "the unpatched model, "
        raise InputError(
            f"patch: the metric is not a number in {len(odd)} places (first: {where}pair "
            f"{int(odd[0, -1])})"
        )
    return values.double().numpy()


def _table(
    effects: Float[np.ndarray, "site prompt"],
    before: Float[np.ndarray, " prompt"],
    gap_end: Float[np.ndarray, " prompt"],
    sites: Sequence[Site],
    unit: Int[np.ndarray, " prompt"] | None,
    resamples: int,
    seed: int,
) -> pd.DataFrame:
    frame = pd.DataFrame(
        [{"site": str(s), "kind": s.kind, "layer": s.layer, "head": s.head} for s in sites]
    ).astype({"head": "Int64"})
    result = _result(effects, before, frame, "metric")
    low, high = result.bootstrap_ci(n_resamples=resamples, seed=seed, of_effect=True)
    gap = float((gap_end - before).mean())
    frame["value"] = effects.mean(axis=1)
    frame["normalized"] = frame["value"] / gap if gap else np.nan
    frame["ci_low"], frame["ci_high"] = low.numpy(), high.numpy()
    if unit is None:
        frame["p"] = result.permutation_pvalue(n_permutations=resamples, seed=seed).numpy()
    else:
        frame["p"] = flipped_p(effects, unit, resamples, seed=seed)[0]
    frame["n_units"] = effects.shape[1] if unit is None else int(unit.max()) + 1
    frame["n"] = effects.shape[1]
    return frame


def _result(
    effects: np.ndarray, before: np.ndarray, index: pd.DataFrame, metric: str
) -> PatchingResult:
    baseline = torch.from_numpy(before)
    return PatchingResult(
        values=torch.from_numpy(effects) + baseline,
        axis_names=[],
        index_df=index,
        metric_names=[metric],
        reduced=False,
        baseline=baseline,
    )


def _in_order(
    frame: pd.DataFrame, sites: Sequence[Site], places: Sequence[str | int]
) -> pd.DataFrame:
    """Rows by site, then by position in the given order."""
    order = np.arange(len(frame)).reshape(len(places), len(sites)).T.ravel()
    columns = ["site", "kind", "layer", "head", "position", "metric", "value", "normalized"]
    return frame.iloc[order].reset_index(drop=True)[
        [*columns, "ci_low", "ci_high", "p", "n", "n_units"]
    ]
