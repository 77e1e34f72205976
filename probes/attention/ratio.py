"""Attention ratio: attention to relevant tokens relative to irrelevant ones.

With ``P`` the attention pattern of a head, ``R`` the query tokens, ``B`` the relevant tokens
and ``C`` the irrelevant ones,

    w(B) = mean over q in R, k in B of P[q, k]        log ratio = log w(B) - log w(C)

for each prompt, then averaged over prompts. Weights are not explanations: a head moves its weight
times the norm of the value, and the effect on the answer is the weight times its gradient. So the
ratio is also taken for ``P ||v W_O||`` (Kobayashi et al. 2020) and ``|P ∂L/∂P|`` (as in Wang et
al. 2023), and each is compared with the ratios between random spans of the same lengths in the same
text.

Source: Yousefi et al. (arXiv 2310.00313) compare attention on relevant and irrelevant information
as a ratio; the query tokens, the averages over tokens and heads, the weightings and the null are
our choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_protocol import TransformerLensModel

from lensclust import figures
from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.figures import Shown
from lensclust.inference import require_fits, with_gradients
from lensclust.models import (
    BACKWARD,
    batches,
    default_budget,
    fingerprint_again,
    model_device,
    model_name,
)
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.results import mean_interval, permutation_p
from probes.attention.patterns import AnswerLoss, PatternReader
from probes.attention.spans import OVER_HEADS, ComparedSpans, SpanWeights

WEIGHTINGS = ("attention", "value", "gradient")
AXES = ("weighting", "prompt", "block", "head", "relevant", "irrelevant")


@checked_arguments
@with_gradients
def attention_ratio(
    model: TransformerLensModel,
    prompts: Prompts,
    *,
    relevant: str = "relevant",
    irrelevant: str = "irrelevant",
    query: str = "answer",
    block: str | None = "query",
    weighting: str | Sequence[str] = WEIGHTINGS,
    draws: int = 100,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> AttentionRatio:
    """Attention of the answering token to relevant against irrelevant tokens, in one forward.

    Args:
        model: a hooked model, in eval mode, with eager attention.
        prompts: prompts to run, with the spans named below. Their first tokens (attention sinks)
            do not count in any span.
        relevant, irrelevant: spans to compare, both inside ``block`` and before the query.
        query: query tokens: ``"answer"``, the token that predicts the answer, or a span, over
            whose tokens weights are averaged.
        block: span of the text with the last question alone, which excludes demonstrations; None
            for the whole of prompts without demonstrations. Random spans of the null lie in it
            too.
        weighting: ``"attention"`` (``P``), ``"value"`` (``P ||v W_O||``, refused where a head's
            output is not attention times values), ``"gradient"``
            (``|P ∂L/∂P|``, ``L`` being the cross-entropy of the first token of the prompt's
            answer); one or several. Only the last needs answers and a backward.
        draws: random pairs of spans in the null; p is at least 1 / (draws + 1).
        seed: of the null.
        batch_tokens: upper bound of the tokens that one forward runs; default that of `extract`,
            a quarter of it with a backward.
        progress: show a bar.

    Returns:
        Weights of every prompt and head, each the mean over the tokens of its span (and of the
        query), and the log ratios between random spans.

    Raises:
        InputError: if a span does not exist, is empty or outside its prompt, the two overlap,
            leave the block or do not end before the query, demonstrations reach into the block,
            a weighting is unknown or unavailable, or the prompts are incompatible with the model.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> spans = {"relevant": [(1, 3)] * len(prompts), "irrelevant": [(3, 4)] * len(prompts)}
    >>> ids = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths)]
    >>> prompts = lc.Prompts.from_token_lists(ids, prompts.rows, spans=spans)
    >>> model = lc.load("native:sif-small")
    >>> found = attention_ratio(model, prompts, block=None, weighting=["attention", "value"])
    >>> found.values.relevant.dims
    ('weighting', 'prompt', 'block', 'head')
    >>> bool(abs(found.frame.log_ratio).max() < 2)  # an untrained model looks everywhere
    True
    """
    weightings = [weighting] if isinstance(weighting, str) else list(weighting)
    _require_options(weightings, draws, batch_tokens)
    require_fits(model, prompts, caller="attention_ratio")
    spans = ComparedSpans.of(
        prompts,
        relevant=relevant,
        irrelevant=irrelevant,
        query=query,
        block=block,
        caller="attention_ratio",
    )
    backward = "gradient" in weightings
    reader = PatternReader(model, values="value" in weightings, caller="attention_ratio")
    loss = AnswerLoss(prompts, caller="attention_ratio") if backward else None
    budget = batch_tokens or max(1, default_budget(model) // (BACKWARD if backward else 1))
    device = model_device(model)
    blocks = reader.blocks
    sizes = (len(weightings), len(prompts), len(blocks), model.cfg.n_heads)
    weights = np.empty((*sizes, 2), dtype=np.float32)
    null = np.zeros((2, sizes[0], sizes[2], sizes[3] + len(OVER_HEADS), draws))
    with progress_bar("attention", len(prompts), enabled=progress) as advance:
        for rows in batches(model, prompts.lengths, budget):
            last = prompts.lengths[rows] - 1
            tokens = prompts.tokens[rows, : int(last.max()) + 1].to(device)
            weighing = SpanWeights(
                weightings, spans, rows.numpy(), tokens, model, len(blocks), draws, seed
            )
            reader.run(tokens, last.to(device), weighing.show, loss and loss.of(rows))
            weights[:, rows.numpy()] = weighing.weights.cpu().numpy()
            null += weighing.null.cpu().numpy()
            advance(len(rows))
    return AttentionRatio(
        values=_dataset(model, prompts, weightings, blocks, weights),
        null=_null(weightings, blocks, null),
    )


def _require_options(weightings: Sequence[str], draws: int, batch_tokens: int | None) -> None:
    unknown = [name for name in weightings if name not in WEIGHTINGS]
    if unknown or not weightings or len(set(weightings)) < len(weightings):
        raise InputError(
            f"attention_ratio: weighting {list(weightings)}, expected some of {list(WEIGHTINGS)}"
        )
    if draws < 2:
        raise InputError(f"attention_ratio: draws={draws}, expected at least 2")
    if batch_tokens is not None and batch_tokens < 1:
        raise InputError(f"attention_ratio: batch_tokens={batch_tokens}, expected at least 1")


def _dataset(
    model: Any,
    prompts: Prompts,
    weightings: Sequence[str],
    blocks: Sequence[int],
    weights: Float[np.ndarray, "weighting prompt block head 2"],
) -> xr.Dataset:
    rows = prompts.label_arrays()
    if taken := [name for name in rows if name in AXES]:
        raise InputError(f"attention_ratio: label {taken[0]!r} of the rows is the name of an axis")
    coords: dict[str, Any] = {name: ("prompt", values) for name, values in rows.items()}
    coords |= {"weighting": list(weightings)}
    coords |= {"block": list(blocks), "head": np.arange(weights.shape[3])}
    axes = ("weighting", "prompt", "block", "head")
    return xr.Dataset(
        {"relevant": (axes, weights[..., 0]), "irrelevant": (axes, weights[..., 1])},
        coords,
        {
            "model": model_name(model),
            "weights": fingerprint_again(model),
            "tokenizer": prompts.tokenizer,
            "prompts": prompts.digest(),
        },
    )


def _null(
    weightings: Sequence[str],
    blocks: Sequence[int],
    sums: Float[np.ndarray, "2 weighting block heads draw"],
) -> xr.DataArray:
    with np.errstate(invalid="ignore"):
        means = sums[0] / sums[1]
    names = [*map(str, range(means.shape[2] - len(OVER_HEADS))), *OVER_HEADS]
    return xr.DataArray(
        means,
        dims=("weighting", "block", "heads", "draw"),
        coords={"weighting": list(weightings), "block": list(blocks), "heads": names},
        name="log_ratio",
    )


@dataclass(frozen=True, repr=False)
class AttentionRatio(Shown):
    """Mean weight on a relevant and on an irrelevant token, by head and prompt.

    Attributes:
        values: ``relevant`` and ``irrelevant (weighting, prompt, block, head)``; prompts have
            the columns of ``rows``.
        null: the mean over prompts of the log ratio between random spans of the same lengths
            ``(weighting, block, heads, draw)``, ``heads`` being each head's number, ``mean`` and
            ``max``.
    """

    values: xr.Dataset
    null: xr.DataArray

    @cached_property
    def frame(self) -> pd.DataFrame:
        """Ratios by weighting, block and head, and over the heads of a block.

        One row for each head (``heads`` is ``"one"``) and two for each block: the weights'
        ``"mean"`` or ``"max"`` over its heads, taken for each span before the ratio. Columns:
        ``weighting, block, heads, head, relevant, irrelevant`` (means over prompts),
        ``log_ratio`` (mean over prompts of the natural logarithm of relevant / irrelevant) with
        its 95 % interval ``low, high``, ``share`` (mean of relevant / (relevant + irrelevant)),
        ``null_mean, null_std, p`` (one-sided: a larger ratio than between random spans) and
        ``n``, the prompts whose ratio is a number (a weight of exactly 0, as beyond a sliding
        window, gives none).
        """
        relevant, irrelevant = (self._over_heads(name) for name in ("relevant", "irrelevant"))
        ratio, share = log_ratio(relevant, irrelevant), _share(relevant, irrelevant)
        names = self.null["heads"].values.tolist()
        rows = []
        for w, weighting in enumerate(self.values["weighting"].values.tolist()):
            for b, block in enumerate(self.values["block"].values.tolist()):
                for h, name in enumerate(names):
                    at = (w, slice(None), b, h)
                    finite = ratio[at][np.isfinite(ratio[at])]
                    mean, low, high = mean_interval(finite) if finite.size else (np.nan,) * 3
                    null = self.null.values[w, b, h]
                    rows.append(
                        {
                            "weighting": weighting,
                            "block": block,
                            "heads": name if name in OVER_HEADS else "one",
                            "head": pd.NA if name in OVER_HEADS else int(name),
                            "relevant": relevant[at].mean(),
                            "irrelevant": irrelevant[at].mean(),
                            "log_ratio": mean,
                            "low": low,
                            "high": high,
                            "share": _mean_of_numbers(share[at]),
                            "null_mean": null.mean(),
                            "null_std": null.std(ddof=1),
                            "p": float(permutation_p(mean, null)) if finite.size else np.nan,
                            "n": finite.size,
                        }
                    )
        return pd.DataFrame(rows).astype({"head": "Int64"})

    def per_prompt(self, *, heads: str = "mean") -> pd.DataFrame:
        """One row per weighting, prompt and block, to compare with the prompt's answer.

        Args:
            heads: ``"mean"`` or ``"max"`` over the heads of a block, or a head's number.

        Returns:
            ``weighting, prompt`` (its index), ``block, relevant, irrelevant, log_ratio, share``;
            a ratio that is no number is NaN.

        Raises:
            InputError: if there is no such head.
        """
        names = self.null["heads"].values.tolist()
        if str(heads) not in names:
            raise InputError(f"per_prompt: heads={heads!r}, expected one of {names}")
        at = (..., names.index(str(heads)))
        relevant, irrelevant = (self._over_heads(name)[at] for name in ("relevant", "irrelevant"))
        sizes = relevant.shape
        weighting, prompt, block = (index.ravel() for index in np.indices(sizes))
        ratio = log_ratio(relevant, irrelevant)
        return pd.DataFrame(
            {
                "weighting": self.values["weighting"].values[weighting],
                "prompt": prompt,
                "block": self.values["block"].values[block],
                "relevant": relevant.ravel(),
                "irrelevant": irrelevant.ravel(),
                "log_ratio": np.where(np.isfinite(ratio), ratio, np.nan).ravel(),
                "share": _share(relevant, irrelevant).ravel(),
            }
        )

    def plot(self) -> Any:
        """Log ratio by block, averaged over heads, with the band of random spans."""
        means = self.frame[self.frame["heads"] == "mean"]
        columns = ["weighting", "block", "log_ratio", "null_mean", "null_std"]
        return figures.curves(
            means[columns],
            x="block",
            y="log_ratio",
            facet="weighting" if means["weighting"].nunique() > 1 else None,
            title="Attention to relevant against irrelevant tokens",
            caption=f"Mean over {self.values.sizes['prompt']} prompts; weights are averaged over "
            "the heads of a block. Random spans of the same lengths lie in the same text.",
            y_title="log ratio",
        )

    def __repr__(self) -> str:
        means = self.frame[self.frame["heads"] == "mean"]
        best = means.loc[means["log_ratio"].idxmax()] if means["log_ratio"].notna().any() else None
        says = (
            "no ratio is a number"
            if best is None
            else f"highest mean log ratio {best['log_ratio']:.2f} at block {best['block']} "
            f"({best['weighting']})"
        )
        sizes = self.values.sizes
        return (
            f"AttentionRatio({sizes['prompt']} prompts, {sizes['block']} blocks of "
            f"{sizes['head']} heads; {says})"
        )

    def _over_heads(self, name: str) -> Float[np.ndarray, "weighting prompt block heads"]:
        each = self.values[name].values.astype(np.float64)
        over = [each.mean(-1, keepdims=True), each.max(-1, keepdims=True)]
        return np.concatenate([each, *over], axis=-1)


def log_ratio(
    relevant: Float[np.ndarray, "*shape"], irrelevant: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """``log(relevant / irrelevant)``, infinite or NaN where a weight is 0.

    >>> log_ratio(np.array([2.0, 1.0]), np.array([2.0, 0.0])).tolist()
    [0.0, inf]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(relevant) - np.log(irrelevant)


def _share(relevant: np.ndarray, irrelevant: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return relevant / (relevant + irrelevant)


def _mean_of_numbers(values: np.ndarray) -> float:
    numbers = values[np.isfinite(values)]
    return float(numbers.mean()) if numbers.size else float("nan")
