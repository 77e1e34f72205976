"""Train one seed's models on the synthetic task and compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lensclust as lc
import probes
from studies.study import silenced
from studies.synthetic_task import trained

if TYPE_CHECKING:
    import pandas as pd

from studies.layer_by_layer.options import CEILING, MULTI, OTHER, UNTRAINED, Options

METRICS = {"cka_debiased": True, "cka": False}
UNSEEN = "new_string"


def measure(study: Options, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train the models of one seed and compare them, in one process."""
    import pandas as pd

    from lensclust.parallel import one_thread

    prompts = task_set(study, seed)
    tasks = range(study.specialists)
    # Two specialists per task, and the model of all tasks, each with a separate seed.
    first = seed * (2 * study.specialists + 1)
    with one_thread():
        run = _train(study, prompts, first, folder / "all")
        multi, untrained = run.model(), run.checkpoints[0].model()
        single = replace(study, steps=study.specialist_steps)
        specialists = {
            (task, copy): _train(
                single,
                prompts.where(task=task, split=["train", UNSEEN]),
                first + 1 + 2 * task + copy,
                folder / f"task-{task}-{copy}",
            ).model()
            for task in tasks
            for copy in (0, 1)
        }
        tables = []
        for task in tasks:
            asked = prompts.where(task=task, split=UNSEEN)
            others = {
                MULTI: multi,
                CEILING: specialists[task, 1],
                OTHER: specialists[(task + 1) % study.specialists, 1],
                UNTRAINED: untrained,
            }
            found = compare(specialists[task, 0], others, asked)
            tables.append(found.assign(task=task))
    scores = pd.concat(tables, ignore_index=True).assign(seed=seed)
    weights = pd.DataFrame({"seed": [seed], "fingerprint": [lc.fingerprint(multi)]})
    return {"scores": scores, "weights": weights}


def task_set(study: Options, seed: int) -> lc.Prompts:
    """The tasks of one seed."""
    return lc.tasks.sif(
        n_tasks=study.n_tasks,
        n_inputs=study.n_inputs,
        mappings_per_task=study.mappings_per_task,
        regexes_per_task=study.regexes_per_task,
        held_out_regexes=0,
        rows_per_mapping=study.rows_per_mapping,
        seed=seed,
    )


def compare(specialist: Any, others: Mapping[str, Any], prompts: lc.Prompts) -> pd.DataFrame:
    """CKA of each model with the specialist at the same layer, and all accuracies."""
    import pandas as pd

    from lensclust.inference import answers
    from probes.design import first_answers
    from probes.steering import first_token

    own = lc.extract(specialist, prompts, "resid", progress=False)
    tables = []
    for pair, model in {"specialist": specialist, **others}.items():
        right = answers(model, prompts, first_token).numpy() == first_answers(prompts)
        tables.append(pd.DataFrame([{"metric": "accuracy", "pair": pair, "value": right.mean()}]))
        if pair == "specialist":
            continue
        acts = lc.extract(model, prompts, "resid", progress=False)
        for debiased in METRICS.values():
            with silenced("probes.similarity.kernel_alignment"):  # the notes say it once
                frame = probes.cka(own, acts, debiased=debiased).frame
            same = frame[frame["layer_a"] == frame["layer_b"]].rename(columns={"layer_a": "layer"})
            kept = same[["layer", "metric", "value", "null_mean", "null_std", "p"]]
            tables.append(kept.assign(pair=pair))
    return pd.concat(tables, ignore_index=True)


def _train(study: Options, prompts: lc.Prompts, seed: int, folder: Path) -> Any:
    sizes = {"n_layers": study.n_layers}
    return trained(study, prompts, seed, folder, n_checkpoints=2, sizes=sizes)
