"""The scores of the study of single components as one number a seed."""

from __future__ import annotations

import numpy as np
import pandas as pd

from studies.frames import where
from studies.scales import AGREED

KINDS = ("good", "bad", "label-biased")
# A model is not good yet below this share of its accuracy at the end.
GOOD = 0.9


class Pretrained:
    """The scores of the pretrained model as one number a seed: means over sets and templates."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="pretrained")
        own = where(self.scores, metric="accuracy")
        self.seeds = sorted(int(seed) for seed in own["seed"].unique())
        counted = own[own["method"].str.endswith("-shot")]
        self.labels = sorted({int(name.removesuffix("-shot")) for name in counted["method"]})
        # Twins are asked with few shots alone: methods are compared without them.
        self.methods = own[own["template"].isin([*counted["template"].unique(), "all"])]

    def accuracy(self, method: str) -> np.ndarray:
        """Accuracy of a method."""
        return self._by_seed(where(self.methods, method=method))

    def relative_to_chance(self, method: str) -> np.ndarray:
        """Accuracy over that of always saying one label."""
        rows = where(self.methods, method=method)
        chance = where(self.scores, metric="chance").groupby("data")["value"].mean()
        return self._by_seed(rows.assign(value=rows["value"] / rows["data"].map(chance)))

    def chance(self) -> float:
        return float(where(self.scores, metric="chance").groupby("data")["value"].mean().mean())

    def alike(self, method: str, metric: str = "correlation") -> np.ndarray:
        """Transfer over demonstrations, templates or twins, in the order of the seeds."""
        return self._by_seed(where(self.scores, metric=metric, method=method))

    def shares(self, method: str = "model") -> pd.DataFrame:
        """Share of components of each type: a row a seed."""
        rows = where(self.scores, metric="share", method=method)
        return rows.pivot_table("value", "seed", "type")[[*KINDS, "chance"]]

    @property
    def n_components(self) -> int:
        """Components that were asked alone."""
        rows = where(self.scores, metric="component accuracy")
        return len(rows[["kind", "block", "head"]].drop_duplicates())

    def heads(self) -> pd.DataFrame:
        """A row a set and head: how well it clusters by task, how right it is, by block."""
        ari = where(self.scores, metric="ari", method="model").set_index(["block", "head"])["value"]
        own = where(self.scores, metric="component accuracy", kind="head")
        right = own.groupby(["data", "block", "head"])["value"].mean().rename("accuracy")
        return right.reset_index().join(ari.rename("ari"), on=["block", "head"])

    def words(self) -> float:
        """ARI of what the prompts' words alone give away."""
        return mean(where(self.scores, metric="ari", method="words")["value"].to_numpy())

    def _by_seed(self, rows: pd.DataFrame) -> np.ndarray:
        by_set = rows.groupby(["seed", "data"])["value"].mean()
        return by_set.groupby("seed").mean().reindex(self.seeds).to_numpy()


class Synthetic:
    """The scores of the trained models as one number a seed."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="synthetic")
        self.steps = sorted(int(step) for step in self.scores["step"].unique())

    def accuracy(self, method: str) -> pd.DataFrame:
        """Accuracy of a method: a row a seed, a column a checkpoint."""
        rows = where(self.scores, metric="accuracy", method=method)
        return rows.pivot_table("value", "seed", "step").sort_index()

    def gain(self, method: str, over: str) -> np.ndarray:
        """Accuracy over another's, mean over trained checkpoints at which the model is not good."""
        model = self.accuracy("model")
        early = model.lt(GOOD * model[self.steps[-1]], axis=0)
        early[self.steps[0]] = False
        gain = (self.accuracy(method) - self.accuracy(over)).where(early)
        return gain.mean(axis=1).dropna().to_numpy()

    def chance(self) -> np.ndarray:
        """Accuracy that the input alone allows."""
        return where(self.scores, metric="chance", method="input alone").groupby("seed")[
            "value"
        ].mean().to_numpy()  # fmt: skip

    def heads(self, step: int) -> pd.DataFrame:
        """A row a seed and head: how well it clusters by task, how right it is."""
        rows = where(self.scores, step=step)
        keys = ["seed", "block", "head"]
        ari = where(rows, metric=AGREED).set_index(keys)["value"].rename("ari")
        own = where(rows, metric="component accuracy", kind="head")
        return own.rename(columns={"value": "accuracy"})[[*keys, "accuracy"]].join(ari, on=keys)


def mean(values: np.ndarray) -> float:
    """The mean, missing where there is no value."""
    return float(values.mean()) if values.size else float("nan")
