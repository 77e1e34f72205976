"""Choose the site and strength of an intervention on validation prompts.

The best of many sites and strengths is biased upwards on the prompts that chose it. `tune`
reports the choice and the whole table; the effect is that of the chosen intervention on prompts
that neither fitted nor chose it, beside a norm-matched random direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import figures
from lensclust.activations import extract, select
from lensclust.arguments import checked_arguments, numbers
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import answers
from lensclust.models import Site, SiteSelector, resolve
from lensclust.prompts import Prompts
from probes.patching import METRICS
from probes.patching.replay import replay
from probes.steering.interventions import Intervention, interventions

Make = Callable[[Site, float], Intervention]


@dataclass(frozen=True, repr=False)
class Tuning(Shown):
    """Rates at every site and strength, and the best of them.

    Attributes:
        frame: one row per site and strength: ``site, kind, layer, head, position, method,
            strength, metric, value, size, n, chosen``. ``value`` is the rate of wanted answers
            over ``n`` prompts, ``size`` the mean norm of the change of states.
        site, strength: the highest rate; ties go to the smallest strength (its absolute value),
            then to the site given first.
        intervention: the one for this site and strength.
        baseline: rate of wanted answers without intervention.
        prompts: digest of the prompts that chose (`Prompts.digest`): report on others.
    """

    frame: pd.DataFrame
    site: Site
    strength: float
    intervention: Intervention
    baseline: float
    prompts: str

    def plot(self) -> Any:
        """Rate of wanted answers by layer, one line per strength; a heat map for heads."""
        words = {
            "title": f"Wanted answers, {self.frame['method'].iloc[0]}",
            "caption": f"Rate over {self.frame['n'].iloc[0]} validation prompts "
            f"({self.baseline:.2f} without intervention); chosen: {self.site}, {self.strength:g}.",
        }
        charts = []
        for kind, rows in self.frame.groupby("kind", sort=False):
            named = words | {"title": f"{words['title']}, {kind}"}
            if rows["head"].isna().all():
                chart = figures.curves(rows, color="strength", band=None, y_title="rate", **named)
            else:
                chart = figures.head_map(rows, facet="strength", value_title="rate", **named)
            charts.append(chart)
        return charts[0] if len(charts) == 1 else figures.stack(charts)

    def __repr__(self) -> str:
        best = float(self.frame.loc[self.frame["chosen"], "value"].iloc[0])
        return (
            f"Tuning({len(self.frame)} tried on {self.frame['n'].iloc[0]} prompts; chosen "
            f"{self.site} at strength {self.strength:g}: wanted answers {best:.2f}, "
            f"{self.baseline:.2f} without intervention)"
        )

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        return (self.frame.pivot_table("value", "site", "strength", sort=False),)


@checked_arguments
def tune(
    model: TransformerLensModel,
    prompts: Prompts,
    make: Intervention | Make,
    sites: SiteSelector,
    strengths: Sequence[float | int] = (1.0,),
    *,
    wanted: Sequence[int] | np.ndarray | Tensor,
    at: str = "answer",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> Tuning:
    """Try an intervention at every site and strength and count the wanted answers.

    Args:
        model: a hooked model, in eval mode.
        prompts: the validation split, disjoint from the prompts that fit the intervention and
            those that its effect is reported on.
        make: an intervention, scaled by each strength, or a function that makes one for a site
            and strength. Each is applied at one site alone.
        sites: kinds or places (`lensclust.models.sites`).
        strengths: factors of the intervention.
        wanted: ``(prompt)``, first token of the answer that each prompt should give, such as
            the target task's answer to its input.
        at: the edited position (`Prompts.position`).
        batch_tokens: as in `replay`.
        progress: show bars.

    Raises:
        InputError: if there is not one wanted token per prompt, strengths are missing, repeated
            or not finite, a site or position does not exist, or the model is in training mode.

    >>> import lensclust as lc
    >>> from probes import mean_states
    >>> from probes import replace
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(task=[0, 1])
    >>> means = mean_states(lc.extract(model, prompts.where(split="train"), "resid"))
    >>> validation = prompts.where(split="new_string", task=0)
    >>> wanted = [answer[0] for answer in validation.answers]
    >>> found = tune(model, validation, replace(means, "1"), "resid", [0.0, 1.0], wanted=wanted)
    >>> len(found.frame), found.frame.query("strength == 0").value.eq(found.baseline).all()
    (14, np.True_)
    """
    chosen_sites = resolve(model, sites)
    steps = _checked_strengths(strengths)
    tokens = _checked_tokens(model, wanted, len(prompts))
    is_wanted = METRICS["accuracy"](tokens, tokens)
    # One pass reads the states of all candidates: each edits the unedited model alone.
    acts = extract(model, prompts, chosen_sites, at=at, batch_tokens=batch_tokens, progress=False)
    tried, edits = [], []
    for site in chosen_sites:
        states = torch.from_numpy(select(acts, site).values).float()
        for strength in steps:
            moved = _made(make, site, strength).edit(site)(states)
            if not bool(moved.isfinite().all()):
                raise InputError(
                    f"tune: strength {strength:g} at {str(site)!r} gave states that are not finite"
                )
            edits.append((site, moved))
            tried.append((site, strength, float((moved - states).norm(dim=-1).mean())))
    hits = replay(
        model, prompts, edits, is_wanted, at=at, batch_tokens=batch_tokens, progress=progress
    )
    before = answers(model, prompts, is_wanted, batch_tokens=batch_tokens)
    rates = hits.double().mean(1).numpy()
    # Stable: ties keep the order of the given sites.
    best = int(np.lexsort([[abs(strength) for _, strength, _ in tried], -rates])[0])
    site, strength, _ = tried[best]
    chosen = _made(make, site, strength)
    place = {"position": at, "method": (make if isinstance(make, Intervention) else chosen).name}
    frame = pd.DataFrame(
        [
            {"site": str(s), "kind": s.kind, "layer": s.layer, "head": s.head}
            | place
            | {"strength": step, "metric": "wanted", "value": float(rate), "size": size}
            for (s, step, size), rate in zip(tried, rates, strict=True)
        ]
    ).astype({"head": "Int64"})
    return Tuning(
        frame=frame.assign(n=len(prompts), chosen=np.arange(len(frame)) == best),
        site=site,
        strength=strength,
        intervention=chosen,
        baseline=float(before.double().mean()),
        prompts=prompts.digest(),
    )


def _made(make: Intervention | Make, site: Site, strength: float) -> Intervention:
    if isinstance(make, Intervention):
        return make.scaled(strength)
    (made,) = interventions("tune: make", [make(site, strength)])
    return made


def _checked_strengths(strengths: Sequence[float | int]) -> list[float]:
    steps = [float(strength) for strength in strengths]
    if not steps or len(set(steps)) < len(steps) or not np.isfinite(steps).all():
        raise InputError(f"tune: strengths={list(strengths)}, expected different finite numbers")
    return steps


def _checked_tokens(
    model: TransformerLensModel, wanted: Any, n_prompts: int
) -> Int[Tensor, " prompt"]:
    numbers("tune", "wanted", wanted)
    tokens = torch.as_tensor(wanted if isinstance(wanted, Tensor) else np.asarray(wanted))
    if tokens.shape != (n_prompts,) or tokens.is_floating_point():
        raise InputError(
            f"tune: wanted has shape {tuple(tokens.shape)} and type {tokens.dtype}, expected one "
            f"token id for each of {n_prompts} prompts"
        )
    vocabulary = model.cfg.d_vocab
    if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
        raise InputError(f"tune: wanted holds ids outside the vocabulary of {vocabulary} tokens")
    return tokens.long()
