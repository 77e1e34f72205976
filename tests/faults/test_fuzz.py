"""Whatever stands in a file, reading it succeeds or is refused in one line of ours."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings, strategies as st

import lensclust as lc
from lensclust.activations.store import attributes as store_notes, writing as store
from lensclust.cli.command import main
from lensclust.models.checkpoints import load_checkpoint, read_metadata, save_checkpoint
from lensclust.models.weight_files import gguf_contents, safetensors_contents
from lensclust.prompts.prompts import Prompts
from lensclust.report.page import write_page
from lensclust.runs import directory as run_directory
from lensclust.storage.safetensors import read_checksummed, save_checksummed
from tests.faults.work import extract, tiny_model
from tests.lensclust.models.test_models import write_gguf
from tests.lensclust.report.test_report import make_run
from tests.tiny import byte_tokenizer, hf_model

TEXT = st.text(st.characters(exclude_categories=[]), max_size=12)
SCALAR = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), TEXT, st.just("")
)
JSON = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=8,
)


def cases(quick: int, slow: int) -> Any:
    marks = [quick, pytest.param(slow, marks=pytest.mark.slow)]
    return pytest.mark.parametrize("count", marks)


def fuzz(
    count: int,
    strategy: st.SearchStrategy[Any],
    read: Callable[[Any], object],
    *,
    both: bool = True,
) -> None:
    """Give ``read`` many values; it may return or raise one line of ours, nothing else."""
    refused = 0

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list[Any](HealthCheck),
    )
    @given(strategy)
    def check(value: Any) -> None:
        nonlocal refused
        try:
            read(value)
            said = ""
        except lc.InputError as error:
            refused, said = refused + 1, str(error)
        assert "\n" not in said

    check()
    print(f"{count} cases, {refused} refused")
    # A fuzz that never gets past the door, or never meets it, tests little.
    assert not both or 0 < refused < count


def put(path: Path, value: Any) -> None:
    """A value as JSON, raw bytes as they are."""
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def spoiled(whole: Any) -> st.SearchStrategy[Any]:
    """A JSON value with one place in it replaced or removed, or something else altogether."""

    def spoil(choices: tuple[int, Any, bool]) -> Any:
        where, other, removed = choices
        copy = json.loads(json.dumps(whole))
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            for key in list(node) if isinstance(node, dict) else range(len(node)):
                places.append((node, key))
                if isinstance(node[key], (dict, list)):
                    walk(node[key])

        walk(copy)
        node, key = places[where % len(places)]
        if removed:
            del node[key]
        else:
            node[key] = other
        return copy

    changed = st.tuples(st.integers(0, 10**6), JSON, st.booleans()).map(spoil)
    return st.one_of(changed, changed, changed, JSON, st.binary(max_size=60))


def damaged(content: bytes, head: int) -> st.SearchStrategy[bytes]:
    """Bytes with a few of their first ones changed, or cut short, or lengthened."""

    def damage(choices: tuple[list[tuple[int, int]], int]) -> bytes:
        changes, length = choices
        copy = bytearray(content)
        for place, value in changes:
            copy[place] = value
        return bytes(copy[:length]) if length < head else bytes(copy)

    change = st.tuples(st.integers(0, head - 1), st.sampled_from([0, 1, 34, 44, 58, 127, 128, 255]))
    return st.tuples(st.lists(change, max_size=4), st.integers(0, 8 * head)).map(damage)


# -- prompts -------------------------------------------------------------------------------------

IDS = st.integers(-3, 60) | st.sampled_from([-(2**63), 2**31, 2**63 - 1, 2**63, 2**90])
LISTS = st.lists(st.lists(IDS, max_size=5), max_size=4)
GOOD = st.lists(st.integers(0, 60), min_size=1, max_size=5)
PLACES = st.sampled_from([(0, 1), (0, 1), (0, 1), (0, 0), (1, 0), (0, 3), (-1, 1)])
SPANS = st.lists(st.tuples(IDS, IDS), max_size=4)
NAME = st.text(max_size=5)
COLUMNS = st.dictionaries(NAME, st.lists(SCALAR, max_size=4), max_size=3)


@cases(quick=30, slow=1200)
def test_prompts_of_any_ids(count: int) -> None:
    def read(given: Any) -> None:
        ids, columns, answers, spans = given
        n = len(ids)
        fitted = {name: (values * n + [None] * n)[:n] for name, values in columns.items()}
        rows = pd.DataFrame(fitted, index=range(n), dtype=object)
        options = {"answers": answers, "spans": None if spans is None else {"part": spans}}
        prompts = Prompts.from_token_lists(ids, rows, **options)
        assert [
            row[:k].tolist() for row, k in zip(prompts.tokens, prompts.lengths, strict=True)
        ] == ids
        prompts.digest()
        prompts.label_arrays()
        assert len(prompts.take([0])) == 1
        assert repr(prompts).startswith("Prompts(")
        prompts._repr_html_()
        if answers is not None:
            prompts.with_answers()
        if spans is not None:
            start, end = prompts.position("part_start"), prompts.position("part_end")
            assert bool(((start >= 0) & (start <= end) & (end < prompts.lengths)).all())

    # Most of the time as many answers and spans as prompts: else nothing gets past the door.
    even = st.lists(GOOD, min_size=1, max_size=4).flatmap(
        lambda ids: st.tuples(
            st.just(ids),
            COLUMNS,
            st.none() | st.lists(GOOD, min_size=len(ids), max_size=len(ids)),
            st.none() | st.lists(PLACES, min_size=len(ids), max_size=len(ids)),
        )
    )
    given = st.tuples(LISTS, COLUMNS, st.none() | LISTS, st.none() | SPANS)
    fuzz(count, given | even | even | even, read)


@cases(quick=24, slow=700)
def test_prompts_of_any_texts(count: int) -> None:
    tokenizer = byte_tokenizer()

    def read(given: tuple[list[str], list[tuple[int, int]], bool]) -> None:
        texts, ranges, chat = given
        rows = pd.DataFrame({"task": texts}, dtype=object)
        fitted = (ranges + [(0, 1)] * len(texts))[: len(texts)]
        Prompts.from_texts(texts, rows, tokenizer, answers=texts, spans={"x": fitted}, chat=chat)

    place = st.integers(-2, 14)
    ranges = st.lists(st.tuples(place, place), max_size=3)
    fuzz(count, st.tuples(st.lists(TEXT, max_size=3), ranges, st.booleans()), read)


@cases(quick=12, slow=40)
def test_labels_of_any_kind_come_back_from_a_store(
    count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 1, 1, 3)

    def read(columns: dict[str, list[Any]]) -> None:
        # pandas itself refuses half a surrogate pair in a column of its own string type.
        kinds = [object if any(isinstance(v, str) for v in c) else None for c in columns.values()]
        given = zip(columns.values(), kinds, strict=True)
        series = {f"c{i}": pd.Series(c, dtype=kind) for i, (c, kind) in enumerate(given)}
        rows = pd.DataFrame(series, index=range(4))
        prompts = Prompts.from_token_lists([[1]] * 4, rows)
        labels = prompts.label_arrays()
        attributes = dict.fromkeys(("weights", "tokenizer", "sites", "dtype"), "x")
        frame = xr.Dataset(
            {"resid": (("prompt", "position", "layer", "d_model"), values)},
            {"position": ["answer"], "layer": [0], **{n: ("prompt", v) for n, v in labels.items()}},
            {**attributes, "prompts": prompts.digest()},
        )
        path = tmp_path_factory.mktemp("labels") / "a"
        acts = store.write(
            path,
            frame,
            lambda m: [(r, {"resid": values[r.start : r.stop]}) for r in m],
            keys=prompts.row_digests(),
            shard=3,
            resume=False,
            append=False,
        )
        for name, label in labels.items():
            assert [str(v) for v in acts[name].values] == [str(v) for v in label], name

    column = st.one_of(
        *(
            st.lists(kind, min_size=4, max_size=4)
            for kind in (TEXT, st.floats(), st.booleans(), SCALAR)
        ),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=4, max_size=4),
    )
    fuzz(count, st.dictionaries(TEXT, column, max_size=3), read, both=False)


@cases(quick=30, slow=400)
def test_descriptions_of_stores(count: int, tmp_path: Path) -> None:
    """Sealed anew each time, as someone would who knows how."""
    extract(tmp_path)
    path = tmp_path / "a"
    names = [".zattrs", ".zgroup"]
    names += [
        f"{n}/{f}" for n in ("resid", "prompt_written", "n", "task") for f in (".zarray", ".zattrs")
    ]
    wholes = {name: json.loads((path / name).read_text()) for name in names}
    batches = json.loads(wholes[".zattrs"].pop("batches"))

    def read(given: tuple[str, Any]) -> None:
        name, value = given
        if name == "batches":
            text = value.decode("latin-1") if isinstance(value, bytes) else json.dumps(value)
            name, value = ".zattrs", {**wholes[".zattrs"], "batches": text}
        if name == ".zattrs" and isinstance(value, dict):
            value = {"batches": json.dumps(batches), **value}
            value["seal"] = store_notes.seal(value)
        before = (path / name).read_bytes()
        put(path / name, value)
        try:
            lc.open_activations(path).load()
        finally:
            (path / name).write_bytes(before)

    either = [st.tuples(st.just(name), spoiled(whole)) for name, whole in wholes.items()]
    whole = st.sampled_from([*wholes.items(), ("batches", batches)])
    fuzz(count, st.one_of(whole, *either, st.tuples(st.just("batches"), spoiled(batches))), read)


# -- files of tasks ------------------------------------------------------------------------------


@cases(quick=30, slow=1200)
def test_task_files(count: int, tmp_path: Path) -> None:
    wholes = {
        "annotations": {"annotations": ["Write the plural.", "Say it twice."]},
        "execute": {
            "metadata": {"task_name": "a"},
            "examples": {
                "1": {"input": "cat", "output": "cats"},
                "2": {"cause": "rain", "effect": "wet"},
                "3": {"items": ["a", "b"], "concept": "letters"},
            },
        },
    }
    for part in wholes:
        (tmp_path / part).mkdir()
    tokenizer = byte_tokenizer()

    def read(given: tuple[Any, Any]) -> None:
        for part, value in zip(wholes, given, strict=True):
            put(tmp_path / part / "a.json", value)
        lc.tasks.from_name(f"instruction_induction:{tmp_path}", tokenizer)

    either = [
        st.tuples(spoiled(wholes["annotations"]), st.just(wholes["execute"])),
        st.tuples(st.just(wholes["annotations"]), spoiled(wholes["execute"])),
    ]
    fuzz(count, st.one_of(either), read)


# -- run directories and what they were asked for -------------------------------------------------


@cases(quick=24, slow=400)
def test_run_directories(count: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for path in (run / "figures").glob("*.svg"):
        path.unlink()
    names = ["config.json", "claims.json", "provenance.json", "notes.json"]
    wholes = {name: json.loads((run / name).read_text()) for name in names}
    spec = next((run / "figures").iterdir())
    spec.rename(tmp_path / "spec")

    def read(given: tuple[str, Any]) -> None:
        name, value = given
        put(run / name, value)
        try:
            write_page([run])
        finally:
            put(run / name, wholes[name])

    either = [st.tuples(st.just(name), spoiled(wholes[name])) for name in names]
    fuzz(count, st.one_of(either), read)


@cases(quick=8, slow=100)
def test_figures_and_tables_of_a_run(count: int, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    spec, scores = run / "figures" / "clusters.vl.json", run / "scores.parquet"
    whole, table = json.loads(spec.read_text()), scores.read_bytes()

    def read(given: tuple[Path, Any]) -> None:
        path, value = given
        before = path.read_bytes()
        put(path, value)
        try:
            write_page([run])
        finally:
            path.write_bytes(before)

    figures = st.tuples(st.just(spec), spoiled(whole))
    fuzz(
        count,
        figures | st.tuples(st.just(scores), damaged(table[::-1], 200).map(lambda b: b[::-1])),
        read,
    )


@cases(quick=30, slow=500)
def test_configurations_of_runs(count: int, tmp_path: Path) -> None:
    config = {"study": "emergence", "preset": "smoke", "seeds": 1, "fields": {"lr": 0.1, "k": None}}

    def read(value: Any) -> None:
        put(tmp_path / "config.json", value)
        with run_directory.claimed(tmp_path, config, resume=True):
            pass

    fuzz(count, st.just(config) | spoiled(config), read)


@cases(quick=12, slow=100)
def test_options_of_studies(count: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a folder that holds something else, so that no study begins."""
    (tmp_path / "mine.txt").write_text("mine")
    fields = ["n-tasks", "n-inputs", "lr", "k", "steps", "model", "seeds", "jobs", "preset", "x"]
    value = (
        st.integers(-3, 12).map(str)
        | st.floats().map(str)
        | st.text("ab,.=-\u2028é\x00", max_size=4)
    )
    options = st.lists(st.tuples(st.sampled_from(fields), value), max_size=3)

    def read(given: list[tuple[str, str]]) -> None:
        said = [f"--{name}={value}" for name, value in given]
        try:
            status = main(["run", "emergence", "--preset", "smoke", "--out", str(tmp_path), *said])
        except SystemExit as stopped:  # the parser's own, with its message
            status = int(str(stopped.code))
        printed = capsys.readouterr().err
        assert status == 2
        assert "Traceback" not in printed
        raise lc.InputError("refused")

    fuzz(count, options, read, both=False)


# -- weights ---------------------------------------------------------------------------------------


@cases(quick=30, slow=400)
def test_headers_of_checkpoints(count: int, tmp_path: Path) -> None:
    path = save_checkpoint(tiny_model(), tmp_path / "a.safetensors", step=1)
    content, tensors = read_checksummed(path, "lensclust")
    whole, other = path.read_bytes(), tmp_path / "b.safetensors"
    (header,) = struct.unpack("<Q", whole[:8])

    def read(value: Any) -> None:
        if isinstance(value, bytes):
            other.write_bytes(value)
        else:
            # Made so by someone who knows the seal.
            said = value if isinstance(value, dict) else {"config": value, "metadata": value}
            save_checksummed(other, "lensclust", said, tensors)
        read_metadata(other)
        load_checkpoint(other)

    fuzz(count, damaged(whole, header + 8) | spoiled(content), read)


@cases(quick=10, slow=300)
def test_folders_of_models(count: int, tmp_path: Path) -> None:
    hf_model("llama").save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    described, whole = json.loads(config.read_text()), weights.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])

    def read(given: tuple[str, Any]) -> None:
        name, value = given
        weights.write_bytes(whole)
        put(config, described)
        put(tmp_path / name, value)
        safetensors_contents(tmp_path)
        lc.load(tmp_path, device="cpu")

    files = st.tuples(st.just("model.safetensors"), damaged(whole, header + 8))
    fuzz(count, files | st.tuples(st.just("config.json"), spoiled(described)), read)


@cases(quick=30, slow=600)
def test_headers_of_gguf_files(count: int, tmp_path: Path) -> None:
    write_gguf(hf_model("llama"), tmp_path / "whole.gguf")
    whole, path = (tmp_path / "whole.gguf").read_bytes(), tmp_path / "a.gguf"
    # The header ends where the first tensor's numbers begin; names stand in it last.
    header = whole.rindex(b"output_norm.weight") + 40

    def read(content: bytes) -> None:
        path.write_bytes(content)
        gguf_contents(path)
        lc.load(path, device="cpu")

    # A whole file among them: that nothing is refused but what is damaged.
    fuzz(count, damaged(whole, header) | st.just(whole), read)
