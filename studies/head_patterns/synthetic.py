"""One seed of the trained models: tuned on moves, maps, their composites and controls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.parallel import one_thread
from studies.head_patterns.mixes import applications
from studies.head_patterns.options import BASIC, COMPLEX, CONTROL, Options
from studies.head_patterns.tuning import Task, split_tests, tuned_patterns
from studies.synthetic_task import trained

# Test prompts of each run: cheap, so more than for the pretrained model.
MEASURED = 64
# Training strings of a task, all of one length: prompts of all tasks cost the same.
STRINGS, LENGTH = 192, 7


def measure_seed(study: Options, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    """Train a model on the known tasks, tune it on each new task, run the applications."""
    prompts = prompts_of(study, seed)
    tasks = tasks_of(study, prompts)
    new = {task.name for task in tasks}
    known = prompts.take(np.flatnonzero(~prompts.rows["task"].isin(new).to_numpy()))
    with one_thread():
        run = trained(
            study,
            known,
            seed,
            folder,
            n_checkpoints=2,
            sizes={"n_layers": study.n_layers, "n_heads": study.n_heads},
            loss_on="answer",
            evaluate=known.where(split="test"),
        )
        model = run.model()
        last = run.frame[run.frame["step"] == study.steps].melt(["step"], ["accuracy", "loss"])
        tables = [
            pd.DataFrame({"metric": last["variable"], "value": last["value"], "method": "known"})
        ]
        tables += [
            tuned_patterns(
                model,
                task,
                seed=seed,
                steps=study.tuning_steps,
                batch_size=study.batch_size,
                lr=study.tuning_lr,
                checkpoints=study.n_checkpoints,
            )
            for task in tasks
        ]
        tables.append(applications(study, model, tasks, pd.concat(tables[1:]), seed))
    scores = pd.concat(tables, ignore_index=True).assign(part="synthetic", seed=seed)
    weights = pd.DataFrame({"name": [f"seed {seed}"], "fingerprint": [lc.fingerprint(model)]})
    return {"scores": scores, "weights": weights}


def prompts_of(study: Options, seed: int) -> lc.Prompts:
    """Prompts of all tasks: known ones with their composites, and new ones."""
    moves, maps = study.known_moves, study.known_maps
    further = study.complex_tasks + study.controls
    known = [(a, b) for a in range(moves) for b in range(maps)]
    return lc.tasks.composed(
        n_moves=moves + further,
        n_maps=maps + further,
        pairs=[*known, *((moves + i, maps + i) for i in range(study.complex_tasks))],
        width=study.width,
        n_symbols=study.n_symbols,
        regexes_per_task=1,
        strings_per_regex=STRINGS,
        test_strings=MEASURED,
        lengths=(LENGTH, LENGTH),
        seed=seed,
    )


def tasks_of(study: Options, prompts: lc.Prompts) -> list[Task]:
    """The new tasks: parts of the complex ones, the complex ones, and controls."""
    moves = [f"move {study.known_moves + i}" for i in range(study.complex_tasks + study.controls)]
    maps = [f"map {study.known_maps + i}" for i in range(study.complex_tasks + study.controls)]
    n = study.complex_tasks
    kinds: dict[str, tuple[str, tuple[str, ...]]] = {
        **dict.fromkeys([*moves[:n], *maps[:n]], (BASIC, ())),
        **{f"{b} after {a}": (COMPLEX, (a, b)) for a, b in zip(moves[:n], maps[:n], strict=True)},
        **dict.fromkeys([*moves[n:], *maps[n:]], (CONTROL, ())),
    }
    return [
        Task(
            name,
            kind,
            parts,
            prompts.where(task=name, split="train"),
            split_tests(prompts.where(task=name, split="test"), study.runs, MEASURED),
        )
        for name, (kind, parts) in kinds.items()
    ]
