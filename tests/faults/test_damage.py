"""Bits that flip, files that end early or are gone: named in one line, or of no effect at all."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import lensclust as lc
from lensclust.activations.store.attributes import DONE, layout_digest, note
from lensclust.activations.store.chunks import ZARR_FORMAT, open_group
from lensclust.activations.store.writing import verify
from lensclust.models import downloads
from lensclust.models.checkpoints import (
    checkpoint_fingerprint,
    checkpoint_series,
    load_checkpoint,
    read_metadata,
    save_checkpoint,
)
from lensclust.models.downloads import Pin
from lensclust.models.native import config_to_json, native_config
from lensclust.report.page import write_page
from lensclust.runs import directory as run_directory
from lensclust.runs.server import state
from lensclust.storage.integrity import DIGESTS, seal_folder
from lensclust.storage.safetensors import read_checksummed
from lensclust.training.data import required_sizes
from lensclust.training.pretraining import train
from studies.study import _once
from tests.faults.work import (
    BATCHES,
    KNOBS,
    PROMPTS,
    SHARD,
    SIZES,
    Small,
    extract,
    small_study,
    tiny_model,
    training,
)
from tests.lensclust.report.test_head_view_files import HELD
from tests.lensclust.report.test_report import make_run
from tests.tiny import hf_model, tiny_tokenizer

TINY = Pin("tiny", "1", 1, "0" * 64, "a/b", "0" * 64)


@dataclass(frozen=True)
class Kept:
    """Something on disk: its files, how it is read, and what it said when it was whole."""

    files: list[Path]
    read: Callable[[], Any]
    said: Any

    def still_says(self) -> bool:
        """Whether it reads as it did; False where it is refused in one line."""
        try:
            found, refused = self.read(), None
        except lc.InputError as error:
            found, refused = None, str(error)
        if refused is None:
            assert as_bytes(found) == as_bytes(self.said), "damage was read as data"
            return True
        assert "\n" not in refused
        assert any(str(file.parent.parent) in refused for file in self.files), refused
        return False


def as_bytes(value: Any) -> Any:
    """What was read, down to the last bit, in a form that can be compared."""
    if isinstance(value, dict):
        return {name: as_bytes(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_bytes(part) for part in value]
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray) and value.dtype.kind in "iufb":
        return (str(value.dtype), value.shape, value.tobytes())
    return value.tolist() if isinstance(value, np.ndarray) else value


def read_store(path: Path) -> Any:
    acts = lc.open_activations(path)
    arrays = {str(n): (list(v.dims), v.values) for n, v in acts.variables.items()}
    return {**arrays, "attributes": dict(acts.attrs)}


def read_checkpoint(path: Path) -> Any:
    model = load_checkpoint(path)
    weights = dict(model.original_model.state_dict())
    return [weights, config_to_json(model.cfg), read_metadata(path)]


def read_frames(folder: Path) -> Any:
    def never(item: Any, folder: Path) -> Any:
        raise AssertionError("done before")

    return {name: frame.to_dict("list") for name, frame in _once(never, 0, folder).items()}


def read_run(run: Path) -> Any:
    shown = {name: value for name, value in state(run).items() if name != "quiet"}
    page = write_page([run], run.parent / "other.html")
    return [shown, (run / "report.html").read_text("utf-8"), page.read_text("utf-8")]


def read_cached(cache: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LENSCLUST_CACHE", str(cache))
        patch.setitem(downloads.PINS, "tiny", TINY)
        model = lc.load("tiny", device="cpu", progress=False)
    network: Any = model.original_model
    text = None if model.tokenizer is None else model.to_tokens("w3 w4")
    return [dict(network.state_dict()), network.config.to_dict(), text]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kept]:
    top = tmp_path_factory.mktemp("kept")
    extract(top)
    training(top)
    frames = {
        "scores": pd.DataFrame({"a": [0.1, 0.2], "b": ["x", "y"]}),
        "t": pd.DataFrame({"c": [1]}),
    }
    _once(lambda item, folder: frames, 0, top / "part")
    run, cached = make_run(top / "run"), top / "models" / f"tiny-{TINY.version}"
    (run / "views").mkdir()
    (run / "views" / "1_heads.json").write_text(json.dumps(HELD))
    run_directory.seal(run)
    write_page([run])
    hf_model("llama").save_pretrained(cached)
    tiny_tokenizer(cached)
    seal_folder(cached, {TINY.member: TINY.member_sha256})
    last = top / "t" / "step-000030.safetensors"
    state = top / "t" / "training.state"
    readers: dict[str, tuple[list[Path], Callable[[], Any]]] = {
        "store": (
            [p for p in (top / "a").rglob("*") if p.is_file()],
            lambda: read_store(top / "a"),
        ),
        "checkpoint": ([last], lambda: read_checkpoint(last)),
        "state": ([state], lambda: read_checksummed(state, "lensclust-training")),
        "part": (list((top / "part" / "frames").iterdir()), lambda: read_frames(top / "part")),
        "run": ([p for p in run.rglob("*") if p.is_file()], lambda: read_run(run)),
        "model": (list(cached.iterdir()), lambda: read_cached(top)),
    }
    return {name: Kept(sorted(files), read, read()) for name, (files, read) in readers.items()}


@contextmanager
def changed(path: Path, content: bytes | None) -> Iterator[None]:
    """A file with other content, or without the file, for as long as the block lasts."""
    before = path.read_bytes()
    path.unlink() if content is None else path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def flipped(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    # Heads of files say how the rest is read: half of the flips fall there.
    first = len(content) if rng.random() < 0.5 else min(400, len(content))
    damaged[rng.randrange(first)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize(("seed", "flips"), [(0, 90), pytest.param(1, 900, marks=pytest.mark.slow)])
def test_no_flipped_bit_is_read_as_data(kept: dict[str, Kept], seed: int, flips: int) -> None:
    rng = random.Random(seed)
    tried, seen = dict.fromkeys(kept, 0), dict.fromkeys(kept, 0)
    # Of the many, every file gets one.
    each = [(name, file) for name in kept for file in kept[name].files]
    while len(each) < flips:
        name = rng.choices(list(kept), [5, 2, 2, 1, 4, 4])[0]
        each.append((name, rng.choice(kept[name].files)))
    for name, file in rng.sample(each, flips):
        with changed(file, flipped(file.read_bytes(), rng)):
            tried[name] += 1
            seen[name] += not kept[name].still_says()
    print(f"{tried} flips, {seen} detected, the others without effect")
    # Blanks in JSON and the like may flip without effect; nearly all bits are not of that kind.
    assert sum(seen.values()) > 0.8 * flips
    assert all(kept[name].still_says() for name in kept)


@pytest.mark.parametrize("name", ["store", "checkpoint", "state", "part", "run", "model"])
def test_files_that_end_early_or_are_gone(kept: dict[str, Kept], name: str) -> None:
    rng = random.Random(1)
    for file in rng.sample(kept[name].files, min(12, len(kept[name].files))):
        content = file.read_bytes()
        shorter = [content[: rng.randrange(len(content))], b"", content + b"\0", None]
        for other in shorter:
            with changed(file, other):
                # Only what no one reads can be done without.
                read_anyway = kept[name].still_says()
            assert not read_anyway or name == "store" or file.name == DIGESTS, file


def test_a_damaged_chunk_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    extract(tmp_path)
    acts = lc.open_activations(tmp_path / "a").load()
    chunk, rows = tmp_path / "a" / "resid" / "2.0.2.0", [*range(2 * SHARD, 3 * SHARD)]
    for content, said in (
        (flipped(chunk.read_bytes(), random.Random(0)), "the chunk does not match"),
        (None, r"1 of \d+ chunks are missing, the first is 2\.0\.2\.0; extract them again"),
    ):
        with changed(chunk, content):
            assert verify(tmp_path / "a").tolist() == rows
            damaged = lc.open_activations(tmp_path / "a")
            with pytest.raises(lc.InputError, match=f"a/resid: is damaged.*{said}"):
                _ = damaged.resid.sel(layer=2).values
            others = damaged.resid.isel(layer=1)
            assert np.array_equal(others.values, acts.resid.isel(layer=1).values)
            several = [i for i in range(41) if i not in rows]
            assert np.array_equal(damaged.resid[several].values, acts.resid[several].values)
    assert verify(tmp_path / "a").tolist() == []


def test_activations_of_another_store_are_refused(tmp_path: Path) -> None:
    """Of another model, or of the same one for other prompts; a chunk, or the whole variable."""
    extract(tmp_path)
    options = {"shard": SHARD, "append": True, "progress": False}
    other = lc.load(native_config("sif-small", **SIZES), seed=1, device="cpu")
    for name, model, batches in (("b", other, BATCHES), ("c", tiny_model(), BATCHES[::-1])):
        for prompts in batches:
            lc.extract(model, prompts, ["resid", "head"], store=tmp_path / name, **options)
        chunk = tmp_path / "a" / "resid" / "2.0.2.0"
        theirs = (tmp_path / name / "resid" / chunk.name).read_bytes()
        with changed(chunk, theirs), pytest.raises(lc.InputError, match="is damaged"):
            _ = lc.open_activations(tmp_path / "a").resid.values
        resid = tmp_path / "a" / "resid"
        resid.rename(tmp_path / "kept")
        shutil.copytree(tmp_path / name / "resid", resid)
        for read in (lc.open_activations, verify):
            with pytest.raises(lc.InputError, match="'resid' is of another store, or damaged"):
                read(tmp_path / "a")
        with pytest.raises(lc.InputError, match="'resid' is of another store, or damaged"):
            extract(tmp_path)
        shutil.rmtree(resid)
        (tmp_path / "kept").rename(resid)
    assert lc.open_activations(tmp_path / "a").load().sizes["prompt"] == 41


def test_a_store_with_checksums_beside_its_arrays_is_read_and_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The form of an earlier version."""
    extract(tmp_path)
    path = tmp_path / "a"
    whole = lc.open_activations(path).load()
    sums = {f"{n}_crc": whole[n].dims[:3] for n in ("resid", "z")}
    beside = {n: (dims, np.ones([whole.sizes[d] for d in dims], "u4")) for n, dims in sums.items()}
    for name in ("resid", "z", DONE):
        shutil.rmtree(path / name)
    bare = whole[["resid", "z"]].drop_vars([*whole.coords]).drop_attrs(deep=False).assign(beside)
    attributes = (path / ".zattrs").read_text()
    bare.to_zarr(str(path), mode="a", zarr_format=ZARR_FORMAT, consolidated=False)
    (path / ".zattrs").write_text(attributes)
    group = open_group(path, "r+")
    note(group, layout=layout_digest(dict(group.arrays()), whole))
    assert as_bytes(read_store(path)) == as_bytes(
        {**{str(n): (list(v.dims), v.values) for n, v in whole.variables.items()},
         "attributes": dict(whole.attrs)}
    )  # fmt: skip
    assert "a: is of an earlier version: damage may go unnoticed" in caplog.text
    with pytest.raises(lc.InputError, match="written by an earlier version: it can be read"):
        extract(tmp_path)
    note(group, written=3)
    with pytest.raises(lc.InputError, match="holds some of 41 prompts, its writing was interrup"):
        lc.open_activations(path)


@pytest.mark.parametrize(
    "key", [(3, 0, 1), (slice(None), 0, -1), ([4, 1, 40], 0, 2, [3, 0]), (-1,)]
)
def test_any_selection_reads_what_memory_holds(kept: dict[str, Kept], key: Any) -> None:
    acts = lc.open_activations(kept["store"].files[0].parent)
    whole = acts.resid.copy().load()
    places = dict(zip(whole.dims, key, strict=False))
    assert np.array_equal(acts.resid.isel(places).values, whole.isel(places).values)
    heads = acts.z.copy().load()
    some = {"head": 1, "block": [1, 0], "prompt": slice(30, 3, -4)}
    assert np.array_equal(acts.z.isel(some).values, heads.isel(some).values)


def test_a_damaged_store_is_not_added_to(tmp_path: Path) -> None:
    extract(tmp_path)
    attributes = tmp_path / "a" / ".zattrs"
    text = attributes.read_text()
    attributes.write_text(text.replace('"model": "', '"model": "X'))
    with pytest.raises(lc.InputError, match="is damaged: its attributes changed"):
        extract(tmp_path)
    attributes.write_text(text)
    extract(tmp_path)


def test_a_training_does_not_go_on_from_damage(tmp_path: Path) -> None:
    training(tmp_path)
    state = tmp_path / "t" / "training.state"
    with (
        changed(state, flipped(state.read_bytes(), random.Random(3))),
        pytest.raises(lc.InputError, match=r"cannot resume from .*training.state: is"),
    ):
        training(tmp_path)
    step = tmp_path / "t" / "step-000030.safetensors"
    content = step.read_bytes()
    at = content.index(b"step") + 8
    with (
        changed(step, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]),
        pytest.raises(lc.InputError, match=r"its header (is damaged|is not readable)"),
    ):
        checkpoint_series(tmp_path / "t")


def test_checkpoints_of_another_training_or_step_are_refused(tmp_path: Path) -> None:
    training(tmp_path)
    config = native_config("sif-small", **{**SIZES, **required_sizes(PROMPTS)})
    train(config, PROMPTS, out=tmp_path / "u", progress=False, **{**KNOBS, "seed": 1})
    ours, last = tmp_path / "t" / "step-000001.safetensors", "step-000030.safetensors"
    for content, said in (
        ((tmp_path / "u" / ours.name).read_bytes(), "000001.* is of another training: delete its"),
        ((tmp_path / "t" / last).read_bytes(), "000001.* is of another step: delete its folder"),
    ):
        with changed(ours, content), pytest.raises(lc.InputError, match=said):
            training(tmp_path)
    shutil.copy(tmp_path / "u" / last, tmp_path / "t")
    with pytest.raises(lc.InputError, match="holds checkpoints of 2 trainings, expected a"):
        checkpoint_series(tmp_path / "t")
    # Without a state to go on from, they are not written over either.
    (tmp_path / "t" / "training.state").unlink()
    with pytest.raises(lc.InputError, match=f"{last}' is of another training"):
        training(tmp_path)


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    path = save_checkpoint(tiny_model(), tmp_path / "a.safetensors", step=3)
    content, weights = read_checksummed(path, "lensclust")
    text = json.dumps({"content": content, "tensors": checkpoint_fingerprint(path)})
    said = f"{hashlib.sha256(text.encode()).hexdigest()} {text}"
    save_file(weights, path, metadata={"lensclust": said})
    assert read_metadata(path) == {"step": 3}
    assert lc.fingerprint(lc.load(path)) == checkpoint_fingerprint(path)
    path.write_bytes(path.read_bytes().replace(b'step\\": 3', b'step\\": 4'))
    with pytest.raises(lc.InputError, match="its header"):
        read_metadata(path)


def test_a_damaged_part_of_a_study_says_what_to_do(tmp_path: Path) -> None:
    _once(lambda item, folder: {"a": pd.DataFrame({"b": [1.5]})}, 0, tmp_path / "part")
    file = tmp_path / "part" / "frames" / "a.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(lc.InputError, match=r"delete it to have it done again.*a\.parquet is dam"):
        read_frames(tmp_path / "part")
    digests = tmp_path / "part" / "frames" / DIGESTS
    digests.write_text(json.dumps([]))
    with pytest.raises(lc.InputError, match="is damaged"):
        read_frames(tmp_path / "part")
    digests.rename(digests.with_name("sha256.json"))
    with pytest.raises(lc.InputError, match=r"delete it .* no digests.json: .* earlier version"):
        read_frames(tmp_path / "part")


def test_a_part_of_another_run_or_item_is_refused(tmp_path: Path) -> None:
    small_study(tmp_path)
    run = tmp_path / "r"
    (run / "parts" / "seed-0").rename(tmp_path / "kept")
    shutil.copytree(run / "parts" / "seed-1", run / "parts" / "seed-0")
    with pytest.raises(lc.InputError, match=r"seed-0: delete it .* part 'seed-1' instead of"):
        small_study(tmp_path)
    shutil.rmtree(run / "parts" / "seed-0")
    Small(steps=9).execute(tmp_path / "other", seeds=2, jobs=1, progress=False)
    shutil.copytree(tmp_path / "other" / "parts" / "seed-0", run / "parts" / "seed-0")
    with pytest.raises(lc.InputError, match=r"seed-0: delete it .* is of run '\w+' instead of '"):
        small_study(tmp_path)


def test_a_damaged_run_is_named_and_written_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_study(tmp_path)
    run = tmp_path / "r"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name, refused in (
        ("notes.json", "is missing"),
        ("scores.parquet", "is damaged"),
        ("figures/2_more.svg", "does not belong there"),
    ):
        if name[0] == "n":
            (run / name).unlink()
        else:
            (run / name).parent.mkdir(exist_ok=True)
            (run / name).write_bytes(before.get(run / name, b"12")[:-1])
        said = rf"^report: .* resume the run .*{name} {refused}"
        with pytest.raises(lc.InputError, match=said) as caught:
            write_page([run])
        assert "\n" not in str(caught.value)
        if name[0] == "f":
            (run / name).unlink()
        small_study(tmp_path)
        assert {path: path.read_bytes() for path in before} == before
    assert "notes.json is missing; all but its parts is written again" in caplog.text


def test_a_run_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    small_study(tmp_path)
    page = (tmp_path / "r" / "report.html").read_bytes()
    (tmp_path / "r" / DIGESTS).unlink()
    assert write_page([tmp_path / "r"]).read_bytes() == page
    assert state(tmp_path / "r")["finished"]
    assert not (tmp_path / "r" / DIGESTS).exists()


def test_a_cached_model_of_an_earlier_version_or_another_pin(tmp_path: Path) -> None:
    cached = tmp_path / "models" / f"tiny-{TINY.version}"
    hf_model("llama").save_pretrained(cached)
    before = as_bytes(read_cached(tmp_path)[0])
    config = cached / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    )
    with pytest.raises(lc.InputError, match=r"tiny-1: delete it .*config\.json is damaged"):
        read_cached(tmp_path)
    # Without digests, there is no place in two layers for the weights of the third.
    (cached / DIGESTS).unlink()
    with pytest.raises(lc.InputError, match=r"9 weights that its config.json does not define"):
        read_cached(tmp_path)
    hf_model("llama").save_pretrained(cached)
    seal_folder(cached, {TINY.member: "1" * 64})
    with pytest.raises(lc.InputError, match=r"delete it .*: is of a/b '1+' instead of '0+'"):
        read_cached(tmp_path)
    (cached / DIGESTS).unlink()
    assert as_bytes(read_cached(tmp_path)[0]) == before
