"""Label logits by component: accuracy, label bias and agreement of components."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Int
from scipy import stats

from lensclust import figures
from lensclust.errors import InputError
from lensclust.figures import Shown

# The source's components.
WRITERS = ("head", "mlp")


@dataclass(frozen=True, repr=False)
class ComponentLogits(Shown):
    """Label logits of each component of a model, for labels of one token each.

    Attributes:
        data: ``logits (prompt, component, label)``, which add up over components to the model's
            ``model_logits (prompt, label)``, before a soft-cap (attribute ``soft_cap``, 0 for
            none). Components are ``embed``, ``head 3.12``, ``mlp 3`` and ``bias``, with
            coordinates ``kind``, ``block`` and ``head`` (-1 for none); labels have their
            ``token``; prompts have the columns of ``rows``, and their right label as ``target``.
            Attributes hold the provenance.
        error: largest error over prompts of the sum against the model's label logits, relative to
            these or to the size of the prompt's logits, whichever is larger.
    """

    data: xr.Dataset
    error: float

    @property
    def logits(self) -> xr.DataArray:
        """Label logits of every component ``(prompt, component, label)``."""
        return self.data["logits"]

    @property
    def model_logits(self) -> xr.DataArray:
        """The model's label logits ``(prompt, label)``, after its soft-cap."""
        return self.data["model_logits"]

    @property
    def labels(self) -> list[str]:
        """The labels, in order."""
        return self.data["label"].values.tolist()

    @property
    def targets(self) -> Int[np.ndarray, " prompt"]:
        """Index of each prompt's right label.

        Raises:
            InputError: if the prompts were decomposed without right labels.
        """
        if "target" not in self.data.coords:
            raise InputError(
                "components: these prompts have no right labels; decompose them with the name of "
                "the column that holds them (label=...)"
            )
        places = {name: place for place, name in enumerate(self.labels)}
        return np.array([places[name] for name in self.data["target"].values])

    def take(self, indices: Sequence[int] | np.ndarray) -> ComponentLogits:
        """The prompts at ``indices``, in that order.

        Raises:
            InputError: if none is given.
        """
        if len(indices) == 0:
            raise InputError("components: no prompt taken, expected at least one")
        return replace(self, data=self.data.isel(prompt=np.asarray(indices)))

    def accuracy(self) -> xr.DataArray:
        """Share of prompts whose right label has the largest logit ``(component)``."""
        right = self.logits.argmax("label").values == self.targets[:, None]
        return self._by_component(right.mean(0), "accuracy")

    @property
    def model_accuracy(self) -> float:
        """The model's own accuracy among the labels."""
        return float((self.model_logits.argmax("label").values == self.targets).mean())

    def label_bias(self) -> xr.DataArray:
        """Share of prompts for which each component predicts each label ``(component, label)``."""
        said = self.logits.argmax("label").values
        shares = np.stack([(said == place).mean(0) for place in range(len(self.labels))], axis=1)
        return xr.DataArray(
            shares,
            dims=("component", "label"),
            coords={"component": self.data["component"], "label": self.data["label"]},
            name="share",
        )

    def kinds(self, *, biased: float = 0.9, level: float = 0.05) -> pd.DataFrame:
        """Sort components into good, bad and label-biased ones.

        A component that predicts label y in a share p_y of the prompts, independently of the right
        labels, is right with probability ``chance = sum_y p_y q_y``, with q_y the share of right
        labels. Its accuracy is compared with the central interval, of probability ``1 - level /
        components``, of a binomial count with that probability.

        Args:
            biased: a component that predicts one label at least this often is ``"label-biased"``.
            level: probability that any component lies outside, if all are at chance.

        Returns:
            One row per component: ``component, kind, block, head, accuracy, chance, chance_low,
            chance_high, favourite`` (the commonest prediction), ``share`` (its rate), ``n`` and
            ``type``: ``"label-biased"``, else ``"good"`` above the interval, ``"bad"`` below it,
            else ``"chance"``.

        Raises:
            InputError: if a threshold is outside 0 to 1, or there are no right labels.
        """
        for name, value in {"biased": biased, "level": level}.items():
            if not 0 < value <= 1:
                raise InputError(f"kinds: {name}={value}, expected more than 0 and at most 1")
        accuracy, shares, n = self.accuracy().values, self.label_bias().values, len(self.targets)
        chance = shares @ (np.bincount(self.targets, minlength=shares.shape[1]) / n)
        low, high = stats.binom.interval(1 - level / len(accuracy), n, chance)
        low, high = low / n, high / n
        most = shares.max(1)
        names = np.select(
            [most >= biased, accuracy > high, accuracy < low],
            ["label-biased", "good", "bad"],
            "chance",
        )
        return self._places().assign(
            accuracy=accuracy,
            chance=chance,
            chance_low=low,
            chance_high=high,
            favourite=np.array(self.labels)[shares.argmax(1)],
            share=most,
            n=n,
            type=names,
        )

    def transfer(self, other: ComponentLogits, *, top: int = 5) -> Transfer:
        """Agreement of the accuracies of heads and MLPs on two sets of prompts.

        Args:
            other: the same model on other prompts: other demonstrations, another template, other
                names for the labels.
            top: size of the compared sets of best components.

        Raises:
            InputError: if the components are not the same, or ``top`` is out of range.

        Source: Chang, Thomason & Jia 2024, table 2.
        """
        if self.data["component"].values.tolist() != other.data["component"].values.tolist():
            raise InputError(
                f"transfer: {self!r} and {other!r} have different components, expected those of "
                "one model"
            )
        writers = np.isin(self.data["kind"].values, WRITERS)
        ours, theirs = (each.accuracy().values[writers] for each in (self, other))
        if not 1 <= top <= len(ours):
            raise InputError(f"transfer: top={top}, expected 1 to {len(ours)}, all components")
        best = [set(np.argsort(-each, kind="stable")[:top].tolist()) for each in (ours, theirs)]
        flat = np.ptp(ours) == 0 or np.ptp(theirs) == 0
        correlation: Any = None if flat else stats.pearsonr(ours, theirs)
        return Transfer(
            correlation=float("nan") if flat else float(correlation.statistic),
            jaccard=len(best[0] & best[1]) / len(best[0] | best[1]),
            top=top,
            frame=self._places()[writers].assign(accuracy=ours, other_accuracy=theirs),
        )

    @cached_property
    def frame(self) -> pd.DataFrame:
        """`kinds` at its defaults."""
        return self.kinds()

    def plot(self) -> Any:
        """Heat map of the accuracy of every head."""
        heads = self.frame[self.frame["kind"] == "head"]
        return figures.head_map(
            heads,
            value="accuracy",
            title="Accuracy of each head alone",
            caption=f"Of {len(self.targets)} prompts; the model itself {self.model_accuracy:.3g}, "
            f"chance {heads['chance'].mean():.3g} on average.",
            value_title="accuracy",
        )

    def __repr__(self) -> str:
        sizes = self.data.sizes
        return (
            f"ComponentLogits({sizes['prompt']} prompts, {sizes['component']} components, "
            f"{sizes['label']} labels; sum exact to {self.error:.2g})"
        )

    def _places(self) -> pd.DataFrame:
        columns = ("component", "kind", "block", "head")
        frame = pd.DataFrame({name: self.data[name].values for name in columns})
        numbers = frame[["block", "head"]].astype("Int64")
        return frame.assign(**numbers.mask(numbers < 0))

    def _by_component(self, values: np.ndarray, name: str) -> xr.DataArray:
        coords = {"component": self.data["component"]}
        return xr.DataArray(values, dims=("component",), coords=coords, name=name)


@dataclass(frozen=True, repr=False)
class Transfer(Shown):
    """Agreement of two sets of component accuracies.

    Attributes:
        correlation: Pearson's, over heads and MLPs; NaN if all of one set are equal.
        jaccard: components in both top sets over those in either.
        top: the size of a top set.
        frame: ``component, kind, block, head, accuracy, other_accuracy``.
    """

    correlation: float
    jaccard: float
    top: int
    frame: pd.DataFrame

    def __repr__(self) -> str:
        return (
            f"Transfer(correlation {self.correlation:.2f}, Jaccard {self.jaccard:.2f} of the top "
            f"{self.top})"
        )
