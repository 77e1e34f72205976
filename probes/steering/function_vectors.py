"""Function vectors: the summed outputs of a few heads that encode a task.

Heads are ranked by their indirect effect: the gain in the probability of the right answer when
a head's output at the last token of a prompt whose demonstrations are shuffled is replaced by
its mean output where they are not. The vector is the sum of the top heads' mean contributions.

Standard of evidence: heads are chosen on the prompts given here, so the vector's effect is
reported on other prompts and queries, beside the vector of as many other heads
(`FunctionVector.random_heads`) and a norm-matched random direction
(`Intervention.random_twin`). A ranking alone is no evidence: some head is always the best.

Source: Todd et al. 2024 (arXiv 2310.15213), sections 2.2 and 2.3. They rank heads by the mean
over several tasks: do that, and pass the heads to `FunctionVector.with_heads`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_protocol import TransformerLensModel
from transformer_lens.utilities.statistics import derive_generator

from lensclust import figures
from lensclust.activations import extract, head_residual, select
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import answers
from lensclust.models import Site, resolve
from lensclust.prompts import Prompts, label_text
from lensclust.results import mean_interval
from probes.design import first_answers
from probes.patching import METRICS
from probes.patching.replay import replay
from probes.steering.directions import add_direction
from probes.steering.interventions import Intervention


@dataclass(frozen=True, repr=False)
class FunctionVector(Shown):
    """The mean contribution of a task's top heads, and the ranking of all heads.

    Attributes:
        frame: one row per head: ``site, kind, layer, head, position, metric, value, ci_low,
            ci_high, n, chosen``. ``value`` is the mean gain in probability over the ``n``
            shuffled prompts and ``ci_*`` its 95 % Student-t interval (not corrected for the
            number of heads, and too narrow where prompts share a query).
        effects: gain in probability ``(site, prompt)``.
        contributions: mean ``z @ W_O`` of every head ``(block, head, d_model)``.
        heads: the chosen heads, the strongest first.
        baseline: mean probability of the right answer in the unpatched shuffled prompts.
    """

    frame: pd.DataFrame
    effects: xr.DataArray
    contributions: xr.DataArray
    heads: tuple[Site, ...]
    baseline: float

    @property
    def vector(self) -> Float[np.ndarray, " d_model"]:
        """Sum of the chosen heads' mean contributions to the residual stream."""
        return self._sum(self.heads)

    def intervention(self, strength: float | int = 1) -> Intervention:
        """Add the vector to the states of any site of the residual stream."""
        made = add_direction(self.vector, name="function vector")
        return made if strength == 1 else made.scaled(strength)

    def random_heads(self, seed: int = 0) -> Intervention:
        """Control: add the vector of as many random heads among those not chosen.

        It keeps its norm; ``.norm_matched(self.intervention())`` gives it that of the vector.

        Raises:
            InputError: if fewer heads are left than were chosen.
        """
        others = [site for site in map(Site.parse, self.frame["site"]) if site not in self.heads]
        if len(others) < len(self.heads):
            raise InputError(
                f"random_heads: {len(self.heads)} heads are chosen and {len(others)} left, "
                "expected at least as many"
            )
        order = torch.randperm(len(others), generator=derive_generator(seed, "heads"))
        drawn = [others[index] for index in order[: len(self.heads)].tolist()]
        return add_direction(self._sum(drawn), name=f"{len(drawn)} other heads")

    def with_heads(self, heads: Sequence[str | Site]) -> FunctionVector:
        """The vector of given heads, such as those that rank highest over several tasks.

        Raises:
            InputError: if there is none, one is repeated, or one is not a head of this model.
        """
        sites = [Site.parse(head) if isinstance(head, str) else head for head in heads]
        known = set(self.frame["site"])
        unknown = [str(site) for site in sites if str(site) not in known]
        if unknown or not sites or len(set(sites)) < len(sites):
            raise InputError(
                f"with_heads: given {[str(s) for s in sites]}, expected different ones of the "
                f"{len(known)} heads ranked" + (f"; {unknown[0]!r} is not" if unknown else "")
            )
        chosen = self.frame["site"].isin([str(site) for site in sites])
        return replace(self, heads=tuple(sites), frame=self.frame.assign(chosen=chosen))

    def plot(self) -> Any:
        """Heat map of the indirect effect of every head."""
        return figures.head_map(
            self.frame,
            title="Indirect effect of each head",
            caption=f"Gain in probability of the right answer, mean over {self.frame['n'].max()} "
            f"shuffled prompts ({self.baseline:.3g} unpatched).",
            value_title="gain in probability",
        )

    def __repr__(self) -> str:
        best = self.frame.iloc[int(self.frame["value"].argmax())]
        return (
            f"FunctionVector({len(self.heads)} of {len(self.frame)} heads, length "
            f"{np.linalg.norm(self.vector):.3g}; largest effect {best['value']:.3g} "
            f"[{best['ci_low']:.3g}, {best['ci_high']:.3g}] at {best['site']})"
        )

    def _sum(self, heads: Sequence[Site]) -> Float[np.ndarray, " d_model"]:
        places = [self.contributions.sel(block=site.layer, head=site.head) for site in heads]
        return np.sum([place.values for place in places], axis=0)


@checked_arguments
def function_vector(
    model: TransformerLensModel,
    prompts: Prompts,
    shuffled: Prompts,
    *,
    top: int = 10,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> FunctionVector:
    """Rank every head by its indirect effect on a task and sum the top ones' mean outputs.

    Args:
        model: a hooked model, in eval mode, whose heads write to the residual stream directly.
        prompts: few-shot prompts of one task (`lensclust.tasks.icl`), whose head outputs at the
            last token are averaged. The source averages over prompts the model answers right.
        shuffled: prompts of the same task with answers, whose demonstrations are shuffled
            (``icl(..., shuffled=True)``); in these, heads are replaced one at a time.
        top: number of heads summed. The source takes 10 for models of hundreds of heads.
        batch_tokens: as in `replay`.
        progress: show bars.

    Raises:
        InputError: if ``top`` is out of range, the prompts are of several tasks or of different
            ones, the shuffled ones lack answers, heads pass through a norm before the residual
            stream (post-norm models), or the model is in training mode.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(task=0)
    >>> found = function_vector(model, prompts.take(range(8)), prompts.take(range(8, 12)), top=3)
    >>> found.effects.sizes["site"], found.vector.shape, [site.kind for site in found.heads]
    (24, (64,), ['head', 'head', 'head'])
    """
    sites = resolve(model, "head")
    if not 1 <= top <= len(sites):
        raise InputError(f"function_vector: top={top}, expected 1 to {len(sites)}, all heads")
    _require_one_task(prompts, shuffled)
    if shuffled.answers is None or not all(shuffled.answers):
        raise InputError("function_vector: expected shuffled prompts with an answer each")
    right = torch.from_numpy(first_answers(shuffled))
    probability = METRICS["probability"](right, right)
    acts = extract(model, prompts, "head", batch_tokens=batch_tokens, progress=progress)
    means = acts.isel(prompt=[0]).assign(z=acts["z"].mean("prompt", dtype=float, keepdims=True))
    edits = [
        (site, torch.from_numpy(select(means, site).values).float().expand(len(shuffled), -1))
        for site in sites
    ]
    before = answers(model, shuffled, probability, batch_tokens=batch_tokens).double().numpy()
    replaced = replay(
        model, shuffled, edits, probability, batch_tokens=batch_tokens, progress=progress
    )
    effects = replaced.double().numpy() - before
    frame = pd.DataFrame(
        [
            {"site": str(site), "kind": site.kind, "layer": site.layer, "head": site.head}
            | {"position": "answer", "metric": "indirect_effect"}
            | dict(zip(("value", "ci_low", "ci_high"), mean_interval(gains), strict=True))
            for site, gains in zip(sites, effects, strict=True)
        ]
    ).astype({"head": "Int64"})
    order = np.argsort(-frame["value"].to_numpy(), kind="stable")[:top]
    return FunctionVector(
        frame=frame.assign(n=len(shuffled), chosen=np.isin(np.arange(len(frame)), order)),
        effects=xr.DataArray(
            effects, dims=("site", "prompt"), coords={"site": [str(site) for site in sites]}
        ),
        contributions=head_residual(means, model).isel(prompt=0, position=0, drop=True),
        heads=tuple(sites[index] for index in order),
        baseline=float(before.mean()),
    )


def _require_one_task(prompts: Prompts, shuffled: Prompts) -> None:
    if "task" not in prompts.rows or "task" not in shuffled.rows:
        return
    tasks = sorted({*(label_text(t) for p in (prompts, shuffled) for t in p.rows["task"])})
    if len(tasks) > 1:
        raise InputError(
            f"function_vector: prompts of {len(tasks)} tasks given ({', '.join(tasks[:5])}), "
            "expected one; make a vector for each"
        )
