"""What the scores of the study of unseen instances say: its claims."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.results import decide
from lensclust.stats import correlation
from studies.frames import where
from studies.scales import AGREEMENT, SHARE, SMALL, WEAK
from studies.small_models import UNSEEN
from studies.unseen_options import ANSWER, INSTRUCTION, MEANS, REASSIGNED, SUBSPACE
from studies.unseen_tables import Pretrained, Synthetic

PAPER: dict[str, Any] = {
    "source": "Wu & Varshney, arXiv 2402.12151",
    "origin": "reconstruction",
}
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}
MEMBER = "another member"
RANDOM = "as much variance in random directions"
PERMUTED = "tasks permuted over whole expressions"


def claims(scores: pd.DataFrame) -> list[lc.Claim]:
    """Decide the claims: values are seeds', for the pretrained model ordered pairs of tasks'."""
    found = _prediction(Synthetic(scores)) + _cause(Synthetic(scores))
    if "pretrained" in set(scores["part"]):
        found += _in_a_pretrained_model(Pretrained(scores))
    return found


def _prediction(seen: Synthetic) -> list[lc.Claim]:
    top, middle = seen.top, seen.middle
    inside, untrained = (seen.at(s, "membership", UNSEEN, top) for s in (seen.steps[-1], 0))
    return [
        decide(
            "tracks-accuracy",
            "On unseen strings accuracy and clustering rise together over training (rank "
            "correlation over checkpoints, last layer)",
            seen.with_accuracy(UNSEEN, top),
            control={
                "layer 0": seen.with_accuracy(UNSEEN, 0).mean(),
                "unseen expressions": seen.with_accuracy("new_regex", top).mean(),
            },
            at_least=0,
            margin=WEAK,
            scale=correlation(of=len(seen.steps)),
            **PAPER,
        ),
        decide(
            "nearest-centroid",
            "The nearest training centroid names the task of unseen strings (share of prompts "
            "above that of the untrained model, last layer, given the input)",
            inside - untrained,
            control={
                "share": inside.mean(),
                "untrained model": untrained.mean(),
                "unseen expressions": seen.final("membership", "new_regex", top).mean(),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **PAPER,
        ),
        *(
            decide(
                f"membership-{name}",
                "Prompts whose state lies in their task's cluster are answered right more often "
                f"({name} layer, unseen strings, within checkpoints)",
                _or_open(seen.inside_minus_outside(UNSEEN, layer)),
                control={
                    "unseen expressions": _mean(seen.inside_minus_outside("new_regex", layer))
                },
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                **PAPER,
            )
            for name, layer in (("middle", middle), ("last", top))
        ),
        decide(
            "margin",
            "and the further inside, the more often (AUC of the margin for right answers, middle "
            "layer, mean over checkpoints)",
            _or_open(seen.margin(UNSEEN, middle)),
            control={"no information": 0.5, "layer 0": _mean(seen.margin(UNSEEN, 0))},
            at_least=0.5,
            margin=SMALL,
            scale=SHARE,
            **PAPER,
        ),
        *_wrong_cluster(seen),
    ]


def _wrong_cluster(seen: Synthetic) -> list[lc.Claim]:
    """Pairs of expression and input that were never trained together, where there are any."""
    inside = seen.final("membership", "new_pair", seen.top)
    if not inside.size:
        return []
    return [
        decide(
            "new-pairs-elsewhere",
            "Pairs of expression and input never trained together cluster by task and are yet "
            "answered wrongly: their states lie in other tasks' clusters (share outside their own)",
            1 - inside,
            control={
                "unseen strings": 1 - seen.final("membership", UNSEEN, seen.top).mean(),
                "ARI of new pairs": seen.final("ari", "new_pair", seen.top).mean(),
                "accuracy of new pairs": seen.final("accuracy", "new_pair").mean(),
            },
            at_least=0.5,
            scale=SHARE,
            **OURS,
        )
    ]


def _cause(seen: Synthetic) -> list[lc.Claim]:
    transport = seen.moved("transport")
    others = {
        "another member": seen.moved(MEMBER).mean(),
        "global shift, best layer": seen.moved("shift").mean(),
        "random direction, same norm": _mean(_random(seen, "transport")),
        "means of dealt labels, same norm": _mean(_dealt(seen, "transport")),
    }
    early = seen.moved("shift", INSTRUCTION) - _random(seen, "shift", INSTRUCTION)
    return [
        decide(
            "transport",
            "A prompt moved to another task's cluster is answered as that task (share of "
            "answers, best layer, cluster of its input)",
            transport,
            control=others,
            at_least=0.95,
            scale=SHARE,
            **OURS,
        ),
        decide(
            "random-moves",
            "which a move as long in a random direction does not do",
            _random(seen, "transport"),
            control={"transport": transport.mean()},
            at_most=0.05,
            scale=SHARE,
            **OURS,
        ),
        decide(
            "input-conditional",
            "and one direction for all inputs does less often (transport minus global shift, "
            "each at its best layer)",
            transport - seen.moved("shift"),
            control={"transport": transport.mean(), "shift": seen.moved("shift").mean()},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        *(
            decide(
                id,
                f"Erasing task identity{within} at the middle layer costs accuracy beyond erasing "
                f"{words}",
                seen.erased(method, control),
                control={
                    "accuracy left": seen.left(method),
                    control: seen.left(f"{method}, {control}"),
                    "input alone": float(seen.chance().mean()),
                    "variance removed": seen.left(method, "variance removed"),
                    f"variance removed, {control}": seen.left(
                        f"{method}, {control}", "variance removed"
                    ),
                },
                at_least=0,
                margin=SMALL,
                scale=SHARE.gain,
                **OURS,
            )
            for id, method, within, control, words in (
                ("erase", "erase", "", SUBSPACE, RANDOM),
                ("erase-given-input", "erase given input", " within input", SUBSPACE, RANDOM),
                ("erase-over-reassigned", "erase", "", REASSIGNED, PERMUTED),
                (
                    "erase-given-input-over-reassigned",
                    *("erase given input", " within input", REASSIGNED, PERMUTED),
                ),
            )
        ),
        decide(
            "instruction-end",
            "The task can be moved at the end of the instruction already (target answers beyond "
            "those of a random direction, best layer)",
            early,
            control={
                "shift": seen.moved("shift", INSTRUCTION).mean(),
                "another member": seen.moved(MEMBER, INSTRUCTION).mean(),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
    ]


def _in_a_pretrained_model(seen: Pretrained) -> list[lc.Claim]:
    over: dict[str, Any] = {"units": {"task": seen.pairs}, "n_seeds": 1, **OURS}
    moved = seen.at_best("shift")
    nothing = _name(seen.moves, "random direction")
    return [
        decide(
            "pretrained-shift",
            "In a pretrained model, one task's mean state put in place of another's makes it do "
            "the other task (target answers, best layer, queries the means have not seen)",
            moved,
            control={
                "random direction, same norm": seen.at_best(nothing).mean(),
                "means of dealt labels, same norm": seen.at_best(_name(seen.moves, MEANS)).mean(),
                "another member": seen.at_best(MEMBER).mean(),
            },
            at_least=0.6,
            scale=SHARE,
            **over,
        ),
        decide(
            "pretrained-random",
            "which a move as long in a random direction does not do",
            seen.at_best(nothing),
            control={"shift": moved.mean()},
            at_most=0.05,
            scale=SHARE,
            **over,
        ),
        decide(
            "pretrained-layers",
            "Layer for layer, moving works where states cluster (rank correlation over layers of "
            "target answers with ARI given the query)",
            seen.with_clusters("ari"),
            control={
                "with accuracy of the nearest neighbour": _mean(seen.with_clusters("1nn_accuracy")),
                "layer where ARI peaks": seen.peak("ari", "model"),
                "layer where shift peaks": seen.peak("target", "shift"),
                "ARI of the words": float(
                    where(seen.scores, metric="ari", method="words")["value"].iloc[0]
                ),
            },
            at_least=0,
            margin=WEAK,
            scale=AGREEMENT,
            **over,
        ),
    ]


def _random(seen: Synthetic, like: str, position: str = ANSWER) -> np.ndarray:
    return seen.moved(f"random direction, norm of {like}", position, best=like)


def _dealt(seen: Synthetic, like: str) -> np.ndarray:
    return seen.moved(f"{MEANS}, norm of {like}", best=like)


def _name(rows: pd.DataFrame, start: str) -> str:
    return next(name for name in rows["method"].unique() if name.startswith(start))


def _or_open(values: np.ndarray) -> np.ndarray:
    """One missing value where no seed gives any: the claim then stays inconclusive."""
    return values if values.size else np.array([np.nan])


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")
