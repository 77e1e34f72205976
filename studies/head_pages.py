"""The head view of a study's page: scores, clusters and sample attention of heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lensclust as lc
import probes

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import xarray as xr

    from lensclust.report.views import HeadView

SAMPLES = 4


def one_group(rows: pd.DataFrame, given: str) -> np.ndarray:
    """Mask of the rows with the value of ``given`` that has the most tasks.

    >>> import pandas as pd
    >>> rows = pd.DataFrame({"input": ["x", "y", "y"], "task": ["a", "a", "b"]})
    >>> one_group(rows, "input").tolist()
    [1, 2]
    """
    import numpy as np

    tasks = rows.groupby(given)["task"].nunique()
    return np.flatnonzero((rows[given] == tasks.idxmax()).to_numpy())


def sample_prompts(prompts: lc.Prompts, given: str) -> lc.Prompts | None:
    """A few prompts of one group, each of another task; None if all are too long to draw."""
    from lensclust.report.views import MOST_TOKENS

    group = prompts.take(one_group(prompts.rows, given))
    firsts = group.rows[(group.lengths <= MOST_TOKENS).numpy()].drop_duplicates("task").index
    return group.take(firsts[:SAMPLES].tolist()) if len(firsts) else None


def opened_heads(
    acts: xr.Dataset,
    prompts: lc.Prompts,
    scores: pd.DataFrame,
    attention: probes.AttentionSamples | None,
    *,
    given: str,
    labels: tuple[str, ...],
    title: str,
    score: str = "metric",
) -> HeadView:
    """The head view of a study's model, with the prompts of one group.

    Args:
        acts: activations of all prompts, with heads.
        prompts: of the activations, in the same order.
        scores: of the heads, within the label ``given``, with ``null_mean``: the mean of the first
            score under permuted labels is shown as well.
        attention: of `sample_prompts`.
        score: the column with the names of scores.
    """
    import pandas as pd

    first = scores[scores[score] == scores[score].iloc[0]]
    chance = first.assign(
        **{score: f"{first[score].iloc[0]}, permuted labels", "value": first["null_mean"]}
    )
    rows = one_group(prompts.rows, given)
    shown = prompts.take(rows)
    samples = sample_prompts(prompts, given) if attention else None
    texts = [shown.text(row) for row in range(len(shown))]
    return probes.head_view(
        acts.isel(prompt=rows).assign_coords(text=("prompt", texts)),
        pd.concat([scores, chance], ignore_index=True),
        attention=attention,
        sample_names=[
            f"{task}: {samples.text(row)}" for row, task in enumerate(samples.rows["task"])
        ]
        if samples
        else (),
        labels=labels,
        text="text",
        score=score,
        title=title,
        caption=f"Scores are within {given}; the planes are two principal components of a head's "
        f"contribution to the residual stream, over the {len(rows)} prompts of one {given}. "
        "Attention is an example, not a measure.",
    )
