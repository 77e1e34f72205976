"""The claims on patterns of head activation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide, decide_over_all, permutation_p
from studies.head_patterns.mixes import DRAWN, EVEN, FITTED, LEAST, OWN, PARTS, RANDOM, SIMILAR
from studies.head_patterns.options import BASIC, COMPLEX
from studies.head_patterns.scores import FEW, RAW, SHARES
from studies.head_patterns.tuning import AND
from studies.scales import AGREEMENT, SHARE, SMALL, WEAK
from studies.scores import where

# Nulls of R² by the parts: none of these uses the parts of the task.
NULLS = ("parts of other tasks", "controls", "shared", "random", "permuted")
PAPER: dict[str, Any] = {"source": "Zhao et al., arXiv 2409.15820", "origin": "reconstruction"}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
PERMUTATIONS = 999


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; without a pretrained model, only those of the trained models."""
    found: list[lc.Claim] = []
    if "pretrained" in set(scores["part"]):
        found += _patterns(Part(scores, "pretrained", "task"), "-pretrained")
    trained = Part(scores, "synthetic", "seed")
    return [*found, *_patterns(trained, ""), *applications(trained), clusters(trained)]


def _patterns(seen: Part, suffix: str) -> list[lc.Claim]:
    """Claims of either part on tasks, concentration, composition and speed."""
    return [*_tasks(seen, suffix), *_composition(seen, suffix), *_speed(seen, suffix)]


def _tasks(seen: Part, suffix: str) -> list[lc.Claim]:
    gaps = {stage: seen.gaps(stage) for stage in ("before", "after")}
    pairs: dict[str, Any] = {
        "at_least": 0,
        "margin": SMALL,
        "scale": AGREEMENT.gain,
        **seen.over_pairs(gaps["after"]),
    }
    control = {
        f"{method}, {stage}": seen.mean(metric="similarity", method=method, stage=stage)
        for stage in ("before", "after")
        for method in ("same task", "other tasks", "dealt")
    }
    control |= {
        f"runs whose task is identified, {stage}": seen.mean(metric="identified", stage=stage)
        for stage in ("before", "after")
    }
    control |= {
        f"accuracy of {kind} tasks, {stage}": seen.mean(metric="learned", kind=kind, stage=stage)
        for kind in (BASIC, COMPLEX)
        for stage in ("before", "after")
    }
    control["by chance"] = 1 / where(seen.scores, metric="identified")["task"].nunique()
    gini = {stage: seen.values(metric="gini", stage=stage, method="model") for stage in gaps}
    return [
        decide(
            f"task-over-seed{suffix}",
            "After tuning, patterns of two runs are more alike if both were tuned on the same task "
            "(correlation over heads, same task minus other tasks; runs differ in prompts and "
            "batches)",
            gaps["after"].to_numpy(),
            control=control,
            **pairs,
            **PAPER,
        ),
        decide(
            f"tuning-separates{suffix}",
            "Tuning makes patterns of different tasks more distinct (correlation over heads, same "
            "task minus other tasks, after minus before tuning)",
            (gaps["after"] - gaps["before"]).to_numpy(),
            control={f"gap {stage}": float(gap.mean()) for stage, gap in gaps.items()},
            **pairs,
            **PAPER,
        ),
        decide(
            f"less-concentrated{suffix}",
            "Tuning spreads the activation over more heads (Gini coefficient, after minus before)",
            (gini["after"] - gini["before"]).to_numpy(),
            control={
                **{f"Gini, {stage}": float(values.mean()) for stage, values in gini.items()},
                "Gini, between prompts": seen.mean(metric="gini", method="noise"),
                **{
                    f"{metric}, {stage}": seen.mean(metric=metric, stage=stage, method="model")
                    for metric in ("cv", "kurtosis")
                    for stage in gini
                },
            },
            at_most=0,
            margin=SMALL,
            scale=SHARE.gain,
            **seen.over,
            **PAPER,
        ),
    ]


def _composition(seen: Part, suffix: str) -> list[lc.Claim]:
    found = []
    for form, id, words, origin in (
        (RAW, "composition", "The change of a complex task's pattern", PAPER),
        (SHARES, "composition-of-shares", "The change of heads' shares of the pattern", OURS),
    ):
        own = seen.values(metric="r2_out", method="parts", form=form)
        nulls = pd.DataFrame(
            {name: seen.values(metric="r2_out", method=name, form=form) for name in NULLS}
        )
        tasks = "its basic tasks" if form == RAW else "a complex task's basic tasks"
        sentence = f"{words} is a combination of the changes of {tasks}"
        found.append(
            decide_over_all(
                f"{id}{suffix}",
                f"{sentence} (R² over held-out layers, above each of the nulls)",
                own.to_numpy(),
                {name: nulls[name].to_numpy() for name in NULLS},
                control={
                    "R² by the parts": float(own.mean()),
                    **{f"by {name}": float(nulls[name].mean()) for name in NULLS},
                    "in sample, by the parts": seen.mean(metric="r2", method="parts", form=form),
                    "in sample, by controls": seen.mean(metric="r2", method="controls", form=form),
                    **{
                        f"mean p against {name}": seen.mean(
                            metric="r2_out p", method=name, form=form
                        )
                        for name in ("shared", "random", "permuted")
                    },
                },
                margin=SMALL,
                **(seen.over | ({"unit": "complex task"} if seen.unit == "task" else {})),
                **origin,
            )
        )
    return found


def _speed(seen: Part, suffix: str) -> list[lc.Claim]:
    way = {name: seen.values(metric="way", method=name) for name in ("pattern", "loss")}
    control = {
        "pattern": float(way["pattern"].mean()),
        "loss": float(way["loss"].mean()),
        "by correlation": seen.mean(metric="way", method="correlation"),
        "in proportion to samples": FEW,
    }
    return [
        decide(
            f"few-samples{suffix}",
            f"After {FEW:.0%} of the samples a pattern has covered more than that share of its "
            "change (distance to the last pattern)",
            way["pattern"].to_numpy(),
            control=control,
            at_least=FEW,
            margin=SMALL,
            **seen.over,
            **PAPER,
        ),
        decide(
            f"half-way{suffix}",
            f"After {FEW:.0%} of the samples a pattern has covered at least half of its change "
            "(distance to the last pattern)",
            way["pattern"].to_numpy(),
            control=control,
            at_least=0.5,
            **seen.over,
            **OURS,
        ),
        decide(
            f"pattern-before-loss{suffix}",
            f"After {FEW:.0%} of the samples a pattern has covered a larger share of its change "
            "than the loss (difference of shares)",
            _or_open(way["pattern"] - way["loss"]),
            control=control,
            at_least=0,
            margin=SMALL,
            **seen.over,
            **OURS,
        ),
    ]


def _or_open(values: pd.Series) -> np.ndarray:
    """The values that exist, or one NaN where none does: the claim then stays inconclusive."""
    found = values.dropna().to_numpy()
    return found if found.size else np.array([np.nan])


class Part:
    """Scores of one part: one number per seed or, for the pretrained model, per task."""

    def __init__(self, scores: pd.DataFrame, part: str, unit: str) -> None:
        self.scores = where(scores, part=part)
        self.unit = unit
        self.over: dict[str, Any] = {"unit": unit}
        if unit == "task":
            self.over["n_seeds"] = int(where(self.scores, metric="activation")["run"].nunique())

    def values(self, **labels: Any) -> pd.Series:
        """Mean of the rows with these labels, by seed or task."""
        rows = where(self.scores, **labels)
        return rows.groupby(self.unit)["value"].mean()

    def gaps(self, stage: str) -> pd.Series:
        """Similarity of patterns of one task minus that of two tasks, before or after tuning.

        By seed; for the pretrained model by ordered pair of tasks, which share tasks.
        """
        same = self.values(metric="similarity", method="same task", stage=stage)
        if self.unit != "task":
            return same - self.values(metric="similarity", method="other tasks", stage=stage)
        rows = where(self.scores, metric="similarity", method="pair", stage=stage)
        pairs = rows.groupby(["task", "other"])["value"].mean()
        return same.reindex(pairs.index, level="task") - pairs

    def over_pairs(self, gaps: pd.Series) -> dict[str, Any]:
        """Units of the values of `gaps`."""
        if self.unit != "task":
            return self.over
        pairs = np.array(gaps.index.to_list(), dtype=str)
        return {"units": {"task": pairs}, "n_seeds": self.over["n_seeds"]}

    def mean(self, **labels: Any) -> float:
        return float(self.values(**labels).mean())


def applications(seen: Part) -> list[lc.Claim]:
    """Claims on mixes of basic tasks and choices of prompts before a scarce task."""
    gained = {
        name: seen.values(metric="accuracy", method=name)
        for name in (FITTED, EVEN, RANDOM, PARTS, OWN, SIMILAR, DRAWN, LEAST)
    }
    accuracy = {name: float(values.mean()) for name, values in gained.items()}
    losses = {f"loss, {name}": seen.mean(metric="loss", method=name) for name in accuracy}
    tokens = where(seen.scores, metric="tokens").groupby("method")["value"].mean()
    share = _share_of_parts(seen)
    mixes = {name: accuracy[name] for name in (FITTED, EVEN, RANDOM, PARTS, OWN)}
    mixes |= {f"loss, {name}": losses[f"loss, {name}"] for name in (FITTED, EVEN, RANDOM, OWN)}
    mixes |= {
        "share of the parts in the fitted mix": share,
        "tokens, most over least": float(tokens.max() / tokens.min()),
    }
    found = [
        decide(
            id,
            f"Training on basic tasks mixed by fitted coefficients before a scarce complex task "
            f"gives higher accuracy than {words} (accuracy gained)",
            (gained[FITTED] - gained[other]).to_numpy(),
            control=mixes,
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **seen.over,
            **PAPER,
        )
        for id, other, words in (
            ("fitted-over-even", EVEN, "an even mix"),
            ("fitted-over-random", RANDOM, "a random mix"),
            ("fitted-over-none", OWN, "the scarce prompts alone, seen as often instead"),
        )
    ]
    found.append(
        decide(
            "similar-examples",
            "Training on public prompts whose patterns are most like the scarce task's gives "
            "higher accuracy than on prompts drawn at random (accuracy gained)",
            (gained[SIMILAR] - gained[DRAWN]).to_numpy(),
            control={
                **{name: accuracy[name] for name in (SIMILAR, DRAWN, LEAST)},
                **{f"loss, {n}": losses[f"loss, {n}"] for n in (SIMILAR, DRAWN, LEAST)},
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **seen.over,
            **PAPER,
        )
    )
    return found


def _share_of_parts(seen: Part) -> float:
    """Share of the complex task's parts in the fitted mix."""
    rows = where(seen.scores, metric="coefficient")
    own = [
        method in parts.split(AND)
        for method, parts in zip(rows["method"], rows["parts"], strict=True)
    ]
    return float(rows[own].groupby(["seed", "task"])["value"].sum().mean())


def clusters(seen: Part) -> lc.Claim:
    """Growth of heads against their clustering; the null permutes heads within layers."""
    heads = where(seen.scores, metric=["ari", "growth"]).pivot_table(
        "value", ["seed", "block", "head"], "metric"
    )
    heads = heads.reset_index()
    inside, nulls, plain = [], [], []
    rng = np.random.default_rng(0)
    for _, rows in heads.groupby("seed"):
        growth, ari = (_within(rows, name) for name in ("growth", "ari"))
        inside.append(_correlation(growth, ari))
        plain.append(rows["growth"].corr(rows["ari"], method="spearman"))
        nulls.append([_correlation(_shuffled(rows, growth, rng), ari) for _ in range(PERMUTATIONS)])
    null = np.mean(nulls, axis=0)
    return decide(
        "growing-heads-cluster",
        "Heads whose share of the activation grows in tuning on all basic tasks cluster more by "
        "task afterwards (rank correlation over heads within layers)",
        np.array(inside),
        control={
            "heads permuted within layers": float(null.mean()),
            "p of the mean": float(permutation_p(float(np.mean(inside)), null)),
            "over all layers": float(np.mean(plain)),
            "best ARI of a head": float(heads["ari"].max()),
        },
        at_least=0,
        margin=WEAK,
        scale=AGREEMENT,
        **seen.over,
        **OURS,
    )


def _within(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Ranks within each layer, centred."""
    ranks = rows.groupby("block")[column].rank()
    return (ranks - ranks.groupby(rows["block"]).transform("mean")).to_numpy()


def _shuffled(rows: pd.DataFrame, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = values.copy()
    blocks = rows["block"].to_numpy()
    for block in np.unique(blocks):
        out[blocks == block] = rng.permutation(values[blocks == block])
    return out


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else 0.0
