"""Label words as anchors: saliency into the demonstrations' labels and to the answer.

The saliency of a block is ``I = |sum over heads of A ∂L/∂A|`` for each pair of tokens: the effect
on the loss of attention from one to the other. With label words ``p`` (the answers in the
demonstrations) and the answering token ``q``,

    wp   mean I(p, j) over j < p            words to label words
    pq   mean I(q, p)                       label words to the answer
    ww   mean I(i, j) over all other j < i  everything else

The controls ``wp_random`` and ``pq_random`` are the same with as many other tokens in place of the
label words.

Source: Wang et al. 2023 (arXiv 2305.14160), section 2; the random tokens are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import figures
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import require_fits, with_gradients
from lensclust.models import BACKWARD, batches, default_budget, model_device
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.results import mean_interval
from probes.attention.patterns import AnswerLoss, Lengths, Pattern, PatternReader, ShowGradient
from probes.components import Choices, exact
from probes.components.label_tokens import label_tokens

FLOWS = ("wp", "pq", "ww", "wp_random", "pq_random")


@dataclass(frozen=True, repr=False)
class LabelWordFlow(Shown):
    """Saliency to and from label words, by block.

    Attributes:
        values: ``wp``, ``pq``, ``ww``, ``wp_random``, ``pq_random (prompt, block)``.
    """

    values: xr.Dataset

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per flow and block: ``flow, block, value, low, high, n`` (mean over prompts)."""
        rows = []
        for flow in FLOWS:
            for block, values in zip(
                self.values["block"].values.tolist(), self.values[flow].values.T, strict=True
            ):
                mean, low, high = mean_interval(values.astype(np.float64))
                rows.append((flow, block, mean, low, high, len(values)))
        return pd.DataFrame(rows, columns=["flow", "block", "value", "low", "high", "n"])

    def plot(self) -> Any:
        """Every flow by block."""
        return figures.curves(
            self.frame[["flow", "block", "value"]],
            x="block",
            color="flow",
            band=None,
            title="Flow to and from label words",
            caption=f"Mean saliency of a pair of tokens over {self.values.sizes['prompt']} "
            "prompts: wp into label words, pq from them to the answer, ww all others; random: "
            "other tokens in place of the label words.",
            y_title="saliency",
        )

    def __repr__(self) -> str:
        means = self.frame.pivot(index="block", columns="flow", values="value")
        strongest = ", ".join(f"{flow} at block {means[flow].idxmax()}" for flow in FLOWS[:3])
        return f"LabelWordFlow({self.values.sizes['prompt']} prompts; strongest {strongest})"


@checked_arguments
@with_gradients
def label_word_flow(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    words: str | Sequence[str] = "label_words",
    query: str = "answer",
    choices: Choices | None = None,
    draws: int = 20,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> LabelWordFlow:
    """Saliency into label words, from them to the answer, and elsewhere, by block.

    Args:
        model: a hooked model, in eval mode, with eager attention.
        prompts: prompts with answers, and spans of the label words.
        words: spans of the label words, one or several (one per demonstration; those that a
            prompt lacks are empty). A name that is no span means all of ``NAME_0, NAME_1, ...``.
        query: position of ``q`` (`Prompts.position`), after all label words.
        choices: labels of the softmax in the loss, as in `decompose`; default all tokens.
            The loss is the cross-entropy of the first token of the prompt's answer.
        draws: sets of random tokens, averaged.
        seed: of those.
        batch_tokens: upper bound of the tokens that one forward runs; default a quarter of that
            of `extract`.
        progress: show a bar.

    Raises:
        InputError: if a span or position does not exist, a prompt has no label word or one that
            is not before the query, an answer is missing or none of the choices, or the prompts
            are incompatible with the model.

    >>> import lensclust as lc
    >>> rows = pd.DataFrame({"task": ["a", "b"]})
    >>> prompts = Prompts.from_token_lists([[1, 2, 3, 4, 5], [1, 2, 6, 4]], rows,
    ...     answers=[[3], [6]], spans={"label_words": [(2, 3), (2, 3)]})
    >>> found = label_word_flow(lc.load("native:sif-small"), prompts)
    >>> found.values.pq.dims, bool((found.values.pq > 0).all())
    (('prompt', 'block'), True)
    """
    if draws < 1 or (batch_tokens is not None and batch_tokens < 1):
        raise InputError(
            f"label_word_flow: draws={draws}, batch_tokens={batch_tokens}, expected at least 1"
        )
    require_fits(model, prompts, caller="label_word_flow")
    labels = prompts.label_arrays()
    if taken := [name for name in labels if name in ("prompt", "block", *FLOWS)]:
        raise InputError(f"label_word_flow: label {taken[0]!r} of the rows is the name of an axis")
    asked = prompts.position(query).numpy()
    anchors = _anchors(prompts, words, asked)
    tokens = None if choices is None else label_tokens(model, choices, caller="label_word_flow")
    loss = AnswerLoss(
        prompts,
        labels=None if tokens is None else list(tokens.values()),
        caller="label_word_flow",
    )
    reader = PatternReader(model, values=False, caller="label_word_flow")
    device = model_device(model)
    found = np.empty((len(FLOWS), len(prompts), len(reader.blocks)), dtype=np.float32)
    budget = batch_tokens or max(1, default_budget(model) // BACKWARD)
    with progress_bar("label words", len(prompts), enabled=progress) as advance:
        for rows in batches(model, prompts.lengths, budget):
            lengths = prompts.lengths[rows]
            width = int(lengths.max())
            columns = _columns(rows.numpy(), anchors[rows.numpy(), :width], asked, draws, seed)
            flows = _Flows(columns.to(device), lengths, torch.from_numpy(asked[rows.numpy()]))
            reader.run(
                prompts.tokens[rows, :width].to(device),
                (lengths - 1).to(device),
                flows.show,
                loss.of(rows),
            )
            for place, values in flows.found.items():
                found[:, rows.numpy(), place] = values.cpu().numpy()
            advance(len(rows))
    coords: dict[str, Any] = {name: ("prompt", values) for name, values in labels.items()}
    coords["block"] = reader.blocks
    return LabelWordFlow(
        xr.Dataset(
            {flow: (("prompt", "block"), each) for flow, each in zip(FLOWS, found, strict=True)},
            coords,
        )
    )


class _Flows:
    """Reduces the saliency of each block to its flows, for one batch."""

    def __init__(
        self,
        columns: Float[Tensor, "row token column"],
        lengths: Int[Tensor, " row"],
        asked: Int[Tensor, " row"],
    ) -> None:
        self.columns, self.asked = columns, asked
        token = torch.arange(columns.shape[1])
        self.real = (token < lengths[:, None]).to(columns)
        # Number of pairs in each mean: a token has as many before it as its index.
        self.into = torch.einsum("rtc,t->rc", columns, token.to(columns))
        self.chosen = columns.sum(1)
        self.all = (lengths * (lengths - 1) / 2).to(columns)
        self.found: dict[int, Float[Tensor, "flow row"]] = {}

    def show(self, place: int, pattern: Pattern, _lengths: Lengths | None) -> ShowGradient:
        def show_gradient(gradient: Pattern) -> None:
            saliency = torch.einsum("rhqk,rhqk->rqk", pattern, gradient).abs().tril(-1)
            self.found[place] = self._flows(saliency.to(exact(saliency.dtype)))

        return show_gradient

    def _flows(self, saliency: Float[Tensor, "row token key"]) -> Float[Tensor, "flow row"]:
        columns, real, into, chosen, pairs = (
            each.to(saliency)
            for each in (self.columns, self.real, self.into, self.chosen, self.all)
        )
        taken = saliency.sum(-1) * real
        asked = saliency[torch.arange(len(saliency)), self.asked.to(saliency.device)]
        to_words = torch.einsum("rt,rtc->rc", taken, columns)
        from_words = torch.einsum("rk,rkc->rc", asked, columns)
        rest = taken.sum(1) - to_words[:, 0] - from_words[:, 0]
        wp, pq = to_words / into, from_words / chosen
        ww = rest / (pairs - into[:, 0] - chosen[:, 0])
        return torch.stack([wp[:, 0], pq[:, 0], ww, wp[:, 1:].mean(1), pq[:, 1:].mean(1)])


def _anchors(
    prompts: Prompts, words: str | Sequence[str], asked: Int[np.ndarray, " prompt"]
) -> Bool[np.ndarray, "prompt token"]:
    """Mask of the label words."""
    spans = prompts.spans or {}
    given = [words] if isinstance(words, str) else list(words)
    names = [
        name
        for each in given
        for name in ([each] if each in spans else _numbered(each, list(spans)))
    ]
    token = np.arange(prompts.tokens.shape[1])
    found = np.zeros(prompts.tokens.shape, dtype=bool)
    for name in names:
        start, stop = spans[name].numpy().T[..., None]
        found |= (token >= start) & (token < stop)
    if not names:
        raise InputError(f"label_word_flow: no span {given}: these prompts have {sorted(spans)}")
    if (without := ~found.any(1)).any():
        raise InputError(
            f"label_word_flow: prompt {int(without.argmax())} has no label word in spans {names}"
        )
    if (late := (found & (token >= asked[:, None])).any(1) | found[:, 0]).any():
        row = int(late.argmax())
        raise InputError(
            f"label_word_flow: prompt {row} has label words at "
            f"{np.flatnonzero(found[row]).tolist()}, expected after its first token and before "
            f"the query at {int(asked[row])}"
        )
    return found


def _numbered(name: str, spans: Sequence[str]) -> list[str]:
    return [span for span in spans if re.fullmatch(re.escape(name) + r"_\d+", span)]


def _columns(
    rows: Int[np.ndarray, " row"],
    anchors: Bool[np.ndarray, "row token"],
    asked: Int[np.ndarray, " prompt"],
    draws: int,
    seed: int,
) -> Float[Tensor, "row token column"]:
    """The label words as a first column of ones, and random other tokens in the others."""
    found = np.zeros((*anchors.shape, 1 + draws), dtype=np.float32)
    found[..., 0] = anchors
    for place, row in enumerate(rows.tolist()):
        # The first token is an attention sink.
        others = 1 + np.flatnonzero(~anchors[place, 1 : asked[row]])
        size = int(anchors[place].sum())
        if len(others) < size:
            raise InputError(
                f"label_word_flow: prompt {row} has {size} label words and {len(others)} other "
                "tokens before the query, expected at least as many"
            )
        generator = np.random.default_rng([seed, row])
        for draw in range(draws):
            found[place, generator.choice(others, size, replace=False), 1 + draw] = 1
    return torch.from_numpy(found)
