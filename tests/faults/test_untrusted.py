"""Files from elsewhere run no code, reach no other file, ask for no more memory than they fill."""

from __future__ import annotations

import ast
import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

import lensclust as lc
from lensclust import store_notes
from lensclust.native import native_config
from lensclust.report import write_page
from lensclust.sealed import read_sealed, save_sealed
from lensclust.weights import load_checkpoint, save_checkpoint
from tests.faults.work import extract, tiny_model
from tests.lensclust.test_report import HOSTILE, Page, make_run
from tests.tiny import hf_model

ROOT = Path(__file__).parents[2]
# What reads pickles, or runs what it reads.
FORBIDDEN = {
    *("pickle", "dill", "cloudpickle", "shelve", "marshal", "yaml"),
    *("torch.load", "np.load", "numpy.load", "pd.read_pickle", "joblib.load", "eval", "exec"),
}


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
            assert not said & FORBIDDEN, f"{path}: {said & FORBIDDEN}"


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
    content, tensors = read_sealed(path, "lensclust")
    content["config"] |= fields
    save_sealed(path, "lensclust", content, tensors)
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


# -- pages ----------------------------------------------------------------------------------------


def check_page(html: str) -> Page:
    page = Page(html)
    assert not [name for _, attributes in page.tags for name in attributes if name[:2] == "on"]
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "a", "header", "p", "h1", "h2", "h3"),
        *("main", "section", "ul", "li", "span", "table", "caption", "thead", "tbody", "tr", "th"),
        *("td", "small", "code", "strong", "aside", "figure", "div", "img", "script"),
        *("figcaption", "details", "summary"),
    }
    loads = [a[name] or "" for _, a in page.tags for name in ("src", "href") if name in a]
    assert all(url.startswith(("data:", "#")) for url in loads)
    return page


def test_nothing_in_a_run_becomes_markup(tmp_path: Path) -> None:
    run = make_run(tmp_path / f"run {HOSTILE.replace('/', '')}", study=HOSTILE)
    (run / "notes.json").write_text(json.dumps([HOSTILE]))
    (run / "provenance.json").write_text(json.dumps({HOSTILE: {HOSTILE: HOSTILE}, "date": HOSTILE}))
    claims = json.loads((run / "claims.json").read_text())
    for claim in claims:
        claim |= {"id": HOSTILE, "source": HOSTILE, "rule": HOSTILE, "origin": HOSTILE}
        claim |= {"estimate": HOSTILE, "n_seeds": HOSTILE, "ci95": [HOSTILE, HOSTILE]}
    (run / "claims.json").write_text(json.dumps(claims))
    import pandas as pd

    pd.DataFrame({HOSTILE: [HOSTILE]}).to_parquet(run / "scores.parquet")
    html = write_page([run]).read_text(encoding="utf-8")
    page = check_page(html)
    assert page.text.count(HOSTILE) >= 10
    assert [image["class"] for image in page.all("img")] == ["still"]


def test_a_figure_brings_no_options_for_the_page(tmp_path: Path) -> None:
    """Vega-Embed would take styles for the whole page from a figure's own metadata."""
    run = make_run(tmp_path / "run")
    file = run / "figures" / "clusters.vl.json"
    spec = json.loads(file.read_text())
    spec["usermeta"]["embedOptions"] = {"defaultStyle": ".verdict {display: none}", "patch": "x"}
    file.write_text(json.dumps(spec))
    page = check_page(write_page([run]).read_text(encoding="utf-8"))
    (text,) = [t for attributes, t in page.scripts if "json" in (attributes.get("type") or "")]
    assert "embedOptions" not in text
    assert json.loads(text)["usermeta"]["title"] == spec["usermeta"]["title"]


def test_any_text_stays_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run / "figures").iterdir():
        path.unlink()

    @settings(max_examples=60, deadline=None, database=None)
    @given(st.lists(st.text(min_size=1), min_size=4, max_size=4))
    def check(texts: list[str]) -> None:
        (run / "config.json").write_text(json.dumps({"study": texts[0], texts[1]: texts[2]}))
        (run / "notes.json").write_text(json.dumps(texts))
        (run / "provenance.json").write_text(json.dumps({texts[1]: texts[2], "x": {texts[3]: 1}}))
        check_page(write_page([run]).read_text(encoding="utf-8"))

    check()


def test_prompts_show_their_texts_as_texts() -> None:
    import pandas as pd

    prompts = lc.Prompts.from_token_lists([[1]], pd.DataFrame({"task": [HOSTILE]}))
    assert "<img" not in prompts._repr_html_()


def test_one_config_is_as_good_as_another() -> None:
    """The bounds refuse nothing that is right."""
    for fields in ({"positional_embedding_type": "rotary"}, {"n_ctx": 4096}, {"attn_only": True}):
        model = lc.load(native_config("sif-small", **fields), device="cpu")
        assert model.cfg.n_layers == 6
