"""What the scores of head patterns say: the study's claims."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide, decide_over_all
from studies.frames import where
from studies.head_patterns_options import BASIC, COMPLEX
from studies.head_patterns_scores import FEW, RAW, SHARES
from studies.head_patterns_tables import OURS, PAPER, Part
from studies.head_patterns_uses import applications, clusters
from studies.scales import AGREEMENT, SHARE, SMALL

# What R² by the parts has to be above: none of these knows what the task is made of.
NULLS = ("parts of other tasks", "controls", "shared", "random", "permuted")


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims; those of the pretrained model are left out where there is none."""
    found: list[lc.Claim] = []
    if "pretrained" in set(scores["part"]):
        found += _patterns(Part(scores, "pretrained", "task"), "-pretrained")
    trained = Part(scores, "synthetic", "seed")
    return [*found, *_patterns(trained, ""), *applications(trained), clusters(trained)]


def _patterns(seen: Part, suffix: str) -> list[lc.Claim]:
    """Task against seed, concentration, composition and speed, of either part."""
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
            "After tuning, patterns of two runs are more alike if they were tuned on the same task "
            "(correlation over heads, same task less other tasks; other prompts, other batches)",
            gaps["after"].to_numpy(),
            control=control,
            **pairs,
            **PAPER,
        ),
        decide(
            f"tuning-separates{suffix}",
            "and tuning sets tasks further apart than they were (the same after less before)",
            (gaps["after"] - gaps["before"]).to_numpy(),
            control={f"gap {stage}": float(gap.mean()) for stage, gap in gaps.items()},
            **pairs,
            **PAPER,
        ),
        decide(
            f"less-concentrated{suffix}",
            "Tuning spreads the activation over more heads (Gini coefficient, after less before)",
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
        (SHARES, "composition-of-shares", "and so is that of heads' shares of it:", OURS),
    ):
        own = seen.values(metric="r2_out", method="parts", form=form)
        nulls = pd.DataFrame(
            {name: seen.values(metric="r2_out", method=name, form=form) for name in NULLS}
        )
        sentence = (
            f"{words} is a combination of the changes of its basic tasks"
            if form == RAW
            else f"{words} a combination of those of its basic tasks"
        )
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
            f"After {FEW:.0%} of the samples a pattern has gone more of its way than in proportion "
            "(distance to the last)",
            way["pattern"].to_numpy(),
            control=control,
            at_least=FEW,
            margin=SMALL,
            **seen.over,
            **PAPER,
        ),
        decide(
            f"half-way{suffix}",
            "and half of it or more",
            way["pattern"].to_numpy(),
            control=control,
            at_least=0.5,
            **seen.over,
            **OURS,
        ),
        decide(
            f"pattern-before-loss{suffix}",
            "and a larger share of its way than the loss of its own",
            _or_open(way["pattern"] - way["loss"]),
            control=control,
            at_least=0,
            margin=SMALL,
            **seen.over,
            **OURS,
        ),
    ]


def _or_open(values: pd.Series) -> np.ndarray:
    """What is there, or one missing value where nothing is: the claim then stays inconclusive."""
    found = values.dropna().to_numpy()
    return found if found.size else np.array([np.nan])
