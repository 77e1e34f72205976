"""The figures of the identity pre-training study, including a map of conditions."""

from __future__ import annotations

from typing import Any

import altair as alt
import pandas as pd

from lensclust import figures
from lensclust.figures import (
    Picture,
    finish,
    how_to_read,
    inline,
    over_seeds,
    panel_names,
    panels,
    require_columns,
    seed_tips,
    tip,
)
from studies.identity_pretraining.claims import BUDGETS, OF_TASK, TOTAL, conditions, percent
from studies.identity_pretraining.options import ARMS, COMPARED
from studies.identity_pretraining.phases import TASK
from studies.scales import AGREED
from studies.scores import where
from studies.synthetic_task import UNSEEN

_CELL = 52


# Claims that each figure shows.
SHOWS = {
    "steps_to_threshold": [
        "sooner-*",
        "after-instruction",
        "auxiliary",
        "own-clusters",
        "true-names",
    ],
    "accuracy": ["sooner-*", "higher"],
    "accuracy_in_phase_2": ["*-in-phase-2", "higher-throughout-phase-2"],
    "final_accuracy": [
        "higher",
        "higher-in-phase-2",
        "pairs",
        "auxiliary-pairs",
        "unknown-expressions",
    ],
    "ari_over_steps": ["named-clusters", "clusters-*"],
    "examples": ["few-examples", "fewer-examples"],
    "conditions": ["conditions"],
}


def pictures(scores: pd.DataFrame, table: pd.DataFrame) -> dict[str, Any]:
    """The study's figures, by file name."""
    runs = where(scores, metric="accuracy", kind=TASK, split=UNSEEN, purpose="arms")
    runs = _in_order(runs).rename(columns={column: budget for budget, column in BUDGETS.items()})
    of_arms = _in_order(where(table, purpose="arms"))
    steps = where(of_arms, split=UNSEEN, budget=TOTAL)
    steps = steps[steps["metric"].str.startswith("steps to")]
    final = where(of_arms, metric="final accuracy", budget=TOTAL)
    shares = where(
        table,
        metric="final accuracy",
        split=UNSEEN,
        arm=list(COMPARED),
        purpose=["arms", "examples"],
    ).sort_values("share")
    searched = conditions(table)
    return {
        "accuracy": figures.curves(
            runs,
            x=TOTAL,
            color="arm",
            band=None,
            title="Accuracy on unseen strings, all steps counted",
            caption="Lines begin where the arm first trains the task; constant learning rate.",
            y_title="accuracy",
        ),
        "accuracy_in_phase_2": figures.curves(
            runs.drop_duplicates(["arm", "seed", OF_TASK]),
            x=OF_TASK,
            color="arm",
            band=None,
            title="Accuracy on unseen strings, only steps of the task counted",
            caption="Steps of naming are not counted.",
            y_title="accuracy",
        ),
        "steps_to_threshold": figures.bars(
            steps,
            name="arm",
            facet="metric",
            title="Steps to an accuracy on unseen strings",
            caption="All steps counted; a run that does not reach it counts with the whole budget.",
            value_title="steps",
        ),
        "final_accuracy": figures.bars(
            final,
            name="arm",
            facet="split",
            title="Final accuracy on every split at equal total steps",
            caption="new_regex cannot be known and is the control.",
            value_title="accuracy",
        ),
        "ari_over_steps": figures.curves(
            _in_order(where(scores, metric=AGREED, purpose="arms")),
            x="step",
            color="layer",
            facet="arm",
            title="Clustering by task over all steps, by layer",
            caption="Agreement across wordings on unseen strings, k-means within input.",
            y_title="agreement across wordings",
        ),
        "examples": figures.curves(
            shares.assign(examples=shares["share"].map(percent)),
            x="examples",
            color="arm",
            facet="budget",
            band=None,
            title="How many answered examples are needed",
            caption="Final accuracy on unseen strings by share of the examples of phase 2, at "
            "equal steps of both kinds.",
            y_title="accuracy",
        ),
        "conditions": condition_map(
            searched.assign(
                panel=searched["share"].map(percent) + " of examples, equal " + searched["budget"]
            ).rename(columns={"n_tasks": "tasks", "n_layers": "layers"}),
            x="tasks",
            y="layers",
            facet="panel",
            title="Where naming tasks first helps",
            caption="Final accuracy on unseen strings of models that name tasks first minus that "
            "of models trained from scratch.",
            value_title="accuracy gained",
        ),
    }


def _in_order(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of the arms."""
    return frame.sort_values("arm", key=lambda arm: arm.map(ARMS.index), kind="stable")


def condition_map(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    value: str = "value",
    facet: str,
    title: str,
    caption: str,
    value_title: str,
) -> Picture:
    """Map of a difference (mean over seeds) by two conditions, one panel per value of a third.

    Zero is the middle of the colour scale.

    Raises:
        ValueError: if a column is missing, no row is left, or a cell has several rows of a seed.

    >>> frame = pd.DataFrame({"tasks": [6, 20], "layers": [2, 2], "value": [0.1, -0.1],
    ...                       "examples": ["all", "all"]})
    >>> chart = condition_map(frame, x="tasks", y="layers", facet="examples", title="Gain",
    ...                       caption="Tiny.", value_title="gain")
    >>> [row["value"] for row in next(iter(chart.to_dict()["datasets"].values()))]
    [0.1, -0.1]
    """
    require_columns("condition_map", frame, [x, y, value, facet])
    means = over_seeds("condition_map", frame, [facet, y, x], [value], value)
    data = pd.DataFrame({"x": means[x], "y": means[y], "value": means[value]})
    data["low"], data["high"] = means["low"], means["high"]
    data["panel"] = panel_names(means[facet])
    largest = max(float(data["value"].abs().max()), 1e-9)
    base = alt.Chart().encode(
        x=alt.X(field="x", type="ordinal", axis=alt.Axis(title=x, labelAngle=0)),
        y=alt.Y(field="y", type="ordinal", axis=alt.Axis(title=y)),
    )
    scale = alt.Scale(scheme="blueorange", domain=[-largest, largest], reverse=True)
    color = alt.Color(
        field="value",
        type="quantitative",
        scale=scale,
        legend=alt.Legend(title=value_title, gradientLength=110),
    )
    tips = [tip("y", y), tip("x", x), tip("value", value_title, "+.3f")]
    cells = base.mark_rect(aria=False).encode(
        color=color, tooltip=[*tips, *seed_tips(means["seeds"])]
    )
    text = alt.Text(field="value", type="quantitative", format="+.2f")
    ink = alt.condition(
        f"abs(datum.value) > {0.7 * largest!r}", alt.value("#ffffff"), alt.value("#111111")
    )
    numbers = base.mark_text(fontSize=12, aria=False).encode(text=text, color=ink)
    chart = alt.LayerChart(data=inline(data), layer=[cells, numbers])
    chart = chart.properties(width=alt.Step(_CELL), height=alt.Step(_CELL))
    chart = panels(chart, data, size=None)
    lowest, highest = (data.iloc[int(i)] for i in (data["value"].argmin(), data["value"].argmax()))
    extremes = " to ".join(
        f"{row['value']:+.3f} ({y} {row['y']}, {x} {row['x']}, {row['panel']})"
        for row in (lowest, highest)
    )
    summary = f"Map of {value_title} by {y} and {x}, from {extremes}"
    reading = how_to_read("", means["seeds"], None)
    return finish(chart, title, caption, summary=summary, reading=reading)
