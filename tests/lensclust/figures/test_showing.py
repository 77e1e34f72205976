"""Results show themselves: escaped, small, without a network, and none forgets to."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from html.parser import HTMLParser
from typing import Any

import pandas as pd
from hypothesis import given, strategies as st

import lensclust as lc
import probes
from lensclust.figures.display import as_html
from probes.components.component_logits import Transfer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)


@given(TEXT, st.lists(TEXT, min_size=1, max_size=12), TEXT)
def test_whatever_a_result_says_stays_text(said: str, labels: list[str], column: str) -> None:
    html = as_html(said, pd.DataFrame({column: labels}))
    assert Tags(html).tags <= {"p", "table", "thead", "tbody", "tr", "th", "td", "small"}


def test_every_result_with_a_table_shows_itself() -> None:
    results = [
        each
        for each in (getattr(probes, name) for name in vars(probes)["__all__"])
        if isinstance(each, type)
    ]
    tabular: list[Any] = [
        each
        for each in [*results, Transfer]
        if is_dataclass(each)
        and ("frame" in {field.name for field in fields(each)} or hasattr(each, "frame"))
    ]
    assert len(tabular) > 15
    assert [each.__name__ for each in tabular if not hasattr(each, "_repr_html_")] == []


def test_real_results_are_shown_small_and_offline() -> None:
    model, prompts = lc.load("native:sif-small"), lc.tasks.sif(n_tasks=4, n_inputs=5)
    unseen = prompts.where(split="new_string")
    acts = lc.extract(model, unseen, ["resid", "head"], progress=False)
    shown = [
        probes.cluster(acts, permutations=2, jobs=1),
        probes.cluster_map(acts),
        probes.probe(acts, target="task", kinds="resid", permutations=2, jobs=1),
        probes.head_activation(model, unseen.take(range(8))),
        probes.cka(acts, kinds="resid"),
        unseen,
    ]
    for result in shown:
        html = result._repr_html_()
        assert len(html) < 400_000, type(result)
        assert not re.search(r"<script|src=|https?://(?!www\.w3\.org)", html), type(result)
        assert len(repr(result)) < 500
