"""Metrics of patching: one number per pair of prompts, from the last token's logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from lensclust.errors import InputError
from lensclust.inference import Readout
from lensclust.prompts import Prompts

DIFFERENCE = "logit_difference"
First = Int[Tensor, " prompt"]


def metric_of(
    metric: str | Readout, base: Prompts, source: Prompts, *, caller: str
) -> tuple[str, Readout]:
    """Name and function of a metric of the pairs.

    Raises:
        InputError: if it is unknown, or the answers it needs are missing or equal.
    """
    if not isinstance(metric, str):
        return getattr(metric, "__name__", "metric").strip("<>"), metric
    if metric not in METRICS:
        raise InputError(
            f"{caller}: metric {metric!r} is not known: expected one of {list(METRICS)} or a "
            "function of logits and pair numbers"
        )
    own, other = (
        _first_tokens(p, which, caller) for p, which in ((base, "base"), (source, "source"))
    )
    same = (own == other).nonzero()[:, 0]
    if metric == DIFFERENCE and len(same):
        raise InputError(
            f"{caller}: base and source answer with the same first token in {len(same)} of "
            f"{len(base)} pairs (the first is {int(same[0])}), where {DIFFERENCE!r} is not "
            "defined; leave these pairs out or choose another metric"
        )
    return metric, METRICS[metric](own, other)


def _first_tokens(prompts: Prompts, which: str, caller: str) -> First:
    if prompts.answers is None or not all(prompts.answers):
        raise InputError(f"{caller}: the {which} prompts need answers for this metric")
    return torch.tensor([answer[0] for answer in prompts.answers])


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(1, tokens.to(values.device)[:, None])[:, 0]


def _logit_difference(own: First, other: First) -> Readout:
    return lambda logits, rows: _at(logits, other[rows]) - _at(logits, own[rows])


def _probability(own: First, other: First) -> Readout:
    return lambda logits, rows: _at(logits.softmax(-1), other[rows])


def _accuracy(own: First, other: First) -> Readout:
    return lambda logits, rows: (logits.argmax(-1) == other[rows].to(logits.device)).float()


METRICS: dict[str, Callable[[First, First], Readout]] = {
    DIFFERENCE: _logit_difference,
    "probability": _probability,
    "accuracy": _accuracy,
}
