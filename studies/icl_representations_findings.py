"""What the scores of questions and words say: the study's claims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide
from studies.frames import rank_correlations, where
from studies.icl_representations import NONE, SHOWN, WRONG
from studies.icl_representations_questions import KINDS, LINES, PERSONA, READING
from studies.icl_representations_tables import Questions, Words, at_layers, elsewhere_best
from studies.icl_representations_words import BOTH, TOLD

PAPER: dict[str, Any] = {
    "source": "Yousefi et al., arXiv 2310.00313",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
Labels = dict[str, Any]
WORDING = {
    READING: "who does what",
    LINES: "points on lines",
    PERSONA: "who does what behind a persona",
}
LINKS = {
    "alignment": "alignment with the answer's hypothesis",
    "attention ratio": "attention on what is relevant",
}


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide all claims."""
    seen, words = Questions.of(scores), Words.of(scores)
    return [
        *_behaviour(seen),
        *_changes(seen),
        *_links(seen),
        *_causes(seen),
        *_words(words),
    ]


def vanished(scores: pd.DataFrame) -> list[str]:
    """A sentence on the links that are gone once wording and length are taken out."""
    rows = where(scores, metric="link", controlled=False)
    rows = rows[rows["p_corrected"] <= 0.05]
    if rows.empty:
        return ["No link between prompts is there at 5 % in any layer, controlled or not."]
    counts = rows.groupby(["task", "method"], sort=False)["vanished"].agg(["sum", "size"])
    found = [
        f"{method} in {task}: {int(gone)} of {total}"
        for (task, method), gone, total in counts.itertuples()
        if gone
    ]
    if not found:
        return ["No link between prompts vanishes with template, condition and lengths taken out."]
    return [
        "Links between prompts that vanish with template, condition and lengths taken out "
        f"(layers of seeds, of those that had one): {'; '.join(found)}."
    ]


def _behaviour(seen: Questions) -> list[lc.Claim]:
    found = []
    for task in KINDS:
        control = {
            "wrongly dealt answers": _mean(seen.gain("confidence", task, WRONG)),
            "right, none": _mean(seen.behaviour("right", task, NONE)),
            "right, shown": _mean(seen.behaviour("right", task, SHOWN)),
        }
        if task == LINES:
            for metric in ("error", "unreadable"):
                control |= {
                    f"{metric}, {name}": _mean(seen.behaviour(metric, task, name))
                    for name in (NONE, SHOWN)
                }
        if task == PERSONA:
            control |= {
                f"complies, {name}": _mean(seen.behaviour("complies", task, name))
                for name in (NONE, SHOWN)
            }
        found.append(
            decide(
                f"behaviour-{task}",
                f"Demonstrations make the right answer more probable ({WORDING[task]}; log "
                "probability gained, nats)",
                seen.gain("confidence", task),
                control=control,
                at_least=0,
                **PAPER,
            )
        )
    right, wrong = (
        np.mean([seen.behaviour("confidence", task, name) for task in KINDS], axis=0)
        for name in (SHOWN, WRONG)
    )
    found.append(
        decide(
            "right-demonstrations",
            "and right ones more than those whose answers are dealt wrongly (mean over tasks)",
            right - wrong,
            control={"right": _mean(right), "wrong": _mean(wrong)},
            at_least=0,
            **OURS,
        )
    )
    return found


def _changes(seen: Questions) -> list[lc.Claim]:
    found = []
    for task in (READING, LINES):
        answer = KINDS[task].answer
        asked: list[tuple[str, str, str, Labels, dict[str, Labels]]] = [
            (
                "alignment",
                "alignment",
                f"States line up more with the hypothesis of the {answer} behind demonstrations "
                "(Spearman, length and wording taken out",
                {"hypothesis": answer, "controlled": True},
                {"left in": {"hypothesis": answer, "controlled": False}},
            ),
            (
                "decodability",
                "decodability",
                f"The {answer} can be decoded better behind demonstrations (balanced accuracy on "
                f"{KINDS[task].others[0]}s not seen",
                {},
                {},
            ),
            (
                "attention",
                "log ratio",
                "Attention shifts to what is relevant behind demonstrations (log ratio to what is "
                "not",
                {"method": "attention"},
                {"weighted by values": {"method": "value"}},
            ),
        ]
        for id, metric, what, labels, others in asked:
            control = {
                name: _mean(seen.change(metric, task, **each)) for name, each in others.items()
            }
            control["lower half"] = _mean(seen.change(metric, task, lower=True, **labels))
            if id != "attention":
                control["wrongly dealt answers"] = _mean(seen.change(metric, task, WRONG, **labels))
            for name in (NONE, SHOWN):
                table = seen.by_layer(metric, task, name, **labels)
                control[f"level, {name}"] = _mean(seen.over_layers(table))
            found.append(
                decide(
                    f"{id}-{task}",
                    f"{what}; {WORDING[task]}, mean change over layers)",
                    seen.change(metric, task, **labels),
                    control=control,
                    at_least=0,
                    **PAPER,
                )
            )
    closer = {
        task: {
            name: seen.change("alignment", task, hypothesis=name, controlled=True)
            for name in ("name", "activity")
        }
        for task in (READING, PERSONA)
    }
    found.append(
        decide(
            "name-over-activity",
            "Behind a persona, demonstrations move states towards the hypothesis of the name more "
            "than towards that of the activity, though the answer is an activity",
            closer[PERSONA]["name"] - closer[PERSONA]["activity"],
            control={
                **{name: _mean(values) for name, values in closer[PERSONA].items()},
                **{
                    f"{name}, without persona": _mean(values)
                    for name, values in closer[READING].items()
                },
            },
            at_least=0,
            **PAPER,
        )
    )
    return found


def _links(seen: Questions) -> list[lc.Claim]:
    found = []
    for method, what in LINKS.items():
        own, raw = (
            {task: seen.links(task, method, controlled=controlled) for task in KINDS}
            for controlled in (True, False)
        )
        both = [READING, LINES]
        control = {
            "covariates left in": _over(seen, raw, both),
            "lower half": _over(seen, own, both, lower=True),
            **{task: _over(seen, own, [task]) for task in KINDS},
        }
        if method == "attention ratio":
            weighted = {
                task: seen.links(task, f"{method}, value", controlled=True) for task in both
            }
            control["weighted by values"] = _over(seen, weighted, both)
        found.append(
            decide(
                f"link-{method.replace(' ', '-')}",
                f"Prompts whose {what} grows are those whose right answer becomes more probable "
                "(rank correlation, wording and lengths taken out, mean over layers and two tasks)",
                np.mean([seen.over_layers(own[task]) for task in both], axis=0),
                control=control,
                at_least=0,
                **PAPER,
            )
        )
        found.append(
            decide(
                f"conditions-{method.replace(' ', '-')}",
                f"Wordings and personas in which {what} grows are those in which the right answer "
                "becomes more probable (correlation, means of tasks taken out, mean over layers)",
                seen.over_conditions(method),
                control={"over prompts": found[-1].estimate},
                at_least=0,
                **PAPER,
            )
        )
    return found


def _causes(seen: Questions) -> list[lc.Claim]:
    shown, none = seen.patched("others, shown"), seen.patched("others, none")
    layers = elsewhere_best(shown - none)
    cuts = {
        name: seen.causes("cut", name) for name in ("answers", "other tokens", "all but the first")
    }
    return [
        decide(
            "one-position",
            "The last state behind demonstrations, averaged over prompts that ask something else, "
            "makes the right answer more probable in a prompt without any (log probability "
            "gained over the same mean without demonstrations, at the layer best in other seeds)",
            at_layers(shown - none, layers),
            control={
                "demonstrations": _mean(seen.gap()),
                "over nothing patched": _mean(at_layers(shown, layers)),
                "own state": _mean(at_layers(seen.patched("own, shown"), layers)),
                "own state, put back": _mean(at_layers(seen.patched("own, none"), layers)),
                "mean over layers": float((shown - none).mean(axis=None)),
            },
            at_least=0,
            **OURS,
        ),
        decide(
            "answers-seen",
            "The question draws on the demonstrations' answers more than on as many other tokens "
            "of them (log probability lost when they are out of sight, one less the other)",
            cuts["other tokens"] - cuts["answers"],
            control={
                "demonstrations": _mean(seen.gap()),
                **{f"hidden: {name}": _mean(values) for name, values in cuts.items()},
            },
            at_least=0,
            **OURS,
        ),
    ]


def _words(words: Words) -> list[lc.Claim]:
    near = words.neighbours()
    for name, group in {"within shots": "shots", "within tasks": "task"}.items():
        means = near.groupby(["seed", group])[["value", "behaviour"]].transform("mean")
        near[[f"value {name}", f"behaviour {name}"]] = near[["value", "behaviour"]] - means
    across = {
        f"{own} by {other}": words.nearest(f"{own} by {other}")
        for own in (TOLD, SHOWN)
        for other in (TOLD, SHOWN)
        if own != other
    }
    chance = _mean(words.nearest(f"{TOLD} by {SHOWN}", "null_mean"))
    sharper = words.silhouette(BOTH) - words.silhouette(TOLD)
    vectors = []
    for name, control, source in (
        ("task vector", "random direction", "Hendel et al., arXiv 2310.15916"),
        ("function vector", "other heads", "Todd et al., arXiv 2310.15213"),
    ):
        own, other = words.vector(name), words.vector(f"{name}, {control}", like=name)
        vectors.append(
            decide(
                name.replace(" ", "-"),
                f"A {name} makes a query without instruction or demonstrations answered as the "
                f"task asks (accuracy over its control, {control}; words it was not made from)",
                own - other,
                control={
                    name: _mean(own),
                    control: _mean(other),
                    "nothing": _mean(words.vector("nothing")),
                    "demonstrations": _mean(words.vector("demonstrations")),
                },
                at_least=0,
                source=source,
                origin="reconstruction",
            )
        )
    return [
        decide(
            "neighbours",
            "Tasks and numbers of demonstrations whose prompts have neighbours of their own task "
            "are answered better (rank correlation of neighbours' accuracy, mean over layers, "
            "with the model's)",
            rank_correlations(near, "value", "behaviour", by="seed").to_numpy(),
            control={
                name: _mean(
                    rank_correlations(
                        near, f"value {name}", f"behaviour {name}", by="seed"
                    ).to_numpy()
                )
                for name in ("within shots", "within tasks")
            }
            | {
                "neighbours": float(near["value"].mean()),
                "chance": float(near["null_mean"].mean()),
            },
            at_least=0,
            source="Han et al., arXiv 2412.12276",
            origin="reconstruction",
        ),
        *vectors,
        decide(
            "one-cluster",
            "A task that is told and the same task that is shown lie together (share of prompts "
            "nearest to their task's mean of the other kind, over swapped names, mean over layers)",
            np.mean(list(across.values()), axis=0) - chance,
            control={
                **{name: _mean(values) for name, values in across.items()},
                **{
                    f"{name}, kinds' means taken out": _mean(words.nearest(name, centred=True))
                    for name in across
                },
                "swapped names": chance,
                f"{BOTH} by {TOLD}": _mean(words.nearest(f"{BOTH} by {TOLD}")),
                f"{BOTH} by {SHOWN}": _mean(words.nearest(f"{BOTH} by {SHOWN}")),
            },
            at_least=0,
            **OURS,
        ),
        decide(
            "kinds-apart",
            "though the kinds lie apart: tasks are found better with the kinds' means taken out",
            np.mean(
                [words.nearest(name, centred=True) - values for name, values in across.items()],
                axis=0,
            ),
            control={"left in": _mean(np.mean(list(across.values()), axis=0)), "chance": chance},
            at_least=0,
            **OURS,
        ),
        decide(
            "sharper",
            "Demonstrations behind an instruction make tasks lie further apart (silhouette, "
            "gained over the instruction alone, mean over layers)",
            sharper,
            control={
                **{kind: _mean(words.silhouette(kind)) for kind in (TOLD, SHOWN, BOTH)},
                **{
                    f"accuracy, {kind}": _mean(words.accuracy(kind)) for kind in (TOLD, SHOWN, BOTH)
                },
            },
            at_least=0,
            **OURS,
        ),
    ]


def _over(
    seen: Questions, tables: dict[str, pd.DataFrame], tasks: Sequence[str], *, lower: bool = False
) -> float:
    return _mean(np.mean([seen.over_layers(tables[task], lower=lower) for task in tasks], axis=0))


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values))
