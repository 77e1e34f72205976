"""What the scores of single components and of reweighting say: the study's claims."""

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
# A model is not good yet below this share of its accuracy at the end.
GOOD = 0.9


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; those of the pretrained model are left out where there is none."""
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
        # The source chooses by oracle; ours chooses on other queries.
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
                "and the worst is below chance (accuracy over that of always saying one label, "
                f"{how})",
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
            "Good, bad and label-biased components are all there (share of the rarest of the "
            "three among heads and MLPs)",
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
            "(correlation, one less the other)",
            alike["demonstrations"] - alike["templates"],
            control=control,
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **over,
        ),
        decide(
            "steady-over-twins",
            "and more over templates that differ in one character than over any two",
            alike["twins"] - alike["templates"],
            control=control,
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **over,
        ),
        decide(
            "twins-differ",
            "though one character of white space changes how often the model is right (mean "
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
            (f"over-few-shot-{n}", "model", "few-shot prompts without it"),
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
        ("labels-matter", "dealt labels", "and it is the labels that do it: right ones beat dealt"),
        ("converged", "script", "Converged weights beat those of the source's script"),
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
    """Against each of the calibrations that are fitted as reweighting is."""
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
        "Heads whose outputs cluster by task are the ones that are right alone (rank correlation "
        "over heads of ARI with accuracy)",
        rank_correlations(heads, "ari", "accuracy", by="data").to_numpy(),
        control={
            "with the means of blocks taken out": float(within.mean()),
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
            "Before training no component is right (accuracy of the best, chosen on other "
            "prompts, above what the input alone allows)",
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
            "Components are right before the model is (best component, chosen on other prompts, "
            "less the model, mean over checkpoints at which the model is not good yet)",
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
            f"Reweighting from {most} labels finds what a half-trained model knows (accuracy "
            "gained over the model, mean over those checkpoints)",
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
            "In the trained model, heads whose outputs cluster by task given the input are the "
            "ones that are right alone (rank correlation over heads)",
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
    """Accuracy of the tenth of heads that clusters best, and of the others."""
    rank = heads.groupby(list(by))["ari"].rank(ascending=False, method="first", pct=True)
    top = rank <= share
    return {
        "accuracy of the tenth that clusters best": float(heads.loc[top, "accuracy"].mean()),
        "of the others": float(heads.loc[~top, "accuracy"].mean()),
    }


def _or_open(values: np.ndarray) -> np.ndarray:
    """One missing value where no seed gives any: the claim then stays inconclusive."""
    return values if values.size else np.array([np.nan])


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
