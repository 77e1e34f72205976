"""Head view: scores of all heads, clusters and attention of selected ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, UInt8

from lensclust.report.views.packed import Parts, number, packed, quantised

# Of one prompt: a pattern has tokens² cells, and a larger image would be illegible.
MOST_TOKENS = 128
MOST_HEADS = 20_000


@dataclass(frozen=True, eq=False)
class AttentionSample:
    """One prompt, and the attention of every selected head to its tokens.

    Attributes:
        name: name of the prompt in a list.
        tokens: its tokens as text.
        weights: from each token to those up to it, row by row, in 255ths.
    """

    name: str
    tokens: tuple[str, ...]
    weights: UInt8[np.ndarray, "opened pair"]


@dataclass(frozen=True, eq=False)
class HeadView:
    """Scores of every head, and details of selected heads.

    Attributes:
        title, caption: text above and below it.
        scores: name -> a value for every head ``(block, head)``, NaN if there is none.
        opened: block and head of each selected head, the best first.
        points: the prompts in two principal components of each selected head's output.
        explained: the two components' share of the variance.
        labels: name -> label of each prompt; the first is the initial colour.
        texts: the prompts as text.
        samples: a few prompts with attention patterns.
    """

    title: str
    caption: str
    scores: Mapping[str, Float[np.ndarray, "block head"]]
    opened: tuple[tuple[int, int], ...]
    points: Float[np.ndarray, "opened prompt 2"]
    explained: Float[np.ndarray, " opened"]
    labels: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]
    samples: tuple[AttentionSample, ...] = ()

    kind: ClassVar[str] = "heads"

    def to_json(self) -> dict[str, Any]:
        """The content of ``views/NAME.json``."""
        return {
            "kind": self.kind,
            "title": self.title,
            "caption": self.caption,
            "shape": list(next(iter(self.scores.values())).shape),
            "scores": [
                {"name": name, "values": [number(value) for value in values.ravel().tolist()]}
                for name, values in self.scores.items()
            ],
            "opened": [list(head) for head in self.opened],
            "points": quantised(self.points),
            "explained": [number(value) for value in self.explained.tolist()],
            "labels": [{"name": name, "values": list(v)} for name, v in self.labels.items()],
            "texts": list(self.texts),
            "samples": [
                {"name": s.name, "tokens": list(s.tokens), "weights": packed(s.weights)}
                for s in self.samples
            ],
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any], *, where: str) -> HeadView:
        """Inverse of `to_json`.

        Raises:
            InputError: if a part is missing, or its type or size is wrong; names ``where`` and
                the part.
        """
        parts = Parts(held, where)
        shape = parts.whole("shape", 2)
        texts = parts.texts("texts")
        labels = {
            item.text("name"): item.texts("values", len(texts)) for item in parts.each("labels")
        }
        scores = {
            item.text("name"): item.numbers("values", shape[0] * shape[1]).reshape(shape)
            for item in parts.each("scores")
        }
        if not scores or not labels or not 0 < shape[0] * shape[1] <= MOST_HEADS:
            raise parts.error(
                "'scores', 'labels' or 'shape'", f"some, of 1 to {MOST_HEADS:,} heads"
            )
        pairs = [Parts({"opened": pair}, where).whole("opened", 2) for pair in parts.list("opened")]
        opened = tuple((block, head) for block, head in pairs)
        if not opened or any(b >= shape[0] or h >= shape[1] for b, h in opened):
            raise parts.error("'opened'", f"block and head of one or more of {shape} heads")
        return cls(
            title=parts.text("title"),
            caption=parts.text("caption"),
            scores=scores,
            opened=opened,
            points=parts.array("points", (len(opened), len(texts), 2)),
            explained=parts.numbers("explained", len(opened)),
            labels=labels,
            texts=texts,
            samples=tuple(_sample(item, len(opened)) for item in parts.each("samples")),
        )

    def _repr_html_(self) -> str:
        from lensclust.report.embed import view_frame

        return view_frame(self)


def _sample(parts: Parts, opened: int) -> AttentionSample:
    tokens = parts.texts("tokens")
    if not 0 < len(tokens) <= MOST_TOKENS:
        raise parts.error("'tokens'", f"1 to {MOST_TOKENS} texts")
    pairs = len(tokens) * (len(tokens) + 1) // 2
    weights = parts.bytes("weights", opened * pairs).reshape(opened, pairs)
    return AttentionSample(parts.text("name"), tokens, weights)
