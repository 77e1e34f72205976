"""Interventions and fine-tunings made from the same labelled examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

import lensclust as lc
import probes
from lensclust.activations import dataset_sites, select
from lensclust.models import Site
from lensclust.training import StateLoss, contrast, pull
from probes.design import answer_table, first_answers, mean_states, prompt_strings
from probes.steering import (
    Intervention,
    interventions,
    linear_transport,
    only_members,
    only_near,
    shift,
    transport,
)
from studies.study import silenced

NOTHING = "nothing"
SHIFT, TRANSPORT = "shift, members", "transport, members"
RANDOM_MATCHED = "random direction, norm of "
PLAIN, PULL, CONTRAST, HEADS = "training", "training + pull", "training + contrast", "heads only"
TRAININGS = (PLAIN, PULL, CONTRAST, HEADS)
# Criteria for layers, strengths and learning rates: success minus damage, or success alone.
MERIT, SUCCESS = "merit", "success"
# Heads alone need larger steps: factor of their learning rates over those of all weights.
HEADS_FASTER = 10
# Margin of the cluster term, in units of the squared distance between the two means.
SURE = 0.25


@dataclass(frozen=True)
class Examples:
    """Labelled examples of answering one task as another.

    Attributes:
        source: the task that is changed.
        target: the task whose answers are wanted.
        asked: prompts of the source, with the target's answers.
        shown: prompts of the target, with the same inputs.
        rows: indices of ``asked`` and ``shown`` in the pool they were drawn from.
    """

    source: str
    target: str
    asked: lc.Prompts
    shown: lc.Prompts
    rows: tuple[np.ndarray, np.ndarray]

    def first(self, n: int) -> Examples:
        """The first ``n`` examples."""
        if n > len(self.asked):
            raise lc.InputError(
                f"alignment: {n} examples of {self.source!r} as {self.target!r} requested, but "
                f"there are {len(self.asked)}"
            )
        some = range(n)
        rows = (self.rows[0][:n], self.rows[1][:n])
        return Examples(
            self.source, self.target, self.asked.take(some), self.shown.take(some), rows
        )

    def states(self, acts: xr.Dataset) -> xr.Dataset:
        """States of the source and target prompts, taken from those of the pool."""
        return acts.isel(prompt=np.concatenate(self.rows))

    @property
    def inputs(self) -> set[str]:
        return set(prompt_strings(self.asked, "input"))


def draw_examples(
    pool: lc.Prompts, source: str, target: str, n: int, seed: Sequence[int]
) -> Examples:
    """Draw up to ``n`` examples, cycling over inputs that the two tasks answer differently.

    Raises:
        InputError: if a task has no prompt, both are the same, or no input is shared.
    """
    if source == target:
        raise lc.InputError(f"alignment: task {source!r} given twice, expected two different ones")
    task, given = prompt_strings(pool, "task"), prompt_strings(pool, "input")
    for name in (source, target):
        if name not in task:
            raise lc.InputError(f"alignment: no example of task {name!r}: {sorted(set(task))}")
    known = answer_table(pool, None, "task", "input")
    shared = [
        x for x in sorted(set(given)) if known.get((source, x)) != known.get((target, x))
        and {(source, x), (target, x)} <= set(known)
    ]  # fmt: skip
    if not shared:
        raise lc.InputError(f"alignment: {source!r} and {target!r} share no input they differ on")
    rng = np.random.default_rng(seed)
    turns = [
        [rng.permutation(np.flatnonzero((task == name) & (given == x))) for x in shared]
        for name in (source, target)
    ]
    order = rng.permutation(len(shared))
    longest = min(max(map(len, some)) for some in turns)
    pairs = [
        (turns[0][x][turn], turns[1][x][turn])
        for turn in range(longest)
        for x in order
        if turn < min(len(turns[0][x]), len(turns[1][x]))
    ][:n]
    rows = (np.array([a for a, _ in pairs]), np.array([b for _, b in pairs]))
    asked, shown = pool.take(rows[0]), pool.take(rows[1])
    return Examples(source, target, replace(asked, answers=shown.answers), shown, rows)


def moves(
    acts: xr.Dataset, members: xr.Dataset, source: str, target: str, *, given: str | None
) -> list[Intervention]:
    """Interventions fitted on the examples' states, with and without a gate.

    Args:
        acts: states of the examples.
        members: mean states of all tasks, for the gate, by ``given`` too where that is named.
    """
    everywhere, by_input = mean_states(acts), mean_states(acts, given="input")
    plain = shift(everywhere, source, target)
    there = transport(by_input, source, target)
    mapped = linear_transport(acts, source, target, name="linear map")
    put = interventions.replace(everywhere, target)

    def gated(move: Intervention) -> Intervention:
        return only_members(move, members, source, given=given)

    return [
        plain,
        there,
        *map(gated, (plain, there, mapped, put)),
        only_near(there, acts, source, target, given=given),
    ]


def parameters(method: str, acts: xr.Dataset, site: Site, gate: int) -> int:
    """Number of parameters of an intervention fitted on these states, including its gate."""
    d = select(acts, site).shape[-1]
    inputs, n = len(np.unique(acts["input"].values)), acts.sizes["prompt"] // 2
    moved = {"shift": d, "transport": 2 * inputs * d, "replace by mean": d}
    # Centre, shift, and the two factors of a linear part of at most this rank.
    moved["linear map"] = 2 * d + 2 * d * min(n, d)
    kind, _, asked = method.partition(", ")
    return moved[kind] + {"": 0, "members": gate, "near": inputs * d + 1}[asked]


def cluster_term(
    method: str, acts: xr.Dataset, examples: Examples, layer: int, weight: float
) -> StateLoss | None:
    """Auxiliary loss of a training method on the examples' states at a layer, by input."""
    if method not in (PULL, CONTRAST):
        return None
    site = Site("resid", layer)
    states = torch.from_numpy(select(acts, site).values)
    given = prompt_strings(examples.asked, "input")
    n = len(examples.asked)
    unwanted, wanted = (_means(part, given) for part in (states[:n], states[n:]))
    spread = float(((wanted - unwanted) ** 2).sum(1).mean())
    if method == PULL:
        return StateLoss(layer, pull(wanted, spread), weight)
    return StateLoss(layer, contrast(wanted, unwanted, SURE * spread), weight)


def learning_rates(method: str, rates: Sequence[float]) -> list[float]:
    """Candidate learning rates of a training method."""
    return [rate * HEADS_FASTER if method == HEADS else rate for rate in rates]


def _means(states: Float[Tensor, "row d"], given: np.ndarray) -> Float[Tensor, "row d"]:
    same = torch.from_numpy((given[:, None] == given).astype(np.float32))
    return same @ states / same.sum(1, keepdim=True)


def cluster_heads(acts: xr.Dataset, share: float) -> list[Site]:
    """The top ``share`` of heads by clustering of their states by task within input."""
    sites = dataset_sites(acts, "head")
    with silenced("probes.clustering.clustering"):
        found = probes.cluster(
            acts, kinds="head", metrics="ari", permutations=1, n_init=2, jobs=1
        ).frame
    best = found.nlargest(max(1, round(share * len(sites))), "value")["site"]
    return [Site.parse(name) for name in best]


# -- evaluation ---------------------------------------------------------------------------

Readout = Callable[[Tensor, Tensor], Tensor]


def against(base: Float[Tensor, "prompt vocab"]) -> Readout:
    """Readout of the first token and of the KL divergence from the original model in nats."""

    def read(logits: Tensor, rows: Tensor) -> Tensor:
        now, before = logits.log_softmax(-1), base[rows].to(logits.device)
        divergence = (before.exp() * (before - now)).sum(-1)
        return torch.stack([logits.argmax(-1).to(divergence), divergence], -1)

    return read


def log_probabilities(logits: Tensor, _rows: Tensor) -> Tensor:
    """Readout of the log probabilities of the next token."""
    return logits.log_softmax(-1)


class Asked:
    """Prompts on which methods are scored, and the original model's predictions for them.

    Args:
        prompts: with rows ``task, input, group``. The group ``seen`` or ``unseen`` is that of
            their instructions; unchanged tasks are scored on ``unseen`` ones.
        base: log probabilities of the next token.
        able: label of the rows. Success counts only where the original model is right on the
            prompt and on the target task's prompt with the same input and this label: elsewhere
            it would measure ability. Unless given, it counts everywhere.
    """

    def __init__(
        self, prompts: lc.Prompts, base: Float[Tensor, "prompt vocab"], able: str | None = None
    ) -> None:
        self.prompts = prompts
        self.readout = against(base)
        self.task, self.given = (prompt_strings(prompts, name) for name in ("task", "input"))
        self.group = prompt_strings(prompts, "group")
        self.own = first_answers(prompts)
        self.right = base.argmax(-1).numpy() == self.own
        self.known = answer_table(prompts, None, "task", "input")
        self.way = None if able is None else prompt_strings(prompts, able)
        self.unmoved = torch.stack([base.argmax(-1).float(), torch.zeros(len(base))], -1)

    def wanted(self, target: str) -> np.ndarray:
        """First token of the target's answer to each prompt's input, -1 where it has none."""
        return np.array([self.known.get((target, x), -1) for x in self.given])

    def counted(self, source: str, target: str) -> np.ndarray:
        """Whether each prompt is of the source and the target's answer differs."""
        wanted = self.wanted(target)
        counted = (self.task == source) & (wanted >= 0) & (wanted != self.own)
        if self.way is None:
            return counted
        places = pd.MultiIndex.from_arrays([self.given, self.way])
        return counted & self.right & places.isin(places[self.right & (self.task == target)])

    def rates(
        self, read: Float[Tensor, "prompt 2"], source: str, target: str, shown: set[str]
    ) -> dict[str, float]:
        """Success on the source's prompts and damage on the other tasks'."""
        token, divergence = read[:, 0].numpy(), read[:, 1].numpy()
        counts = self.counted(source, target)
        moved = token == self.wanted(target)
        found = {
            f"wanted, {group}": _mean(moved[counts & (self.group == group)])
            for group in ("seen", "unseen")
        }
        new = counts & (self.group == "unseen") & ~np.isin(self.given, list(shown))
        others = (self.task != source) & (self.group == "unseen")
        after = _mean((token == self.own)[others])
        return found | {
            "wanted, unseen, new input": _mean(moved[new]),
            "untouched accuracy": after,
            "untouched loss": _mean(self.right[others]) - after,
            "KL": _mean(divergence[others]),
        }


def merit(rates: dict[str, float]) -> float:
    """Criterion for layers, strengths and learning rates: success minus damage.

    The divergence breaks ties.
    """
    damage = max(0.0, rates["untouched loss"])
    return rates["wanted, unseen"] - damage - 1e-3 * min(rates["KL"], 1.0)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
