"""Scores of interventions and trainings on the same prompts, as tidy rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from lensclust.activations import select
from lensclust.inference import FrozenBlocks, require_one_side, scored_logits
from lensclust.models import Site
from lensclust.training import Finetuned
from probes.patching.replay import replay
from probes.steering import Intervention
from studies.alignment.methods import (
    MERIT,
    NOTHING,
    RANDOM_MATCHED,
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
        method: its name without the strength.
        parameters: number of its parameters.
        task_states: states with a known task that it uses beside the examples.
        seconds: to read the states it uses and to fit it.
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
    reading: float,
) -> Iterator[Move]:
    """All interventions: every method at every site and strength.

    Args:
        acts: states of the examples.
        members: mean states of all tasks, from ``task_states`` states.
        reading: seconds to read one state.
    """
    gate = sum(int(members[name].sel(layer=sites[0].layer).size) for name in members)
    for intervention in moves(acts, members, examples.source, examples.target, given=given):
        name = intervention.name
        known = task_states if name.endswith("members") else 0
        for site in sites:
            began = time.perf_counter()
            intervention.edit_at(site)
            fitting = time.perf_counter() - began
            for strength in strengths:
                yield Move(
                    examples,
                    name,
                    intervention if strength == 1 else intervention.scaled(strength),
                    site,
                    strength,
                    parameters(name, acts, site, gate),
                    known,
                    fitting + reading * (2 * len(examples.asked) + known),
                )


def steered(
    model: TransformerBridge, asked: Asked, acts: xr.Dataset, made: Sequence[Move]
) -> Float[Tensor, "move prompt 2"]:
    """First token and divergence of each prompt under each intervention.

    Prompts that a gate leaves unchanged are not run again: interventions at one site that
    change different prompts share one forward.

    Args:
        acts: the prompts' own states.
    """
    edits: list[tuple[Site, Tensor]] = []
    owners: list[Tensor] = []
    every = torch.arange(len(asked.prompts))
    in_order = sorted(range(len(made)), key=lambda index: str(made[index].site))
    for site, group in groupby(in_order, key=lambda index: made[index].site):
        before = torch.from_numpy(select(acts, site).values)
        places = list(group)
        after = torch.stack([made[index].intervention.edit_at(site)(before) for index in places])
        changed = (after != before).any(-1)
        # Index of this intervention among those that change the prompt.
        turn = torch.where(changed, changed.cumsum(0), 0)
        for number in range(1, int(turn.max()) + 1):
            found, which = (turn == number).max(0)
            edits.append((site, torch.where(found[:, None], after[which, every], before)))
            owners.append(torch.where(found, torch.tensor(places)[which], -1))
    read = asked.unmoved.repeat(len(made), 1, 1)
    if edits:
        for owner, values in zip(
            owners, replay(model, asked.prompts, edits, asked.readout), strict=True
        ):
            rows = owner >= 0
            read[owner[rows], every[rows]] = values[rows]
    return read


def chosen_moves(
    model: TransformerBridge, asked: Asked, acts: xr.Dataset, made: Sequence[Move]
) -> list[Move]:
    """The interventions at the site and strength best over all pairs of tasks.

    Chosen separately for each method and number of examples.

    Args:
        asked: prompts to choose by; ``acts`` are their states.
    """
    values: dict[tuple[str, int], dict[tuple[Site, float], float]] = {}
    for move, read in zip(made, steered(model, asked, acts, made), strict=True):
        found, place = values.setdefault(_key(move), {}), (move.site, move.strength)
        found[place] = found.get(place, 0.0) + merit(_rates(asked, read, move.examples))
    best = {name: max(found, key=found.__getitem__) for name, found in values.items()}
    return [move for move in made if (move.site, move.strength) == best[_key(move)]]


def _key(move: Move) -> tuple[str, int]:
    return move.method, len(move.examples.asked)


def measure_moves(
    model: TransformerBridge, asked: Asked, acts: xr.Dataset, chosen: Sequence[Move]
) -> Rows:
    """Scores of interventions, and of norm-matched random directions for some."""
    randoms = [
        replace(
            move, method=RANDOM_MATCHED + move.method, intervention=move.intervention.random_twin()
        )
        for move in chosen
        if move.method in (SHIFT, TRANSPORT)
    ]
    everything = [*chosen, *randoms]
    rows: Rows = []
    for move, read in zip(everything, steered(model, asked, acts, everything), strict=True):
        place = {"layer": move.site.layer, "strength": float(move.strength)}
        scores: dict[str, float] = {"parameters": move.parameters, "task states": move.task_states}
        scores |= {"seconds": move.seconds} | _rates(asked, read, move.examples)
        rows += _tidy(move.examples, move.method, scores, place)
    return rows


def measure_nothing(asked: Asked, examples: Sequence[Examples]) -> Rows:
    """The original model's scores, repeated for each number of examples."""
    cost = {"parameters": 0, "task states": 0, "seconds": 0.0}
    return [
        row
        for some in examples
        for row in _tidy(some, NOTHING, _rates(asked, asked.unmoved, some) | cost, {})
    ]


@dataclass(frozen=True)
class TrainedScores:
    """A training at one learning rate.

    Attributes:
        merit, success: on the prompts that choose the rate.
        rows: scores on the reported prompts.
    """

    lr: float
    merit: float
    success: float
    rows: Rows

    def chosen_by(self, name: str) -> Rows:
        """The rows with another selection criterion."""
        return [row | {"chosen_by": name} for row in self.rows]


def try_training(
    method: str,
    examples: Examples,
    lr: float,
    train: Callable[..., AbstractContextManager[Finetuned]],
    read: Callable[[Asked], Tensor],
    asked: Sequence[Asked],
    *,
    task_states: int,
) -> TrainedScores:
    """Train, then score the prompts to choose by and those to report.

    Args:
        train: takes ``lr``; inside the block the model has the trained weights.
        read: first token and divergence of each prompt.
        asked: prompts to choose by, and prompts to report.
    """
    with train(lr=lr) as done:
        found, scores = (_rates(part, read(part), examples) for part in asked)
    scores |= {"parameters": done.parameters, "task states": task_states, "seconds": done.seconds}
    rows = _tidy(examples, method, scores, {"lr": lr})
    return TrainedScores(lr, merit(found), found["wanted, unseen"], rows)


def read_now(
    model: TransformerBridge, asked: Asked, frozen: FrozenBlocks | None = None
) -> Float[Tensor, "prompt 2"]:
    """First token and divergence of each prompt with the current weights."""
    prompts = asked.prompts
    require_one_side(model, prompts.lengths, caller="alignment")
    last = torch.arange(prompts.tokens.shape[1]) == (prompts.lengths - 1)[:, None]
    with torch.no_grad(), nullcontext() if frozen is None else frozen.reused():
        logits = scored_logits(model, prompts.tokens, last).float()
    return asked.readout(logits, torch.arange(len(prompts))).cpu()


def frame(rows: Rows, **labels: Any) -> pd.DataFrame:
    """Rows as a frame with further label columns."""
    return pd.DataFrame(rows).assign(**labels)


def _tidy(
    examples: Examples, method: str, metrics: Mapping[str, float | int], place: Mapping[str, Any]
) -> Rows:
    shared = {"source": examples.source, "target": examples.target, "method": method}
    shared |= {"examples": len(examples.asked), "chosen_by": MERIT, **place}
    return [{**shared, "metric": name, "value": float(value)} for name, value in metrics.items()]


def _rates(asked: Asked, read: Tensor, examples: Examples) -> dict[str, float]:
    return asked.rates(read, examples.source, examples.target, examples.inputs)
