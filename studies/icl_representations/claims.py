"""The claims on questions and words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide
from studies.icl_representations.claims_words import OURS, word_claims
from studies.icl_representations.measures import Questions, Words, at_layers, elsewhere_best, mean
from studies.icl_representations.options import LINES, NONE, PERSONA, READING, SHOWN, WRONG
from studies.icl_representations.prompts import KINDS
from studies.scales import AGREEMENT, NATS, SHARE, SMALL, WEAK
from studies.scores import where

PAPER: dict[str, Any] = {
    "source": "Yousefi et al., arXiv 2310.00313",
    "origin": "reconstruction",
}
Labels = dict[str, Any]
POOLED: dict[str, Labels] = {
    f"{how} of the query{words}": {
        "hypothesis": KINDS[READING].answer,
        "controlled": True,
        "method": f"query_{how}{words}",
    }
    for how in ("max", "mean")
    for words in ("", ", standardised")
}
# Smallest differences that matter, by measure.
SMALLEST: dict[str, Labels] = {
    "alignment": {"margin": SMALL, "scale": AGREEMENT.gain},
    "decodability": {"margin": SMALL, "scale": SHARE.gain},
    "log ratio": {"margin": NATS},
}
WORDING = {
    READING: "who does what",
    LINES: "points on lines",
    PERSONA: "who does what behind a persona",
}
LINKS = {
    "alignment": "alignment with the hypothesis of the answer",
    "decodability": "decodability of the answer",
    "attention ratio": "attention to the relevant part",
}


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide all claims."""
    seen, words = Questions.of(scores), Words.of(scores)
    return [
        *_behaviour(seen),
        *_changes(seen),
        *_links(seen),
        *_causes(seen),
        *word_claims(words),
    ]


def vanished(scores: pd.DataFrame) -> list[str]:
    """A sentence on the links that vanish once wording and length are partialled out."""
    rows = where(scores, metric="link", controlled=False)
    rows = rows[rows["p_corrected"] <= 0.05]
    if rows.empty:
        return ["No link between prompts is significant at 5 % in any layer, controlled or not."]
    counts = rows.groupby(["task", "method"], sort=False)["vanished"].agg(["sum", "size"])
    found = [
        f"{method} in {task}: {int(gone)} of {total}"
        for (task, method), gone, total in counts.itertuples()
        if gone
    ]
    if not found:
        return [
            "No link between prompts vanishes once template, condition and lengths are controlled."
        ]
    return [
        "Links between prompts that vanish once template, condition and lengths are controlled "
        f"(layers of seeds, of those with a link): {'; '.join(found)}."
    ]


def _behaviour(seen: Questions) -> list[lc.Claim]:
    found = []
    for task in KINDS:
        control = {
            "shuffled answers": mean(seen.gain("confidence", task, WRONG)),
            "right, none": mean(seen.behaviour("right", task, NONE)),
            "right, shown": mean(seen.behaviour("right", task, SHOWN)),
        }
        if task == LINES:
            for metric in ("error", "unreadable"):
                control |= {
                    f"{metric}, {name}": mean(seen.behaviour(metric, task, name))
                    for name in (NONE, SHOWN)
                }
        if task == PERSONA:
            control |= {
                f"complies, {name}": mean(seen.behaviour("complies", task, name))
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
                margin=NATS,
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
            "Demonstrations with right answers make the right answer more probable than "
            "demonstrations with shuffled answers (log probability, nats, mean over tasks)",
            right - wrong,
            control={"right": mean(right), "wrong": mean(wrong)},
            at_least=0,
            margin=NATS,
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
                f"Demonstrations align states more with the hypothesis of the {answer} (Spearman, "
                "length and wording partialled out",
                {"hypothesis": answer, "controlled": True, "method": "answer"},
                {
                    "left in": {"hypothesis": answer, "controlled": False, "method": "answer"},
                    **(POOLED if task == READING else {}),
                },
            ),
            (
                "decodability",
                "decodability",
                f"Demonstrations make the {answer} more decodable (balanced accuracy on unseen "
                f"{KINDS[task].others[0]}s",
                {},
                {},
            ),
            (
                "attention",
                "log ratio",
                "Demonstrations shift attention to the relevant part of the query (log ratio to "
                "the irrelevant part",
                {"method": "attention"},
                {"weighted by values": {"method": "value"}},
            ),
        ]
        for id, metric, what, labels, others in asked:
            control = {
                name: mean(seen.change(metric, task, **each)) for name, each in others.items()
            }
            control["lower half"] = mean(seen.change(metric, task, lower=True, **labels))
            if id != "attention":
                control["shuffled answers"] = mean(seen.change(metric, task, WRONG, **labels))
            for name in (NONE, SHOWN):
                table = seen.by_layer(metric, task, name, **labels)
                control[f"level, {name}"] = mean(seen.over_layers(table))
            found.append(
                decide(
                    f"{id}-{task}",
                    f"{what}; {WORDING[task]}, mean change over layers)",
                    seen.change(metric, task, **labels),
                    control=control,
                    at_least=0,
                    **SMALLEST[metric],
                    **PAPER,
                )
            )
    closer = {
        task: {
            name: seen.change("alignment", task, hypothesis=name, controlled=True, method="answer")
            for name in ("name", "activity")
        }
        for task in (READING, PERSONA)
    }
    found.append(
        decide(
            "name-over-activity",
            "With a persona, demonstrations align states with the hypothesis of the name more than "
            "with that of the activity, which is the answer (difference of changes, Spearman)",
            closer[PERSONA]["name"] - closer[PERSONA]["activity"],
            control={
                **{name: mean(values) for name, values in closer[PERSONA].items()},
                **{
                    f"{name}, without persona": mean(values)
                    for name, values in closer[READING].items()
                },
            },
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
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
                f"Prompts whose {what} grows more gain more probability of the right answer (rank "
                "correlation, wording and lengths partialled out, mean over layers and two tasks)",
                np.mean([seen.over_layers(own[task]) for task in both], axis=0),
                control=control,
                at_least=0,
                margin=WEAK,
                scale=AGREEMENT,
                **PAPER,
            )
        )
        found.append(
            decide(
                f"conditions-{method.replace(' ', '-')}",
                f"Wordings and personas in which {what} grows more gain more probability of the "
                "right answer (correlation, means of tasks subtracted, mean over layers)",
                seen.over_conditions(method),
                control={"over prompts": found[-1].estimate},
                at_least=0,
                margin=WEAK,
                scale=AGREEMENT,
                **PAPER,
            )
        )
    return found


def _causes(seen: Questions) -> list[lc.Claim]:
    shown, none = seen.patched("others, shown"), seen.patched("others, none")
    # A mean state that only does less harm than another adds nothing.
    brought = shown - none.clip(lower=0)
    layers = elsewhere_best(brought)
    cuts = {
        name: seen.causes("cut", name) for name in ("answers", "other tokens", "all but the first")
    }
    return [
        decide(
            "one-position",
            "The last state of prompts with demonstrations, averaged over other questions, makes "
            "the right answer more probable in a prompt without demonstrations (log probability "
            "gained over no patch, or over the same mean without demonstrations if that gains "
            "more; at the layer best in other seeds)",
            at_layers(brought, layers),
            control={
                "demonstrations": mean(seen.gap()),
                "over no patch": mean(at_layers(shown, layers)),
                "the mean without": mean(at_layers(none, layers)),
                "own state": mean(at_layers(seen.patched("own, shown"), layers)),
                "own state, put back": mean(at_layers(seen.patched("own, none"), layers)),
                "mean over layers": float(brought.mean(axis=None)),
            },
            at_least=0,
            margin=NATS,
            **OURS,
        ),
        decide(
            "answers-seen",
            "The query uses the demonstrations' answers more than as many other tokens of them "
            "(log probability lost by attention knockout, difference)",
            cuts["other tokens"] - cuts["answers"],
            control={
                "demonstrations": mean(seen.gap()),
                **{f"hidden: {name}": mean(values) for name, values in cuts.items()},
            },
            at_least=0,
            margin=NATS,
            **OURS,
        ),
    ]


def _over(
    seen: Questions, tables: dict[str, pd.DataFrame], tasks: Sequence[str], *, lower: bool = False
) -> float:
    return mean(np.mean([seen.over_layers(tables[task], lower=lower) for task in tasks], axis=0))
