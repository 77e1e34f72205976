"""Claims on word tasks: neighbours, vectors, and clusters across kinds of prompt."""

from __future__ import annotations

from typing import Any

import numpy as np

import lensclust as lc
from lensclust.results import decide, share
from studies.icl_representations.measures import Words, mean
from studies.icl_representations.words import BOTH, SHOWN, TOLD
from studies.scales import AGREEMENT, SHARE, SMALL, WEAK
from studies.scores import rank_correlations

# Few words are queried: six of each of six tasks.
OF_WORDS = share(of=36)
OURS: dict[str, Any] = {"source": "this project", "origin": "extension"}


def word_claims(words: Words) -> list[lc.Claim]:
    """Decide the claims on word tasks."""
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
    chance = mean(words.nearest(f"{TOLD} by {SHOWN}", "null_mean"))
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
                f"A {name} makes the model do the task on a query without instruction or "
                f"demonstrations (accuracy above its control, {control}; words unseen by the "
                "vector)",
                own - other,
                control={
                    name: mean(own),
                    control: mean(other),
                    "nothing": mean(words.vector("nothing")),
                    "demonstrations": mean(words.vector("demonstrations")),
                },
                at_least=0,
                margin=SMALL,
                scale=OF_WORDS.gain,
                source=source,
                origin="reconstruction",
            )
        )
    return [
        decide(
            "neighbours",
            "Where prompts have nearest neighbours of their own task, the model is more accurate "
            "(rank correlation over tasks and shots of neighbours' accuracy, mean over layers, "
            "with the model's)",
            rank_correlations(near, "value", "behaviour", by="seed").to_numpy(),
            control={
                name: mean(
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
            margin=WEAK,
            scale=AGREEMENT,
            source="Han et al., arXiv 2412.12276",
            origin="reconstruction",
        ),
        *vectors,
        decide(
            "one-cluster",
            "An instructed task and the same task by demonstrations lie together (share of "
            "prompts nearest to their task's mean of the other kind, above permuted names, mean "
            "over layers)",
            np.mean(list(across.values()), axis=0) - chance,
            control={
                **{name: mean(values) for name, values in across.items()},
                **{
                    f"{name}, kinds' means subtracted": mean(words.nearest(name, centred=True))
                    for name in across
                },
                "swapped names": chance,
                f"{BOTH} by {TOLD}": mean(words.nearest(f"{BOTH} by {TOLD}")),
                f"{BOTH} by {SHOWN}": mean(words.nearest(f"{BOTH} by {SHOWN}")),
            },
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "kinds-apart",
            "Subtracting the means of the kinds of prompt brings the same task closer together "
            "(share of prompts nearest to their task's mean of the other kind, gained)",
            np.mean(
                [words.nearest(name, centred=True) - values for name, values in across.items()],
                axis=0,
            ),
            control={"left in": mean(np.mean(list(across.values()), axis=0)), "chance": chance},
            at_least=0,
            margin=SMALL,
            scale=SHARE.gain,
            **OURS,
        ),
        decide(
            "sharper",
            "Demonstrations after an instruction separate tasks more (silhouette, gained over the "
            "instruction alone, mean over layers)",
            sharper,
            control={
                **{kind: mean(words.silhouette(kind)) for kind in (TOLD, SHOWN, BOTH)},
                **{f"accuracy, {kind}": mean(words.accuracy(kind)) for kind in (TOLD, SHOWN, BOTH)},
            },
            at_least=0,
            margin=SMALL,
            scale=AGREEMENT.gain,
            **OURS,
        ),
    ]
