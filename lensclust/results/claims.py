"""Claims of a study, and the rules that decide them from measured values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from lensclust.results.statistics import REAL, Mean, Scale, holm, mean_of, q_values

Origin = Literal["paper", "reconstruction", "extension"]
Verdict = Literal["supported", "negligible", "contradicted", "inconclusive"]
LEVEL = 0.05


@dataclass(frozen=True)
class Claim:
    """A statement with its estimate, control, decision rule and verdict.

    Attributes:
        id: short name, unique in a run.
        statement: the sentence under test.
        source: where the statement comes from.
        origin: ``paper`` (the paper's words), ``reconstruction`` (its words, our
            operationalisation) or ``extension`` (ours).
        estimate: mean of the measured values.
        ci95: 95 % interval of the mean over units, NaN when undefined.
        control: name -> value with which the estimate is to be compared.
        rule: the decision rule in words, which determines the verdict.
        verdict: ``supported``, ``negligible``, ``contradicted`` or ``inconclusive``
            (:func:`decide`).
        n_seeds: number of independent runs behind the estimate.
        figures: names of the figures that show it, the most relevant first.
        unit: unit of the interval, such as ``"seed"`` or ``"input and wording"``.
        n: number of independent units, the fewest if several kinds are crossed.
        spread: smallest and largest of the values behind the mean.
        p: two-sided p that the mean is no further from the bound than the margin.
        q: false discovery rate of ``p`` among the claims of the run, NaN outside of one.
        holds_corrected: whether ``p`` is below .05 after Holm's correction over the run.
    """

    id: str
    statement: str
    source: str
    origin: Origin
    estimate: float
    ci95: tuple[float, float]
    control: Mapping[str, float]
    rule: str
    verdict: Verdict
    n_seeds: int
    figures: tuple[str, ...] = ()
    unit: str = "seed"
    n: int = 0
    spread: tuple[float, float] = (math.nan, math.nan)
    p: float = math.nan
    q: float = math.nan
    holds_corrected: bool = False

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``claims.json``; NaN becomes null."""
        return _plain(asdict(self))


def decide(
    id: str,
    statement: str,
    values: ArrayLike | Mean,
    *,
    source: str,
    origin: Origin,
    control: Mapping[str, float],
    at_least: float | int | None = None,
    at_most: float | int | None = None,
    margin: float = 0.0,
    scale: Scale = REAL,
    units: Mapping[str, np.ndarray] | None = None,
    unit: str = "seed",
    n_seeds: int | None = None,
) -> Claim:
    """Decide a claim from measured values, one per seed (or other independent unit).

    The claim is *supported* if the whole 95 % interval of the mean is beyond the bound by the
    margin, *contradicted* if all of it is short of the bound by the margin, *negligible* if all of
    it is within the margin, else *inconclusive*, also if a single unit leaves no interval. The
    margin is the smallest difference that would matter, stated beforehand, and is the same in both
    directions.

    Args:
        values: ``(value)`` measurements, or a `lensclust.results.Mean` (whose scale is used).
        control: the same measure where no effect is expected.
        at_least: lower bound the mean must reach; give this or ``at_most``.
        at_most: upper bound the mean must not exceed.
        margin: distance from the bound that counts as negligible.
        scale: range and step of the measure (`lensclust.results.Scale`).
        units: kind -> unit of each value, if values share some (`lensclust.results.mean_of`).
        unit: name of the units over which values vary; the kinds of ``units`` if given.
        n_seeds: number of independent runs, if the unit is not the seed.

    Raises:
        ValueError: if not exactly one bound is given, there is no value, or one is outside the
            scale.

    >>> claim = decide("rise", "ARI rises", [0.8, 0.9, 0.85], source="here",
    ...                origin="extension", control={"permuted labels": 0.0}, at_least=0.5)
    >>> claim.verdict, round(claim.estimate, 2)
    ('supported', 0.85)
    """
    bound, side = _bound(id, at_least, at_most)
    mean = values
    if not isinstance(mean, Mean):
        mean = mean_of(_measured(id, mean), scale=scale, units=units)
    unit = " and ".join(units) if units else unit
    return Claim(
        id=id,
        statement=statement,
        source=source,
        origin=origin,
        estimate=mean.value,
        ci95=(mean.low, mean.high),
        control=dict(control),
        rule=_rule(f"95% interval over {_plural(unit)}", bound, side, margin),
        verdict=_verdict([mean], bound, side, margin),
        n_seeds=mean.n if n_seeds is None else n_seeds,
        unit=unit,
        n=mean.n,
        spread=(mean.least, mean.most),
        p=_two_sided(mean, bound, margin),
    )


def decide_over_all(
    id: str,
    statement: str,
    values: ArrayLike,
    nulls: Mapping[str, ArrayLike],
    *,
    source: str,
    origin: Origin,
    control: Mapping[str, float],
    margin: float = 0.0,
    scale: Scale = REAL,
    unit: str = "seed",
    n_seeds: int | None = None,
) -> Claim:
    """Decide whether values are above each of several nulls, measured in the same units.

    Each null has a separate difference and p; p-values are corrected for their number (Holm), and
    so are intervals (Bonferroni), so that the largest of several equal nulls is no evidence.
    Supported if every interval is beyond the margin, contradicted if one is on the other side of
    0 and outside it. The estimate is the smallest mean difference.

    Args:
        values: ``(value)``, one per unit.
        nulls: name -> ``(value)`` in the same units.

    >>> own = [0.8, 0.9, 0.85, 0.8]
    >>> claim = decide_over_all("x", "more than others", own, {"a": [0.1, 0.2, 0.1, 0.2],
    ...     "b": [0.7, 0.95, 0.8, 0.85]}, source="here", origin="extension", control={})
    >>> claim.verdict, round(claim.estimate, 4)
    ('inconclusive', 0.0125)
    """
    measured = _measured(id, values)
    confidence = 1 - LEVEL / max(len(nulls), 1)
    differences = {
        name: mean_of(
            measured - np.asarray(null, dtype=float), scale=scale.gain, confidence=confidence
        )
        for name, null in nulls.items()
    }
    if not differences:
        raise ValueError(f"claim {id!r}: no null to decide it against")
    means = list(differences.values())
    p = holm(np.minimum(1, [2 * mean.p_above(margin) for mean in means]))
    against = {f"p against {name}": float(each) for name, each in zip(nulls, p, strict=True)}
    weakest = min(means, key=lambda mean: mean.value)
    said = f"95% intervals over {_plural(unit)}, corrected for {len(means)} nulls, all"
    return Claim(
        id=id,
        statement=statement,
        source=source,
        origin=origin,
        estimate=weakest.value,
        ci95=(weakest.low, weakest.high),
        control={**control, **against},
        rule=_rule(said, 0.0, 1, margin),
        verdict=_verdict(means, 0.0, 1, margin),
        n_seeds=weakest.n if n_seeds is None else n_seeds,
        unit=unit,
        n=weakest.n,
        spread=(weakest.least, weakest.most),
        p=float(np.max(p)) if np.isfinite(p).all() else math.nan,
    )


def corrected(claims: Sequence[Claim]) -> list[Claim]:
    """The claims of a run with p-values corrected for their number.

    ``q`` is the false discovery rate (Benjamini & Hochberg); ``holds_corrected`` says whether
    Holm's correction leaves p below .05.
    """
    p = [claim.p for claim in claims]
    return [
        replace(claim, q=float(q), holds_corrected=bool(h <= LEVEL))
        for claim, q, h in zip(claims, q_values(p), holm(p), strict=True)
    ]


def shown_by(
    claims: Sequence[Claim], figures: Iterable[str], shows: Mapping[str, Sequence[str]]
) -> list[Claim]:
    """Add to each claim the names of the figures that show it.

    Args:
        figures: names of the existing figures.
        shows: pattern of figures' names -> patterns of claims' ids, with wildcards as in file
            names (``over-*``); patterns without a match are ignored.

    >>> claim = decide("over-12-shot", "It gains", [0.8, 0.9], source="here", origin="extension",
    ...                control={}, at_least=0.5)
    >>> shown_by([claim], ["methods", "kinds"], {"methods": ["over-*"]})[0].figures
    ('methods',)
    """
    drawn = list(figures)

    def of(id: str) -> tuple[str, ...]:
        shown = [
            figure
            for pattern, ids in shows.items()
            if any(fnmatchcase(id, each) for each in ids)
            for figure in drawn
            if fnmatchcase(figure, pattern)
        ]
        return tuple(dict.fromkeys(shown))

    return [replace(claim, figures=of(claim.id)) for claim in claims]


def _bound(id: str, at_least: float | int | None, at_most: float | int | None) -> tuple[float, int]:
    """The bound, and 1 if the claim is that the mean is above it, -1 if below."""
    if at_least is not None and at_most is None:
        return float(at_least), 1
    if at_most is not None and at_least is None:
        return float(at_most), -1
    raise ValueError(f"claim {id!r}: give exactly one of at_least and at_most")


def _measured(id: str, values: ArrayLike) -> np.ndarray:
    measured = np.asarray(values, dtype=float)
    if measured.size == 0:
        raise ValueError(f"claim {id!r}: no value to decide it from")
    return measured


def _plural(unit: str) -> str:
    return " and ".join(f"{kind}s" for kind in unit.split(" and "))


def _rule(said: str, bound: float, side: int, margin: float) -> str:
    words = f"{said} at {'least' if side > 0 else 'most'} {bound:g}"
    if not margin:
        return words
    return f"{words}, by {margin:g} or more; within {margin:g} of it is negligible"


def _verdict(means: Sequence[Mean], bound: float, side: int, margin: float) -> Verdict:
    """The verdict from one interval, or from several that must all be on the claimed side."""
    ends = [sorted((side * (mean.low - bound), side * (mean.high - bound))) for mean in means]
    if any(math.isnan(end) for pair in ends for end in pair):
        return "inconclusive"
    if all(low >= margin for low, _ in ends):
        return "supported"
    if any(high < -margin for _, high in ends):
        return "contradicted"
    if all(-margin <= low and high <= margin for low, high in ends):
        return "negligible"
    return "inconclusive"


def _two_sided(mean: Mean, bound: float, margin: float) -> float:
    """p that the mean is within the margin of the bound."""
    beyond = min(mean.p_above(bound + margin), mean.p_below(bound - margin))
    return beyond if math.isnan(beyond) else min(1.0, 2 * beyond)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
