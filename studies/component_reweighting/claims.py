"""The claims on single components and on reweighting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide, decide_over_all, share
from studies.component_reweighting.scores import MATCHED
from studies.scales import AGREED, AGREEMENT, SHARE, SMALL, WEAK
from studies.scores import rank_correlations, where

PAPER: dict[str, Any] = {
    "source": "Chang, Thomason & Jia, arXiv 2406.13131",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
DEMONSTRATIONS, EXAMPLES = "seed of demonstrations", "seed of labelled examples"
KINDS = ("good", "bad", "label-biased")
# Below this share of its final accuracy a model counts as not good yet.
GOOD = 0.9


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; without a pretrained model, only those of the trained models."""
    found = _training(Synthetic(scores))
    if "pretrained" in set(scores["part"]):
        seen = Pretrained(scores)
        found = [*_components(seen), *_transfer(seen), *_reweighting(seen), _heads(seen), *found]
    return found


def _components(seen: Pretrained) -> list[lc.Claim]:
    model = seen.accuracy("model")
    shares, untrained = seen.shares(), seen.shares("random weights")
    over: dict[str, Any] = {"unit": DEMONSTRATIONS, **PAPER}
    return [
        # The source chooses components by oracle; the extension chooses them on other queries.
        *(
            decide(
                id,
                "The best single component answers more prompts right than the whole model "
                f"({how})",
                seen.accuracy(method) - model,
                control={
                    "best component": seen.accuracy(method).mean(),
                    "model": model.mean(),
                    "one label": seen.chance(),
                },
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                unit=DEMONSTRATIONS,
                **origin,
            )
            for id, method, how, origin in (
                ("best-component", "best component, same queries", "chosen by oracle", PAPER),
                ("best-component-chosen", "best component", "chosen on other queries", OURS),
            )
        ),
        *(
            decide(
                id,
                "The worst single component is below chance (accuracy over that of always giving "
                f"one label, {how})",
                seen.relative_to_chance(method),
                control={
                    "worst component": seen.accuracy(method).mean(),
                    "model, over chance": seen.relative_to_chance("model").mean(),
                },
                at_most=1,
                margin=SMALL,
                unit=DEMONSTRATIONS,
                **origin,
            )
            for id, method, how, origin in (
                ("worst-component", "worst component, same queries", "chosen by oracle", PAPER),
                ("worst-component-chosen", "worst component", "chosen on other queries", OURS),
            )
        ),
        decide(
            "kinds",
            "Heads and MLPs include good, bad and label-biased components (share of the rarest of "
            "the three)",
            shares[list(KINDS)].min(axis=1).to_numpy(),
            control={
                **{name: shares[name].mean() for name in KINDS},
                **{f"{name}, random weights": untrained[name].mean() for name in KINDS},
            },
            at_least=0.01,
            scale=share(of=seen.n_components),
            **over,
        ),
    ]


def _transfer(seen: Pretrained) -> list[lc.Claim]:
    alike = {name: seen.alike(name) for name in ("demonstrations", "templates", "twins")}
    control = {name: mean(values) for name, values in alike.items()}
    control |= {f"Jaccard of five, {name}": mean(seen.alike(name, "jaccard")) for name in alike}
    over: dict[str, Any] = {"unit": DEMONSTRATIONS, **PAPER}
    return [
        decide(
            "steady-over-demonstrations",
            "Component accuracies agree more over demonstrations than over templates "
            "(difference of correlations)",
            alike["demonstrations"] - alike["templates"],
            control=control,
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **over,
        ),
        decide(
            "steady-over-twins",
            "Component accuracies agree more over templates that differ in one character than over "
            "any two templates (difference of correlations)",
            alike["twins"] - alike["templates"],
            control=control,
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **over,
        ),
        decide(
            "twins-differ",
            "One character of white space in the template changes the model's accuracy (mean "
            "absolute difference)",
            seen.alike("twins", "gap"),
            control={
                "other demonstrations": mean(seen.alike("demonstrations", "gap")),
                "another template": mean(seen.alike("templates", "gap")),
            },
            at_least=0.05,
            scale=SHARE,
            **over,
        ),
    ]


def _reweighting(seen: Pretrained) -> list[lc.Claim]:
    most = seen.labels[-1]
    over: dict[str, Any] = {"unit": EXAMPLES}
    found = []
    for n in seen.labels:
        own = seen.accuracy(f"reweighting {n}")
        few = seen.accuracy("model")
        for id, method, words in (
            (f"over-few-shot-{n}", "model", "few-shot prompts without reweighting"),
            (f"over-{n}-shot", f"{n}-shot", "as many demonstrations"),
            (f"over-calibration-{n}", f"Calib+ {n}", "calibration (Calib+)"),
            (f"over-prompt-selection-{n}", f"prompt selection {n}", "prompt selection"),
        ):
            other = seen.accuracy(method)
            found.append(
                decide(
                    id,
                    f"Reweighting from {n} labels beats {words} (accuracy gained)",
                    own - other,
                    control={
                        f"reweighting {n}": own.mean(),
                        method: other.mean(),
                        "few shots": few.mean(),
                    }
                    if method != "model"
                    else {f"reweighting {n}": own.mean(), "few shots": few.mean()},
                    at_least=0,
                    margin=SMALL,
                    scale=SHARE.gain,
                    **over,
                    **PAPER,
                )
            )
        found.append(_over_matched_calibration(seen, n))
    own = seen.accuracy(f"reweighting {most}")
    for id, variant, statement in (
        ("labels-matter", "dealt labels", "Reweighting from true labels beats permuted labels"),
        ("converged", "script", "Converged weights beat the weights of the source's script"),
        ("muted", "free", "Weights that may only mute beat weights that may also invert"),
    ):
        other = seen.accuracy(f"reweighting {most}, {variant}")
        found.append(
            decide(
                id,
                f"{statement} (accuracy gained, {most} labels)",
                own - other,
                control={f"reweighting {most}": own.mean(), variant: other.mean()},
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                **over,
                **OURS,
            )
        )
    return found


def _over_matched_calibration(seen: Pretrained, n: int) -> lc.Claim:
    """Reweighting against each calibration that is fitted on the same folds."""
    own = seen.accuracy(f"reweighting {n}")
    others = {f"{name} {n}": seen.accuracy(f"{name} {n}") for name in MATCHED}
    return decide_over_all(
        f"over-matched-calibration-{n}",
        f"Reweighting from {n} labels beats calibration to convergence on the same folds "
        "(accuracy gained over the better of Calib+ and vector scaling)",
        own,
        others,
        control={
            f"reweighting {n}": own.mean(),
            **{name: values.mean() for name, values in others.items()},
            f"Calib+ {n}, script": seen.accuracy(f"Calib+ {n}").mean(),
        },
        margin=SMALL,
        scale=SHARE,
        unit=EXAMPLES,
        **OURS,
    )


def _heads(seen: Pretrained) -> lc.Claim:
    heads = seen.heads()
    heads["beyond its block"] = heads["ari"] - heads.groupby(["data", "block"])["ari"].transform(
        "mean"
    )
    heads["accuracy beyond"] = heads["accuracy"] - heads.groupby(["data", "block"])[
        "accuracy"
    ].transform("mean")
    within = rank_correlations(heads, "beyond its block", "accuracy beyond", by="data")
    return decide(
        "task-heads",
        "Heads whose outputs cluster by task are more often right alone (rank correlation over "
        "heads of ARI with accuracy)",
        rank_correlations(heads, "ari", "accuracy", by="data").to_numpy(),
        control={
            "means of blocks subtracted": float(within.mean()),
            **_top(heads, ["data"]),
            "best ARI of a head": float(heads["ari"].max()),
            "ARI of the words": seen.words(),
        },
        at_least=0,
        margin=WEAK,
        scale=AGREEMENT,
        unit="data set",
        n_seeds=len(seen.seeds),
        **OURS,
    )


def _training(seen: Synthetic) -> list[lc.Claim]:
    best, model = seen.accuracy("best component"), seen.accuracy("model")
    first, last = seen.steps[0], seen.steps[-1]
    most = max(
        int(name.removeprefix("reweighting "))
        for name in seen.scores["method"].dropna().unique()
        if name.removeprefix("reweighting ").isdigit()
    )
    heads, before = seen.heads(last), seen.heads(first)
    early = [model[step].mean() for step in seen.steps]
    return [
        decide(
            "none-untrained",
            "Before training no component is right (accuracy of the best component, chosen on "
            "other prompts, above what the input alone allows)",
            best[first].to_numpy() - seen.chance(),
            control={
                "input alone": seen.chance().mean(),
                "chosen on the same prompts": seen.accuracy("best component, same queries")[
                    first
                ].mean(),
                "best component, trained": best[last].mean(),
            },
            at_most=0.05,
            scale=SHARE.gain,
            **PAPER,
        ),
        decide(
            "components-first",
            "Components are right earlier in training than the model (accuracy of the best "
            "component, chosen on other prompts, minus the model's, mean over checkpoints at "
            "which the model is not good yet)",
            _or_open(seen.gain("best component", "model")),
            control={
                "at the end": (best[last] - model[last]).mean(),
                "model at the end": model[last].mean(),
                "checkpoints": float(len(early)),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **PAPER,
        ),
        decide(
            "reweighting-half-trained",
            f"Reweighting from {most} labels improves a half-trained model (accuracy gained over "
            "the model, mean over checkpoints at which the model is not good yet)",
            _or_open(seen.gain(f"reweighting {most}", "model")),
            control={
                **{
                    f"{name} {most}": mean(seen.gain(f"{name} {most}", "model"))
                    for name in ("Calib+", *MATCHED)
                },
                "dealt labels": mean(seen.gain(f"reweighting {most}, dealt labels", "model")),
                "script": mean(seen.gain(f"reweighting {most}, script", "model")),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "task-heads-trained",
            "In the trained model, heads whose outputs cluster by task within input are more often "
            "right alone (rank correlation over heads of ARI with accuracy)",
            rank_correlations(heads, "ari", "accuracy", by="seed").to_numpy(),
            control={
                "untrained model": float(
                    rank_correlations(before, "ari", "accuracy", by="seed").mean()
                ),
                **_top(heads, ["seed"]),
            },
            at_least=0,
            margin=WEAK,
            scale=AGREEMENT,
            **OURS,
        ),
    ]


def _top(heads: pd.DataFrame, by: Sequence[str], share: float = 0.1) -> dict[str, float]:
    """Accuracy of the top tenth of heads by clustering, and of the other heads."""
    rank = heads.groupby(list(by))["ari"].rank(ascending=False, method="first", pct=True)
    top = rank <= share
    return {
        "accuracy of the tenth that clusters best": float(heads.loc[top, "accuracy"].mean()),
        "of the others": float(heads.loc[~top, "accuracy"].mean()),
    }


def _or_open(values: np.ndarray) -> np.ndarray:
    """One NaN where no seed gives a value: the claim then stays inconclusive."""
    return values if values.size else np.array([np.nan])


class Pretrained:
    """The pretrained model's scores: one number per seed, the mean over sets and templates."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="pretrained")
        own = where(self.scores, metric="accuracy")
        self.seeds = sorted(int(seed) for seed in own["seed"].unique())
        counted = own[own["method"].str.endswith("-shot")]
        self.labels = sorted({int(name.removesuffix("-shot")) for name in counted["method"]})
        # One-character variants of templates have few-shot scores only: methods leave them out.
        self.methods = own[own["template"].isin([*counted["template"].unique(), "all"])]

    def accuracy(self, method: str) -> np.ndarray:
        """Accuracy of a method."""
        return self._by_seed(where(self.methods, method=method))

    def relative_to_chance(self, method: str) -> np.ndarray:
        """Accuracy divided by that of always giving one label."""
        rows = where(self.methods, method=method)
        chance = where(self.scores, metric="chance").groupby("data")["value"].mean()
        return self._by_seed(rows.assign(value=rows["value"] / rows["data"].map(chance)))

    def chance(self) -> float:
        return float(where(self.scores, metric="chance").groupby("data")["value"].mean().mean())

    def alike(self, method: str, metric: str = "correlation") -> np.ndarray:
        """Transfer over demonstrations, templates or one-character variants, by seed."""
        return self._by_seed(where(self.scores, metric=metric, method=method))

    def shares(self, method: str = "model") -> pd.DataFrame:
        """Share of components of each type, one row per seed."""
        rows = where(self.scores, metric="share", method=method)
        return rows.pivot_table("value", "seed", "type")[[*KINDS, "chance"]]

    @property
    def n_components(self) -> int:
        """Number of components that were scored alone."""
        rows = where(self.scores, metric="component accuracy")
        return len(rows[["kind", "block", "head"]].drop_duplicates())

    def heads(self) -> pd.DataFrame:
        """One row per set and head: its ARI by task, its accuracy and its block."""
        ari = where(self.scores, metric="ari", method="model").set_index(["block", "head"])["value"]
        own = where(self.scores, metric="component accuracy", kind="head")
        right = own.groupby(["data", "block", "head"])["value"].mean().rename("accuracy")
        return right.reset_index().join(ari.rename("ari"), on=["block", "head"])

    def words(self) -> float:
        """ARI that the prompts' words alone reach."""
        return mean(where(self.scores, metric="ari", method="words")["value"].to_numpy())

    def _by_seed(self, rows: pd.DataFrame) -> np.ndarray:
        by_set = rows.groupby(["seed", "data"])["value"].mean()
        return by_set.groupby("seed").mean().reindex(self.seeds).to_numpy()


class Synthetic:
    """The trained models' scores: one number per seed."""

    def __init__(self, scores: pd.DataFrame) -> None:
        self.scores = where(scores, part="synthetic")
        self.steps = sorted(int(step) for step in self.scores["step"].unique())

    def accuracy(self, method: str) -> pd.DataFrame:
        """Accuracy of a method, one row per seed and one column per checkpoint."""
        rows = where(self.scores, metric="accuracy", method=method)
        return rows.pivot_table("value", "seed", "step").sort_index()

    def gain(self, method: str, over: str) -> np.ndarray:
        """Accuracy gained, mean over trained checkpoints at which the model is not good yet."""
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
        """One row per seed and head: its ARI by task and its accuracy."""
        rows = where(self.scores, step=step)
        keys = ["seed", "block", "head"]
        ari = where(rows, metric=AGREED).set_index(keys)["value"].rename("ari")
        own = where(rows, metric="component accuracy", kind="head")
        return own.rename(columns={"value": "accuracy"})[[*keys, "accuracy"]].join(ari, on=keys)


def mean(values: np.ndarray) -> float:
    """The mean, NaN where there is no value."""
    return float(values.mean()) if values.size else float("nan")
