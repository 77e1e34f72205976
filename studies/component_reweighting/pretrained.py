"""The pretrained part: components of few-shot prompts, over demonstrations and templates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
import probes
from lensclust.prompts.joined import joined
from lensclust.tasks.labelled import LabelledTexts
from probes.components import ComponentLogits, decompose, select_prompt
from studies.component_reweighting.options import Options
from studies.component_reweighting.scores import component_rows, extremes, kind_shares, relearned
from studies.study import silenced

# One template for all sets, so that heads cannot separate tasks by it.
COMMON = "Text: {input}\nLabel: {label}\n"

Prompted = dict[tuple[str, int], ComponentLogits]


def measure_data(study: Options, name: str, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    """All scores of one set of labelled texts."""
    texts = lc.tasks.labelled_texts(name, progress=False)
    study.check_classes(name, len(texts.classes))
    templates = templates_of(texts, study.templates)
    model = lc.load(study.pretrained, progress=False)
    twins = [(a, b) for a, b in texts.twins if a in templates]
    few = {
        (template, seed): _decomposed(study, model, texts, template, seed, max(study.labels))
        for template, seed in product(templates, seeds)
    }
    twin = {
        (b, seed): _decomposed(study, model, texts, b, seed, 0)
        for (_, b), seed in product(twins, seeds)
    }
    asked = {key: _split(parts, "query") for key, parts in (few | twin).items()}
    tables = [
        table.assign(template=template, seed=seed)
        for (template, seed), parts in asked.items()
        for table in (
            pd.DataFrame(
                [*extremes(parts), *kind_shares(parts), _error(few | twin, template, seed)]
            ),
            component_rows(parts),
        )
    ]
    tables += _transfers(asked, templates, twins, seeds)
    tables += _methods(study, few, {key: asked[key] for key in few}, templates, seeds)
    for template, seed, shots in product(templates, seeds, study.labels):
        more = _decomposed(study, model, texts, template, seed, shots, shots=shots)
        row = {"metric": "accuracy", "method": f"{shots}-shot", "value": more.model_accuracy}
        tables.append(pd.DataFrame([row]).assign(template=template, seed=seed))
    weights = lc.fingerprint(model)
    del model
    untrained = lc.load(study.pretrained, random_weights=True, progress=False)
    control = _decomposed(study, untrained, texts, templates[0], seeds[0], 0)
    shares = pd.DataFrame(kind_shares(control, "random weights"))
    tables.append(shares.assign(template=templates[0], seed=seeds[0]))
    scores = pd.concat(tables, ignore_index=True).assign(part="pretrained", data=name)
    return {
        "scores": scores,
        "weights": pd.DataFrame({"name": [study.pretrained], "fingerprint": [weights]}),
    }


def measure_heads(study: Options, seeds: Sequence[int]) -> dict[str, pd.DataFrame]:
    """ARI by task of every head's output, with one template for all sets."""
    model = lc.load(study.pretrained, progress=False)
    prompts = joined(
        [
            lc.tasks.classification(
                lc.tasks.labelled_texts(name, progress=False),
                model.tokenizer,
                template=COMMON,
                queries=study.cluster_queries,
                longest=study.longest,
                seed=seed,
            )
            for name, seed in product(study.data, seeds)
        ]
    )
    acts = lc.extract(model, prompts, "head", progress=False)
    options: dict[str, Any] = {"given": None, "permutations": study.permutations, "jobs": 1}
    with silenced("probes.clustering.clustering"):
        heads = probes.cluster(acts, kinds="head", **options).frame
        words = probes.cluster(probes.bag_of_tokens(prompts), **options).frame
    tables = [
        frame[frame["metric"] == "ari"][["block", "head", "value", "null_mean"]].assign(method=name)
        for name, frame in (
            ("model", heads.rename(columns={"layer": "block"})),
            ("words", words.rename(columns={"layer": "block"})),
        )
    ]
    scores = pd.concat(tables, ignore_index=True).assign(part="pretrained", metric="ari", seed=-1)
    weights = pd.DataFrame({"name": ["clusters"], "fingerprint": [acts.attrs["weights"]]})
    return {"scores": scores, "weights": weights}


def templates_of(texts: LabelledTexts, n: int) -> list[str]:
    """The first templates of a set, without their one-character variants."""
    second = {b for _, b in texts.twins}
    found = [name for name in texts.templates if name not in second]
    if n > len(found):
        raise lc.InputError(f"templates={n}: {texts.name} has {len(found)}: {', '.join(found)}")
    return found[:n]


def _decomposed(
    study: Options,
    model: Any,
    texts: LabelledTexts,
    template: str,
    seed: int,
    examples: int,
    *,
    shots: int | None = None,
) -> ComponentLogits:
    shots = max(4, len(texts.classes)) if shots is None else shots
    prompts = lc.tasks.classification(
        texts,
        model.tokenizer,
        template=template,
        shots=shots,
        examples=max(examples, shots),
        queries=study.queries,
        longest=study.longest,
        seed=seed,
    )
    return decompose(model, prompts, lc.tasks.choices(prompts), progress=False)


def _split(parts: ComponentLogits, split: str) -> ComponentLogits:
    return parts.take(np.flatnonzero(parts.data["split"].values == split))


def _error(prompted: Prompted, template: str, seed: int) -> dict[str, Any]:
    return {"metric": "error", "method": "sum", "value": prompted[template, seed].error}


def _transfers(
    asked: Prompted,
    templates: Sequence[str],
    twins: Sequence[tuple[str, str]],
    seeds: Sequence[int],
) -> Iterator[pd.DataFrame]:
    """Agreement of component accuracies over demonstrations and templates, by seed."""
    for place, seed in enumerate(seeds):
        pairs = [("templates", (a, seed), (b, seed)) for a, b in combinations(templates, 2)]
        pairs += [("twins", (a, seed), (b, seed)) for a, b in twins]
        if len(seeds) > 1:
            # Pairs in a circle, so that every seed is in equally many.
            other = seeds[(place + 1) % len(seeds)]
            pairs += [("demonstrations", (a, seed), (a, other)) for a in templates]
        rows = []
        for method, one, two in pairs:
            alike = asked[one].transfer(asked[two])
            gap = abs(asked[one].model_accuracy - asked[two].model_accuracy)
            values = {"correlation": alike.correlation, "jaccard": alike.jaccard, "gap": gap}
            rows += [{"metric": m, "method": method, "value": v} for m, v in values.items()]
        means = pd.DataFrame(rows).groupby(["metric", "method"], sort=False)["value"].mean()
        yield means.reset_index().assign(template="all", seed=seed)


def _methods(
    study: Options,
    few: Prompted,
    asked: Prompted,
    templates: Sequence[str],
    seeds: Sequence[int],
) -> Iterator[pd.DataFrame]:
    """Accuracy of reweighting, calibration and prompt selection from labelled examples."""
    for n_labels in study.labels:
        learnt = {}
        for key, parts in few.items():
            examples = _split(parts, "example")
            shown = int(parts.data["shots"].values[0])
            learnt[key] = examples.take(np.arange(n_labels - shown))
        found = relearned(
            list(learnt.values()), list(asked.values()), n_labels, full=n_labels == study.labels[-1]
        )
        for (template, seed), rows in zip(learnt, found, strict=True):
            yield pd.DataFrame(rows).assign(template=template, seed=seed)
        for seed in seeds:
            chosen = templates[select_prompt([learnt[t, seed] for t in templates])]
            row = {"metric": "accuracy", "method": f"prompt selection {n_labels}"}
            row |= {"value": asked[chosen, seed].model_accuracy, "template": "all", "seed": seed}
            yield pd.DataFrame([row])
