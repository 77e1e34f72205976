"""Changes by demonstrations: alignment, decodability, attention, and their links."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy.stats import rankdata
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
import probes
from lensclust.results import permutation_p
from probes.similarity import standardised
from studies.icl_representations.options import NONE, SHOWN, Options
from studies.icl_representations.prompts import KINDS
from studies.scores import where
from studies.study import silenced

# Folds: one name (or intercept) each, up to this number.
FOLDS = 5
PENALTY = 1e-2
BOUNDS = (0.025, 0.975)
NEVER = 0.05


def alignment(
    study: Options, acts: xr.Dataset, task: str, seed: int, *, both: bool = False
) -> pd.DataFrame:
    """RSA of each component's hypothesis by layer, with and without nuisances partialled out.

    With ``both``, features are standardised over prompts, and also unchanged.
    """
    kind = KINDS[task]
    components = (kind.answer, *kind.others)
    hypotheses = {name: probes.hypothesis(acts, name, graded=kind.graded) for name in components}
    hypotheses["combined"] = probes.combined(list(hypotheses.values()))
    nuisance = ["length", "template", "first_token"]
    nuisance += ["condition"] if "condition" in acts.coords else []
    tables = []
    for position in acts["position"].values.tolist():
        with silenced("probes.similarity.representational"):
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
    """The same for states pooled over the query, in every reading of the source."""
    found = []
    for name in (NONE, SHOWN):
        pooled = lc.pooled(
            model, variants[name], "resid", span="query", how=("max", "mean"), progress=False
        )
        acts = probes.with_nuisances(pooled, variants[name])
        found.append(alignment(study, acts, task, seed, both=True).assign(variant=name))
    return found


def decodability(study: Options, acts: xr.Dataset, task: str, seed: int) -> pd.DataFrame:
    """Accuracy by layer of a probe for the answer on held-out names (intercepts)."""
    kind = KINDS[task]
    groups = kind.others[0]
    reduced, share = in_their_span(acts)
    with silenced("probes.linear.linear_probe"):
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
    """States in an orthonormal basis of their span, and its share of all dimensions.

    A ridge probe gives the same result there in a fraction of the time if its penalty, which is
    in units of the mean eigenvalue over dimensions, is multiplied by this share.
    """
    x = acts["resid"].isel(position=0).transpose("layer", "prompt", "d_model").values
    left, size, _ = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    coordinates = (left * size[:, None]).transpose(1, 0, 2)[:, None]
    resid = (("prompt", "position", "layer", "d_model"), coordinates)
    return acts.drop_vars("resid").assign(resid=resid), size.shape[1] / x.shape[2]


def _folds(acts: xr.Dataset, task: str) -> int:
    return min(FOLDS, len(np.unique(acts[KINDS[task].others[0]].values)))


def log_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean log ratios by layer; attention of block b enters the states of layer b + 1."""
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
    """Links of changes of states and attention with changes of the answer over prompts."""
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
        permutations=0,
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
    """Similarity of each prompt to prompts of its label minus that to other labels.

    Mean cosine with other prompts of the same template and label minus that with prompts of the
    same template and other labels; features are standardised over prompts first.
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
    """Means of templates and conditions, for links between them."""
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


def link(
    change: Float[np.ndarray, "layer prompt"],
    behaviour: Float[np.ndarray, " prompt"],
    *,
    items: np.ndarray,
    covariates: pd.DataFrame,
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """Rank correlation of each layer's change with that of behaviour, raw and controlled.

    Args:
        change, behaviour: changes of every prompt; a layer with a missing value gives NaN.
        items: every item has equally many prompts, in the same order of wordings and conditions.
        covariates: numbers, and names (a column each).

    Returns:
        Two rows a layer (its index): ``metric`` (``link``), ``layer, controlled, value, low,
        high, p, p_corrected, vanished`` (significant at 5 % raw and not controlled).
    """
    order = np.argsort(items, kind="stable")
    blocks = order.reshape(len(np.unique(items)), -1)
    ranks = np.apply_along_axis(rankdata, 1, change, nan_policy="propagate")
    goal = rankdata(behaviour)
    constant = np.ones((len(goal), 1))
    dummies = pd.get_dummies(covariates, dtype=float).to_numpy()
    tables = []
    for controlled, design in ((False, constant), (True, np.hstack([constant, dummies]))):
        # An orthonormal basis: covariates may be constant or collinear.
        left, size, _ = np.linalg.svd(design, full_matrices=False)
        basis = left[:, size > size[0] * 1e-9]

        def rest(values: np.ndarray, basis: np.ndarray = basis) -> np.ndarray:
            return values - (values @ basis) @ basis.T

        x, y = rest(ranks), rest(goal)
        value = _correlation(x, y)
        rng = np.random.default_rng([seed, int(controlled)])
        permuted = np.empty((permutations, len(y)))
        for turn in range(permutations):
            permuted[turn, blocks.ravel()] = y[rng.permutation(blocks).ravel()]
        null = np.abs(np.stack([_correlation(x, each) for each in rest(permuted)], axis=1))
        drawn = rng.integers(len(blocks), size=(permutations, len(blocks)))
        resampled = np.stack(
            [_correlation(x[:, r], y[r]) for r in (blocks[d].ravel() for d in drawn)]
        )
        missing = np.isnan(value)
        low, high = np.full((2, len(value)), np.nan)
        low[~missing], high[~missing] = np.nanquantile(resampled[:, ~missing], BOUNDS, axis=0)
        largest = np.where(np.isnan(null), -np.inf, null).max(0)
        p = np.where(missing, np.nan, permutation_p(np.abs(value), null))
        corrected = permutation_p(np.abs(value), np.broadcast_to(largest, null.shape))
        tables.append(
            pd.DataFrame(
                {
                    "metric": "link",
                    "layer": np.arange(len(value)),
                    "controlled": controlled,
                    "value": value,
                    "low": low,
                    "high": high,
                    "p": p,
                    "p_corrected": np.where(missing, np.nan, corrected),
                }
            )
        )
    before, after = (table["p_corrected"].to_numpy() for table in tables)
    gone = (before <= NEVER) & ~(after <= NEVER)
    return pd.concat(
        [table.assign(vanished=gone.astype(float)) for table in tables], ignore_index=True
    )


def _correlation(
    x: Float[np.ndarray, "layer prompt"], y: Float[np.ndarray, " prompt"]
) -> Float[np.ndarray, " layer"]:
    """Pearson's correlation, NaN where one of the two is constant."""
    x, y = x - x.mean(1, keepdims=True), y - y.mean()
    length = np.linalg.norm(x, axis=1) * np.linalg.norm(y)
    # The residual of a column that the covariates explain is rounding.
    flat = length < 1e-9 * len(y) ** 2
    return np.where(flat, np.nan, x @ y / np.where(flat, 1, length))
