"""Claims about what patterns are good for: mixing tasks, choosing prompts, finding heads."""

from __future__ import annotations

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide
from lensclust.stats import permutation_p
from studies.frames import where
from studies.head_patterns_mixes import DRAWN, EVEN, FITTED, LEAST, OWN, PARTS, RANDOM, SIMILAR
from studies.head_patterns_tables import OURS, PAPER, Part
from studies.head_patterns_tuning import AND
from studies.scales import AGREEMENT, SHARE, SMALL, WEAK

PERMUTATIONS = 999


def applications(seen: Part) -> list[lc.Claim]:
    """Mixes of basic tasks, and choices of prompts, by what they are worth to a scarce task."""
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
            f"Before a scarce complex task, basic tasks mixed by fitted coefficients are worth "
            f"more than {words} (accuracy gained)",
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
            ("fitted-over-none", OWN, "none of them, the scarce prompts seen as often instead"),
        )
    ]
    found.append(
        decide(
            "similar-examples",
            "Public prompts whose patterns are most like the scarce task's are worth more than "
            "prompts drawn at random (accuracy gained)",
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
    """How much of the fitted mix are the tasks that the complex one is made of."""
    rows = where(seen.scores, metric="coefficient")
    own = [
        method in parts.split(AND)
        for method, parts in zip(rows["method"], rows["parts"], strict=True)
    ]
    return float(rows[own].groupby(["seed", "task"])["value"].sum().mean())


def clusters(seen: Part) -> lc.Claim:
    """Growing heads against heads that cluster, with each layer's heads permuted as the null."""
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
        "Heads whose share of the activation grows as the model is tuned on all basic tasks are "
        "those whose outputs cluster by task then (rank correlation over heads of a layer)",
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
