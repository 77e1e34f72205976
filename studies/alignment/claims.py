"""The table and the claims of the alignment study."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import REAL, decide, mean_of
from studies.alignment.methods import (
    HEADS,
    MERIT,
    NOTHING,
    PLAIN,
    PULL,
    RANDOM_MATCHED,
    SHIFT,
    SUCCESS,
    TRAININGS,
    TRANSPORT,
)
from studies.scales import SHARE, SMALL
from studies.scores import where

RECONSTRUCTION: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
WANTED, LOSS, KL = "wanted, unseen", "untouched loss", "KL"
NEAR = "transport, near"
TABLE = "table"
ENOUGH = 0.9
# A smaller number of halvings of the examples is no difference.
HALVINGS = 0.1
# A pair that never reaches `ENOUGH` counts as needing this many times the largest number.
BEYOND = 4


class Part:
    """The scores of one part: one number per ordered pair of tasks (and seed).

    Args:
        chosen_by: the criterion that chose layers, strengths and learning rates.
    """

    def __init__(self, scores: pd.DataFrame, part: str, chosen_by: str = MERIT) -> None:
        rows = where(scores, part=part, chosen_by=chosen_by)
        self.rows = rows[rows["metric"] != "generated"]
        self.numbers = sorted(int(n) for n in self.rows["examples"].unique())
        self.most = self.numbers[-1]

    def values(self, method: str, metric: str, n: int | None = None) -> np.ndarray:
        """A score of a method with ``n`` examples, by default the largest number."""
        rows = where(self.rows, method=method, metric=metric, examples=n or self.most)
        return rows.sort_values(["seed", "source", "target"])["value"].dropna().to_numpy()

    @property
    def units(self) -> dict[str, np.ndarray]:
        """Units that pairs share: the model of a seed, or without seeds the tasks."""
        keys = ["seed", "source", "target"]
        pairs = self.rows[keys].drop_duplicates().sort_values(keys)
        if (pairs["seed"] >= 0).all():
            return {"seed": pairs["seed"].to_numpy()}
        return {"task": pairs[["source", "target"]].to_numpy(dtype=str)}

    def mean(self, method: str, metric: str, n: int | None = None) -> float:
        """The mean of `values` over pairs."""
        found = self.values(method, metric, n)
        return float(found.mean()) if found.size else float("nan")

    def needed(self, method: str) -> pd.Series:
        """Number of examples that reaches `ENOUGH`, by pair, interpolated on a log scale."""
        rows = where(self.rows, method=method, metric=WANTED)
        curves = rows.pivot_table("value", ["seed", "source", "target"], "examples")
        return curves.apply(_reaches, axis=1)


def _reaches(curve: pd.Series) -> float:
    numbers, values = curve.index.to_numpy(dtype=float), curve.to_numpy(dtype=float)
    above = np.flatnonzero(values >= ENOUGH)
    if len(above) == 0:
        return BEYOND * float(numbers[-1])
    last = int(above[0])
    if last == 0:
        return float(numbers[0])
    part = (ENOUGH - values[last - 1]) / (values[last] - values[last - 1])
    return float(numbers[last - 1] * (numbers[last] / numbers[last - 1]) ** part)


def table(scores: pd.DataFrame) -> pd.DataFrame:
    """Mean of each metric over pairs of tasks, by method and examples, with a 95 % interval.

    The interval is over seeds (all pairs of a seed share a model), or without seeds over tasks
    as sources and targets.
    """
    measured = scores[scores["metric"] != "generated"].dropna(subset="value")
    keys = ["part", "method", "examples", "chosen_by", "metric"]
    rows = []
    for key, found in measured.groupby(keys, sort=False):
        values, seeds = found["value"].to_numpy(dtype=float), found["seed"].to_numpy()
        pairs = found[["source", "target"]].to_numpy(dtype=str)
        units = {"seed": seeds} if (seeds >= 0).all() else {"task": pairs}
        scale = SHARE.gain if str(key[-1]) in (WANTED, LOSS) else REAL
        mean = mean_of(values, units=units, scale=scale)
        labels = dict(zip(keys, key, strict=True))
        labels["part"] = f"{TABLE}, {labels['part']}"
        ends = {"ci_low": mean.low, "ci_high": mean.high, "n": mean.n}
        rows.append(labels | {"value": mean.value} | ends)
    return pd.DataFrame(rows)


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims: one value per ordered pair of tasks; units are seeds or tasks."""
    careful, eager = (Part(scores, "synthetic", chosen_by) for chosen_by in (MERIT, SUCCESS))
    found = _synthetic(careful, eager, scores["seed"][scores["seed"] >= 0].nunique())
    if "pretrained" in set(scores["part"]):
        found += _pretrained(Part(scores, "pretrained"))
    return found


def _synthetic(seen: Part, eager: Part, n_seeds: int) -> list[lc.Claim]:
    """Claims on damage use ``seen`` (chosen by merit), those on success ``eager`` trainings."""
    over: dict[str, Any] = {"units": seen.units, "n_seeds": n_seeds}
    pulled, plain = eager.needed(PULL), eager.needed(PLAIN)
    return [
        decide(
            "moved",
            "With the most examples, states moved from one task's cluster to another's give the "
            "other task's answers (share of prompts with unseen instructions, above that of a "
            "norm-matched random direction)",
            seen.values(TRANSPORT, WANTED) - seen.values(RANDOM_MATCHED + TRANSPORT, WANTED),
            control=_others(seen, WANTED, (TRANSPORT, SHIFT, PLAIN)),
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **over,
            **RECONSTRUCTION,
        ),
        decide(
            "moved-nearly-all",
            "Nearly all states moved from one task's cluster to another's give the other task's "
            "answers (share of prompts with unseen instructions, most examples)",
            seen.values(TRANSPORT, WANTED),
            control=_others(seen, WANTED, (TRANSPORT, SHIFT, PLAIN)),
            at_least=0.95,
            scale=SHARE,
            **over,
            **OURS,
        ),
        decide(
            "moved-damage",
            "Moving only the states that lie in the source task's cluster leaves other tasks "
            "unchanged (accuracy lost)",
            seen.values(TRANSPORT, LOSS),
            control=_others(seen, LOSS, ("transport", NEAR, PLAIN)),
            at_most=0.02,
            scale=SHARE.gain,
            **over,
            **OURS,
        ),
        decide(
            "gate-of-examples",
            "Moving only the states near the labelled examples leaves other tasks unchanged "
            "(accuracy lost)",
            seen.values(NEAR, LOSS),
            control={"wanted": seen.mean(NEAR, WANTED), "no gate": seen.mean("transport", LOSS)},
            at_most=0.02,
            scale=SHARE.gain,
            **over,
            **OURS,
        ),
        decide(
            "needs-a-gate",
            "Moving all states, without a gate, damages other tasks (accuracy lost)",
            seen.values("transport", LOSS),
            control={"with a gate": seen.mean(TRANSPORT, LOSS)},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **over,
            **OURS,
        ),
        decide(
            "pull-examples",
            "Fine-tuning with the cluster term needs fewer examples than plain fine-tuning for "
            f"{ENOUGH} wanted answers (log2 of the ratio, between numbers on their log scale; "
            f"never enough counts as {BEYOND} times the most)",
            np.log2(np.asarray(pulled / plain, dtype=float)),
            control={
                **{f"plain, {n}": eager.mean(PLAIN, WANTED, n) for n in seen.numbers},
                **{f"cluster term, {n}": eager.mean(PULL, WANTED, n) for n in seen.numbers},
            },
            at_most=0,
            margin=HALVINGS,
            **over,
            **RECONSTRUCTION,
        ),
        decide(
            "pull-half-the-examples",
            "Fine-tuning with the cluster term needs at most half the examples of plain "
            f"fine-tuning for {ENOUGH} wanted answers (log2 of the ratio)",
            np.log2(np.asarray(pulled / plain, dtype=float)),
            control={},
            at_most=-1,
            **over,
            **OURS,
        ),
        *(
            decide(
                name,
                f"{words} damages other tasks less than plain fine-tuning (accuracy lost by plain "
                "fine-tuning minus that lost by the method, mean over numbers of examples)",
                np.mean(
                    [
                        seen.values(PLAIN, LOSS, n) - seen.values(method, LOSS, n)
                        for n in seen.numbers
                    ],
                    axis=0,
                ),
                control={
                    "wanted, plain": seen.mean(PLAIN, WANTED),
                    f"wanted, {method}": seen.mean(method, WANTED),
                    "KL, plain": seen.mean(PLAIN, KL),
                    f"KL, {method}": seen.mean(method, KL),
                },
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                **over,
                **OURS,
            )
            for name, method, words in (
                ("pull-damage", PULL, "Fine-tuning with the cluster term"),
                ("heads-damage", HEADS, "Fine-tuning only the heads that carry the clusters"),
            )
        ),
        decide(
            "fewer-than-training",
            "Moving states needs no more examples than plain fine-tuning for "
            f"{ENOUGH} wanted answers (log2 of the ratio)",
            np.log2(np.asarray(seen.needed(TRANSPORT) / plain, dtype=float)),
            control={
                **{f"transport, {n}": seen.mean(TRANSPORT, WANTED, n) for n in seen.numbers},
                **{f"plain, {n}": eager.mean(PLAIN, WANTED, n) for n in seen.numbers},
            },
            at_most=0,
            margin=HALVINGS,
            **over,
            **OURS,
        ),
    ]


def _pretrained(seen: Part) -> list[lc.Claim]:
    over: dict[str, Any] = {"units": seen.units, "n_seeds": 1, **OURS}
    return [
        decide(
            "pretrained-moved",
            "In a pretrained model, states moved by the difference of the examples' means give "
            "the other task's answers (share of prompts with unseen instruction and query)",
            seen.values(SHIFT, WANTED),
            control=_others(seen, WANTED, (SHIFT, TRANSPORT, PLAIN)),
            at_least=0.6,
            scale=SHARE,
            **over,
        ),
        decide(
            "pretrained-random",
            "In a pretrained model, a norm-matched random direction does not give the other task's "
            "answers (share of prompts with unseen instruction and query)",
            seen.values(RANDOM_MATCHED + SHIFT, WANTED),
            control={"shift": seen.mean(SHIFT, WANTED)},
            at_most=0.05,
            scale=SHARE,
            **over,
        ),
        decide(
            "pretrained-damage",
            "In a pretrained model, moving only the states in the source task's cluster leaves "
            "other tasks unchanged (accuracy lost)",
            seen.values(SHIFT, LOSS),
            control=_others(seen, LOSS, ("shift", NEAR, PLAIN)),
            at_most=0.02,
            scale=SHARE.gain,
            **over,
        ),
        decide(
            "pretrained-against-training",
            "In a pretrained model, moving states gives more wanted answers than fine-tuning the "
            "last blocks on as many examples (share of prompts)",
            seen.values(SHIFT, WANTED) - seen.values(PLAIN, WANTED),
            control={
                "shift": seen.mean(SHIFT, WANTED),
                **{f"{m}": seen.mean(m, WANTED) for m in TRAININGS},
                **{f"{m}, accuracy lost": seen.mean(m, LOSS) for m in TRAININGS},
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **over,
        ),
        decide(
            "pretrained-pull",
            "In a pretrained model, fine-tuning with the cluster term gives more wanted answers "
            "than plain fine-tuning on as many examples (share of prompts)",
            seen.values(PULL, WANTED) - seen.values(PLAIN, WANTED),
            control={"plain": seen.mean(PLAIN, WANTED), "cluster term": seen.mean(PULL, WANTED)},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **over,
        ),
    ]


def _others(seen: Part, metric: str, methods: tuple[str, ...]) -> dict[str, float]:
    randoms = (RANDOM_MATCHED + SHIFT, RANDOM_MATCHED + TRANSPORT)
    return {
        name: seen.mean(name, metric)
        for name in dict.fromkeys((*methods, *randoms, NOTHING))
        if seen.values(name, metric).size
    }


def generated_texts(scores: pd.DataFrame) -> list[str]:
    """One sentence per text that the pretrained model generated before and while steered."""
    found = where(scores, metric="generated")
    return [
        f"{row.source} answered as {row.target}, prompt ending {_ending(row.prompt)}: "
        f"{row.before!r} before, {row.after!r} while steered ({row.method}, layer {row.layer:g})."
        for row in found.itertuples()
    ]


def _ending(prompt: object) -> str:
    return repr(str(prompt).rpartition("\n")[2])
