"""Applications of patterns: mixes of basic tasks, or of prompts, before a scarce task.

All arms end with the same tuning on the same scarce prompts of the complex task. Before it, all
but one train on equally many prompts of basic tasks and controls, mixed or chosen by the arm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from transformer_lens.model_bridge import TransformerBridge

import lensclust as lc
import probes
from lensclust.prompts.joined import joined
from studies.head_patterns.options import BASIC, COMPLEX, Options
from studies.head_patterns.tuning import Task, changes, pattern_change, spread_counts
from studies.study import silenced

FITTED, EVEN, RANDOM, PARTS, OWN = (
    "fitted mix", "even mix", "random mix", "parts alone", "its own examples",
)  # fmt: skip
SIMILAR, DRAWN, LEAST = "most similar", "drawn at random", "least similar"
# Public prompts of each task, and the chosen share of all of them.
PUBLIC, CHOSEN = 64, 0.25


def applications(
    study: Options,
    model: TransformerBridge,
    tasks: Sequence[Task],
    patterns: pd.DataFrame,
    seed: int,
) -> pd.DataFrame:
    """Accuracy on complex tasks after each arm, and heads of the model of the even mix."""
    simple = [task for task in tasks if task.kind != COMPLEX]
    rng = np.random.default_rng([seed, 11])
    mix = Mixes(simple, study.mixed, rng)
    tables = []
    for task in tasks:
        if task.kind != COMPLEX:
            continue
        order = rng.permutation(len(task.train))[: study.scarce]
        scarce = task.train.take(order)
        shares = _fitted(study, model, scarce, changes(patterns), simple, seed)
        arms = {
            FITTED: mix.of(list(shares.values())),
            EVEN: mix.of([1.0] * len(simple)),
            RANDOM: mix.of(rng.dirichlet(np.ones(len(simple))).tolist()),
            PARTS: mix.of([float(part.name in task.parts) for part in simple]),
            OWN: None,
            **_choices(study, model, scarce, simple, rng),
        }
        test = joined(task.tests)
        for name, before in arms.items():
            frame = _tuned(study, model, before, scarce, test, seed)
            tables.append(frame.assign(method=name, **task.labels))
        found = {"metric": "coefficient", "method": list(shares), "value": list(shares.values())}
        tables.append(pd.DataFrame(found).assign(**task.labels))
    basics = [task for task in tasks if task.kind == BASIC]
    tables.append(_heads(study, model, mix.of([1.0] * len(simple)), basics, seed))
    return pd.concat(tables, ignore_index=True)


class Mixes:
    """Draws of prompts of several tasks, by number per task."""

    def __init__(self, tasks: Sequence[Task], n: int, rng: np.random.Generator) -> None:
        self.n = n
        self.pool = joined([task.train for task in tasks])
        self.starts = np.cumsum([0, *(len(task.train) for task in tasks)])
        self.orders = [
            start + rng.permutation(len(task.train))
            for start, task in zip(self.starts, tasks, strict=False)
        ]

    def of(self, shares: Sequence[float]) -> lc.Prompts:
        """Prompts by the shares of the tasks, each task's in a fixed order, repeated if few."""
        counts = spread_counts(shares, self.n)
        places = [np.resize(o, n) for o, n in zip(self.orders, counts, strict=True) if n]
        return self.pool.take(np.concatenate(places))


def _fitted(
    study: Options,
    model: TransformerBridge,
    scarce: lc.Prompts,
    basis: Mapping[str, np.ndarray],
    simple: Sequence[Task],
    seed: int,
) -> dict[str, float]:
    """Share of each simple task in the change of the pattern by the scarce prompts.

    The pattern is measured on the same prompts, since no others of the complex task are known.
    Where no coefficient is above 0, all tasks have the same share.
    """
    change = pattern_change(
        model,
        scarce,
        steps=study.tuning_steps,
        batch_size=min(study.batch_size, len(scarce)),
        lr=study.tuning_lr,
        seed=seed,
    )
    bases = {task.name: basis[task.name] for task in simple}
    # Only coefficients are needed: nulls are drawn where the composition is tested.
    found = probes.compose(change, bases, nonnegative=True, nulls=2, seed=seed)
    try:
        return {str(name): float(share) for name, share in found.shares().items()}
    except lc.InputError:
        return {task.name: 1 / len(simple) for task in simple}


def _choices(
    study: Options,
    model: TransformerBridge,
    scarce: lc.Prompts,
    simple: Sequence[Task],
    rng: np.random.Generator,
) -> dict[str, lc.Prompts]:
    """Public prompts chosen by the similarity of their patterns to the scarce prompts'."""
    pool = joined([task.train.take(rng.permutation(len(task.train))[:PUBLIC]) for task in simple])
    target = probes.head_activation(model, scarce).pattern.values
    alike = alike_to(probes.head_activation(model, pool).values.values, target)
    n = max(1, round(CHOSEN * len(pool)))
    chosen = {
        SIMILAR: np.argsort(-alike, kind="stable")[:n],
        DRAWN: rng.permutation(len(pool))[:n],
        LEAST: np.argsort(alike, kind="stable")[:n],
    }
    return {
        name: pool.take(np.resize(rng.permutation(places), study.mixed))
        for name, places in chosen.items()
    }


def alike_to(
    values: Float[np.ndarray, "prompt block head"], target: Float[np.ndarray, "block head"]
) -> Float[np.ndarray, " prompt"]:
    """Pearson's correlation of each prompt's pattern with the target, over heads."""
    rows = values.reshape(len(values), -1).astype(np.float64)
    rows = rows - rows.mean(1, keepdims=True)
    wanted = target.ravel() - target.mean()
    return rows @ wanted / np.maximum(np.linalg.norm(rows, axis=1) * np.linalg.norm(wanted), 1e-30)


def _tuned(
    study: Options,
    model: TransformerBridge,
    before: lc.Prompts | None,
    scarce: lc.Prompts,
    test: lc.Prompts,
    seed: int,
) -> pd.DataFrame:
    """Accuracy and loss on the complex task after both trainings, and the tokens they took."""
    own: dict[str, Any] = {"batch_size": min(study.batch_size, len(scarce)), "seed": seed}
    options: dict[str, Any] = {"lr": study.tuning_lr, "checkpoints": 2, "progress": False}
    steps = study.tuning_steps
    if before is None:
        # As many prompts as in the other arms, all of them scarce ones.
        steps += round(study.mixed / own["batch_size"])
        run = lc.finetune(model, scarce, steps=steps, evaluate=test, **own, **options)
    else:
        first = lc.finetune(
            model,
            before,
            steps=_steps(study),
            batch_size=study.batch_size,
            seed=seed,
            **options,
        )
        with first.at(_steps(study)) as mixed:
            run = lc.finetune(mixed, scarce, steps=steps, evaluate=test, **own, **options)
    last = run.frame[run.frame["step"] == steps]
    tokens = scarce.lengths.double().mean() * steps * own["batch_size"]
    if before is not None:
        tokens += before.lengths.double().mean() * _steps(study) * study.batch_size
    measured = last.melt(["step"], ["accuracy", "loss"], "metric")[["metric", "value"]]
    return pd.concat([measured, pd.DataFrame([{"metric": "tokens", "value": float(tokens)}])])


def _steps(study: Options) -> int:
    return max(1, round(study.mixed / study.batch_size))


def _heads(
    study: Options,
    model: TransformerBridge,
    before: lc.Prompts,
    basics: Sequence[Task],
    seed: int,
) -> pd.DataFrame:
    """Growth of each head's share of the activation, and its clustering by task after."""
    run = lc.finetune(
        model,
        before,
        steps=study.tuning_steps,
        batch_size=study.batch_size,
        lr=study.tuning_lr,
        seed=seed,
        checkpoints=2,
        progress=False,
    )
    asked = joined([test for task in basics for test in task.tests])
    old = probes.head_activation(model, asked).pattern
    with run.at(study.tuning_steps) as tuned:
        new = probes.head_activation(tuned, asked).pattern
        acts = lc.extract(tuned, asked, "head", progress=False)
    with silenced("probes.clustering.clustering"):
        found = probes.cluster(
            acts, given=None, permutations=study.permutations, kinds="head", jobs=1
        ).frame
    ari = found[found["metric"] == "ari"].rename(columns={"layer": "block"})
    grown = (new / new.sum() - old / old.sum()).rename("value").to_dataframe().reset_index()
    return pd.concat(
        [
            ari[["block", "head", "value", "null_mean"]].assign(metric="ari"),
            grown[["block", "head", "value"]].assign(metric="growth"),
        ],
        ignore_index=True,
    )
