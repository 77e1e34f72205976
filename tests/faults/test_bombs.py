"""Few bytes that stand for many: refused in one line, before any memory is taken for them.

Each is tried in a process that may take a gigabyte more than it began with.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pandas as pd
import pyarrow
import pytest
import zarr
from pyarrow import parquet

import lensclust as lc
from lensclust.activations.store import attributes as store_notes
from lensclust.report.page import write_page
from lensclust.storage.locations import inflated_bytes
from lensclust.storage.parquet import read_frame
from tests.faults.work import extract
from tests.lensclust.report.test_report import make_run
from tests.tiny import hf_model

ROOT = Path(__file__).parents[2]
PROGRAM = """
import re, resource, sys
from pathlib import Path
import pandas, pyarrow, torch, zarr, altair, transformers
import lensclust as lc
from lensclust.models.native import native_config
from lensclust.report import write_page
from tests.faults.work import extract
lc.load(native_config("sif-small", n_layers=1), device="cpu")
begun = re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
most = 1024 * int(begun[1]) + 2**30
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
for line in sys.stdin:
    path, call = line.rstrip().split("\\t")
    path = Path(path)
    try:
        eval(call)
        said = "took it"
    except lc.InputError as error:
        said = str(error)
    except BaseException as error:
        said = f"foreign {type(error)}: {error}"
    print(repr(said), flush=True)
"""
Said = Callable[[Path, str], str]


@pytest.fixture(scope="module")
def said() -> Iterator[Said]:
    """What a call says to a user, in a process of limited memory."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    pipes: Any = process

    def ask(path: Path, call: str) -> str:
        pipes.stdin.write(f"{path}\t{call}\n")
        pipes.stdin.flush()
        found = pipes.stdout.readline()
        assert found, f"the process ended: {process.wait()}"
        line = ast.literal_eval(found)
        assert "\n" not in line
        assert not line.startswith("foreign"), line
        return line

    yield ask
    process.communicate()


# -- stores ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [None, numcodecs.Blosc(), numcodecs.Zstd(level=1)])
def test_a_chunk_that_inflates_to_a_gigabyte(codec: Any, tmp_path: Path, said: Said) -> None:
    """Of activations, by someone who makes the right checksum, and of labels."""
    extract(tmp_path)
    name = "resid" if codec is None else "task"
    folder = tmp_path / "a" / name
    described = json.loads((folder / ".zarray").read_text())
    if codec is None:
        checksum: Any = numcodecs.get_codec(described["compressor"])
        chunk = checksum.encode(numcodecs.Blosc("lz4").encode(np.zeros(2**30, np.uint8)))
    else:
        described["compressor"] = codec.get_config()
        (folder / ".zarray").write_text(json.dumps(described))
        chunk = codec.encode(np.zeros(2**30, np.uint8))
    assert len(chunk) < 5_000_000
    for file in folder.iterdir():
        if not file.name.startswith("."):
            file.write_bytes(chunk)
    found = said(tmp_path / "a", "lc.open_activations(path).load()")
    assert f"chunk {name}/" in found
    assert "inflates to 1,073,741,824 bytes" in found


@pytest.mark.parametrize("size", [0, 1, 200, 300, 10**5, 10**6])
@pytest.mark.parametrize("codec", [numcodecs.Blosc(), numcodecs.Zstd(), numcodecs.Zstd(1, True)])
def test_sizes_of_chunks_are_known_from_their_first_bytes(codec: Any, size: int) -> None:
    chunk = codec.encode(np.random.default_rng(0).bytes(size))
    assert inflated_bytes(chunk[:18], len(chunk)) == size


@pytest.mark.parametrize("chunked", [False, True])
def test_a_store_forged_to_very_many_rows(chunked: bool, tmp_path: Path, said: Said) -> None:
    """By someone who knows how: every array agrees, and the seal is right."""
    extract(tmp_path)
    path, rows = tmp_path / "a", 10**8
    for file in path.glob("*/.zarray"):
        described = json.loads(file.read_text())
        if "prompt" in json.loads((file.parent / ".zattrs").read_text())["_ARRAY_DIMENSIONS"]:
            described["shape"][0] = rows
            if chunked:
                described["chunks"][0] = rows
        file.write_text(json.dumps(described))
    group: Any = zarr.open_group(str(path), mode="r+", zarr_format=2)
    batches = [[rows, *json.loads(group.attrs["batches"])[0][1:]]]
    store_notes.note(group, batches=json.dumps(batches), written=rows)
    for call in ("lc.open_activations(path).load()", "extract(path.parent)"):
        assert "is damaged: 'resid' says" in said(path, call)


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"num_hidden_layers": 200_000},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 10**10},
        {"hidden_size": 10**6},
        {"intermediate_size": 10**9},
    ],
)
def test_random_weights_of_a_configuration_of_no_real_model(
    fields: dict[str, int], tmp_path: Path, said: Said
) -> None:
    config = hf_model("llama").config.to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    call = "lc.load(path, random_weights=True, device='cpu', progress=False)"
    assert "load: " in said(tmp_path, call)


@pytest.mark.parametrize("fields", ["n_layers=200_000", "n_ctx=10**6", "d_vocab=10**10"])
def test_a_native_model_that_nothing_holds(fields: str, tmp_path: Path, said: Said) -> None:
    call = f"lc.load(native_config('sif-small', {fields}), device='cpu')"
    assert "ask for" in said(tmp_path, call)


def test_random_weights_of_what_is_no_bomb(tmp_path: Path) -> None:
    hf_model("llama").config.save_pretrained(tmp_path)
    assert lc.load(tmp_path, random_weights=True, device="cpu").cfg.n_layers == 3


# -- runs ------------------------------------------------------------------------------------------

POINTS = {"mark": "point", "encoding": {"x": {"field": "data", "type": "quantitative"}}}
SPECS = {
    "a sequence": {"data": {"sequence": {"start": 0, "stop": 1e8}}},
    "a formula": {
        "data": {"values": [{"data": 1}]},
        "transform": [{"calculate": "length(sequence(0, 3e8))", "as": "data"}],
    },
}


@pytest.mark.parametrize("kind", ["a sequence", pytest.param("a formula", marks=pytest.mark.slow)])
def test_a_figure_of_very_many_rows(kind: str, tmp_path: Path, said: Said) -> None:
    run = make_run(tmp_path / "run")
    spec = next((run / "figures").glob("*.vl.json"))
    spec.write_text(json.dumps(POINTS | SPECS[kind]))
    # Its still is there: the page shows that, and nobody's browser makes the rows.
    page = write_page([run]).read_text()
    assert "only its still is shown" in page
    for still in (run / "figures").glob("*.svg"):
        still.unlink()
    found = said(run, "write_page([path])")
    assert found == "took it" or "cannot be drawn" in found


def hostile_tables() -> dict[str, Callable[[Path], None]]:
    column = pyarrow.array([0.0, 1.0])

    def about(**pandas: Any) -> Callable[[Path], None]:
        frame = pd.DataFrame({"a": [0.0, 1.0]})
        table = pyarrow.Table.from_pandas(frame)
        known = json.loads(table.schema.metadata[b"pandas"])
        metadata = {b"pandas": json.dumps(known | pandas).encode()}
        return lambda path: parquet.write_table(table.replace_schema_metadata(metadata), path)

    def write(column: Callable[[], pyarrow.Array]) -> Callable[[Path], None]:
        return lambda path: parquet.write_table(
            pyarrow.table({"a": column()}), path, compression="zstd"
        )

    def often(value: Any, times: int) -> pyarrow.Array:
        return pyarrow.array([value]).take(pyarrow.array([0] * times))

    span = {"kind": "range", "name": None, "start": 0, "step": 1}
    kinds = {"name": "a", "field_name": "a", "pandas_type": "x", "metadata": None}
    long = "x" * 10**6
    return {
        "rows without end": about(index_columns=[span | {"stop": 10**15}]),
        "rows by twos": about(index_columns=[span | {"stop": 2, "step": 2}]),
        "rows of no step": about(index_columns=[span | {"stop": 2, "step": 0}]),
        "rows of texts": about(index_columns=[span | {"stop": "2" * 99}]),
        "an index of nothing": about(index_columns=["b", 7, None]),
        "an index that is none": about(index_columns=5),
        "columns that are none": about(columns=[3, None]),
        "a type of no name": about(columns=[kinds | {"numpy_type": "nothing[at all]"}]),
        "a type with a program": about(columns=[kinds | {"numpy_type": "period[1000000000Y]"}]),
        "columns of columns": about(column_indexes=[{"pandas_type": "x", "numpy_type": "y"}] * 3),
        "no object": lambda path: parquet.write_table(
            pyarrow.table({"a": column}).replace_schema_metadata({b"pandas": b"[1"}), path
        ),
        "a long text often": write(lambda: often(long, 600)),
        "a long text in a dictionary": write(lambda: often(long, 600).dictionary_encode()),
        "a long list": write(lambda: often([0] * 10**6, 70)),
    }


@pytest.mark.parametrize("write", [pytest.param(w, id=n) for n, w in hostile_tables().items()])
def test_a_table_of_hostile_notes_or_texts(
    write: Callable[[Path], None], tmp_path: Path, said: Said
) -> None:
    run = make_run(tmp_path / "run")
    write(run / "scores.parquet")
    assert (run / "scores.parquet").stat().st_size < 100_000
    said(run, "write_page([path])")  # either way


def test_frames_come_back_as_pandas_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    frame = pd.DataFrame(
        {
            "site": ["resid 1", None, "head 2.1"],
            "head": pd.array([None, 1, 2], "Int64"),
            "value": [0.5, None, 2.0],
            "right": [True, False, True],
            "kind": pd.Categorical(["a", "b", "a"]),
        }
    )
    for each in (frame, frame.set_index("kind"), frame.iloc[:0], frame.iloc[1:], frame.iloc[::2]):
        for index in (None, False):
            each.to_parquet(path, index=index)
            pd.testing.assert_frame_equal(read_frame(path), pd.read_parquet(path))
