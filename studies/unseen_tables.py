"""The scores of the study of unseen instances as one number a seed, or an ordered pair of tasks."""

from __future__ import annotations

import numpy as np
import pandas as pd

from studies.frames import rank_correlations, where
from studies.scales import AGREED
from studies.small_models import UNSEEN
from studies.unseen_options import ANSWER, SUBSPACE

# Fewer prompts than this inside or outside their cluster say nothing about a checkpoint.
FEWEST = 5


class Synthetic:
    """The scores of the trained models as one number a seed."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="synthetic")
        self.layers = sorted(int(x) for x in self.scores["layer"].dropna().unique())
        self.top, self.middle = self.layers[-1], self.layers[len(self.layers) // 2]
        self.steps = sorted(int(x) for x in self.scores["step"].unique())

    def final(self, metric: str, split: str, layer: int | None = None) -> np.ndarray:
        """A score after training."""
        return self.at(self.steps[-1], metric, split, layer)

    def at(self, step: int, metric: str, split: str, layer: int | None = None) -> np.ndarray:
        """A score at a checkpoint."""
        rows = where(self.scores, metric=metric, split=split, step=step)
        rows = rows if layer is None else where(rows, layer=layer)
        return rows.sort_values(by="seed")["value"].to_numpy()

    def with_accuracy(self, split: str, layer: int) -> np.ndarray:
        """Rank correlation of clustering with accuracy over checkpoints.

        Clustering is agreement across wordings where tasks have several, else ARI.
        """
        rows = where(self.scores, split=split)
        accuracy = where(rows, metric="accuracy")[["seed", "step", "value"]]
        metric = AGREED if AGREED in set(rows["metric"]) else "ari"
        both = where(rows, metric=metric, layer=layer).merge(
            accuracy, on=["seed", "step"], suffixes=("", "_accuracy")
        )
        return rank_correlations(both, "value_accuracy", "value", by="seed").to_numpy()

    def inside_minus_outside(self, split: str, layer: int) -> np.ndarray:
        """Accuracy of prompts in their task's cluster minus that of the others, within checkpoints.

        Differences of single checkpoints are weighted as Mantel and Haenszel weigh strata.
        """
        rows = where(self.scores, split=split, layer=layer)
        table = rows.pivot_table("value", ["seed", "step"], "metric", dropna=False)
        outside = table["in wrong cluster"]
        inside = where(rows, metric="membership").set_index(["seed", "step"])["n"] - outside
        counted = (inside >= FEWEST) & (outside >= FEWEST)
        weight = (inside * outside / (inside + outside)).where(counted, 0)
        gain = table["accuracy, right cluster"] - table["accuracy, wrong cluster"]
        total = (gain.fillna(0) * weight).groupby("seed").sum()
        return (total / weight.groupby("seed").sum().replace(0, np.nan)).dropna().to_numpy()

    def margin(self, split: str, layer: int) -> np.ndarray:
        """Mean over checkpoints of the AUC with which the margin tells right answers."""
        rows = where(self.scores, split=split, layer=layer, metric="margin AUC")
        rows = rows[rows["step"] > 0].dropna(subset="value")
        return rows.groupby("seed")["value"].mean().to_numpy()

    def moved(
        self, method: str, position: str = ANSWER, metric: str = "target", best: str | None = None
    ) -> np.ndarray:
        """Rate at the layer where ``best`` moves most answers of the other half of the prompts."""
        rows = where(self.scores, position=position)
        chosen = where(rows, fold="choose", metric="target", method=best or method)
        layer = chosen.loc[chosen.groupby("seed")["value"].idxmax()].set_index("seed")["layer"]
        rows = where(rows, fold="report", metric=metric, method=method).set_index("seed")
        return rows.loc[rows["layer"] == layer.reindex(rows.index), "value"].to_numpy()

    def erased(self, method: str, control: str = SUBSPACE) -> np.ndarray:
        """Accuracy lost by an erasure at the middle layer, beyond that lost by its control.

        Below chance an accuracy counts as chance, on either side: what is lost further is not
        knowledge of the task.
        """
        rows = where(self.scores, metric="accuracy left", position=ANSWER, fold="report")
        table = where(rows, layer=self.middle).pivot_table("value", "seed", "method")
        floored = table.clip(lower=self.chance().reindex(table.index), axis=0)
        return (floored[f"{method}, {control}"] - floored[method]).to_numpy()

    def left(self, method: str, metric: str = "accuracy left") -> float:
        """Accuracy left after an erasure at the middle layer, or another score of it."""
        rows = where(self.scores, metric=metric, position=ANSWER, fold="report")
        return float(where(rows, layer=self.middle, method=method)["value"].mean())

    def chance(self) -> pd.Series:
        """By seed, how often the best answer from the input alone is right on unseen strings."""
        rows = where(self.scores, metric="accuracy", split=UNSEEN, step=self.steps[-1])
        return rows.set_index("seed")["null_mean"]


class Pretrained:
    """The scores of the pretrained model as one number an ordered pair of tasks."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="pretrained")
        self.moves = self.scores[self.scores["fold"].notna()]

    @property
    def pairs(self) -> np.ndarray:
        """Source and target of each value, in their order."""
        pairs = where(self.moves, metric="target", method="shift")[["source", "target"]]
        return pairs.drop_duplicates().sort_values(["source", "target"]).to_numpy(dtype=str)

    def at_best(self, method: str, best: str = "shift") -> np.ndarray:
        """Rate at the layer where ``best`` moves most, chosen on the other half of the queries."""
        found = []
        rows = where(self.moves, metric="target")
        for fold, other in (("0", "1"), ("1", "0")):
            by_layer = where(rows, method=best, fold=other).groupby("layer")["value"].mean()
            found.append(where(rows, method=method, fold=fold, layer=by_layer.idxmax()))
        both = pd.concat(found)
        weighted = (both["value"] * both["n"]).groupby([both["source"], both["target"]]).sum()
        return (weighted / both["n"].groupby([both["source"], both["target"]]).sum()).to_numpy()

    def with_clusters(self, metric: str, source: str = "model") -> np.ndarray:
        """Rank correlation over layers of moved answers with a clustering score, by pair."""
        score = where(self.scores, metric=metric, method=source).set_index("layer")["value"]
        rows = where(self.moves, metric="target", method="shift")
        rows = rows.assign(
            score=rows["layer"].map(score), pair=rows["source"] + "\0" + rows["target"]
        )
        return rank_correlations(rows, "score", "value", by="pair").to_numpy()

    def peak(self, metric: str, method: str) -> int:
        """The first layer at which a curve reaches nine tenths of its largest value."""
        curve = where(self.scores, metric=metric, method=method).groupby("layer")["value"].mean()
        return int(curve.index[curve >= 0.9 * curve.max()][0])
