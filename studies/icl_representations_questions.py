"""Questions with and without demonstrations: answers, states and attention of one seed."""

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
from lensclust.tasks.linear_regression import TEMPLATES, decoded
from lensclust.tasks.reading_comprehension import data
from lensclust.tokenization import continuation
from probes.answer_scores import answer_scores, greedy_texts
from probes.pairing import first_answers
from probes.rdms import standardised
from studies.frames import where
from studies.icl_representations import NONE, SHOWN, WRONG, ICLRepresentations
from studies.icl_representations_causes import measure_causes
from studies.icl_representations_links import link
from studies.icl_representations_states import states_and_answers
from studies.study import silenced

READING, LINES, PERSONA = "reading_comprehension", "linear_regression", "prompt_injection"
NEW_TOKENS = 6
Options = dict[str, Any]
# Distinct items of one name (or line) hold out what is not decoded.
FOLDS = 5


@dataclass(frozen=True)
class Kind:
    """What is asked of one task's states.

    Attributes:
        answer: the component that the answer is.
        others: components that are in the text, too.
        graded: the components are numbers.
    """

    answer: str
    others: tuple[str, ...]
    graded: bool = False


KINDS = {
    READING: Kind("activity", ("name",)),
    LINES: Kind("slope", ("intercept",), graded=True),
    PERSONA: Kind("activity", ("name",)),
}


def check_sizes(study: ICLRepresentations) -> None:
    """Refuse sizes for which there are no prompts (InputError), before a model is loaded."""
    most = len(data()["templates"])
    if study.templates > most:
        raise lc.InputError(f"templates={study.templates}: expected at most {most}")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    for task in KINDS:
        source, options = _source(study, task)
        # One wording of each item: sizes are refused alike, in a fraction of the time.
        options |= {"templates": options["templates"][:1]}
        options |= {"conditions": ["none"]} if task == PERSONA else {}
        source(PreTrainedTokenizerFast(tokenizer_object=words), shots=study.shots, **options)


def measure_questions(
    study: ICLRepresentations, model: TransformerBridge, seed: int
) -> pd.DataFrame:
    """All scores of the three tasks."""
    tables = []
    for task in KINDS:
        variants = _prompts(study, model.tokenizer, task, seed)
        read = {
            name: _answered(model, prompts, whole=task == LINES)
            for name, prompts in variants.items()
        }
        acts = {name: states for name, (states, _) in read.items()}
        answered = {name: scores for name, (_, scores) in read.items()}
        found = [_behaviour(variants, answered)]
        for name, each in acts.items():
            found.append(_alignment(study, each, task, seed).assign(variant=name))
            found.append(_decodability(study, each, task, seed).assign(variant=name))
        ratios = {
            name: probes.attention_ratio(
                model,
                variants[name],
                weighting=("attention", "value"),
                draws=study.permutations,
                seed=seed,
                progress=False,
            )
            for name in (NONE, SHOWN)
        }
        found += [_ratios(ratio.frame).assign(variant=name) for name, ratio in ratios.items()]
        found += _links(study, variants, answered, acts, ratios, task, seed)
        if task == READING:
            found.append(measure_causes(study, model, variants, acts, seed))
        tables += [table.assign(task=task) for table in found]
    return pd.concat(tables, ignore_index=True)


def _prompts(
    study: ICLRepresentations, tokenizer: Any, task: str, seed: int
) -> dict[str, lc.Prompts]:
    """The same queries behind nothing, behind demonstrations, and behind wrongly dealt ones."""
    source, options = _source(study, task)
    options["seed"] = seed
    both = source(tokenizer, shots=(0, study.shots), **options)
    wrong = source(tokenizer, shots=study.shots, shuffled=True, **options)
    return {NONE: both.where(shots=0), SHOWN: both.where(shots=study.shots), WRONG: wrong}


def _source(study: ICLRepresentations, task: str) -> tuple[Callable[..., lc.Prompts], Options]:
    """What makes a task's prompts, and the study's sizes for it."""
    if task == LINES:
        sizes: Options = {"slopes": study.slopes, "intercepts": study.intercepts}
        known = list(TEMPLATES)
    else:
        prefix = "persona_" if task == PERSONA else ""
        sizes = {name: getattr(study, f"{prefix}{name}") for name in ("names", "activities")}
        known = list(data()["templates"])
    # Points on lines come in fewer wordings than the others.
    return getattr(lc.tasks, task), {**sizes, "templates": known[: study.templates]}


def _answered(
    model: TransformerBridge, prompts: lc.Prompts, *, whole: bool
) -> tuple[xr.Dataset, pd.DataFrame]:
    """States, and how each prompt is answered: by the whole answer, or by its first token.

    Activities begin with a token of their own, numbers do not.
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
    """Token ids of the activity that somebody else does."""
    ids = [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)]
    return [
        continuation(model.tokenizer, prompts.text(row), ids[row], f" {text}")
        for row, text in enumerate(prompts.rows["distractor_activity"])
    ]


def _behaviour(
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


def _alignment(study: ICLRepresentations, acts: xr.Dataset, task: str, seed: int) -> pd.DataFrame:
    """Fit of each component's hypothesis by layer, lengths and wordings left in and taken out."""
    kind = KINDS[task]
    components = (kind.answer, *kind.others)
    hypotheses = {name: probes.hypothesis(acts, name, graded=kind.graded) for name in components}
    hypotheses["combined"] = probes.combined(list(hypotheses.values()))
    nuisance = ["length", "template", "first_token"]
    nuisance += ["condition"] if "condition" in acts.coords else []
    with silenced("probes.rdm_alignment"):
        found = probes.rsa(
            acts,
            hypotheses,
            compare="spearman",
            standardise=True,
            nuisance=nuisance,
            permutations=study.permutations,
            seed=seed,
        ).frame
    columns = ["layer", "hypothesis", "controlled", "value", "null_mean", "null_std", "p"]
    return found[[*columns, "p_corrected"]].assign(metric="alignment")


def _decodability(
    study: ICLRepresentations, acts: xr.Dataset, task: str, seed: int
) -> pd.DataFrame:
    """Accuracy by layer of a probe for the answer, tested on names (intercepts) it has not seen."""
    kind = KINDS[task]
    groups = kind.others[0]
    n = len(np.unique(acts[groups].values))
    with silenced("probes.linear"):
        found = probes.probe(
            acts,
            target=kind.answer,
            groups=groups,
            penalties=(1e-2,),
            control=None,
            folds=min(FOLDS, n),
            permutations=min(study.permutations, 20),
            seed=seed,
            jobs=1,
        ).frame
    found = found[found["metric"] == "balanced_accuracy"]
    columns = ["layer", "value", "null_mean", "null_std", "p", "p_corrected"]
    return found[columns].assign(metric="decodability", hypothesis=kind.answer)


def _ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean log ratios by layer; what block b attends to enters the states of layer b + 1."""
    rows = frame[frame["heads"] == "mean"]
    return pd.DataFrame(
        {
            "layer": rows["block"] + 1,
            "method": rows["weighting"],
            "value": rows["log_ratio"],
            "null_mean": rows["null_mean"],
            "null_std": rows["null_std"],
            "p": rows["p"],
            "metric": "log ratio",
        }
    )


def _links(
    study: ICLRepresentations,
    variants: Mapping[str, lc.Prompts],
    answered: Mapping[str, pd.DataFrame],
    acts: Mapping[str, xr.Dataset],
    ratios: Mapping[str, probes.AttentionRatio],
    task: str,
    seed: int,
) -> list[pd.DataFrame]:
    """Changes of states and attention against changes of the answer, prompt by prompt."""
    rows = variants[NONE].rows
    behaviour = (answered[SHOWN]["confidence"] - answered[NONE]["confidence"]).to_numpy()
    covariates = pd.DataFrame(
        {
            "length": variants[NONE].lengths.numpy(),
            "added": (variants[SHOWN].lengths - variants[NONE].lengths).numpy(),
            "template": rows["template"],
        }
    )
    if "condition" in rows:
        covariates["condition"] = rows["condition"]
    own = {name: own_alignment(each, KINDS[task].answer) for name, each in acts.items()}
    changes = {"alignment": own[SHOWN] - own[NONE]}
    layers = {"alignment": acts[NONE]["layer"].values}
    for weighting in ("attention", "value"):
        each = {
            name: where(ratio.per_prompt(), weighting=weighting).pivot(
                index="block", columns="prompt", values="log_ratio"
            )
            for name, ratio in ratios.items()
        }
        name = "attention ratio" if weighting == "attention" else f"attention ratio, {weighting}"
        changes[name] = (each[SHOWN] - each[NONE]).to_numpy()
        layers[name] = each[NONE].index.to_numpy() + 1
    found = []
    for name, change in changes.items():
        table = link(
            change,
            behaviour,
            items=rows["item"].to_numpy(),
            covariates=covariates,
            permutations=study.permutations,
            seed=seed,
        )
        found.append(table.assign(layer=layers[name][table.pop("layer")], method=name))
        found.append(_over_conditions(change, behaviour, rows).assign(method=name))
        found[-1]["layer"] = layers[name][found[-1]["layer"]]
    return found


def own_alignment(acts: xr.Dataset, label: str) -> Float[np.ndarray, "layer prompt"]:
    """How much more alike a prompt is to those of its own label than to the others.

    Mean cosine with the others of the same template and label less that with those of the
    template and other labels; features are standardised over prompts first.
    """
    values, template = acts[label].values, acts["template"].values
    same = values[:, None] == values
    within = (template[:, None] == template) & ~np.eye(len(values), dtype=bool)
    found = []
    for layer in acts["layer"].values:
        states = acts["resid"].sel(layer=layer).isel(position=0).values.astype(np.float64)
        z = standardised(states)
        z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)
        cosine = z @ z.T
        own, other = (
            np.where(mask, cosine, 0).sum(1) / np.maximum(mask.sum(1), 1)
            for mask in (within & same, within & ~same)
        )
        found.append(own - other)
    return np.stack(found)


def _over_conditions(
    change: Float[np.ndarray, "layer prompt"],
    behaviour: Float[np.ndarray, " prompt"],
    rows: pd.DataFrame,
) -> pd.DataFrame:
    """Means of templates and conditions: what is left of a link between them."""
    by = ["template", *(["condition"] if "condition" in rows else [])]
    groups = [np.asarray(part) for part in rows.groupby(by, sort=False).indices.values()]
    return pd.DataFrame(
        [
            {
                "layer": layer,
                "metric": "condition change",
                "variant": str(number),
                "value": float(np.nanmean(values[members])),
                "behaviour": float(behaviour[members].mean()),
            }
            for layer, values in enumerate(change)
            for number, members in enumerate(groups)
        ]
    )
