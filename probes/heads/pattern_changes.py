"""Distance of the activation pattern to its first and last, over training steps.

Source: Zhao et al. (arXiv 2409.15820) follow correlation and mean squared difference over
fine-tuning; their reference pattern is not known to us, so both ends are used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from transformer_lens.model_bridge import TransformerBridge

from lensclust import figures
from lensclust.arguments import checked_arguments, pairs
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import Readout
from lensclust.prompts import Prompts
from probes.heads.activation import HeadActivation, head_activation, pattern_similarity

METRICS = ("mse", "1 - pearson")


@dataclass(frozen=True, repr=False)
class PatternChange(Shown):
    """Distance of every pattern of a series to the first and to the last.

    Attributes:
        frame: one row per step, reference and metric: ``step, reference`` (``first``, ``last``),
            ``metric`` (``mse``, ``1 - pearson``), ``value``, and ``share``, the value over that
            between first and last (NaN if these are the same).
        patterns: step -> the pattern there, in order.
    """

    frame: pd.DataFrame
    patterns: dict[int, HeadActivation]

    def plot(self, metric: str = "1 - pearson") -> Any:
        """Distance over steps, one line per reference."""
        if metric not in METRICS:
            raise InputError(f"metric {metric!r} is not known: expected one of {list(METRICS)}")
        return figures.curves(
            self.frame[self.frame["metric"] == metric],
            x="step",
            color="reference",
            band=None,
            title="Distance of the head activation pattern to its first and last",
            caption=f"{len(self.patterns)} steps.",
            y_title=metric,
        )

    def __repr__(self) -> str:
        ends = self.frame[self.frame["reference"] == "first"].groupby("metric").value.last()
        return (
            f"PatternChange({len(self.patterns)} steps; first to last: mse {ends['mse']:.3g}, "
            f"1 - Pearson {ends['1 - pearson']:.3g})"
        )


@checked_arguments
def change(
    series: Iterable[tuple[int, TransformerBridge | HeadActivation]],
    prompts: Prompts | None = None,
    *,
    loss: str | Readout = "answer",
    batch_tokens: int | None = None,
) -> PatternChange:
    """Follow the head activation pattern over training steps.

    Also `pattern_change`.

    Args:
        series: ``(step, model)`` or ``(step, pattern)``, such as from ``run.models()``; a model
            is measured before the next one is taken.
        prompts: prompts to measure models on.
        loss, batch_tokens: as in `probes.head_activation`.

    Raises:
        InputError: if there are fewer than two steps, a step is repeated, models are given
            without prompts, or as `probes.head_activation`.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string").take(range(8))
    >>> models = ((seed, lc.load("native:sif-small", seed=seed)) for seed in (0, 1))
    >>> found = change(models, prompts)
    >>> found.frame.query("reference == 'first' and metric == 'mse'").value.gt(0).tolist()
    [False, True]
    """
    patterns: dict[int, HeadActivation] = {}
    for step, item in pairs("change", series, "a model or pattern"):
        if step in patterns:
            raise InputError(f"change: step {step} comes twice")
        if isinstance(item, HeadActivation):
            patterns[step] = item
            continue
        if prompts is None:
            raise InputError("change: models given, but no prompts to measure them by")
        patterns[step] = head_activation(item, prompts, loss=loss, batch_tokens=batch_tokens)
    if len(patterns) < 2:
        raise InputError(f"change: {len(patterns)} steps, expected at least 2")
    first, *_, last = found = [each.pattern.values for each in patterns.values()]
    whole = _distances(first, last)
    rows = []
    for step, here in zip(patterns, found, strict=True):
        for reference, there in {"first": first, "last": last}.items():
            for metric, value in _distances(here, there).items():
                share = value / whole[metric] if whole[metric] else np.nan
                row = {"step": step, "reference": reference, "metric": metric}
                rows.append({**row, "value": value, "share": share})
    return PatternChange(pd.DataFrame(rows), patterns)


# The same function under a name that is clear out of context.
pattern_change = change


def _distances(here: np.ndarray, there: np.ndarray) -> dict[str, float]:
    found = pattern_similarity(here, there)
    # The correlation of equal patterns is 1 up to rounding.
    distances = {"mse": found["mse"], "1 - pearson": 1 - found["pearson"]}
    return {name: 0.0 if abs(value) < 1e-12 else float(value) for name, value in distances.items()}
