"""Activation of attention heads by a task: attention times its gradient.

    c_ilh = sum_qk A_ilh[q, k] dL_i/dA_ilh[q, k]        L_i the loss of prompt i
    activation of head h of block l = mean over prompts of |c_ilh|

computed as the gradient of a gate on the head (`probes.heads.gates`), without attention matrices
(by the model's own fused kernel, where it has one: `lensclust.inference.fused_attention`).

L_i is the mean cross-entropy of the answer's tokens, and prompts are summed: numbers do not
depend on how prompts are batched. (The authors' script takes the mean over all answer tokens of
a batch; its numbers are these times the prompt's share of the batch's answer tokens.)

Source: Zhao et al. (arXiv 2409.15820, ACL 2025 long 831); that the absolute value is taken of
each prompt's sum is read off the authors' published script. As an importance of heads: Michel,
Levy & Neubig (arXiv 1905.10650), there normalised by layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor
from torch.nn import functional as F
from transformer_lens.model_bridge import TransformerBridge

from lensclust import figures
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import Readout, require_fits, with_gradients
from lensclust.inference.fused_attention import fused_attention
from lensclust.models import (
    BACKWARD,
    batches,
    default_budget,
    fingerprint_again,
    head_blocks,
    model_device,
    model_name,
)
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.results import mean_interval
from probes.heads.gates import (
    RowLosses,
    gate_gradients,
    require_attention_times_gradient,
    require_reach,
)

# Ratio of tokens of a forward to those of a forward with backward, for fused attention.
FUSED = 2
AXES = ("prompt", "block", "head")


@checked_arguments
@with_gradients
def head_activation(
    model: TransformerBridge,
    prompts: Prompts,
    *,
    loss: str | Readout = "answer",
    batch_tokens: int | None = None,
    progress: bool = True,
) -> HeadActivation:
    """Activation of every head by prompts: absolute attention times gradient of the loss.

    Args:
        model: a hooked model, in eval mode. Its parameters are frozen during the call.
        prompts: with an answer each, for ``loss="answer"``.
        loss: ``"answer"``, the mean cross-entropy of a prompt's answer tokens in nats; or a
            function of the logits at the last token of prompts ``(row, vocab)`` and the numbers
            of the prompts to one differentiable loss per row, which depends on this row alone.
        batch_tokens: upper bound of the tokens of one forward and backward; default a quarter of
            that of `lensclust.extract`, since a backward holds every layer's states, and half of
            it where no attention matrices are among them.
        progress: show a bar.

    Returns:
        Activations of each prompt and head (of blocks with attention), in nats, signed and
        absolute.

    Raises:
        InputError: if the model is in training mode, prompts do not fit it or have no answer, a
            loss or its gradient is not finite (of which prompt), or the numbers would not be
            attention times gradient: attention that fires hooks beside the computation, a norm
            before ``hook_z``, or weights without a backward. Checked once per model,
            on the shortest prompt.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> found = head_activation(model, prompts)
    >>> found.pattern.dims, found.pattern.shape, bool((found.pattern > 0).all())
    (('block', 'head'), (6, 4), True)
    """
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"head_activation: batch_tokens={batch_tokens}, expected at least 1")
    scoring = _scoring(model, prompts, loss)
    shortest = scoring.batch(scoring.lengths.argmin().repeat(2))
    require_attention_times_gradient(model, *shortest)
    losses = torch.empty(len(prompts), dtype=torch.float64)
    signed: list[Tensor] = []
    order: list[Tensor] = []
    with (
        fused_attention(model, int(scoring.lengths.max())) as fused,
        progress_bar("head_activation", len(prompts), enabled=progress) as advance,
    ):
        budget = batch_tokens or max(1, default_budget(model) // (FUSED if fused else BACKWARD))
        require_reach(model, *shortest, path=fused)
        for rows in batches(model, scoring.lengths, budget):
            found, gradients = gate_gradients(model, *scoring.batch(rows))
            _require_finite(rows, found, "loss")
            _require_finite(rows, gradients.flatten(1).sum(1), "gradient of the loss")
            losses[rows] = found.double().cpu()
            signed.append(gradients.cpu())
            order.append(rows)
            advance(len(rows))
    back = torch.cat(order).argsort()
    return HeadActivation(
        _dataset(model, prompts, torch.cat(signed)[back].numpy(), losses.numpy(), scoring.name)
    )


@dataclass(frozen=True, eq=False)
class _Scoring:
    """Tokens to run, positions of logits, and the loss of each row."""

    name: str
    device: torch.device
    tokens: Int[Tensor, "prompt length"]
    lengths: Int[Tensor, " prompt"]
    scored: Bool[Tensor, "prompt length"]
    losses: Callable[[Int[Tensor, " row"]], RowLosses]

    def batch(
        self, rows: Int[Tensor, " row"]
    ) -> tuple[Int[Tensor, "row length"], Bool[Tensor, "row length"], RowLosses]:
        """Tokens (with minimal padding), scored positions and losses of these prompts."""
        longest = int(self.lengths[rows].max())
        tokens, scored = (each[rows, :longest] for each in (self.tokens, self.scored))
        return tokens.to(self.device), scored.to(self.device), self.losses(rows)


def _scoring(model: TransformerBridge, prompts: Prompts, loss: str | Readout) -> _Scoring:
    if not isinstance(loss, str):
        return _last_token(model, prompts, loss)
    if loss != "answer":
        raise InputError(
            f"head_activation: loss {loss!r} is not known: expected 'answer' or a function of "
            "logits and prompt numbers"
        )
    if prompts.answers is None or not all(prompts.answers):
        given = prompts.answers or [()]
        without = next(index for index, answer in enumerate(given) if not answer)
        raise InputError(
            f"head_activation: prompt {without} has no answer, expected one for each prompt; give "
            "loss= a function of logits if there are none"
        )
    tokens, lengths, answered = prompts.with_answers()
    # The last token of an answer is predicted, never read; its id must exist all the same.
    lengths = lengths - 1
    require_fits(model, replace(prompts, tokens=tokens, lengths=lengths), caller="head_activation")
    targets, scored = tokens[:, 1:], answered[:, 1:]

    def losses(rows: Int[Tensor, " row"]) -> RowLosses:
        wanted, counts = targets[rows][scored[rows]], scored[rows].sum(1)

        def of(logits: Tensor, owner: Tensor) -> Float[Tensor, " row"]:
            each = F.cross_entropy(logits, wanted.to(logits.device), reduction="none")
            share = each / counts.to(each)[owner]
            return torch.zeros(len(rows)).to(each).index_add(0, owner, share)

        return of

    device = model_device(model)
    return _Scoring("answer", device, tokens[:, :-1], lengths, scored, losses)


def _last_token(model: TransformerBridge, prompts: Prompts, loss: Readout) -> _Scoring:
    require_fits(model, prompts, caller="head_activation")
    scored = torch.arange(prompts.tokens.shape[1]) == prompts.lengths[:, None] - 1

    def losses(rows: Int[Tensor, " row"]) -> RowLosses:
        def of(logits: Tensor, owner: Tensor) -> Float[Tensor, " row"]:
            found: Any = loss(logits, rows)
            if not isinstance(found, Tensor) or found.shape != rows.shape:
                is_tensor = isinstance(found, Tensor)
                given = f"of shape {tuple(found.shape)}" if is_tensor else type(found).__name__
                raise InputError(
                    f"head_activation: the loss of {len(rows)} prompts is {given}, expected one "
                    "number each, in a tensor"
                )
            return found

        return of

    name = getattr(loss, "__name__", "loss").strip("<>")
    return _Scoring(name, model_device(model), prompts.tokens, prompts.lengths, scored, losses)


def _require_finite(rows: Int[Tensor, " row"], values: Float[Tensor, " row"], what: str) -> None:
    bad = (~torch.isfinite(values)).nonzero()[:, 0].cpu()
    if len(bad):
        row = int(rows[bad].min())
        raise InputError(
            f"head_activation: the {what} of prompt {row} is not finite"
            f"{f' (nor of {len(bad) - 1} others of its batch)' if len(bad) > 1 else ''}"
        )


def _dataset(
    model: Any, prompts: Prompts, signed: np.ndarray, losses: np.ndarray, name: str
) -> xr.Dataset:
    labels = prompts.label_arrays()
    if taken := [label for label in labels if label in (*AXES, "signed", "loss")]:
        raise InputError(
            f"head_activation: label {taken[0]!r} of the rows is the name of an axis or variable"
        )
    return xr.Dataset(
        {"signed": (AXES, signed), "loss": (("prompt",), losses)},
        {
            "block": head_blocks(model),
            "head": np.arange(signed.shape[2]),
            **{label: ("prompt", values) for label, values in labels.items()},
        },
        {
            "model": model_name(model),
            "weights": fingerprint_again(model),
            "tokenizer": prompts.tokenizer,
            "prompts": prompts.digest(),
            "loss": name,
        },
    )


@dataclass(frozen=True, repr=False)
class HeadActivation(Shown):
    """Activation of each head by each prompt.

    Attributes:
        data: ``signed (prompt, block, head)``, the gradient of each prompt's loss with respect
            to a gate on the head, and ``loss (prompt)``, both in nats. Prompts have the columns of
            ``rows``; attributes hold the provenance.
    """

    data: xr.Dataset

    @property
    def signed(self) -> xr.DataArray:
        """Signed ``(prompt, block, head)``: above 0 where more of the head raises the loss."""
        return self.data["signed"]

    @property
    def values(self) -> xr.DataArray:
        """Absolute value ``(prompt, block, head)``."""
        return abs(self.signed).rename("activation")

    @property
    def losses(self) -> xr.DataArray:
        """Each prompt's loss ``(prompt)``."""
        return self.data["loss"]

    @cached_property
    def pattern(self) -> xr.DataArray:
        """The activation pattern ``(block, head)``: the mean over prompts, in float64."""
        return self.values.astype(np.float64).mean("prompt")

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per head: ``site, block, head, value, ci_low, ci_high, n``.

        Intervals are Student-t's over prompts, NaN for a single prompt.
        """
        values = self.values.values.astype(np.float64)
        rows = []
        blocks, heads = (self.values[axis].values.tolist() for axis in ("block", "head"))
        for at, head in np.ndindex(values.shape[1:]):
            value, low, high = mean_interval(values[:, at, head])
            block, head = blocks[at], heads[head]
            place = {"site": f"head {block}.{head}", "block": block, "head": head}
            rows.append({**place, "value": value, "ci_low": low, "ci_high": high})
        return pd.DataFrame(rows).assign(n=len(values))

    def concentration(
        self, *, resamples: int = 1000, confidence: float = 0.95, seed: int = 0
    ) -> pd.DataFrame:
        """Concentration of the pattern on few heads.

        Args:
            resamples: of the prompts, for the percentile interval. With few prompts, noise biases
                the concentration upwards, and resampling adds as much again.
            confidence: of the interval.
            seed: of the resampling.

        Returns:
            One row per metric: ``metric, value, ci_low, ci_high, convention, n``; the metrics are
            ``gini``, ``cv`` and ``kurtosis``. The interval of one prompt is NaN.

        Raises:
            InputError: if the number of resamples or the confidence is out of range, or the
                pattern is 0 everywhere.
        """
        if resamples < 1 or not 0 < confidence < 1:
            raise InputError(
                "concentration: expected resamples of at least 1 and a confidence between 0 and "
                f"1, given {resamples}, {confidence}"
            )
        values = self.values.values.astype(np.float64)
        n = len(values)
        if not values.any():
            raise InputError("concentration: the pattern is 0 at every head")
        drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples) / n
        patterns = drawn @ values.reshape(n, -1)
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        rows = []
        for metric, (measure, convention) in CONCENTRATION.items():
            low, high = np.quantile(measure(patterns), tails) if n > 1 else (np.nan, np.nan)
            value = float(measure(self.pattern.values.ravel()))
            row = {"metric": metric, "value": value, "ci_low": float(low), "ci_high": float(high)}
            rows.append({**row, "convention": convention, "n": n})
        return pd.DataFrame(rows)

    def similarity(self, other: HeadActivation) -> pd.Series:
        """Similarity of two patterns of the same heads: ``pearson``, ``spearman``, ``mse``.

        Correlations are invariant to a common factor, such as other units of the loss; the mean
        squared difference is not.

        Raises:
            InputError: if the patterns have different heads.
        """
        return pattern_similarity(self.pattern.values, other.pattern.values)

    def take(self, indices: Sequence[int] | np.ndarray) -> HeadActivation:
        """The prompts at ``indices``, in that order.

        Raises:
            InputError: if none is given.
        """
        if len(indices) == 0:
            raise InputError("head activation: no prompt taken, expected at least one")
        return replace(self, data=self.data.isel(prompt=np.asarray(indices)))

    def where(self, **labels: Any) -> HeadActivation:
        """The prompts with the given labels (a value or a list of values each).

        Raises:
            InputError: if a label does not exist or no prompt is left.
        """
        keep = np.ones(self.data.sizes["prompt"], dtype=bool)
        known = [str(c) for c in self.data.coords if self.data[c].dims == ("prompt",)]
        for name, wanted in labels.items():
            if name not in known:
                raise InputError(f"head activation: no label {name!r}: prompts have {known}")
            among = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
            keep &= np.isin(self.data[name].values, among)
        return self.take(np.flatnonzero(keep))

    def plot(self) -> Any:
        """A heat map of the pattern."""
        return figures.head_map(
            self.frame,
            title="Activation of each head",
            caption=f"Attention times gradient, magnitude; mean over {len(self)} prompts.",
            value_title="activation",
        )

    def __len__(self) -> int:
        return self.data.sizes["prompt"]

    def __repr__(self) -> str:
        most = self.frame.iloc[int(self.frame["value"].argmax())]
        sizes = self.pattern.sizes
        return (
            f"HeadActivation({len(self)} prompts, {sizes['block']} blocks x {sizes['head']} heads; "
            f"most {most['value']:.3g} at {most['site']}, mean {float(self.pattern.mean()):.3g})"
        )


def pattern_similarity(
    ours: Float[np.ndarray, "block head"], theirs: Float[np.ndarray, "_block _head"]
) -> pd.Series:
    """Pearson, Spearman and mean squared difference of two patterns over heads.

    Correlations with a pattern that is the same everywhere are NaN.

    Raises:
        InputError: if the shapes differ.

    >>> found = pattern_similarity(np.array([[1.0, 2.0, 4.0]]), np.array([[2.0, 4.0, 8.0]]))
    >>> found.round(6).to_dict()
    {'pearson': 1.0, 'spearman': 1.0, 'mse': 7.0}
    """
    if ours.shape != theirs.shape:
        raise InputError(
            f"similarity: patterns of {ours.shape} and {theirs.shape} blocks and heads, expected "
            "the same"
        )
    a, b = (each.astype(np.float64).ravel() for each in (ours, theirs))
    flat = np.ptp(a) == 0 or np.ptp(b) == 0
    pearson: Any = None if flat else stats.pearsonr(a, b)
    spearman: Any = None if flat else stats.spearmanr(a, b)
    return pd.Series(
        {
            "pearson": np.nan if flat else float(pearson.statistic),
            "spearman": np.nan if flat else float(spearman.statistic),
            "mse": float(np.mean((a - b) ** 2)),
        }
    )


def gini(x: Float[np.ndarray, "... n"]) -> Float[np.ndarray, ...]:
    """Gini coefficient along the last axis, of numbers of at least 0.

    >>> float(gini(np.array([1.0, 1.0, 1.0]))), float(gini(np.array([0.0, 0.0, 3.0])))
    (0.0, 0.6666666666666666)
    """
    n = x.shape[-1]
    place = 2 * np.arange(1, n + 1) - n - 1
    return np.sort(x, axis=-1) @ place / (n * x.sum(-1))


CONCENTRATION: dict[str, tuple[Any, str]] = {
    "gini": (gini, "0 for equal heads"),
    "cv": (lambda x: stats.variation(x, axis=-1), "of the population"),
    "kurtosis": (
        lambda x: stats.kurtosis(x, axis=-1, fisher=False),
        "m4 / m2², 3 for a normal distribution",
    ),
}
