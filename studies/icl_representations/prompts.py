"""Prompts of the three tasks, and the model's behaviour on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
import probes
from lensclust.activations import template
from lensclust.inference import Readout, answers_with_states, greedy_texts
from lensclust.inference.answer_scores import answer_scores
from lensclust.models import hook_name, resolve
from lensclust.prompts import continuation
from lensclust.tasks.in_context import TEMPLATES, data, decoded
from probes.design import first_answers
from studies.icl_representations.options import LINES, NONE, PERSONA, READING, SHOWN, WRONG, Options

NEW_TOKENS = 6


@dataclass(frozen=True)
class Kind:
    """Components of one task's prompts.

    Attributes:
        answer: the component that is the answer.
        others: other components in the text.
        graded: whether the components are numbers.
    """

    answer: str
    others: tuple[str, ...]
    graded: bool = False


KINDS = {
    READING: Kind("activity", ("name",)),
    LINES: Kind("slope", ("intercept",), graded=True),
    PERSONA: Kind("activity", ("name",)),
}


def check_sizes(study: Options) -> None:
    """Raise InputError for sizes without prompts, before a model is loaded."""
    most = len(data()["templates"])
    if study.templates > most:
        raise lc.InputError(f"templates={study.templates}: expected at most {most}")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    for task in KINDS:
        source, options = _source(study, task)
        # One wording of each item: the same checks in a fraction of the time.
        options |= {"templates": options["templates"][:1]}
        options |= {"conditions": ["none"]} if task == PERSONA else {}
        source(PreTrainedTokenizerFast(tokenizer_object=words), shots=study.shots, **options)


def variants_of(study: Options, tokenizer: Any, task: str, seed: int) -> dict[str, lc.Prompts]:
    """The same queries with no, right and shuffled demonstrations."""
    source, options = _source(study, task)
    options["seed"] = seed
    both = source(tokenizer, shots=(0, study.shots), **options)
    wrong = source(tokenizer, shots=study.shots, shuffled=True, **options)
    return {NONE: both.where(shots=0), SHOWN: both.where(shots=study.shots), WRONG: wrong}


def _source(study: Options, task: str) -> tuple[Callable[..., lc.Prompts], dict[str, Any]]:
    """The function that makes a task's prompts, and the study's sizes for it."""
    if task == LINES:
        sizes: dict[str, Any] = {"slopes": study.slopes, "intercepts": study.intercepts}
        known = list(TEMPLATES)
    else:
        prefix = "persona_" if task == PERSONA else ""
        sizes = {name: getattr(study, f"{prefix}{name}") for name in ("names", "activities")}
        known = list(data()["templates"])
    # Points on lines have fewer wordings than the other tasks.
    return getattr(lc.tasks, task), {**sizes, "templates": known[: study.templates]}


def answered(
    model: TransformerBridge, prompts: lc.Prompts, *, whole: bool
) -> tuple[xr.Dataset, pd.DataFrame]:
    """States and answers of each prompt, scored by the whole answer or its first token.

    Activities have different first tokens, numbers do not.
    """
    right = torch.from_numpy(first_answers(prompts))
    other = torch.tensor([tokens[0] for tokens in _others(model, prompts)]) if not whole else right

    def read(logits: Float[Tensor, "row vocab"], rows: Int[Tensor, " row"]) -> Tensor:
        told, said = logits.log_softmax(-1), logits.argmax(-1)
        own, wrong = (tokens[rows].to(logits.device) for tokens in (right, other))
        each = [told.gather(1, tokens[:, None])[:, 0] for tokens in (own, wrong)]
        return torch.stack([each[0], said == own, each[0] - each[1], said == wrong], dim=1).float()

    states, found = states_and_answers(model, prompts, read)
    acts = probes.with_nuisances(states, prompts)
    if whole:
        scores = answer_scores(model, prompts)
        said = decoded(greedy_texts(model, prompts, new_tokens=NEW_TOKENS))
        scores["error"] = np.log10(1 + np.abs(said - prompts.rows["y"].to_numpy()))
        scores["unreadable"] = np.isnan(said).astype(float)
        return acts, scores
    columns = ["confidence", "right", "choice", "says_other"]
    scores = pd.DataFrame(found.double().numpy(), columns=columns)
    if "compliant" in prompts.rows:
        lies = (prompts.rows["compliant"] == prompts.rows["lie"]).to_numpy()
        scores["complies"] = np.where(lies, scores["says_other"], scores["right"])
    return acts, scores


def _others(model: TransformerBridge, prompts: lc.Prompts) -> list[list[int]]:
    """Token ids of another person's activity."""
    ids = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)]
    return [
        continuation(model.tokenizer, prompts.text(row), ids[row], f" {text}")
        for row, text in enumerate(prompts.rows["distractor_activity"])
    ]


def behaviour(
    variants: Mapping[str, lc.Prompts], answered: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Means over items, by template and condition."""
    tables = []
    for name, prompts in variants.items():
        by = ["template", *(["condition"] if "condition" in prompts.rows else [])]
        scores = answered[name]
        means = pd.concat([prompts.rows[by], scores], axis=1).groupby(by, sort=False).mean()
        long = means.reset_index().melt(by, var_name="metric")
        tables.append(long.assign(variant=name))
    return pd.concat(tables, ignore_index=True)


def states_and_answers(
    model: TransformerBridge, prompts: lc.Prompts, readout: Readout
) -> tuple[xr.Dataset, Float[Tensor, "prompt value"]]:
    """The residual stream at the last token, as from `extract`, and the readout of answers.

    Args:
        readout: as in `lensclust.inference.answers`, one row of numbers per prompt.
    """
    sites = resolve(model, "resid")
    names = [hook_name(model, site) for site in sites]
    found = answers_with_states(
        model,
        prompts,
        lambda logits, rows, states: torch.cat(
            [readout(logits, rows), *(states[name].float() for name in names)], dim=1
        ),
        names,
    )
    width = model.cfg.d_model * len(sites)
    read, states = found[:, :-width], found[:, -width:].unflatten(1, (len(sites), -1))
    acts = template(model, prompts, sites, ["answer"], np.dtype(np.float32))
    resid = (acts["resid"].dims, states[:, None].numpy())
    return acts.assign(resid=resid), read
