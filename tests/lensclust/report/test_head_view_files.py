"""Head views as files: what was written is read back, and what is no view is one clear error."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lensclust.errors import InputError
from lensclust.report.views.heads import AttentionSample, HeadView

HOSTILE = "</script><img src=x onerror=alert(1)>"


def view(
    blocks: int = 3, heads: int = 4, opened: int = 5, prompts: int = 6, seed: int = 0
) -> HeadView:
    rng = np.random.default_rng(seed)
    places = list(np.ndindex(blocks, heads))[:opened]
    grid = rng.normal(size=(blocks, heads))
    grid[-1, -1] = np.nan
    return HeadView(
        title=f"Heads {HOSTILE}",
        caption="A caption.",
        scores={"ari": grid, HOSTILE: rng.random((blocks, heads))},
        opened=tuple((b, h) for b, h in places),
        points=rng.normal(size=(len(places), prompts, 2)) * 10.0 ** rng.integers(-3, 4),
        explained=rng.random(len(places)),
        labels={"task": tuple(f"task {i % 3}" for i in range(prompts))},
        texts=tuple(f"{HOSTILE} {i}" for i in range(prompts)),
        samples=tuple(
            AttentionSample(
                f"prompt {n}",
                tuple([HOSTILE, " the", "\n", "�", ""][i % 5] for i in range(n)),
                rng.integers(0, 256, (len(places), n * (n + 1) // 2)).astype(np.uint8),
            )
            for n in (1, 7)
        ),
    )


@settings(max_examples=30, deadline=None, database=None)
@given(
    st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 99)
)
def test_what_is_written_is_read_back(
    blocks: int, heads: int, opened: int, prompts: int, seed: int
) -> None:
    given_ = view(blocks, heads, opened, prompts, seed)
    text = json.dumps(given_.to_json(), allow_nan=False)
    found = HeadView.from_json(json.loads(text), where="here")
    step = np.ptp(given_.points) / 65535
    assert np.abs(found.points - given_.points).max() <= step
    for name, grid in given_.scores.items():
        np.testing.assert_allclose(found.scores[name], grid, rtol=1e-4)
    for field in ("title", "caption", "opened", "labels", "texts"):
        assert getattr(found, field) == getattr(given_, field)
    for mine, theirs in zip(found.samples, given_.samples, strict=True):
        assert (mine.name, mine.tokens) == (theirs.name, theirs.tokens)
        assert (mine.weights == theirs.weights).all()
    again = json.dumps(found.to_json())
    assert json.dumps(HeadView.from_json(json.loads(again), where="here").to_json()) == again


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value below its root."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node)
    found = []
    for key, item in pairs:
        found.append((*path, key))
        if isinstance(item, (dict, list)):
            found += places(item, (*path, key))
    return found


def read(held: Any) -> HeadView | InputError:
    try:
        return HeadView.from_json(held, where="run/views/heads.json")
    except InputError as error:
        return error


HELD = view().to_json()
JUNK = [None, True, -1, 1.5, 10**9, "text", [], [[]], {}, [None], {"name": 1}, float("inf")]


@settings(max_examples=300, deadline=None, database=None)
@given(st.sampled_from(places(HELD)), st.sampled_from([*JUNK, "delete", "double"]))
def test_a_view_spoilt_anywhere_is_refused_or_still_a_view(
    path: tuple[Any, ...], junk: Any
) -> None:
    held = copy.deepcopy(HELD)
    node: Any = held
    for key in path[:-1]:
        node = node[key]
    if junk == "delete":
        del node[path[-1]]
    elif junk == "double" and isinstance(node, list):
        node.append(node[path[-1]])
    else:
        node[path[-1]] = junk
    found = read(held)
    if isinstance(found, InputError):
        assert "run/views/heads.json" in str(found)
        assert "\n" not in str(found)
        return
    count = (len(found.opened), len(found.texts))
    assert found.points.shape == (*count, 2)
    assert np.isfinite(found.points).all()
    assert all(len(values) == count[1] for values in found.labels.values())
    assert found.explained.shape == count[:1]
    json.dumps(found.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("opened", [[3, 0]], "'opened' is missing or wrong"),
        ("shape", [4, 4], "scores 0: 'values'"),
        ("texts", ["one"], "labels 0: 'values'.* expected 1 texts"),
        ("points", {"shape": [5, 6, 2], "low": 0, "step": 1, "data": "!"}, "120 bytes in base64"),
        ("title", 3, "'title' .*expected a text"),
    ],
)
def test_the_error_names_the_part(part: str, value: Any, said: str) -> None:
    with pytest.raises(InputError, match=f"here.*{said}"):
        HeadView.from_json({**HELD, part: value}, where="here")
