"""Cluster interchange: move states between tasks' clusters and count the answers.

If the cluster of a state makes the model do a task, a prompt of task A whose state is moved to
task B's cluster gets B's answer to the same input. Evidence is the rate of B's answers beside
that of a norm-matched random direction.

Source: the causal check is our extension of Wu & Varshney (arXiv 2402.12151); interchange in
the sense of Geiger et al. (2021), with displaced states in place of a second prompt's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import figures
from lensclust.activations import extract, select
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import answers as read_answers
from lensclust.models import Site, SiteSelector, resolve
from lensclust.prompts import Prompts
from probes.design import answer_table, draw_members, draw_targets, first_answers, prompt_strings
from probes.patching.replay import replay
from probes.steering.interventions import Intervention, interventions

Moves = Callable[[str, str], Intervention | Sequence[Intervention]]
MEMBER = "another member"
OUTCOMES = ["target", "source", "other"]


@dataclass(frozen=True, repr=False)
class Interchange(Shown):
    """Answers after states were moved from one label's cluster to another's.

    Attributes:
        frame: one row per site, method and ordered pair of labels: ``site, kind, layer, head,
            position, method, source, target, metric, value, n``. ``metric`` is ``target`` (rate
            of the answer that the target label gives this input), ``source`` (rate of the
            prompt's own answer) and ``other``.
        answers: first token of the answer ``(move, round, prompt)``; a move is a method at a site.
        targets: label that each prompt is moved to in each round ``(round, prompt)``; empty
            where it is not moved.
        baseline: rate of the prompts' own answers without intervention.
    """

    frame: pd.DataFrame
    answers: xr.DataArray
    targets: xr.DataArray
    baseline: float

    def by_site(self, metric: str = "target") -> pd.DataFrame:
        """Mean over pairs of labels: ``site, kind, layer, head, position, method, value``."""
        rows = self.frame[self.frame["metric"] == metric]
        place = ["site", "kind", "layer", "head", "position", "method"]
        return rows.groupby(place, dropna=False, sort=False)["value"].mean().reset_index()

    def best(self, method: str, *, metric: str = "target") -> Site:
        """The site where a method has its highest rate; ties go to the earliest.

        Choose on one set of prompts and report on another: the best of many is biased upwards.
        """
        rows = self.by_site(metric)
        rows = rows[rows["method"] == method]
        if rows.empty:
            known = self.frame["method"].unique().tolist()
            raise InputError(f"best: no method {method!r}, these interchanges hold {known}")
        return Site.parse(str(rows.loc[rows["value"].idxmax(), "site"]))

    def plot(self, metric: str = "target") -> Any:
        """Rate by layer, one line per method."""
        return figures.curves(
            self.by_site(metric),
            color="method",
            band=None,
            title=f"Answers of the {metric} task after the move",
            caption=f"Mean over {len(self.frame[['source', 'target']].drop_duplicates())} ordered "
            "pairs of tasks.",
            y_title="rate",
        )

    def __repr__(self) -> str:
        rows = self.by_site()
        best = rows.loc[rows.groupby("method", sort=False)["value"].idxmax()]
        found = ", ".join(f"{r.method} {r.value:.2f} at {r.site}" for r in best.itertuples())
        return f"Interchange(target answers, best site of each method: {found})"

    def _tables(self) -> tuple[pd.DataFrame, ...]:
        return (self.by_site().pivot_table("value", "site", "method", sort=False),)


@checked_arguments
def interchange(
    model: TransformerLensModel,
    prompts: Prompts,
    moves: Moves,
    sites: SiteSelector,
    *,
    by: str = "task",
    given: str = "input",
    at: str = "answer",
    rounds: int | None = 1,
    donors: Prompts | None = None,
    answers: Mapping[tuple[str, str], int] | None = None,
    batch_tokens: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Interchange:
    """Move the states of every prompt to other labels' clusters and read the answers.

    Each round moves every prompt to another label, drawn without repetition among those that
    answer its ``given`` differently (in the first token).

    Args:
        model: a hooked model, in eval mode.
        prompts: prompts with answers, whose states are moved.
        moves: ``(source, target) ->`` one intervention, or several to compare; their names are
            the methods, and every pair must give the same names.
        sites: where to move; several sites of one kind make a curve over layers.
        by: the label whose clusters are exchanged.
        given: the label under which another label's answer is looked up (the input).
        at: read position whose state is moved.
        rounds: number of targets of each prompt; None for all.
        donors: with these, a further method, `MEMBER`: the state is replaced by that
            of a random donor of the target label and the same ``given`` (of the target label
            alone where there is none).
        answers: ``(label, given) ->`` first token of the answer; default: from the prompts (and
            donors).
        batch_tokens: as in `extract`.
        seed: of targets and members.

    Raises:
        InputError: if there are no answers, a label or position does not exist, no prompt has
            another label to move to, or names of interventions clash.
    """
    chosen = resolve(model, sites)
    label, condition = (prompt_strings(prompts, name) for name in (by, given))
    own = first_answers(prompts)
    known = dict(answers) if answers is not None else answer_table(prompts, donors, by, given)
    targets = draw_targets(label, condition, own, known, rounds, seed)
    states = extract(model, prompts, chosen, at=at, batch_tokens=batch_tokens, progress=False)
    before = {site: torch.from_numpy(select(states, site).values) for site in chosen}
    moved = _moved(before, moves, label, targets)
    if donors is not None:
        members = draw_members(targets, condition, donors, by, given, seed)
        theirs = extract(model, donors, chosen, at=at, batch_tokens=batch_tokens, progress=False)
        for site in chosen:
            # A prompt that is not moved has an arbitrary donor, and its answer is not counted.
            moved[MEMBER, site] = torch.from_numpy(select(theirs, site).values)[members]
    edits = [(site, turn) for (_, site), values in moved.items() for turn in values]
    tokens = replay(
        model, prompts, edits, first_token, at=at, batch_tokens=batch_tokens, progress=progress
    ).numpy()
    unmoved = read_answers(model, prompts, first_token, batch_tokens=batch_tokens).numpy()
    found = tokens.reshape(len(moved), len(targets), len(prompts))
    frame = pd.concat(
        [
            _rates(rows, label, condition, targets, own, known).assign(
                site=str(site), kind=site.kind, layer=site.layer, head=site.head, method=method
            )
            for (method, site), rows in zip(moved, found, strict=True)
        ],
        ignore_index=True,
    )
    return Interchange(
        frame=frame.astype({"head": "Int64"}).assign(position=at),
        answers=xr.DataArray(
            found,
            dims=("move", "round", "prompt"),
            coords={
                "method": ("move", [method for method, _ in moved]),
                "site": ("move", [str(site) for _, site in moved]),
            },
        ),
        targets=xr.DataArray(targets, dims=("round", "prompt")),
        baseline=float((unmoved == own).mean()),
    )


def first_token(
    logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]
) -> Int[Tensor, " row"]:
    """Readout of the most likely next token, for `probes.patching.replay.replay`."""
    return logits.argmax(-1)


def _moved(
    before: Mapping[Site, Float[Tensor, "prompt _"]],
    moves: Moves,
    label: np.ndarray,
    targets: np.ndarray,
) -> dict[tuple[str, Site], Tensor]:
    """Edited states of each method and site ``(round, prompt, d)``; unchanged without target."""
    values: dict[tuple[str, Site], Tensor] = {}
    names: list[str] = []
    for source in np.unique(label):
        for target in np.unique(targets[targets != ""]):
            turn, row = np.nonzero((label == source) & (targets == target))
            if len(row) == 0:
                continue
            made = interventions("interchange: moves", moves(str(source), str(target)))
            given = [intervention.name for intervention in made]
            if given != (names := names or given) or len({*given, MEMBER}) <= len(given):
                raise InputError(
                    f"interchange: moves from {source!r} to {target!r} have the names {given}, "
                    f"expected different ones, none {MEMBER!r}, the same for every pair"
                )
            for intervention in made:
                for site, states in before.items():
                    shape = (len(targets), *states.shape)
                    key = (intervention.name, site)
                    if key not in values:
                        values[key] = states.expand(shape).clone()
                    values[key][turn, row] = intervention.edit(site)(states[row])
    return values


def _rates(
    tokens: Int[np.ndarray, "round prompt"],
    label: np.ndarray,
    condition: np.ndarray,
    targets: np.ndarray,
    own: np.ndarray,
    known: Mapping[tuple[str, str], int],
) -> pd.DataFrame:
    """Rates of the target's, the prompt's own and other answers, by pair."""
    turn, row = np.nonzero(targets != "")
    wanted = [known[b, x] for b, x in zip(targets[turn, row], condition[row], strict=True)]
    given = tokens[turn, row]
    outcome = np.select([given == wanted, given == own[row]], ["target", "source"], "other")
    pairs = pd.DataFrame({"source": label[row], "target": targets[turn, row], "metric": outcome})
    counts = pairs.value_counts().unstack(fill_value=0).reindex(columns=OUTCOMES, fill_value=0)
    n = counts.sum(axis=1)
    rates = counts.div(n, axis=0).stack().rename("value").reset_index()
    return rates.merge(n.rename("n").reset_index())
