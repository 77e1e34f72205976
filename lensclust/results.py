"""Claims: what a study says, and the rule by which its own numbers decide it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from lensclust.stats import mean_interval

Origin = Literal["paper", "reconstruction", "extension"]
Verdict = Literal["supported", "contradicted", "inconclusive"]


@dataclass(frozen=True)
class Claim:
    """A statement, its estimate, its control and the verdict that a stated rule gives.

    Attributes:
        id: short name, unique in a run.
        statement: the sentence under test.
        source: where the statement comes from.
        origin: ``paper`` (the paper's own words), ``reconstruction`` (its words, our
            operationalisation) or ``extension`` (ours).
        estimate: mean of the measured values.
        ci95: 95 % interval of the mean over seeds (or over ``unit``), NaN when undefined.
        control: name -> value of what the estimate is to be compared with.
        rule: the rule in words; the verdict follows from it alone.
        verdict: ``supported``, ``contradicted`` or ``inconclusive``.
        n_seeds: number of independent runs behind the estimate.
        figures: names of the figures that show it, the most telling first.
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

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``claims.json``; NaN becomes null."""
        return _plain(asdict(self))


def decide(
    id: str,
    statement: str,
    values: Sequence[float] | np.ndarray,
    *,
    source: str,
    origin: Origin,
    control: Mapping[str, float],
    at_least: float | int | None = None,
    at_most: float | int | None = None,
    unit: str = "seed",
    n_seeds: int | None = None,
) -> Claim:
    """Decide a claim from one value per seed (or other independent unit).

    The claim is supported when the whole 95 % interval of the mean satisfies the bound,
    contradicted when the whole interval violates it, and inconclusive otherwise, also when
    a single value leaves no interval.

    Args:
        values: one measurement per ``unit``.
        control: what the same measure gives where no effect is expected.
        at_least: lower bound the mean must reach; give this or ``at_most``.
        at_most: upper bound the mean must not exceed.
        unit: what the values vary over, named in the rule.
        n_seeds: independent runs, where the unit is not the seed.

    Raises:
        ValueError: if not exactly one bound is given or there is no value.

    >>> claim = decide("rise", "ARI rises", [0.8, 0.9, 0.85], source="here",
    ...                origin="extension", control={"permuted labels": 0.0}, at_least=0.5)
    >>> claim.verdict, round(claim.estimate, 2)
    ('supported', 0.85)
    """
    if (at_least is None) == (at_most is None):
        raise ValueError(f"claim {id!r}: give exactly one of at_least and at_most")
    measured = np.asarray(values, dtype=float)
    if measured.size == 0:
        raise ValueError(f"claim {id!r}: no value to decide it from")
    estimate, low, high = mean_interval(measured)
    if at_least is not None:
        relation, bound, holds, fails = "at least", at_least, low >= at_least, high < at_least
    else:
        assert at_most is not None
        relation, bound, holds, fails = "at most", at_most, high <= at_most, low > at_most
    verdict: Verdict = "supported" if holds else "contradicted" if fails else "inconclusive"
    return Claim(
        id=id,
        statement=statement,
        source=source,
        origin=origin,
        estimate=estimate,
        ci95=(low, high),
        control=dict(control),
        rule=f"95% interval over {unit}s {relation} {bound:g}",
        verdict=verdict,
        n_seeds=int(measured.size) if n_seeds is None else n_seeds,
    )


def shown_by(claims: Sequence[Claim], figures: Mapping[str, str | Sequence[str]]) -> list[Claim]:
    """The claims, each with the figures that show it, by the claim's id.

    Raises:
        ValueError: if an id is no claim's.

    >>> claim = decide("rise", "ARI rises", [0.8, 0.9], source="here", origin="extension",
    ...                control={}, at_least=0.5)
    >>> shown_by([claim], {"rise": "ari_by_layer"})[0].figures
    ('ari_by_layer',)
    """
    unknown = figures.keys() - {claim.id for claim in claims}
    if unknown:
        raise ValueError(f"shown_by: no claim {sorted(unknown)[0]!r}")
    names = {id: (each,) if isinstance(each, str) else tuple(each) for id, each in figures.items()}
    return [replace(claim, figures=names.get(claim.id, claim.figures)) for claim in claims]


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
