"""Reweight a model's components from a few labelled prompts.

With ``g_j`` the label logits of component j, the weights w minimise

    mean over prompts of cross-entropy(softmax(fixed + sum_j w_j g_j), right label) + λ |w|_1

over heads and MLPs; the embedding and the biases keep weight 1, so that weights of 1 give the model
itself. Weights are between 0 and 1 (a bad component can be muted), or free (it can be inverted).
The minimum is certified (`probes.components.sparse_fits`); the loss is convex, so the start of a
fit does not matter. A soft-cap of the model's logits is left out of the loss.

Standard of evidence: weights are fitted and the penalty chosen on the prompts given here, so their
accuracy is reported on other prompts, beside the model and `calibrate`, which uses as many labels.

Source: Chang, Thomason & Jia 2024 (arXiv 2406.13131), section 4. ``official=True`` runs their
script's schedule unchanged, with its flaw: it stops as soon as every labelled prompt is right, or
after a total of three steps without a new lowest loss, so that with few labels the weights may stay
at 1, and the number of zeros depends on the length of the run (`probes.components.scripted_fits`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import figures
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.models import Site
from probes.components.component_logits import WRITERS, ComponentLogits
from probes.components.direct_paths import direct_paths
from probes.components.labelled_examples import Examples
from probes.components.penalties import chosen_penalty, example_folds, penalty_frame, require_folds
from probes.components.scripted_fits import scripted_fits
from probes.components.sparse_fits import sparse_fits
from probes.steering import Edit, Indices, Intervention, Positions, steer

PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
_MAX_PENALTY = 1e12  # far above, where all weights are 0, the solver overflows
# Gap that separates penalties.
CHOOSING = 1e-3
SCRIPT = {"rate": 0.05, "penalty": 0.01, "steps": 2000}


@checked_arguments
def reweight(
    components: ComponentLogits,
    *,
    box: bool = True,
    penalty: float | int | None = None,
    folds: int = 4,
    seed: int = 0,
    official: bool = False,
) -> Reweighting:
    """Weights of one task's components: `reweight_many` of one.

    >>> import lensclust as lc
    >>> from probes import decompose
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> rows = prompts.rows.assign(label=[*"ab"] * (len(prompts) // 2))
    >>> prompts = lc.Prompts.from_token_lists(prompts.tokens.tolist(), rows)
    >>> found = reweight(decompose(model, prompts, {"a": 3, "b": 5}), penalty=0.1)
    >>> bool(found.gap < 1e-3), bool(((found.weights >= 0) & (found.weights <= 1)).all())
    (True, True)
    """
    return reweight_many(
        [components], box=box, penalty=penalty, folds=folds, seed=seed, official=official
    )[0]


@checked_arguments
def reweight_many(
    components: Sequence[ComponentLogits],
    *,
    box: bool = True,
    penalty: float | int | None = None,
    folds: int = 4,
    seed: int = 0,
    official: bool = False,
) -> list[Reweighting]:
    """Weights for many tasks, templates and sets of labelled prompts, fitted as one batch.

    Args:
        components: decomposed labelled prompts, one entry per problem; all of one model.
        box: keep weights between 0 and 1.
        penalty: ``λ``; by default the one of `PENALTIES` with the lowest cross-entropy of
            held-out prompts, for each problem.
        folds: number of folds to choose the penalty.
        seed: of the folds.
        official: use the schedule of the source's script: heads and MLPs alone, its penalty, its
            stopping rules.

    Raises:
        InputError: if there is no problem, components differ, there are fewer labelled prompts
            than labels, an option is out of range, or ``official`` comes with another one.
    """
    _check(components, box=box, penalty=penalty, folds=folds, official=official)
    writers = np.isin(components[0].data["kind"].values, WRITERS)
    features = [each.logits.transpose("prompt", "label", "component").values for each in components]
    examples = Examples.of(
        [each[..., writers] for each in features],
        [each[..., ~writers].sum(-1) * (not official) for each in features],
        [each.targets for each in components],
    )
    if official:
        fitted = scripted_fits(examples, **SCRIPT, clipped=True, check_first=False).clamp(0, 1)
        chosen, gaps = [SCRIPT["penalty"]] * len(components), [np.nan] * len(components)
        frames = [pd.DataFrame()] * len(components)
    else:
        if penalty is None:
            frames = _held_out(examples, components, box=box, folds=folds, seed=seed)
            chosen = [chosen_penalty(frame) for frame in frames]
        else:
            frames, chosen = [pd.DataFrame()] * len(components), [float(penalty)] * len(components)
        found = sparse_fits(
            examples, examples.shares[..., None], torch.tensor(chosen)[:, None], box=box
        )
        fitted, gaps = found.weights[..., 0], found.gap[:, 0].tolist()
    made = []
    for number, each in enumerate(components):
        values = np.full(len(writers), 0.0 if official else 1.0)
        values[writers] = fitted[number].numpy()
        coords = {name: each.data[name] for name in ("component", "kind", "block", "head")}
        table = xr.DataArray(values, dims=("component",), coords=coords, name="weight")
        made.append(Reweighting(table, chosen[number], gaps[number], frames[number]))
    return made


def _check(
    components: Sequence[ComponentLogits],
    *,
    box: bool,
    penalty: float | int | None,
    folds: int,
    official: bool,
) -> None:
    if not components:
        raise InputError("reweight: no components given, expected at least one problem")
    first = components[0].data["component"].values.tolist()
    for each in components:
        n, labels = len(each.targets), len(each.labels)
        if n < labels:
            raise InputError(
                f"reweight: {n} labelled prompts for {labels} labels, expected at least as many"
            )
        if each.data["component"].values.tolist() != first:
            raise InputError(f"reweight: {each!r} has other components than {components[0]!r}")
    if official and (penalty is not None or not box):
        raise InputError("reweight: official=True has its own penalty and box, give none")
    if penalty is not None and not 0 < penalty <= _MAX_PENALTY:
        raise InputError(
            f"reweight: penalty={penalty}, expected more than 0 and at most {_MAX_PENALTY:g}"
        )
    require_folds("reweight", folds, max(each.data.sizes["prompt"] for each in components))


def _held_out(
    examples: Examples, components: Sequence[ComponentLogits], *, box: bool, folds: int, seed: int
) -> list[pd.DataFrame]:
    """Score of each penalty on held-out prompts."""
    out = torch.zeros(*examples.shares.shape, folds, dtype=torch.bool)
    for problem, each in enumerate(components):
        targets = each.targets
        fold = example_folds(targets, folds, seed=seed)
        out[problem, torch.arange(len(targets)), torch.from_numpy(fold)] = True
    kept = examples.shares[..., None] * ~out
    # One column for each fold and penalty.
    shares = (kept / kept.sum(1, keepdim=True)).repeat(1, 1, len(PENALTIES))
    penalties = (
        torch.tensor(PENALTIES, dtype=torch.float32)
        .repeat_interleave(folds)
        .expand(len(shares), -1)
    )
    found = sparse_fits(examples, shares, penalties, box=box, tolerance=CHOOSING)
    logits = examples.logits(found.weights)
    scored = out.repeat(1, 1, len(PENALTIES)) * examples.shares[..., None]
    right = (logits.argmax(2) == examples.targets[..., None]).float()

    def mean(scores: Float[Tensor, "problem example column"]) -> np.ndarray:
        return (scored * scores).sum(1).unflatten(1, (len(PENALTIES), folds)).sum(-1).numpy()

    return [
        penalty_frame(PENALTIES, loss, accuracy)
        for loss, accuracy in zip(mean(examples.losses(logits)), mean(right), strict=True)
    ]


@dataclass(frozen=True, repr=False)
class Reweighting(Shown):
    """One weight per component, to predict and to run a model with.

    Attributes:
        weights: ``(component)``; those of ``embed`` and ``bias`` are 1 (0 if official).
        penalty: ``λ`` of these weights.
        gap: bound of the objective above its minimum (nats); NaN if official, which does not
            minimise it.
        frame: the choice of the penalty: ``penalty, cross_entropy, accuracy`` on held-out prompts
            and ``chosen``; empty if it was given.
    """

    weights: xr.DataArray
    penalty: float
    gap: float
    frame: pd.DataFrame

    def logits(self, components: ComponentLogits) -> xr.DataArray:
        """Label logits of other prompts under these weights ``(prompt, label)``, without a model.

        Only direct effects on the logits are scaled; the result is exact.

        Raises:
            InputError: if the components differ.
        """
        names = components.data["component"].values.tolist()
        if names != self.weights["component"].values.tolist():
            raise InputError(
                f"predict: {components!r} has other components than the {len(self.weights)} that "
                "these weights are of"
            )
        return xr.dot(components.logits, self.weights.astype(np.float32), dim="component")

    def predict(self, components: ComponentLogits) -> np.ndarray:
        """The label of each prompt."""
        return np.array(components.labels)[self.logits(components).argmax("label").values]

    def accuracy(self, components: ComponentLogits) -> float:
        """Share of prompts whose right label is predicted."""
        guesses = self.logits(components).argmax("label").values
        return float((guesses == components.targets).mean())

    @contextmanager
    def direct(self, model: TransformerLensModel) -> Iterator[TransformerLensModel]:
        """Run a model with the logits of `logits`, at every token and position.

        Only direct effects on the logits are scaled; inputs of later components are unchanged.
        See `probes.components.direct_paths`.
        """
        by_name = zip(self.weights["component"].values.tolist(), self.weights.values, strict=True)
        with direct_paths(model, {name: float(weight) for name, weight in by_name}):
            yield model

    @contextmanager
    def through(
        self,
        model: TransformerLensModel,
        *,
        positions: Positions | None = None,
        since: Indices | None = None,
    ) -> Iterator[TransformerLensModel]:
        """Run a model with the outputs of heads and MLPs scaled by their weights.

        Later components read the scaled outputs, unlike in `direct`: this tests whether the
        weights also hold for a component's total effect. The embedding and the biases are
        unchanged, since the whole computation depends on them.

        Args:
            positions, since: as in `probes.steering.steer`.

        Raises:
            InputError: if the model has no such heads or MLPs, or its heads pass through a norm
                before the residual stream, where scaling one would scale the others.
        """
        sites = list(self._scales())
        if not sites:
            yield model
            return
        with steer(model, self.intervention, at=sites, positions=positions, since=since):
            yield model

    @property
    def intervention(self) -> Intervention:
        """Scale the states of heads (``hook_z``) and MLPs by their weights (1 elsewhere)."""
        scales = self._scales()

        def edit_at(site: Site) -> Edit:
            scale = scales.get(site, 1.0)
            return lambda states: scale * states

        return Intervention("reweighting", edit_at)

    def plot(self) -> Any:
        """Heat map of the weight of every head."""
        where = self.weights["kind"].values == "head"
        heads = pd.DataFrame(
            {name: self.weights[name].values[where] for name in ("block", "head")}
        ).assign(value=self.weights.values[where])
        return figures.head_map(
            heads,
            title="Weight of each head",
            caption=f"Penalty {self.penalty:g}; {self._zeros()} of {len(self.weights)} components "
            "have weight 0.",
            value_title="weight",
        )

    def __repr__(self) -> str:
        return (
            f"Reweighting({len(self.weights)} components, {self._zeros()} of weight 0, "
            f"penalty {self.penalty:g})"
        )

    def _zeros(self) -> int:
        return int((self.weights == 0).sum())

    def _scales(self) -> dict[Site, float]:
        found = {}
        for name, weight in zip(self.weights["component"].values, self.weights.values, strict=True):
            kind, _, place = str(name).partition(" ")
            if place and weight != 1:
                site = Site.parse(f"{'mlp_out' if kind == 'mlp' else kind} {place}")
                found[site] = float(weight)
        return found
