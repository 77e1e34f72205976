"""The comparison of two runs finds a changed number and passes over other words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.compare_runs import main


def run(
    folder: Path, *, estimate: float = 0.5, score: float = 1.0, text: str = "It holds."
) -> Path:
    folder.mkdir(parents=True)
    claim = {"id": "a", "statement": text, "estimate": estimate, "ci95": [0.1, None]}
    (folder / "claims.json").write_text(json.dumps([claim]))
    scores = pd.DataFrame({"metric": ["ari", "ami"], "value": [score, None]})
    scores.to_parquet(folder / "scores.parquet")
    return folder


def test_other_words_are_no_difference(tmp_path: Path):
    assert main(run(tmp_path / "1"), run(tmp_path / "2", text="This is so.")) == 0


@pytest.mark.parametrize("changed", [{"estimate": 0.5000001}, {"score": 1.0000001}])
def test_one_other_number_is(tmp_path: Path, changed: dict[str, Any], capsys):
    run(tmp_path / "before" / "b", **changed)
    run(tmp_path / "before" / "c")
    run(tmp_path / "after" / "b")
    run(tmp_path / "after" / "c")
    assert main(tmp_path / "before", tmp_path / "after") == 1
    shown = capsys.readouterr().out
    assert "b: 1 differences" in shown
    assert "c: the same" in shown
    assert main(tmp_path, tmp_path) == 2
