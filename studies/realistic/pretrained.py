"""Prompts, states and scores of a pretrained model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import lensclust as lc
import probes
from studies.study import Context, silenced

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from studies.realistic.units import Source

from studies.realistic.options import FOLDER_INPUTS, Options


def prompts_of(study: Options, tokenizer: Any, *, held_out: bool = False) -> lc.Prompts:
    """Prompts of the task set, with texts and folds that hold every instruction once.

    Folds run along the diagonals of instruction and input, so that the prompts of one task
    in one fold differ in both. ``held_out`` gives the own set's held-out wordings.
    """
    if study.data is None:
        found = lc.tasks.natural(tokenizer, inputs=study.inputs, chat=study.chat, held_out=held_out)
    else:
        inputs = FOLDER_INPUTS if study.inputs is None else study.inputs
        found = lc.tasks.instruction_induction(
            study.data, tokenizer, inputs=inputs, chat=study.chat
        )
    rows = found.rows
    nth_input = rows.groupby("instruction").cumcount()
    nth_instruction = rows.groupby("task")["instruction"].transform(lambda s: s.factorize()[0])
    n_inputs = rows.groupby("instruction")["input"].transform("size")
    fold = ((nth_input + nth_instruction) % n_inputs).astype(str)
    return replace(found, rows=rows.assign(fold=fold, text=found.texts))


def read_states(
    study: Options, model: Any, prompts: lc.Prompts, sites: list[str], context: Context, name: str
) -> xr.Dataset:
    """Activations, stored in the run directory so that a killed run can resume."""
    store = context.out / f"{name}.zarr"
    return lc.extract(
        model, prompts, sites, store=store, resume=True, progress=context.progress
    ).load()


def measure(
    study: Options, acts: xr.Dataset, source: str, given: str, context: Context, seed: int = 0
) -> tuple[pd.DataFrame, Source]:
    """Scores of one source of states, in total and by group, with their partitions."""
    import pandas as pd

    from studies.realistic.units import Source

    options: dict[str, Any] = {
        "permutations": study.permutations,
        "seed": seed,
        "jobs": context.jobs,
        "progress": context.progress,
    }
    with silenced(
        "probes.clustering.clustering"
    ):  # where states coincide, as at layer 0, they score 0
        inside = probes.cluster(acts, given=given, k=study.k, score_against=["template"], **options)
        across = probes.cluster(
            acts, given=None, score_against=["input", "template"], kinds="resid", **options
        )
    near = probes.nearest_neighbour(
        acts, apart=apart(study), per=given, kinds="resid", permutations=study.permutations
    )
    place = ["site", "kind", "layer", "head", "by", "metric"]
    near_all = near.groupby(place, dropna=False, sort=False)[["value", "null_mean"]].mean()
    scores = pd.concat(
        [inside.frame, across.frame, near_all.reset_index().assign(given="none")],
        ignore_index=True,
    )
    groups = pd.concat([inside.groups, near[list(inside.groups)]], ignore_index=True)
    labels = {
        name: ("prompt", acts[name].values)
        for name in dict.fromkeys(("task", "template", "instruction", given))
    }
    found = Source(source, seed, groups, inside.assignments.assign_coords(labels), given)
    return scores.assign(source=source, seed=seed), found


def apart(study: Options) -> list[str]:
    """Labels that neighbours must not share; a folder's inputs belong to one task each."""
    return ["template"] if study.data is None else ["template", "input"]


def neighbours(study: Options, acts: xr.Dataset, source: Source) -> pd.DataFrame:
    """Whether each prompt's neighbour has its task, at the site chosen on other groups."""
    import pandas as pd

    from studies.realistic.units import chosen_sites

    sites = chosen_sites(source.groups, "1nn_accuracy")
    prompt = [f"{i}" for i in range(acts.sizes["prompt"])]
    rows = []
    for site in sorted(set(sites.values())):
        at = acts.sel(layer=[lc.Site.parse(site).layer])[["resid"]].assign_coords(
            row=("prompt", prompt)
        )
        found = probes.nearest_neighbour(
            at, apart=apart(study), per="row", permutations=2, progress=False
        )
        right = found.set_index("group").loc[prompt, "value"].to_numpy()
        group = acts[source.given].values.astype(str)
        frame = pd.DataFrame(
            {
                "prompt": prompt,
                "value": right,
                "group": group,
                "instruction": acts["instruction"].values,
            }
        )
        rows.append(frame[[sites.get(name) == site for name in group]])
    return pd.concat(rows).assign(source=source.name, seed=source.seed)
