"""One task of the pretrained model: words, arithmetic, compositions of two, and controls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.parallel import one_thread
from lensclust.tasks.words import AFTER
from studies.head_patterns.options import BASIC, COMPLEX, CONTROL, Options
from studies.head_patterns.tuning import Task, split_tests, tuned_patterns

WORDS = ("plural", "upper_case")
NUMBERS = ("add", "multiply")
OTHER = "french"
TEMPLATES = ("imperative", "question")
# Words held out for tests; texts to tune on.
TEST_WORDS, TRAINED_TEXTS = 8, 64
LONGEST_TEXT = 80
# Parts of the names of attention weights, in all architectures.
ATTENTION = r"attn|attention"


def task_names(study: Options) -> list[str]:
    """Names of the tasks; the parts of a composite task come before it."""
    composites = [AFTER.join(parts[::-1]) for parts in (WORDS, NUMBERS)]
    return [*WORDS, *NUMBERS, *composites, OTHER, *([study.texts] if study.texts != "none" else [])]


def measure_task(study: Options, name: str) -> dict[str, pd.DataFrame]:
    """Tune the pretrained model on one task and measure its patterns at checkpoints."""
    model = lc.load(study.pretrained, progress=False)
    tuned: dict[str, Any] = {"only": ATTENTION}
    if study.rank:
        tuned = {"lora": lc.Lora(rank=study.rank, targets=("q", "k", "v", "o"))}
    # Workers share the cores: a second thread each would only wait.
    with one_thread():
        scores = tuned_patterns(
            model,
            task_of(study, name, model.tokenizer),
            seed=0,
            steps=study.pretrained_steps,
            batch_size=study.pretrained_batch,
            lr=study.pretrained_lr,
            checkpoints=study.n_checkpoints,
            **tuned,
        )
    weights = pd.DataFrame({"name": [study.pretrained], "fingerprint": [lc.fingerprint(model)]})
    return {"scores": scores.assign(part="pretrained", seed=0), "weights": weights}


def task_of(study: Options, name: str, tokenizer: Any) -> Task:
    """Prompts of a task for tuning and for measuring."""
    last, _, first = name.partition(AFTER)
    parts = (first, last) if first else ()
    if last in NUMBERS:
        prompts = lc.tasks.arithmetic(tokenizer, tasks=[name])
    elif name == study.texts:
        prompts = _texts(study, tokenizer)
    elif first:
        prompts = _words(lc.tasks.composed_words(tokenizer, tasks=[name]))
    else:
        prompts = _words(lc.tasks.natural(tokenizer, tasks=[name], paraphrases=TEMPLATES))
    kind = COMPLEX if first else BASIC if name in (*WORDS, *NUMBERS) else CONTROL
    tests = split_tests(prompts.where(split="test"), study.pretrained_runs, study.measured)
    return Task(name, kind, parts, prompts.where(split="train"), tests)


def _words(prompts: lc.Prompts) -> lc.Prompts:
    """Prompts with the last words as the test split, the same for every task."""
    words = prompts.rows["input"].drop_duplicates().iloc[-TEST_WORDS:]
    return _split(prompts, lambda rows: rows["input"].isin(words).to_numpy())


def _texts(study: Options, tokenizer: Any) -> lc.Prompts:
    prompts = lc.tasks.classification(
        study.texts,
        tokenizer,
        shots=0,
        examples=TRAINED_TEXTS,
        queries=study.pretrained_runs * study.measured,
        longest=LONGEST_TEXT,
    )
    return _split(prompts, lambda rows: (rows["split"] == "query").to_numpy())


def _split(prompts: lc.Prompts, is_test: Callable[[pd.DataFrame], np.ndarray]) -> lc.Prompts:
    names = np.where(is_test(prompts.rows), "test", "train")
    return replace(prompts, rows=prompts.rows.assign(split=names))
