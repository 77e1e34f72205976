"""Scores of interventions and trainings on the same prompts, as tidy rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lensclust.activations import select
from lensclust.finetuning import Finetuned
from lensclust.partial_forwards import FrozenBlocks, scored_logits
from lensclust.sites import Site
from probes.interventions import Intervention
from probes.replay import replay
from studies.alignment_methods import (
    NOTHING,
    SHIFT,
    TRANSPORT,
    Asked,
    Examples,
    merit,
    moves,
    parameters,
)

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Move:
    """An intervention at a site, made from some examples.

    Attributes:
        method: its name without its strength.
        parameters: numbers it consists of.
        task_states: states with a known task that it uses beside the examples.
        seconds: to fit it.
    """

    examples: Examples
    method: str
    intervention: Intervention
    site: Site
    strength: float
    parameters: int
    task_states: int
    seconds: float


def candidates(
    acts: xr.Dataset,
    examples: Examples,
    members: xr.Dataset,
    task_states: int,
    sites: Sequence[Site],
    strengths: Sequence[float],
    *,
    given: str | None,
    seconds: float,
) -> Iterator[Move]:
    """Every method at every site and strength.

    Args:
        acts: states of the examples.
        members: mean states of all tasks, made of ``task_states`` states.
        seconds: that it took to read the examples' states.
    """
    began = time.perf_counter()
    made = moves(acts, members, examples.source, examples.target, given=given)
    fitting = seconds + (time.perf_counter() - began) / len(made)
    gate = sum(int(members[name].sel(layer=sites[0].layer).size) for name in members)
    for intervention in made:
        name = intervention.name
        for site in sites:
            for strength in strengths:
                yield Move(
                    examples,
                    name,
                    intervention if strength == 1 else intervention.scaled(strength),
                    site,
                    strength,
                    parameters(name, acts, site, gate),
                    task_states if name.endswith("members") else 0,
                    fitting,
                )


def steered(
    model: TransformerBridge, asked: Asked, acts: xr.Dataset, made: Sequence[Move]
) -> Tensor:
    """First token and divergence ``(move, prompt, 2)`` with each move made in every prompt.

    Args:
        acts: the prompts' own states.
    """
    edits = [
        (move.site, move.intervention.edit_at(move.site)(_states(acts, move.site))) for move in made
    ]
    return replay(model, asked.prompts, edits, asked.readout)


def measure_moves(
    model: TransformerBridge,
    validation: tuple[Asked, xr.Dataset],
    reported: tuple[Asked, xr.Dataset],
    made: Sequence[Move],
) -> tuple[Rows, list[Move]]:
    """Choose site and strength of each method on some prompts and report others.

    Returns:
        Rows of scores, and the moves that were chosen.
    """
    best: dict[tuple[Any, ...], tuple[float, Move]] = {}
    for move, read in zip(made, steered(model, *validation, made), strict=True):
        value = merit(_rates(validation[0], read, move.examples))
        key = _key(move.examples, move.method)
        if key not in best or value > best[key][0]:
            best[key] = (value, move)
    chosen = [move for _, move in best.values()]
    twins = [_twin(move) for move in chosen if move.method in (SHIFT, TRANSPORT)]
    everything = [*chosen, *twins]
    rows: Rows = []
    for move, read in zip(everything, steered(model, *reported, everything), strict=True):
        place = {"layer": move.site.layer, "strength": float(move.strength)}
        cost = {"parameters": move.parameters, "task states": move.task_states}
        rates = _rates(reported[0], read, move.examples)
        rows += _tidy(move.examples, move.method, rates | cost | {"seconds": move.seconds}, place)
    return rows, chosen


def measure_nothing(reported: Asked, examples: Sequence[Examples]) -> Rows:
    """The original model's scores, beside each number of examples."""
    cost = {"parameters": 0, "task states": 0, "seconds": 0.0}
    return [
        row
        for some in examples
        for row in _tidy(some, NOTHING, _rates(reported, reported.unmoved, some) | cost, {})
    ]


def measure_training(
    method: str,
    examples: Examples,
    rates: Sequence[float],
    train: Callable[[float], AbstractContextManager[Finetuned]],
    read: Callable[[Asked], Tensor],
    validation: Asked,
    reported: Asked,
    task_states: int,
) -> Rows:
    """Train at each learning rate, choose one on some prompts and report others."""
    found: list[tuple[float, Rows]] = []
    for lr in rates:
        with train(lr) as done:
            value = merit(_rates(validation, read(validation), examples))
            scores = _rates(reported, read(reported), examples)
        cost = {"parameters": done.parameters, "task states": task_states, "seconds": done.seconds}
        found.append((value, _tidy(examples, method, scores | cost, {"lr": lr})))
    return max(found, key=lambda item: item[0])[1]


def best_rate(
    trials: Mapping[float, Sequence[AbstractContextManager[Finetuned]]],
    examples: Sequence[Examples],
    read: Callable[[Asked], Tensor],
    validation: Asked,
) -> float:
    """The learning rate that serves some pairs of tasks best, one training of each at each."""
    values: dict[float, float] = {}
    for lr, trainings in trials.items():
        values[lr] = 0.0
        for training, some in zip(trainings, examples, strict=True):
            with training:
                values[lr] += merit(_rates(validation, read(validation), some))
    return max(values, key=values.__getitem__)


def read_now(model: TransformerBridge, asked: Asked, frozen: FrozenBlocks | None = None) -> Tensor:
    """First token and divergence of each prompt ``(prompt, 2)``, with the weights as they are."""
    prompts = asked.prompts
    last = torch.arange(prompts.tokens.shape[1]) == (prompts.lengths - 1)[:, None]
    with torch.no_grad(), nullcontext() if frozen is None else frozen.reused():
        logits = scored_logits(model, prompts.tokens, last).float()
    return asked.readout(logits, torch.arange(len(prompts)))


def frame(rows: Rows, **labels: Any) -> pd.DataFrame:
    """Rows as a table, with labels beside them."""
    return pd.DataFrame(rows).assign(**labels)


def _tidy(
    examples: Examples, method: str, metrics: Mapping[str, float], place: Mapping[str, Any]
) -> Rows:
    shared = {"source": examples.source, "target": examples.target, "method": method}
    shared |= {"examples": len(examples.asked), **place}
    return [{**shared, "metric": name, "value": float(value)} for name, value in metrics.items()]


def _rates(asked: Asked, read: Tensor, examples: Examples) -> dict[str, float]:
    return asked.rates(read, examples.source, examples.target, examples.inputs)


def _key(examples: Examples, method: str) -> tuple[Any, ...]:
    return examples.source, examples.target, len(examples.asked), method


def _twin(move: Move) -> Move:
    twin = move.intervention.random_twin()
    method = f"random direction, norm of {move.method}"
    return Move(
        move.examples, method, twin, move.site, move.strength,
        move.parameters, move.task_states, move.seconds,
    )  # fmt: skip


def _states(acts: xr.Dataset, site: Site) -> Tensor:
    return torch.from_numpy(select(acts, site).values)
