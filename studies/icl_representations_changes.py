"""What demonstrations change: alignment, decodability, attention, and what goes along with it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
import probes
from probes.rdms import standardised
from studies.frames import where
from studies.icl_representations_asking import KINDS
from studies.icl_representations_links import link
from studies.icl_representations_options import NONE, SHOWN, Options
from studies.study import silenced

# A name (an intercept) each, up to so many.
FOLDS = 5
PENALTY = 1e-2


def alignment(
    study: Options, acts: xr.Dataset, task: str, seed: int, *, both: bool = False
) -> pd.DataFrame:
    """Fit of each component's hypothesis by layer, lengths and wordings left in and taken out.

    With ``both`` features are standardised over prompts, and left as they are.
    """
    kind = KINDS[task]
    components = (kind.answer, *kind.others)
    hypotheses = {name: probes.hypothesis(acts, name, graded=kind.graded) for name in components}
    hypotheses["combined"] = probes.combined(list(hypotheses.values()))
    nuisance = ["length", "template", "first_token"]
    nuisance += ["condition"] if "condition" in acts.coords else []
    tables = []
    for position in acts["position"].values.tolist():
        with silenced("probes.rdm_alignment"):
            found = probes.rsa(
                acts,
                hypotheses,
                position=position,
                compare="spearman",
                standardise="both" if both else True,
                nuisance=nuisance,
                permutations=study.permutations,
                seed=seed,
            ).frame
        names = {True: f"{position}, standardised", False: position}
        tables.append(found.assign(method=found["standardised"].map(names) if both else position))
    columns = ["layer", "hypothesis", "controlled", "method", "value", "null_mean", "null_std"]
    return pd.concat(tables)[[*columns, "p", "p_corrected"]].assign(metric="alignment")


def pooled_alignment(
    study: Options,
    model: TransformerBridge,
    variants: Mapping[str, lc.Prompts],
    task: str,
    seed: int,
) -> list[pd.DataFrame]:
    """The same of states pooled over the query, in every way the source may have meant."""
    found = []
    for name in (NONE, SHOWN):
        pooled = lc.pooled(
            model, variants[name], "resid", span="query", how=("max", "mean"), progress=False
        )
        acts = probes.with_nuisances(pooled, variants[name])
        found.append(alignment(study, acts, task, seed, both=True).assign(variant=name))
    return found


def decodability(study: Options, acts: xr.Dataset, task: str, seed: int) -> pd.DataFrame:
    """Accuracy by layer of a probe for the answer, tested on names (intercepts) it has not seen."""
    kind = KINDS[task]
    groups = kind.others[0]
    reduced, share = in_their_span(acts)
    with silenced("probes.linear"):
        found = probes.probe(
            reduced,
            target=kind.answer,
            groups=groups,
            penalties=(PENALTY * share,),
            control=None,
            folds=_folds(acts, task),
            permutations=min(study.permutations, 20),
            seed=seed,
            jobs=1,
        ).frame
    found = found[found["metric"] == "balanced_accuracy"]
    columns = ["layer", "value", "null_mean", "null_std", "p", "p_corrected"]
    return found[columns].assign(metric="decodability", hypothesis=kind.answer)


def in_their_span(acts: xr.Dataset) -> tuple[xr.Dataset, float]:
    """States in an orthonormal basis of what they span, and its share of all dimensions.

    A ridge probe finds the same there, in a fraction of the time, if its penalty, which is in
    units of the mean eigenvalue over dimensions, takes this share.
    """
    x = acts["resid"].isel(position=0).transpose("layer", "prompt", "d_model").values
    left, size, _ = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    coordinates = (left * size[:, None]).transpose(1, 0, 2)[:, None]
    resid = (("prompt", "position", "layer", "d_model"), coordinates)
    return acts.drop_vars("resid").assign(resid=resid), size.shape[1] / x.shape[2]


def _folds(acts: xr.Dataset, task: str) -> int:
    return min(FOLDS, len(np.unique(acts[KINDS[task].others[0]].values)))


def log_ratios(frame: pd.DataFrame) -> pd.DataFrame:
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


def all_links(
    study: Options,
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
    reduced, share = zip(*(in_their_span(acts[name]) for name in (NONE, SHOWN)), strict=True)
    read = probes.decode(
        *reduced,
        target=KINDS[task].answer,
        groups=KINDS[task].others[0],
        penalty=PENALTY * share[0],
        folds=_folds(acts[NONE], task),
        resamples=study.permutations,
        seed=seed,
    ).right.astype(float)
    changes = {
        "alignment": own[SHOWN] - own[NONE],
        "decodability": (read.sel(condition="with") - read.sel(condition="without")).values,
    }
    layers = dict.fromkeys(changes, acts[NONE]["layer"].values)
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
