"""Training data and measures of the arms of `identity_pretraining`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import lensclust as lc
import probes
from lensclust.training import Auxiliary
from studies.identity_pretraining.options import task_set
from studies.identity_pretraining.phases import (
    NAMING,
    TASK,
    After,
    Phase,
    Stage,
    first_name,
    naming_prompts,
    own_names,
    regrouped_names,
    reported,
    shuffled_names,
    train_in_phases,
    with_share,
)
from studies.scales import AGREED
from studies.study import silenced
from studies.synthetic_task import UNSEEN, clustered_prompts, input_only_accuracy

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

    from studies.identity_pretraining.options import Options, Part


def measure(study: Options, part: Part, folder: Path) -> dict[str, pd.DataFrame]:
    """Train the arms of one part; score accuracy, and clusters where all arms are compared.

    ``folder`` holds only the returned frames: a part takes minutes.
    """
    import pandas as pd

    from lensclust.models import native_config
    from lensclust.parallel import one_thread
    from lensclust.training import required_sizes

    prompts = task_set(replace(study, n_tasks=part.n_tasks), part.seed)
    n_ctx = required_sizes(prompts)["n_ctx"]
    # One vocabulary for all arms, and therefore the same initial weights.
    d_vocab = first_name(prompts) + part.n_tasks
    config = native_config("sif-small", n_layers=part.n_layers, n_ctx=n_ctx, d_vocab=d_vocab)
    tables, weights, done = [], {}, {}
    with one_thread():
        for share in part.shares:
            plans = plan(study, prompts, share, part.seed)
            for arm in part.arms:
                frame, stages = train_in_phases(
                    config,
                    plans[arm],
                    warmup=study.warmup,
                    report=reported,
                    done=done,
                    batch_size=study.batch_size,
                    lr=study.lr,
                    n_checkpoints=study.n_checkpoints if part.purpose == "arms" else 2,
                    evaluate_every=study.evaluate_every,
                    seed=part.seed,
                )
                found = [accuracies(frame, prompts)]
                if part.purpose == "arms":
                    found.append(cluster_scores(study, prompts, stages))
                if arm == "own clusters":
                    found.append(agreement(study, prompts, stages, part.seed))
                tables.append(pd.concat(found, ignore_index=True).assign(arm=arm, share=share))
                weights[f"{part} {arm} {share:g}"] = lc.fingerprint(stages[-1].model())
    scores = pd.concat(tables, ignore_index=True).assign(
        purpose=part.purpose, seed=part.seed, n_layers=part.n_layers, n_tasks=part.n_tasks
    )
    return {
        "scores": scores,
        "weights": pd.DataFrame({"run": weights.keys(), "fingerprint": weights.values()}),
    }


def plan(study: Options, prompts: lc.Prompts, share: float, seed: int) -> dict[str, list[Phase]]:
    """The phases of every arm; ``share`` of the training rows have an answer in phase 2."""
    rows, rng = prompts.rows, np.random.default_rng([seed, 1])
    true = rows["task"].to_numpy(dtype=np.int64)
    shuffled, regrouped = shuffled_names(rows, rng), regrouped_names(rows, rng)
    answered = with_share(prompts, share, np.random.default_rng([seed, 2]))
    answered_rows = answered.rows.assign(identity=first_name(prompts) + answered.rows["task"])
    both = study.naming_steps + study.task_steps
    first_half = study.task_steps // 2

    def task(steps: int, name: str = "task", **options: Any) -> Phase:
        prompts_then = replace(answered, rows=answered_rows)
        return Phase(f"{name} {steps} {share:g}", TASK, steps, lambda _: prompts_then, **options)

    def naming(name: str, names: np.ndarray, after: After = "input") -> Phase:
        named = naming_prompts(prompts, names, after=after)
        return Phase(name, NAMING, study.naming_steps, lambda _: named)

    def name_clusters(model: TransformerBridge | None) -> lc.Prompts:
        assert model is not None
        return naming_prompts(prompts, clusters_of(study, model, prompts, seed))

    then = task(study.task_steps)
    head = Auxiliary("identity", layer=min(study.layer, study.n_layers), weight=study.weight)
    return {
        "identity": [naming("identity", true), then],
        "instruction": [naming("instruction", true, "instruction"), then],
        "auxiliary": [task(both, "auxiliary", auxiliary=head)],
        "own clusters": [
            task(first_half),
            Phase("own clusters", NAMING, study.naming_steps, name_clusters),
            task(study.task_steps - first_half),
        ],
        "regrouped": [naming("regrouped", regrouped), then],
        "shuffled": [naming("shuffled", shuffled), then],
        "scratch": [task(both)],
    }


def clusters_of(
    study: Options, model: TransformerBridge, prompts: lc.Prompts, seed: int
) -> np.ndarray:
    """Names from clusters of the model's last layer."""
    n_tasks = prompts.rows["task"].nunique()
    return own_names(model, prompts, k=n_tasks, layer=int(model.cfg.n_layers), seed=seed)


def accuracies(frame: pd.DataFrame, prompts: lc.Prompts) -> pd.DataFrame:
    """Accuracy by step and split; for the task with the best answer from the input alone."""
    chance = input_only_accuracy(reported(prompts).rows)
    return frame.rename(columns={"accuracy": "value"}).assign(
        metric="accuracy",
        null_mean=lambda f: f["split"].map(chance).where(f["kind"] == TASK),
    )


def cluster_scores(study: Options, prompts: lc.Prompts, stages: list[Stage]) -> pd.DataFrame:
    """Clustering by task at every layer and checkpoint, on unseen strings within input."""
    import pandas as pd

    unseen = clustered_prompts(prompts, study.rows_per_mapping).where(split=UNSEEN)
    tables = []
    for stage in stages:
        acts = lc.extract(stage.model(), unseen, "resid", progress=False)
        with silenced("probes.clustering.clustering"):  # the notes say what layer 0 cannot hold
            options: dict[str, Any] = {"permutations": study.permutations, "jobs": 1}
            found = probes.cluster(acts, metrics=AGREED, kinds="resid", **options).frame
        columns = ["metric", "layer", "value", "null_mean", "null_std"]
        at = {"kind": stage.kind, "step": stage.step, "task_step": stage.task_step}
        tables.append(found[columns].assign(split=UNSEEN, **at))
    return pd.concat(tables, ignore_index=True)


def agreement(study: Options, prompts: lc.Prompts, stages: list[Stage], seed: int) -> pd.DataFrame:
    """ARI with the tasks of the names that a half-trained model gives the training rows."""
    import pandas as pd
    from sklearn.metrics import adjusted_rand_score

    half = max((s for s in stages if s.task_step == study.task_steps // 2), key=lambda s: -s.step)
    names = clusters_of(study, half.model(), prompts, seed)
    rows, is_train = prompts.rows, (prompts.rows["split"] == "train").to_numpy()
    value = adjusted_rand_score(rows["task"].to_numpy()[is_train], names[is_train])
    at = {"kind": half.kind, "step": half.step, "task_step": half.task_step, "split": "train"}
    return pd.DataFrame([{"metric": "ari of names", "value": value, "null_mean": 0.0, **at}])
