"""Cluster view: prompts as points, by layer and training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from jaxtyping import Float

from lensclust.errors import InputError
from lensclust.report.views.packed import Parts, number, quantised


@dataclass(frozen=True, eq=False)
class ClusterView:
    """States of the same prompts in two dimensions, at each layer and step.

    Attributes:
        title, caption: text above and below it.
        layers: the layers shown.
        steps: the training steps shown; a single one has no slider.
        points: two coordinates of each prompt; every panel has a separate scale.
        explained: their share of the variance, NaN if undefined.
        score: a number for each panel, such as the ARI of its clusters; NaN if there is none.
        score_name: name of that number.
        labels: name -> label of each prompt; the first is the initial colour.
        texts: the prompts as text.
    """

    title: str
    caption: str
    layers: tuple[int, ...]
    steps: tuple[int, ...]
    points: Float[np.ndarray, "step layer prompt 2"]
    explained: Float[np.ndarray, "step layer"]
    score: Float[np.ndarray, "step layer"]
    score_name: str
    labels: Mapping[str, tuple[str, ...]]
    texts: tuple[str, ...]

    kind: ClassVar[str] = "clusters"

    @classmethod
    def from_frame(
        cls,
        frame: pd.DataFrame,
        *,
        labels: Sequence[str],
        title: str,
        caption: str,
        scores: pd.DataFrame | None = None,
        score_name: str = "ARI",
        text: str = "text",
    ) -> ClusterView:
        """Build from the rows of a cluster map.

        Args:
            frame: ``step, layer, x, y, explained``, the columns of labels and that of texts; the
                prompts of every step and layer in the same order.
            labels: columns to colour by, the initial one first.
            scores: ``step, layer, value``: a number for each panel; averaged if there are
                several.
            score_name: name of that number.
            text: the column with the prompts as text.

        Raises:
            InputError: if a column is missing, or panels hold different numbers of prompts.
        """
        wanted = ["step", "layer", "x", "y", "explained", *labels, text]
        if lost := [name for name in wanted if name not in frame]:
            raise InputError(f"cluster view: no column {lost[0]!r}, only {list(frame)}")
        ordered = frame.sort_values(["step", "layer"], kind="stable")
        steps, layers = (
            tuple(int(value) for value in ordered[name].unique()) for name in ("step", "layer")
        )
        panels = ordered.groupby(["step", "layer"]).size()
        if len(panels) != len(steps) * len(layers) or panels.nunique() != 1:
            raise InputError(
                f"cluster view: {len(panels)} panels of {panels.min()} to {panels.max()} prompts, "
                f"expected {len(steps) * len(layers)} of as many each"
            )
        shape, prompts = (len(steps), len(layers), -1), ordered.head(int(panels.iloc[0]))
        score = np.full(shape[:2], np.nan)
        if scores is not None:
            table = scores.pivot_table("value", "step", "layer")
            score = table.reindex(index=list(steps), columns=list(layers)).to_numpy(dtype=float)
        return cls(
            title=title,
            caption=caption,
            layers=layers,
            steps=steps,
            points=ordered[["x", "y"]].to_numpy(dtype=float).reshape(*shape, 2),
            explained=ordered["explained"].to_numpy(dtype=float).reshape(shape)[..., 0],
            score=score,
            score_name=score_name,
            labels={name: tuple(map(str, prompts[name])) for name in labels},
            texts=tuple(map(str, prompts[text])),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values; coordinates in 16 bits.

        >>> view = ClusterView("t", "c", (0,), (0,), np.eye(2)[None, None], np.ones((1, 1)),
        ...                    np.ones((1, 1)), "ARI", {"task": ("a", "b")}, ("x", "y"))
        >>> ClusterView.from_json(view.to_json(), where="here").points[0, 0].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
        """
        # Each panel has a separate scale, since states grow from layer to layer.
        largest = np.abs(self.points).max(axis=(2, 3), keepdims=True)
        return {
            "kind": self.kind,
            "title": self.title,
            "caption": self.caption,
            "layers": list(self.layers),
            "steps": list(self.steps),
            "points": quantised(self.points / np.where(largest > 0, largest, 1)),
            "explained": [number(value) for value in self.explained.ravel().tolist()],
            "score": [number(value) for value in self.score.ravel().tolist()],
            "score_name": self.score_name,
            "labels": [{"name": name, "values": list(v)} for name, v in self.labels.items()],
            "texts": list(self.texts),
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any], *, where: str) -> ClusterView:
        """Inverse of `to_json`.

        Raises:
            InputError: if a part is missing, or its type or size is wrong; names ``where`` and
                the part.
        """
        parts = Parts(held, where)
        layers, steps = (parts.whole(name, len(parts.list(name))) for name in ("layers", "steps"))
        texts = parts.texts("texts")
        labels = {
            item.text("name"): item.texts("values", len(texts)) for item in parts.each("labels")
        }
        if not (layers and steps and texts and labels):
            raise parts.error("'layers', 'steps', 'texts' or 'labels'", "at least one each")
        panels = (len(steps), len(layers))
        return cls(
            title=parts.text("title"),
            caption=parts.text("caption"),
            layers=layers,
            steps=steps,
            points=parts.array("points", (*panels, len(texts), 2)),
            explained=parts.numbers("explained", len(steps) * len(layers)).reshape(panels),
            score=parts.numbers("score", len(steps) * len(layers)).reshape(panels),
            score_name=parts.text("score_name"),
            labels=labels,
            texts=texts,
        )

    def _repr_html_(self) -> str:
        from lensclust.report.embed import view_frame

        return view_frame(self)
