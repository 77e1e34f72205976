"""Rank sites by attribution patching, and check the ranking against exact patches.

Attribution patching estimates the effect of a patch to first order, ``(source state - base state)
. gradient``, for all sites from one forward and one backward of the base prompt. It can be far off
where the model is nonlinear between the two states. So the top sites and a random sample of all
sites are patched exactly: the correlation of estimated and exact effects over the random sample
measures the reliability of the ranking (over the top sites it is biased, since the estimate
selected them).

Source: Nanda (2023), attribution patching; Kramár et al. (arXiv 2403.00745) on where it fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

# TransformerLens' `attribution_patch` takes one pair at a time, a metric without the pair's index,
# fixed nodes and pairs of equal length; its part that reads activations and gradients takes any
# hook, batch and metric, also on native models.
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

from lensclust.activations import extract, select
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import Readout, one_a_row, with_gradients
from lensclust.models import (
    BACKWARD,
    Site,
    SiteSelector,
    batches,
    default_budget,
    hook_name,
    model_device,
    model_name,
)
from lensclust.prompts import Prompts
from probes.patching.metrics import DIFFERENCE, metric_of
from probes.patching.patching import Patching, patch, require_pairs


@dataclass(frozen=True, repr=False)
class AttributionCheck(Shown):
    """First-order effects of all sites, and exact effects of the top and of random sites.

    Attributes:
        frame: one row per site, best ranked first: ``site, kind, layer, head, position, metric,
            attributed, exact, rank, chosen``. ``chosen`` is the reason for an exact patch: ``top``,
            ``random`` or ``both``; or ``none``, with ``exact`` NaN.
        correlation: of attributed and exact effects over the ``top``, the ``random`` and ``all``
            patched sites: ``sites, pearson, spearman, n``; NaN for fewer than three sites or
            constant effects.
        exact: the exact effects, with intervals and p.
    """

    frame: pd.DataFrame
    correlation: pd.DataFrame
    exact: Patching

    def __repr__(self) -> str:
        found = self.correlation.set_index("sites")
        says = "; ".join(
            f"{name} {row['n']:.0f}: Pearson {row['pearson']:.2f}, Spearman {row['spearman']:.2f}"
            for name, row in found.iterrows()
        )
        return (
            f"AttributionCheck({len(self.frame)} sites ranked, best {self.frame['site'].iloc[0]}; "
            f"attributed against exact effects, {says})"
        )

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        return self.correlation, self.frame[self.frame["chosen"] != "none"]


@checked_arguments
@with_gradients
def rank(
    model: TransformerLensModel,
    base: Prompts,
    source: Prompts,
    sites: SiteSelector,
    *,
    at: str = "answer",
    metric: str | Readout = DIFFERENCE,
    m: int = 16,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> AttributionCheck:
    """Rank sites by first-order effects and patch the top ``m`` and ``m`` random ones exactly.

    Also `rank_sites`.

    Sites are ranked by magnitude, whatever the sign.

    Args:
        model, base, source, sites, batch_tokens, progress: as in `patch`.
        at: one position by name.
        metric: as in `patch`, and differentiable: ``accuracy`` is not.
        m: number of sites patched exactly from the top, and of random ones from all sites.
        seed: of the draw, the intervals and p.

    Raises:
        InputError: as `patch`, and if the metric has no gradient, or the model's embedding none.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> check = rank(model, prompts, prompts.take(range(len(prompts))[::-1]), "head",
    ...              metric="probability", m=3)
    >>> check.correlation.sites.tolist()
    ['top', 'random', 'all']
    """
    chosen = require_pairs(model, base, source, sites, caller="rank")
    if m < 1:
        raise InputError(f"rank: m={m}, expected at least 1")
    name, readout = metric_of(metric, base, source, caller="rank")
    if name == "accuracy":
        raise InputError("rank: metric 'accuracy' has no gradient; rank by 'probability' instead")
    budget = batch_tokens or default_budget(model)
    slopes = _gradients(model, base, chosen, at, readout, max(1, budget // BACKWARD))
    states = [
        extract(model, prompts, chosen, at=at, batch_tokens=batch_tokens, progress=progress)
        for prompts in (base, source)
    ]
    attributed = np.array(
        [
            np.mean(np.sum((select(states[1], s).values - select(states[0], s).values) * g, axis=1))
            for s, g in zip(chosen, slopes, strict=True)
        ]
    )
    if not np.isfinite(attributed).all():
        raise InputError(f"rank: the gradient of {name!r} is not a number at some site")
    order = np.argsort(-np.abs(attributed), kind="stable")
    top = set(order[:m].tolist())
    drawn = np.random.default_rng(seed).choice(len(chosen), min(m, len(chosen)), replace=False)
    random = set(drawn.tolist())
    exact = patch(
        model,
        base,
        source,
        [chosen[i] for i in sorted(top | random)],
        at=at,
        metric=metric,
        seed=seed,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    found = exact.frame.set_index("site")["value"]
    why = {(True, False): "top", (False, True): "random", (True, True): "both"}
    frame = pd.DataFrame(
        [
            {"site": str(s), "kind": s.kind, "layer": s.layer, "head": s.head, "position": at}
            | {"metric": name, "attributed": attributed[i], "exact": found.get(str(s), np.nan)}
            | {"rank": place + 1, "chosen": why.get((i in top, i in random), "none")}
            for place, i in enumerate(order)
            for s in [chosen[i]]
        ]
    ).astype({"head": "Int64"})
    groups = {"top": ["top", "both"], "random": ["random", "both"], "all": list(why.values())}
    correlation = pd.DataFrame(
        [
            {"sites": label} | _correlation(frame[frame["chosen"].isin(reasons)])
            for label, reasons in groups.items()
        ]
    )
    return AttributionCheck(frame=frame, correlation=correlation, exact=exact)


# The same function under a name that is clear out of context.
rank_sites = rank


def _gradients(
    model: Any,
    prompts: Prompts,
    sites: Sequence[Site],
    at: str,
    readout: Readout,
    budget: int,
) -> list[Float[np.ndarray, "_prompt _d"]]:
    """Gradient of each prompt's metric with respect to its state, at each site."""
    position = prompts.position(at)
    hooks = dict.fromkeys(hook_name(model, site) for site in sites)
    parts: list[list[Tensor]] = [[] for _ in sites]
    order = []
    for rows in batches(model, prompts.lengths, budget):
        last = prompts.lengths[rows] - 1
        device = model_device(model)
        inside = torch.arange(len(rows), device=device)
        places = position[rows].to(device)

        def total(logits: Tensor, rows: Tensor = rows, last: Tensor = last) -> Tensor:
            # Rows are independent, so the gradient of the sum separates by row.
            found = readout(logits[torch.arange(len(rows)), last].float(), rows)
            return one_a_row(found, rows).sum()

        tokens = prompts.tokens[rows, : int(last.max()) + 1].to(device)
        with _begun(model):
            # A backward that ends at the first hook does not reach it: start at the embedding.
            cache = cache_activation_and_gradient(model, tokens, total, ["hook_embed", *hooks])
        found = []
        for site in sites:
            gradient = cache.gradients[hook_name(model, site)]
            if gradient is None:
                raise InputError(f"rank: the metric has no gradient at site {site}")
            here = gradient[inside.to(gradient.device), places.to(gradient.device)]
            found.append((here if site.head is None else here[:, site.head]).float())
        # Queue all transfers before waiting for the first.
        for part, gradient in zip(parts, found, strict=True):
            part.append(gradient.cpu())
        order.append(rows)
    back = torch.cat(order).argsort()
    return [torch.cat(part)[back].numpy() for part in parts]


@contextmanager
def _begun(model: Any) -> Iterator[None]:
    """Start gradients at the embedding inside the block, also for frozen networks."""
    weights = [weight for weight in model.embed.parameters() if weight.is_floating_point()]
    if not weights:
        raise InputError(
            f"rank: the embedding of {model_name(model)} is quantised, so nothing has a gradient"
        )
    frozen = [weight for weight in weights if not weight.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _correlation(rows: pd.DataFrame) -> dict[str, float | int]:
    a, b = rows["attributed"].to_numpy(), rows["exact"].to_numpy()
    if len(rows) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": np.nan, "spearman": np.nan, "n": len(rows)}
    pearson: Any = stats.pearsonr(a, b)
    spearman: Any = stats.spearmanr(a, b)
    return {
        "pearson": float(pearson.statistic),
        "spearman": float(spearman.statistic),
        "n": len(rows),
    }
