"""The study of demonstrations: its claims can fail, its links are right, and it runs end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from transformers import LlamaConfig, LlamaForCausalLM

import lensclust as lc
import probes
from studies.icl_representations import ICLRepresentations
from studies.icl_representations.changes import in_their_span, link, own_alignment
from studies.icl_representations.claims import POOLED, claims, vanished
from studies.icl_representations.figures import pictures
from studies.icl_representations.options import LINES, NONE, PERSONA, READING, SHOWN, WRONG
from studies.icl_representations.prompts import KINDS
from tests.tiny import byte_tokenizer

SEEDS, LAYERS, CONDITIONS = range(4), range(5), ("plain", "liar")
WORD_TASKS, SHOTS = ("plural", "past", "opposite"), (1, 4)
KINDS_OF_PROMPT = ("told", "shown", "told and shown")

# A world in which every claim holds: what is measured, by where and when.
GOOD: dict[str, Callable[..., float]] = {
    "confidence": lambda task, variant: {NONE: -4.0, SHOWN: -2.0, WRONG: -2.5}[variant],
    "alignment": lambda task, variant, name: (
        0.1 + (variant == SHOWN) * (0.3 if (task == PERSONA) == (name == "name") else 0.1)
    ),
    "decodability": lambda task, variant: {NONE: 0.4, SHOWN: 0.6, WRONG: 0.5}[variant],
    "log ratio": lambda task, variant: {NONE: 0.1, SHOWN: 0.5}[variant],
    "link": lambda task, method: 0.4,
    "condition": lambda method, place: place,
    "patched": lambda method, layer: {"others, shown": 0.2 * layer}.get(method, 0.05 * layer),
    "cut": lambda method: {"answers": -1.0, "other tokens": -0.2}.get(method, -1.5),
    "neighbours": lambda place: place,
    "nearest": lambda centred: 0.8 if centred else 0.6,
    "silhouette": lambda kind: {"told": 0.1, "shown": 0.2}.get(kind, 0.3),
    "vector": lambda method, half, layer: (
        (0.1 * layer if half == "fitted" else 0.5) * ("," not in method)
    ),
}


def world(**changes: Callable[..., float]) -> pd.DataFrame:
    """Scores as the study collects them, with a little noise."""
    rule = GOOD | {name.replace("_", " "): change for name, change in changes.items()}
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []

    def add(value: float, **labels: Any) -> None:
        rows.append({**labels, "value": value + 0.004 * rng.uniform(-1, 1)})

    null = {"null_mean": 0.2, "null_std": 0.05, "p": 0.01}
    for seed in SEEDS:
        for task, kind in KINDS.items():
            own: dict[str, Any] = {"part": "questions", "seed": seed, "task": task}
            for variant in (NONE, SHOWN, WRONG):
                each = {**own, "variant": variant}
                add(rule["confidence"](task, variant), **each, metric="confidence", template="a")
                for metric in ("right", "complies", "error", "unreadable"):
                    add(0.5, **each, metric=metric, template="a")
                for layer in LAYERS:
                    place = {**each, "layer": layer, **null}
                    for pooled in POOLED.values() if task == READING and variant != WRONG else ():
                        add(0.1, **place, **pooled, metric="alignment")
                    for name in (kind.answer, *kind.others, "combined"):
                        for controlled in (False, True):
                            add(
                                rule["alignment"](task, variant, name),
                                **place,
                                metric="alignment",
                                method="answer",
                                hypothesis=name,
                                controlled=controlled,
                            )
                    value = rule["decodability"](task, variant)
                    add(value, **place, metric="decodability", hypothesis=kind.answer)
                    for method in ("attention", "value") if variant != WRONG else ():
                        value = rule["log ratio"](task, variant)
                        add(
                            value,
                            **{**place, "layer": layer + 1},
                            metric="log ratio",
                            method=method,
                        )
            for method in (
                "alignment", "decodability", "attention ratio", "attention ratio, value"
            ):  # fmt: skip
                for layer in LAYERS:
                    here = {**own, "layer": layer, "method": method}
                    for controlled in (False, True):
                        add(
                            rule["link"](task, method),
                            **here,
                            metric="link",
                            controlled=controlled,
                            p_corrected=0.01,
                            vanished=0.0,
                        )
                    for n in range(6):
                        add(
                            rule["condition"](method, n / 6),
                            **here,
                            metric="condition change",
                            variant=str(n),
                            behaviour=n / 6,
                        )
        own = {"part": "questions", "seed": seed, "task": READING}
        add(2.0, **own, metric="gap")
        for method in ("own, shown", "others, shown", "others, none", "own, none"):
            for layer in LAYERS:
                value = rule["patched"](method, layer)
                add(value, **own, metric="patched", method=method, layer=layer)
        for method in ("answers", "other tokens", "all but the first"):
            add(rule["cut"](method), **own, metric="cut", method=method)
        own = {"part": "words", "seed": seed}
        for kind_of in KINDS_OF_PROMPT:
            add(0.5, **own, metric="word accuracy", variant=kind_of)
            for layer in LAYERS:
                value = rule["silhouette"](kind_of)
                add(value, **own, **null, metric="silhouette", variant=kind_of, layer=layer)
            for other in KINDS_OF_PROMPT:
                for layer in LAYERS if other != kind_of else ():
                    for centred in (False, True):
                        add(
                            rule["nearest"](centred),
                            **own,
                            **null,
                            metric="nearest",
                            layer=layer,
                            method=f"{kind_of} by {other}",
                            controlled=centred,
                        )
        cells = [(task, shots) for task in WORD_TASKS for shots in SHOTS]
        for n, (task, shots) in enumerate(cells):
            for layer in LAYERS:
                add(
                    rule["neighbours"](n / len(cells)),
                    **own,
                    **null,
                    metric="neighbours",
                    task=task,
                    shots=shots,
                    layer=layer,
                    behaviour=n / len(cells),
                )
        for task in WORD_TASKS:
            for method in (
                "task vector",
                "task vector, random direction",
                "function vector",
                "function vector, other heads",
                "function vector, random direction",
            ):
                for half in ("fitted", "tested"):
                    for layer in LAYERS:
                        value = rule["vector"](method, half, layer)
                        here = {**own, "task": task, "metric": "vector", "method": method}
                        add(value, **here, variant=half, layer=layer)
            for method in ("nothing", "demonstrations"):
                add(0.3, **own, task=task, metric="vector", method=method, variant="tested")
    return pd.DataFrame(rows)


def verdicts(scores: pd.DataFrame) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in claims(scores)}


def test_a_world_in_which_every_claim_holds():
    found = verdicts(world())
    assert len(found) == 25
    assert set(found.values()) == {"supported"}, found


@pytest.mark.parametrize(
    ("refuted", "changes"),
    [
        (
            {f"behaviour-{LINES}"},
            {"confidence": lambda t, v: -5.0 if (t, v) == (LINES, SHOWN) else -4.0 + (v == SHOWN)},
        ),
        (
            {"right-demonstrations"},
            {"confidence": lambda t, v: {NONE: -4.0, SHOWN: -2.0}.get(v, -1)},
        ),
        (
            {f"alignment-{READING}"},
            {
                "alignment": lambda t, v, name: GOOD["alignment"](t, v, name)
                if t != READING
                else 0.3 - 0.1 * (v == SHOWN)
            },
        ),
        (
            {f"decodability-{LINES}"},
            {"decodability": lambda t, v: 0.5 + 0.2 * (v == SHOWN) * (-1 if t == LINES else 1)},
        ),
        (
            {f"attention-{READING}"},
            {"log_ratio": lambda t, v: -0.5 * (v == SHOWN) if t == READING else 0.5 * (v == SHOWN)},
        ),
        (
            {"name-over-activity"},
            {"alignment": lambda t, v, name: 0.1 + (v == SHOWN) * (0.1 if name == "name" else 0.2)},
        ),
        ({"link-alignment"}, {"link": lambda t, m: -0.2 if m == "alignment" else 0.2}),
        ({"link-decodability"}, {"link": lambda t, m: -0.2 if m == "decodability" else 0.2}),
        ({"link-attention-ratio"}, {"link": lambda t, m: -0.2 if "attention" in m else 0.2}),
        ({"conditions-alignment"}, {"condition": lambda m, x: x if m != "alignment" else -x}),
        ({"conditions-decodability"}, {"condition": lambda m, x: -x if m == "decodability" else x}),
        ({"conditions-attention-ratio"}, {"condition": lambda m, x: -x if "attention" in m else x}),
        ({"one-position"}, {"patched": lambda m, layer: -1.0 if m == "others, shown" else 0.0}),
        ({"answers-seen"}, {"cut": lambda m: -0.1 if m == "answers" else -0.9}),
        ({"neighbours"}, {"neighbours": lambda x: 1 - x}),
        ({"one-cluster"}, {"nearest": lambda centred: 0.6 if centred else 0.1}),
        ({"kinds-apart"}, {"nearest": lambda centred: 0.5 if centred else 0.7}),
        ({"sharper"}, {"silhouette": lambda kind: 0.5 if kind == "told" else 0.2}),
        (
            {"task-vector", "function-vector"},
            {"vector": lambda m, half, layer: 0.5 if "," in m else 0.1},
        ),
    ],
)  # fmt: skip
def test_worlds_in_which_a_claim_fails(refuted, changes):
    found = verdicts(world(**changes))
    assert {name for name, verdict in found.items() if verdict == "contradicted"} == refuted


def test_a_vector_that_does_nothing_is_negligible():
    found = verdicts(world(vector=lambda m, half, layer: 0.0))
    assert {found["task-vector"], found["function-vector"]} <= {"negligible", "inconclusive"}


def test_a_layer_is_chosen_where_its_effect_is_not_reported():
    """Noise in each seed's own best layer must not count: the others choose."""
    rng = np.random.default_rng(0)
    noise = {}
    scores = world(
        patched=lambda method, layer: (
            noise.setdefault(len(noise), rng.normal()) if method == "others, shown" else 0.0
        )
    )
    claim = next(c for c in claims(scores) if c.id == "one-position")
    assert claim.verdict == "inconclusive"
    own_best = scores.query("metric == 'patched' and method == 'others, shown'")
    assert own_best.groupby("seed")["value"].max().min() > claim.estimate


def test_one_seed_decides_nothing():
    scores = world()
    assert set(verdicts(scores[scores["seed"] == 0]).values()) == {"inconclusive"}


def test_every_figure_draws():
    assert all(chart.to_dict() for chart in pictures(world()).values())


def test_links_that_are_gone_are_marked():
    scores = world()
    gone = (scores["metric"] == "link") & (scores["task"] == LINES) & (scores["layer"] < 2)
    scores.loc[gone & (scores["method"] == "alignment"), "vanished"] = 1.0
    (sentence,) = vanished(scores)
    assert sentence.endswith(f"alignment in {LINES}: {2 * len(SEEDS)} of {5 * len(SEEDS)}.")
    (sentence,) = vanished(world())
    assert sentence.startswith("No link between prompts vanishes")


# -- links -----------------------------------------------------------------------------------------


def planted(
    seed: int, *, n: int = 24, wordings: int = 2, by_length: float = 0.0, truly: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, pd.DataFrame]:
    """Three layers of noise; behaviour follows the second, or length drives both."""
    rng = np.random.default_rng(seed)
    items = np.repeat(np.arange(n), wordings)
    shuffled = rng.permutation(len(items))
    length = rng.normal(size=n)[items]
    of_item = rng.normal(size=(2, n))[:, items]
    change = rng.normal(size=(3, len(items))) + of_item[0]
    change[1] += by_length * length
    wording = np.tile(np.arange(wordings), n)
    behaviour = 0.5 * rng.normal(size=len(items)) + of_item[1] + by_length * length
    behaviour += truly * change[1] + wording
    covariates = pd.DataFrame({"length": length, "template": wording.astype(str)})
    # Blocks are made of items wherever they stand.
    return (
        change[:, shuffled],
        behaviour[shuffled],
        items[shuffled],
        covariates.iloc[shuffled].reset_index(drop=True),
    )


def links(*given: Any, permutations: int = 99) -> pd.DataFrame:
    change, behaviour, items, covariates = given
    # In an item, wordings stand in the same order.
    order = np.lexsort((covariates["template"], items))
    return link(
        change[:, order],
        behaviour[order],
        items=items[order],
        covariates=covariates.iloc[order],
        permutations=permutations,
        seed=0,
    )


def test_a_link_is_the_rank_correlation_and_its_partial():
    spearman: Any = stats.spearmanr
    pearson: Any = stats.pearsonr
    change, behaviour, items, covariates = planted(0, truly=0.5)
    found = links(change, behaviour, items, covariates)
    for layer in range(3):
        plain, partial = found[found["layer"] == layer].sort_values("controlled")["value"]
        assert np.isclose(plain, spearman(change[layer], behaviour).statistic)
        design = np.column_stack([np.ones(len(items)), pd.get_dummies(covariates, dtype=float)])
        rest = [
            ranks - design @ np.linalg.lstsq(design, ranks, rcond=None)[0]
            for ranks in (stats.rankdata(change[layer]), stats.rankdata(behaviour))
        ]
        assert np.isclose(partial, pearson(*rest).statistic)


def test_a_true_link_stays_and_one_through_length_vanishes():
    stays = links(*planted(1, truly=1.0)).query("layer == 1").set_index("controlled")
    assert (stays["p_corrected"] < 0.05).all()
    assert (stays["low"] > 0).all()
    assert not stays["vanished"].any()
    gone = links(*planted(1, by_length=3.0)).query("layer == 1").set_index("controlled")
    assert gone.loc[False, "p_corrected"] < 0.05 < gone.loc[True, "p_corrected"]
    assert gone["vanished"].all()


def test_without_a_link_few_are_found():
    """Wordings of an item are alike, and still there are no more finds than 5 % over layers."""
    runs = [links(*planted(seed), permutations=39) for seed in range(120)]
    found = [run[run["controlled"]]["p_corrected"].min() <= 0.05 for run in runs]
    assert stats.binomtest(sum(found), len(found), 0.05, alternative="greater").pvalue > 0.01


def test_what_cannot_be_correlated_has_no_value():
    change, behaviour, items, covariates = planted(2)
    change[0], change[2, 3] = 1.0, np.nan
    found = links(change, behaviour, items, covariates)
    assert found[found["layer"] != 1][["value", "p", "p_corrected"]].isna().all(axis=None)
    assert found[found["layer"] == 1]["value"].notna().all()


# -- alignment of a prompt -------------------------------------------------------------------------


def test_a_prompt_is_aligned_where_its_label_is_in_its_state():
    rng = np.random.default_rng(0)
    label, template = np.repeat(list("abcd"), 6), np.tile(["s", "t"], 12)
    means = {name: rng.normal(size=30) for name in "abcdst"}
    noise = rng.normal(size=(3, 24, 30))
    noise[1] += [3 * means[name] for name in label]
    noise[2] += [9 * means[name] for name in template]
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), noise.transpose(1, 0, 2)[:, None])},
        {
            "label": ("prompt", label),
            "template": ("prompt", template),
            "layer": range(3),
            "position": ["answer"],
        },
    )
    found = own_alignment(acts, "label")
    assert found.shape == (3, 24)
    assert found[1].min() > 0.3
    # Neither noise nor the wording is the label.
    assert abs(found[0].mean()) < 0.1
    assert abs(found[2].mean()) < 0.1


def test_a_probe_finds_the_same_in_the_span_of_the_states():
    rng = np.random.default_rng(0)
    label, group = np.repeat(list("ab"), 8), np.tile(list("stuv"), 4)
    states = rng.normal(size=(16, 1, 3, 40)) + 0.5 * (label == "a")[:, None, None, None]
    acts = xr.Dataset(
        {"resid": (("prompt", "position", "layer", "d_model"), states)},
        {
            "label": ("prompt", label),
            "group": ("prompt", group),
            "layer": range(3),
            "position": ["answer"],
        },
    )
    reduced, share = in_their_span(acts)
    assert share == 16 / 40
    options: dict[str, Any] = {"target": "label", "groups": "group", "folds": 4, "control": None}
    options |= {"permutations": 20, "jobs": 1}
    full, same = (
        probes.probe(each, penalties=[penalty], **options).frame
        for each, penalty in ((acts, 1e-2), (reduced, 1e-2 * share))
    )
    columns = ["layer", "metric", "value", "null_mean", "p"]
    pd.testing.assert_frame_equal(full[columns], same[columns])
    assert full["value"].max() > 0.6


# -- end to end ------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "shots": 2, "names": 3, "activities": 2, "slopes": 2, "intercepts": 2, "persona_names": 2,
    "persona_activities": 2, "templates": 2, "word_tasks": ("plural", "past", "opposite"),
    "word_shots": (1, 2), "word_queries": 3, "vector_shots": 2, "top_heads": 2, "layer_stride": 1,
    "permutations": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=24, intermediate_size=48,
                num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3,
                max_position_embeddings=1024, bos_token_id=1, eos_token_id=1, pad_token_id=1,
            )
        )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_end_to_end_and_resumed(tmp_path: Path, byte_model: str):
    study = ICLRepresentations(**TINY, model=byte_model)
    out = tmp_path / "run"
    findings = study.execute(out, seeds=1, jobs=1, progress=False)
    assert len(findings.claims) == 25
    assert {claim.verdict for claim in findings.claims} == {"inconclusive"}
    scores = findings.scores
    for task in KINDS:
        own = scores[scores["task"] == task]
        for metric in ("confidence", "alignment", "decodability", "log ratio", "link"):
            rows = own[own["metric"] == metric]
            assert set(rows["seed"]) == {0}, (task, metric)
        assert own[own["metric"] == "confidence"]["value"].lt(0).all()
    errors = scores[scores["metric"] == "unreadable"]["value"]
    assert errors.between(0, 1).all()
    gap = scores[scores["metric"] == "gap"].set_index("seed")["value"]
    # All of the state after the last block brings all of the answer with it.
    last = scores.query("metric == 'patched' and method == 'own, shown' and layer == 2")
    np.testing.assert_allclose(last.set_index("seed")["value"], gap, atol=1e-4)
    assert (out / "report.html").exists()
    before = (out / "claims.json").read_bytes()
    study.execute(out, seeds=1, jobs=1, progress=False, resume=True)
    assert (out / "claims.json").read_bytes() == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shots": 1}, "shots=1: expected at least 2"),
        ({"names": 2}, "names=2: expected at least 3"),
        ({"names": 23}, "names=23 with distractors=1, expected 2 to 22"),
        ({"persona_activities": 1}, "persona_activities=1: expected at least 2"),
        ({"slopes": 17}, "slopes=17 with distractors=1, expected 2 to 16"),
        ({"templates": 4}, "templates=4: expected at most 3"),
        ({"word_tasks": ("plural", "past", "future")}, "word_tasks: no task 'future': there are"),
        ({"word_tasks": ("plural", "past")}, "expected three or more, all different"),
        ({"word_shots": (4,)}, r"word_shots=\(4,\): expected two rising numbers or more"),
        ({"word_shots": (8, 4)}, r"word_shots=\(8, 4\): expected two rising numbers or more"),
        ({"word_queries": 7}, "word_queries=7: expected 3 to 6"),
        ({"vector_shots": 13}, "vector_shots=13: expected at most 12"),
        ({"word_shots": (1, 13)}, "word_shots=13: expected at most 12"),
        ({"permutations": 1}, "permutations=1: expected at least 2"),
    ],
)
def test_unusable_fields_are_one_line_and_nothing_is_written(tmp_path, fields, message):
    out = tmp_path / "run"
    with pytest.raises(lc.InputError, match=message) as caught:
        ICLRepresentations(**fields).execute(out, progress=False)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_every_preset_can_be_run():
    for fields in ICLRepresentations.presets.values():
        ICLRepresentations(**fields).check()
