"""Exact decomposition of label logits over a model's components (direct effects).

The state before the final norm is the sum of what the embedding, every head, every MLP and the
attention biases wrote. With the norm's scale frozen at its value for the prompt, the logit of a
label is the sum of their logits (direct effects: a component's effect through later ones counts as
theirs):

    head    z · (W_O M) / σ          M = γ U[labels], centred over d_model for LayerNorm
    MLP     (its output) · M / σ     including its bias
    embed   (input of the first block) · M / σ
    bias    (sum of attention biases) · M / σ + β U[labels] + b_U[labels]

Multipliers of attention outputs (Granite) or of logits (Cohere, Granite) are included in the sum.

The bracket is computed once per block and label set, so that no head's contribution is computed in
``d_model`` numbers, and only the last token is unembedded.

Source: Chang, Thomason & Jia 2024 (arXiv 2406.13131), section 2. They leave out the embedding
and the biases, so that their sum is not the model's logit; here it is, which is checked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from transformer_lens.model_protocol import TransformerLensModel

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.inference import States, answers_with_states, require_fits
from lensclust.models import (
    autocast_precision,
    fingerprint_again,
    hooked_points,
    model_name,
    rounding_tolerance,
)
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts, label_texts
from probes.components.component_logits import ComponentLogits
from probes.components.label_logits import (
    LabelLogits,
    component_table,
    require_decomposable,
    soft_cap,
)
from probes.components.label_tokens import Choices, label_tokens

# Largest accepted relative error of the sum.
TOLERANCE = 1e-3
AXES = ("prompt", "component", "kind", "block", "head", "token", "target")


@checked_arguments
def decompose(
    model: TransformerLensModel,
    prompts: Prompts,
    choices: Choices,
    *,
    label: str | None = "label",
    batch_tokens: int | None = None,
    share_prefixes: bool = True,
    progress: bool = True,
) -> ComponentLogits:
    """Decompose label logits at the last token into embedding, heads, MLPs and biases.

    Args:
        model: a hooked model, in eval mode. Norms after a block's attention or MLP (Gemma,
            OLMo-2) have their scales frozen for the prompt, like the final norm.
        prompts: prompts to run; each ends at the token that predicts its label.
        choices: label -> its single token, as an id or as a text of one token (with its leading
            space); or a list of such texts, each its own label.
        label: the column of ``prompts.rows`` that holds each prompt's right label, one of those
            in ``choices``; None if there is none, which rules out scores. It becomes the coordinate
            ``target``.
        batch_tokens, share_prefixes: as in `lensclust.extract`.
        progress: show a bar.

    Returns:
        Logits ``(prompt, component, label)``, before the model's soft-cap if it has one, and the
        model's logits.

    Raises:
        InputError: if a label is not one token or two have the same one, a prompt's label is
            none of them, a block has no heads, the parts do not add up to the model's own label
            logits (an error above 1e-3 of these, or of the size of the prompt's logits where
            that is larger; in half precision what rounding explains), or as `extract`.

    >>> import lensclust as lc
    >>> model, prompts = lc.load("native:sif-small"), lc.tasks.sif().where(split="new_string")
    >>> parts = decompose(model, prompts, {"a": 3, "b": 5}, label=None)
    >>> parts.logits.dims, parts.logits.component.values[[0, 1, 25, -1]].tolist()
    (('prompt', 'component', 'label'), ['embed', 'head 0.0', 'mlp 0', 'bias'])
    >>> bool(np.allclose(parts.logits.sum("component"), parts.model_logits, atol=1e-4))
    True
    """
    tokens = label_tokens(model, choices, caller="decompose")
    targets = None if label is None else _targets(prompts, label, list(tokens))
    require_fits(model, prompts, caller="decompose")
    require_decomposable(model, caller="decompose")
    parts = LabelLogits(model, torch.tensor(list(tokens.values())))
    seen = torch.zeros(len(prompts), dtype=torch.bool)
    with progress_bar("decompose", len(prompts), enabled=progress) as advance:

        def read(logits: Tensor, rows: Tensor, states: States) -> Tensor:
            # Restarts after a failed plan for shared prefixes.
            advance(int((~seen[rows]).sum()))
            seen[rows] = True
            own = logits[:, parts.labels.to(logits.device)]
            # Size of the logits of all tokens: a label logit near 0 has the same absolute error.
            size = logits.square().mean(1).sqrt()[:, None].expand_as(own)
            beside = torch.stack([own, size], dim=1).to(parts.matrix)
            return torch.cat([parts.of(states), beside], dim=1)

        found = answers_with_states(
            model,
            prompts,
            read,
            parts.hooks,
            batch_tokens=batch_tokens,
            share_prefixes=share_prefixes,
        )
    logits, own, size = found[:, :-2].numpy(), found[:, -2].numpy(), found[:, -1].numpy()
    cap = soft_cap(model)
    capped = logits.sum(1) if cap is None else cap * np.tanh(logits.sum(1) / cap)
    scale = np.maximum(np.linalg.norm(own, axis=1), np.linalg.norm(size, axis=1))
    error = float(np.max(np.linalg.norm(capped - own, axis=1) / scale))
    allowed = max(TOLERANCE, rounding_tolerance(parts.weight.dtype))
    if not error <= allowed:
        changed = hooked_points(model)
        why = ""
        if changed:
            why = f"; hooks such as steering change {changed[:1]}, and their part is no component"
        elif (precision := autocast_precision(model)) is not None:
            why = (
                f": torch.autocast rounds to {precision} what float32 weights give; leave it, or "
                f"load the model with dtype={precision}"
            )
        raise InputError(
            f"decompose: the components of {model_name(model)} do not add up to its label logits "
            f"(relative error {error:.2g}, expected at most {allowed:.2g}){why}"
        )
    return ComponentLogits(
        data=_dataset(model, prompts, tokens, targets, label, logits, own),
        error=error,
    )


def _targets(prompts: Prompts, column: str, labels: list[str]) -> np.ndarray:
    if column not in prompts.rows:
        raise InputError(
            f"decompose: no column {column!r} with the right labels: rows have "
            f"{list(prompts.rows)}; label=None if there are none"
        )
    values = label_texts(prompts.rows[column].array)
    unknown = sorted({*values} - {*labels})
    if unknown:
        raise InputError(
            f"decompose: label {str(unknown[0])!r} in column {column!r} is none of the choices "
            f"{labels}"
        )
    return values.astype(object)


def _dataset(
    model: Any,
    prompts: Prompts,
    tokens: dict[str, int],
    targets: np.ndarray | None,
    column: str | None,
    logits: np.ndarray,
    own: np.ndarray,
) -> xr.Dataset:
    coords: dict[str, Any] = {"label": list(tokens), "token": ("label", list(tokens.values()))}
    table = component_table(model)
    coords |= {str(name): ("component", column.to_numpy()) for name, column in table.items()}
    # The labels have an axis of that name; the column becomes `target`.
    left_out = (column, "label") if column is None else (column,)
    rows = {k: v for k, v in prompts.label_arrays().items() if k not in left_out}
    if taken := [name for name in rows if name in (*AXES, "label")]:
        raise InputError(f"decompose: label {taken[0]!r} of the rows is the name of an axis")
    coords |= {name: ("prompt", values) for name, values in rows.items()}
    if targets is not None:
        coords["target"] = ("prompt", targets)
    return xr.Dataset(
        {
            "logits": (("prompt", "component", "label"), logits),
            "model_logits": (("prompt", "label"), own),
        },
        coords,
        {
            "model": model_name(model),
            "weights": fingerprint_again(model),
            "tokenizer": prompts.tokenizer,
            "prompts": prompts.digest(),
            "soft_cap": soft_cap(model) or 0.0,
        },
    )
