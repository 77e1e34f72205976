"""Train one seed's model on the synthetic task and measure it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lensclust as lc
import probes
from studies.head_pages import one_group, opened_heads, sample_prompts
from studies.scales import AGREED
from studies.scores import plane
from studies.study import silenced

if TYPE_CHECKING:
    import pandas as pd

    from lensclust.report.views import HeadView

from studies.emergence.options import CHOOSING, Options
from studies.synthetic_task import (
    LABELS,
    SPLITS,
    UNSEEN,
    clustered_prompts,
    input_only_accuracy,
    states_over_training,
    task_set,
    trained,
)


def measure(study: Options, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train one seed and score every checkpoint, in one process."""
    import numpy as np
    import pandas as pd

    from lensclust.parallel import one_thread

    prompts = task_set(study, seed)
    # A tiny model gains nothing from a second thread; one thread is reproducible.
    with one_thread():
        run = trained(study, prompts, seed, folder, n_checkpoints=study.n_checkpoints)
        held_out = clustered_prompts(prompts, study.rows_per_mapping)
        tables, states = [training_scores(run.frame, prompts)], pd.DataFrame()
        heads = pd.DataFrame({"view": []}, dtype=object)
        unseen = held_out.where(split=UNSEEN)
        followed: list[tuple[int, Any]] = []
        for step, model in run.models():
            acts = lc.extract(model, held_out, ["resid", "head"], progress=False)
            is_last = step == study.steps
            if seed == 0:
                rows = np.flatnonzero(acts["split"].values == UNSEEN)
                followed.append((step, acts[["resid"]].isel(prompt=rows)))
            with silenced("probes.clustering.clustering"):  # the notes say what layer 0 cannot hold
                tables.append(cluster_scores(acts, study, is_last=is_last).assign(step=step))
            if is_last:
                states = plane_by_layer(acts).assign(step=step)
            if is_last and seed == 0:
                view = heads_of_last(model, acts, held_out, pd.concat(tables), study)
                heads = pd.DataFrame({"view": [json.dumps(view.to_json())]})
        weights = pd.DataFrame({"seed": [seed], "fingerprint": [lc.fingerprint(run.model())]})
    scores = pd.concat(tables, ignore_index=True).assign(seed=seed)
    found = {"scores": scores, "states": states.assign(seed=seed), "weights": weights}
    found |= {"map": states_over_training(followed, unseen) if seed == 0 else pd.DataFrame()}
    return found | {"heads": heads}


def heads_of_last(
    model: Any, acts: Any, prompts: lc.Prompts, scores: pd.DataFrame, study: Options
) -> HeadView:
    """Heads of the last checkpoint, with their scores at earlier checkpoints."""
    import numpy as np

    from lensclust.tasks.synthetic import vocabulary

    rows = np.flatnonzero((prompts.rows["split"] == UNSEEN).to_numpy())
    unseen = prompts.take(rows)
    samples = sample_prompts(unseen, "input")
    names = vocabulary(n_inputs=study.n_inputs, n_outputs=study.n_outputs)
    mine = scores[(scores["kind"] == "head") & (scores["split"] == UNSEEN)]
    agreed, last = mine["metric"] == AGREED, mine["step"] == study.steps
    # Agreement at all checkpoints, last first; other scores at the last checkpoint only.
    mine = mine[(mine["by"] == "task") & (agreed | last)]
    mine = mine.assign(other=mine["metric"] != AGREED, before=-mine["step"])
    mine = mine.sort_values(["other", "before"], kind="stable")
    return opened_heads(
        acts.isel(prompt=rows),
        unseen,
        mine.assign(score=mine["metric"] + " at step " + mine["step"].astype(int).astype(str)),
        None if samples is None else probes.sample_attention(model, samples, names=names),
        given="input",
        labels=LABELS,
        title="The heads after training, on unseen strings",
        score="score",
    )


def training_scores(frame: pd.DataFrame, prompts: lc.Prompts) -> pd.DataFrame:
    """Accuracy by step and split, and that of the best answer from the input alone."""
    chance = input_only_accuracy(prompts.rows)
    return frame.melt(["step", "split"], ["accuracy", "loss"], "metric").assign(
        site="model",
        kind="model",
        null_mean=lambda f: f["split"].map(chance).where(f["metric"] == "accuracy"),
    )


def cluster_scores(acts: Any, study: Options, *, is_last: bool) -> pd.DataFrame:
    """Clustering by task at every layer on every split, and at every head on unseen strings.

    At the last checkpoint heads are also scored on the split that chooses the best head.
    """
    import numpy as np
    import pandas as pd

    tables = []
    for split in SPLITS:
        part = acts.isel(prompt=np.flatnonzero(acts["split"].values == split))
        if part.sizes["prompt"] == 0:
            continue
        options: dict[str, Any] = {"permutations": study.permutations, "jobs": 1}
        with_heads = split == UNSEEN or (is_last and split == CHOOSING)
        kinds = ["resid", "head"] if with_heads else ["resid"]
        against = [] if study.n_outputs is None else ["output"]
        inside = probes.cluster(part, k=study.k, kinds=kinds, score_against=against, **options)
        tables.append(inside.frame.assign(split=split))
        if split == UNSEEN:
            everything = probes.cluster(
                part, given=None, score_against=["input"], kinds="resid", **options
            )
            tables.append(everything.frame.assign(split=split))
    return pd.concat(tables, ignore_index=True)


def plane_by_layer(acts: Any) -> pd.DataFrame:
    """Two principal components by layer of the states that share one input."""
    import numpy as np
    import pandas as pd

    part = acts.isel(prompt=np.flatnonzero(acts["split"].values == UNSEEN))
    tasks = pd.DataFrame({name: part[name].values for name in ("input", "task")})
    part = part.isel(prompt=one_group(tasks, "input"))
    labels = {name: part[name].values for name in ("instruction", "template", "input")}
    labels["task"] = [f"task {number}" for number in part["task"].values]
    return pd.concat(
        [
            plane(part.resid.sel(layer=layer)[:, 0].values, layer=layer, **labels)
            for layer in part["layer"].values
        ],
        ignore_index=True,
    )
