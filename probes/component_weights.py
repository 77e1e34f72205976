"""Weights of components: to predict with, and to run a model with in two ways.

``direct`` scales what a component writes straight to the logits, which is what the weights were
fitted for. ``through`` scales what it writes, so that all that reads it later changes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import figures
from lensclust.errors import InputError
from lensclust.showing import Shown
from lensclust.sites import Site
from probes.component_logits import ComponentLogits
from probes.direct_paths import direct_paths
from probes.interventions import Edit, Intervention
from probes.steering import Indices, Positions, steer


@dataclass(frozen=True, repr=False)
class Reweighting(Shown):
    """One weight a component, to predict with and to run a model with.

    Attributes:
        weights: ``(component)``; those of ``embed`` and ``bias`` are 1 (0 if official).
        penalty: ``λ`` of these weights.
        gap: by how much the objective may exceed its least (nats); NaN if official, which does
            not look for the least.
        frame: what the penalty was chosen by: ``penalty, cross_entropy, accuracy`` on held-out
            prompts and ``chosen``; empty if it was given.
    """

    weights: xr.DataArray
    penalty: float
    gap: float
    frame: pd.DataFrame

    def logits(self, components: ComponentLogits) -> xr.DataArray:
        """Label logits of other prompts under these weights ``(prompt, label)``: exact, no model.

        Only what components write straight to the logits is scaled.

        Raises:
            InputError: if the components are others.
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
        """Run a model so that its logits are those of `logits`, at every token and position.

        Only what components write straight to the logits is scaled; what later ones read is as
        before. See `probes.direct_paths`.
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
        """Run a model whose heads and MLPs write what they write times their weight.

        Everything later reads the scaled outputs, so this is another thing than `direct`: it
        asks whether a component's part in the whole computation is what the weights say. The
        embedding and the biases are left alone: the whole computation hangs on them.

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
        """Scales the states of heads (``hook_z``) and MLPs by their weights (1 elsewhere)."""
        scales = self._scales()

        def edit_at(site: Site) -> Edit:
            scale = scales.get(site, 1.0)
            return lambda states: scale * states

        return Intervention("reweighting", edit_at)

    def plot(self) -> Any:
        """The weight of every head, a heat map."""
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
