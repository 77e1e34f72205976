"""The claims of the study of unseen instances."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import correlation, decide
from studies.scales import AGREED, AGREEMENT, SHARE, SMALL, WEAK
from studies.scores import rank_correlations, where
from studies.synthetic_task import UNSEEN
from studies.unseen.options import ANSWER, INSTRUCTION, MEANS, REASSIGNED, SUBSPACE

PAPER: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
MEMBER = "another member"
RANDOM = "as much variance in random directions"
PERMUTED = "tasks permuted over whole expressions"
# A checkpoint counts only with this many prompts both inside and outside their cluster.
FEWEST = 5


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; each value is one seed, or one ordered pair of tasks (pretrained)."""
    found = _prediction(Synthetic(scores)) + _cause(Synthetic(scores))
    if "pretrained" in set(scores["part"]):
        found += _in_a_pretrained_model(Pretrained(scores))
    return found


def _prediction(seen: Synthetic) -> list[lc.Claim]:
    top, middle = seen.top, seen.middle
    inside, untrained = (seen.at(s, "membership", UNSEEN, top) for s in (seen.steps[-1], 0))
    return [
        decide(
            "tracks-accuracy",
            "On unseen strings accuracy and clustering rise together over training (rank "
            "correlation over checkpoints, last layer)",
            seen.with_accuracy(UNSEEN, top),
            control={
                "layer 0": seen.with_accuracy(UNSEEN, 0).mean(),
                "unseen expressions": seen.with_accuracy("new_regex", top).mean(),
            },
            at_least=0,
            margin=WEAK,
            scale=correlation(of=len(seen.steps)),
            **PAPER,
        ),
        decide(
            "nearest-centroid",
            "The nearest training centroid names the task of unseen strings (share of prompts "
            "above that of the untrained model, last layer, within input)",
            inside - untrained,
            control={
                "share": inside.mean(),
                "untrained model": untrained.mean(),
                "unseen expressions": seen.final("membership", "new_regex", top).mean(),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **PAPER,
        ),
        *(
            decide(
                f"membership-{name}",
                "Prompts whose state lies in their task's cluster are answered right more often "
                f"({name} layer, unseen strings, within checkpoints)",
                _or_open(seen.inside_minus_outside(UNSEEN, layer)),
                control={
                    "unseen expressions": _mean(seen.inside_minus_outside("new_regex", layer))
                },
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                **PAPER,
            )
            for name, layer in (("middle", middle), ("last", top))
        ),
        decide(
            "margin",
            "Prompts further inside their task's cluster are answered right more often (AUC of the "
            "margin for right answers, middle layer, mean over checkpoints)",
            _or_open(seen.margin(UNSEEN, middle)),
            control={"no information": 0.5, "layer 0": _mean(seen.margin(UNSEEN, 0))},
            at_least=0.5,
            margin=SMALL,
            scale=SHARE,
            **PAPER,
        ),
        *_wrong_cluster(seen),
    ]


def _wrong_cluster(seen: Synthetic) -> list[lc.Claim]:
    """Claims on pairs of expression and input never trained together, if there are any."""
    inside = seen.final("membership", "new_pair", seen.top)
    if not inside.size:
        return []
    return [
        decide(
            "new-pairs-elsewhere",
            "States of pairs of expression and input never trained together lie in other tasks' "
            "clusters (share of prompts outside their own task's cluster)",
            1 - inside,
            control={
                "unseen strings": 1 - seen.final("membership", UNSEEN, seen.top).mean(),
                "ARI of new pairs": seen.final("ari", "new_pair", seen.top).mean(),
                "accuracy of new pairs": seen.final("accuracy", "new_pair").mean(),
            },
            at_least=0.5,
            scale=SHARE,
            **OURS,
        )
    ]


def _cause(seen: Synthetic) -> list[lc.Claim]:
    transport = seen.moved("transport")
    others = {
        "another member": seen.moved(MEMBER).mean(),
        "global shift, best layer": seen.moved("shift").mean(),
        "random direction, same norm": _mean(_random(seen, "transport")),
        "means of shuffled labels, same norm": _mean(_shuffled(seen, "transport")),
    }
    early = seen.moved("shift", INSTRUCTION) - _random(seen, "shift", INSTRUCTION)
    return [
        decide(
            "transport",
            "A prompt moved to another task's cluster gets that task's answer (share of answers, "
            "best layer, cluster within input)",
            transport,
            control=others,
            at_least=0.95,
            scale=SHARE,
            **OURS,
        ),
        decide(
            "random-moves",
            "A norm-matched random direction does not give the target task's answer (share of "
            "answers, best layer)",
            _random(seen, "transport"),
            control={"transport": transport.mean()},
            at_most=0.05,
            scale=SHARE,
            **OURS,
        ),
        decide(
            "input-conditional",
            "A move within input gives more target answers than one direction for all inputs "
            "(transport minus global shift, each at its best layer)",
            transport - seen.moved("shift"),
            control={"transport": transport.mean(), "shift": seen.moved("shift").mean()},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        *(
            decide(
                id,
                f"Erasing task identity{within} at the middle layer costs accuracy beyond erasing "
                f"{words}",
                seen.erased(method, control),
                control={
                    "accuracy left": seen.left(method),
                    control: seen.left(f"{method}, {control}"),
                    "input alone": float(seen.chance().mean()),
                    "variance removed": seen.left(method, "variance removed"),
                    f"variance removed, {control}": seen.left(
                        f"{method}, {control}", "variance removed"
                    ),
                },
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                **OURS,
            )
            for id, method, within, control, words in (
                ("erase", "erase", "", SUBSPACE, RANDOM),
                ("erase-given-input", "erase given input", " within input", SUBSPACE, RANDOM),
                ("erase-over-reassigned", "erase", "", REASSIGNED, PERMUTED),
                (
                    "erase-given-input-over-reassigned",
                    *("erase given input", " within input", REASSIGNED, PERMUTED),
                ),
            )
        ),
        decide(
            "instruction-end",
            "A move at the end of the instruction changes the task (target answers above those of "
            "a norm-matched random direction, best layer)",
            early,
            control={
                "shift": seen.moved("shift", INSTRUCTION).mean(),
                "another member": seen.moved(MEMBER, INSTRUCTION).mean(),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
    ]


def _in_a_pretrained_model(seen: Pretrained) -> list[lc.Claim]:
    over: dict[str, Any] = {"units": {"task": seen.pairs}, "n_seeds": 1, **OURS}
    moved = seen.at_best("shift")
    nothing = _name(seen.moves, "random direction")
    return [
        decide(
            "pretrained-shift",
            "In a pretrained model, shifting states from one task's mean to another's gives the "
            "other task's answers (share of answers, best layer, queries unseen by the means)",
            moved,
            control={
                "random direction, same norm": seen.at_best(nothing).mean(),
                "means of shuffled labels, same norm": seen.at_best(
                    _name(seen.moves, MEANS)
                ).mean(),
                "another member": seen.at_best(MEMBER).mean(),
            },
            at_least=0.6,
            scale=SHARE,
            **over,
        ),
        decide(
            "pretrained-random",
            "In a pretrained model, a norm-matched random direction does not give the other task's "
            "answers (share of answers, best layer)",
            seen.at_best(nothing),
            control={"shift": moved.mean()},
            at_most=0.05,
            scale=SHARE,
            **over,
        ),
        decide(
            "pretrained-layers",
            "In a pretrained model, moves work at the layers at which states cluster (rank "
            "correlation over layers of target answers with ARI within query)",
            seen.with_clusters("ari"),
            control={
                "with accuracy of the nearest neighbour": _mean(seen.with_clusters("1nn_accuracy")),
                "layer where ARI peaks": seen.peak("ari", "model"),
                "layer where shift peaks": seen.peak("target", "shift"),
                "ARI of the words": float(
                    where(seen.scores, metric="ari", method="words")["value"].iloc[0]
                ),
            },
            at_least=0,
            margin=WEAK,
            scale=AGREEMENT,
            **over,
        ),
    ]


def _random(seen: Synthetic, like: str, position: str = ANSWER) -> np.ndarray:
    return seen.moved(f"random direction, norm of {like}", position, best=like)


def _shuffled(seen: Synthetic, like: str) -> np.ndarray:
    return seen.moved(f"{MEANS}, norm of {like}", best=like)


def _name(rows: pd.DataFrame, start: str) -> str:
    return next(name for name in rows["method"].unique() if name.startswith(start))


def _or_open(values: np.ndarray) -> np.ndarray:
    """One NaN where no seed gives a value: the claim then stays inconclusive."""
    return values if values.size else np.array([np.nan])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


class Synthetic:
    """The trained models' scores: one number per seed."""

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
        """Accuracy of prompts inside their task's cluster minus outside, within checkpoints.

        Checkpoints are combined with the Mantel-Haenszel weights of strata.
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
        """AUC of the margin for right answers, mean over checkpoints."""
        rows = where(self.scores, split=split, layer=layer, metric="margin AUC")
        rows = rows[rows["step"] > 0].dropna(subset="value")
        return rows.groupby("seed")["value"].mean().to_numpy()

    def moved(
        self, method: str, position: str = ANSWER, metric: str = "target", best: str | None = None
    ) -> np.ndarray:
        """Rate at the layer where ``best`` is highest on the other half of the prompts."""
        rows = where(self.scores, position=position)
        chosen = where(rows, fold="choose", metric="target", method=best or method)
        layer = chosen.loc[chosen.groupby("seed")["value"].idxmax()].set_index("seed")["layer"]
        rows = where(rows, fold="report", metric=metric, method=method).set_index("seed")
        return rows.loc[rows["layer"] == layer.reindex(rows.index), "value"].to_numpy()

    def erased(self, method: str, control: str = SUBSPACE) -> np.ndarray:
        """Accuracy lost by an erasure at the middle layer minus that lost by its control.

        On both sides an accuracy below chance counts as chance: a further loss is not one of
        knowledge of the task.
        """
        rows = where(self.scores, metric="accuracy left", position=ANSWER, fold="report")
        table = where(rows, layer=self.middle).pivot_table("value", "seed", "method")
        floored = table.clip(lower=self.chance().reindex(table.index), axis=0)
        return (floored[f"{method}, {control}"] - floored[method]).to_numpy()

    def left(self, method: str, metric: str = "accuracy left") -> float:
        """Accuracy (or another metric) after an erasure at the middle layer."""
        rows = where(self.scores, metric=metric, position=ANSWER, fold="report")
        return float(where(rows, layer=self.middle, method=method)["value"].mean())

    def chance(self) -> pd.Series:
        """Accuracy of the best answer from the input alone on unseen strings, by seed."""
        rows = where(self.scores, metric="accuracy", split=UNSEEN, step=self.steps[-1])
        return rows.set_index("seed")["null_mean"]


class Pretrained:
    """The pretrained model's scores: one number per ordered pair of tasks."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="pretrained")
        self.moves = self.scores[self.scores["fold"].notna()]

    @property
    def pairs(self) -> np.ndarray:
        """Source and target of each value, in order."""
        pairs = where(self.moves, metric="target", method="shift")[["source", "target"]]
        return pairs.drop_duplicates().sort_values(["source", "target"]).to_numpy(dtype=str)

    def at_best(self, method: str, best: str = "shift") -> np.ndarray:
        """Rate at the layer where ``best`` is highest on the other half of the queries."""
        found = []
        rows = where(self.moves, metric="target")
        for fold, other in (("0", "1"), ("1", "0")):
            by_layer = where(rows, method=best, fold=other).groupby("layer")["value"].mean()
            found.append(where(rows, method=method, fold=fold, layer=by_layer.idxmax()))
        both = pd.concat(found)
        weighted = (both["value"] * both["n"]).groupby([both["source"], both["target"]]).sum()
        return (weighted / both["n"].groupby([both["source"], both["target"]]).sum()).to_numpy()

    def with_clusters(self, metric: str, source: str = "model") -> np.ndarray:
        """Rank correlation over layers of target answers with a clustering score, by pair."""
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
