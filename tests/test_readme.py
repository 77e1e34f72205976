"""The README's Python runs: its sessions are doctests, its other blocks are executed here."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

import lensclust as lc
from studies.study import Study

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = [b for b in re.findall(r"```python\n(.*?)```", README, re.S) if ">>>" not in b]
PRETRAINED, SHOWN, COMPONENTS, PROBE, STUDY = BLOCKS


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Import a block as the module a reader would put it into."""

    def load(block: str, name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        return importlib.import_module(name)

    return load


def test_the_probe_of_your_own(module):
    prompts = lc.tasks.sif(n_tasks=3, n_inputs=4, mappings_per_task=3).where(split="new_string")
    acts = lc.extract(lc.load("native:sif-small"), prompts, "resid", progress=False)
    found = module(PROBE, "my_probe").dimension(acts)
    assert len(found) == 7
    assert (found["value"] > 0).all()
    assert len(PROBE.strip().splitlines()) <= 34


@pytest.mark.slow
def test_the_study_of_your_own(module, tmp_path):
    study = module(STUDY, "my_study").Untrained
    assert issubclass(study, Study)
    findings = study().execute(tmp_path / "run", seeds=4, jobs=1, progress=False)
    assert findings.claims[0].verdict == "supported"
    assert json.loads((tmp_path / "run" / "claims.json").read_text())[0]["n_seeds"] == 4
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "says"),
    [
        (PRETRAINED, "best ARI"),
        (SHOWN, "AttentionRatio("),
        (COMPONENTS, "weights.accuracy(asked)=0."),
    ],
)
def test_the_pretrained_sessions(module, capsys, block, says):
    try:
        model = lc.load("smollm2-135m-instruct", progress=False)
        lc.tasks.classification("sst2", model.tokenizer, queries=1)
    except lc.InputError as error:
        pytest.skip(f"the model or the texts cannot be downloaded: {error}")
    module(block, f"session_{BLOCKS.index(block)}")
    assert says in capsys.readouterr().out
