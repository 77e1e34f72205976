"""The figures of the alignment study."""

from __future__ import annotations

from typing import Any

import pandas as pd

from lensclust import figures
from lensclust.figures import trade_off
from studies.alignment.claims import LOSS, WANTED
from studies.alignment.methods import MERIT, SUCCESS
from studies.scores import where

# Claims that each figure shows.
SHOWS = {
    "synthetic_examples": ["moved", "gate-of-examples", "pull-examples", "fewer-than-training"],
    "synthetic_trade_off": [
        "moved-damage",
        "gate-of-examples",
        "needs-a-gate",
        "pull-damage",
        "heads-damage",
    ],
    "pretrained_examples": [
        "pretrained-moved",
        "pretrained-random",
        "pretrained-against-training",
        "pretrained-pull",
    ],
    "pretrained_trade_off": ["pretrained-damage", "pretrained-against-training"],
}


def pictures(scores: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    found: dict[str, Any] = {}
    for part in ("synthetic", "pretrained"):
        rows = where(scores, part=part)
        if rows.empty:
            continue
        name = "synthetic task" if part == "synthetic" else "pretrained model"
        careful, eager = (_means(where(rows, chosen_by=by)) for by in (MERIT, SUCCESS))
        most = careful[~careful["method"].isin(eager["method"])]
        curves = where(pd.concat([most, eager]), metric=WANTED).sort_values("examples")
        if curves["examples"].nunique() > 1:
            found[f"{part}_examples"] = figures.curves(
                curves.assign(examples=curves["examples"].astype(str)),
                x="examples",
                color="method",
                band=None,
                title=f"Wanted answers from few examples, {name}",
                caption="Share of prompts with unseen instructions that get the wanted answer"
                + ("; learning rates chosen by that share alone." if len(eager) else "."),
                y_title="wanted answers",
            )
        keys = ["method", "examples", "metric"]
        wide = careful.groupby(keys, sort=False)["value"].mean().unstack("metric").reset_index()
        found[f"{part}_trade_off"] = trade_off(
            wide,
            cost=LOSS,
            gain=WANTED,
            label="examples",
            title=f"Success against damage, {name}",
            caption="Means over pairs of tasks; numbers are labelled examples.",
            cost_title="accuracy lost on other tasks",
            gain_title="wanted answers",
        )
    return found


def _means(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over pairs of tasks, of each seed."""
    keys = ["seed", "method", "examples", "metric"]
    return rows.groupby(keys, sort=False)["value"].mean().reset_index()
