"""Stores at URLs: what a folder holds, object by object, through memory and a real S3 server."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import xarray as xr
from upath import UPath

import lensclust as lc
from lensclust.activations.store import attributes as store_notes, writing as store
from lensclust.activations.store.chunks import open_group
from lensclust.cli.command import main
from lensclust.storage import locations as store_places
from lensclust.storage.locations import as_place
from tests.lensclust.activations.test_store import some_prompts

pytestmark = pytest.mark.skipif(store_places.ZARR_2, reason="URLs need zarr 3")
# Few places: each is an object a shard, and a request.
SITES = ["resid 2", "resid 3", "head 1.0"]


@pytest.fixture(scope="module")
def model():
    return lc.load("native:sif-small")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    place = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patched:
        for name, value in place.items():
            patched.setenv(name, value)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patched.setenv(name, "test")
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(request) -> str:
    base = "memory://" if request.param == "memory" else request.getfixturevalue("bucket") + "/"
    return f"{base}{uuid.uuid4().hex}/a"


def objects(place: store_places.Place) -> dict[str, bytes]:
    files = (path for path in place.rglob("*") if path.is_file())
    return {str(path)[len(str(place)) + 1 :]: path.read_bytes() for path in files}


def test_a_url_holds_what_a_folder_holds(model, tmp_path, url):
    for prompts in (some_prompts(13), some_prompts(9, seed=3)):
        folder = lc.extract(model, prompts, SITES, store=tmp_path / "a", shard=5, append=True)
        there = lc.extract(model, prompts, SITES, store=url, shard=5, append=True)
    assert not there.resid.variable._in_memory
    assert objects(as_place(url)) == objects(tmp_path / "a")
    xr.testing.assert_identical(lc.open_activations(url).load(), folder.load())
    assert store.verify(url).size == 0
    assert [path.name for path in as_place(url).parent.iterdir()] == ["a"]


def test_a_write_that_stopped_is_resumed(model, tmp_path, url):
    whole = lc.extract(model, some_prompts(23), SITES, store=url, shard=5).load()
    before = objects(as_place(url))
    (as_place(url) / store_notes.DONE / "2").unlink()
    store_notes.note(open_group(as_place(url), "r+"), written=0)
    with pytest.raises(lc.InputError, match="holds 18 of 23 prompts"):
        lc.open_activations(url)
    with pytest.raises(lc.InputError, match="finish it with resume=True"):
        lc.extract(model, some_prompts(23), SITES, store=url)
    resumed = lc.extract(model, some_prompts(23), SITES, store=url, resume=True)
    xr.testing.assert_identical(resumed.load(), whole)
    assert objects(as_place(url)) == before


def test_a_store_that_was_half_laid_out_is_laid_out_again(model, tmp_path, url, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments, **options):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(store, "note", killed)
        with pytest.raises(Killed):
            lc.extract(model, some_prompts(8), "resid 2", store=url)
    assert (as_place(url) / ".zgroup").exists()
    with pytest.raises(lc.InputError, match=r"not a folder of activations|is damaged"):
        lc.open_activations(url)
    lc.extract(model, some_prompts(8), "resid 2", store=url)
    lc.extract(model, some_prompts(8), "resid 2", store=tmp_path / "a")
    assert objects(as_place(url)) == objects(tmp_path / "a")
    assert [path.name for path in as_place(url).parent.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "harm", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[: len(b) // 2]]
)
def test_a_damaged_object_is_never_data(model, url, harm):
    lc.extract(model, some_prompts(23), SITES, store=url, shard=5)
    chunk = as_place(url) / "resid" / "2.0.1.0"
    chunk.write_bytes(harm(chunk.read_bytes()))
    acts = lc.open_activations(url)
    assert acts.resid.sel(layer=2).values.shape[0] == 23
    with pytest.raises(lc.InputError, match="is damaged"):
        acts.resid.sel(layer=3).load()
    assert set(store.verify(url).tolist()) <= set(range(10, 15))
    assert store.verify(url).size
    (as_place(url) / "task" / "0").unlink()
    with pytest.raises(lc.InputError, match=r"labels of rows 0 to 22 .* changed"):
        lc.open_activations(url)


def test_what_is_there_already_is_kept(model, url):
    (as_place(url).parent / "notes" / "mine.txt").write_text("keep me")
    with pytest.raises(lc.InputError, match="not a folder of activations"):
        lc.extract(model, some_prompts(6), "resid 2", store=f"{as_place(url).parent}/notes")
    assert (as_place(url).parent / "notes" / "mine.txt").read_text() == "keep me"
    lc.extract(model, some_prompts(6), "resid 2", store=url)
    with pytest.raises(lc.InputError, match="holds weights"):
        lc.extract(lc.load("native:sif-small", seed=1), some_prompts(6), "resid 2", store=url)


def test_the_command_writes_to_a_url(url, capsys):
    command = ["extract", "--model", "native:sif-small", "--tasks", "sif", "--sites", "resid 6"]
    if url.startswith("memory:"):
        assert main([*command, "--out", url, "--quiet"]) == 2
        assert "is in memory, expected a folder or URL" in capsys.readouterr().err
        return
    assert main([*command, "--out", url, "--quiet"]) == 0
    assert url in capsys.readouterr().out
    assert lc.open_activations(url).sizes["layer"] == 1


@pytest.mark.parametrize("form", ["file://{}/a", "file:{}/a", "FILE://localhost{}/a"])
def test_a_file_url_is_a_folder(model, tmp_path, form):
    lc.extract(model, some_prompts(6), "resid 2", store=form.format(tmp_path))
    assert lc.open_activations(tmp_path / "a").sizes["prompt"] == 6
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:/b/a", "memory://", "file://", "file:///", "file://other/x", "file:////x",
     "File:b/c", "reference://a/b", "dir://a/b", "zip://a/b", "simplecache::s3://b/a", "dir://a::file:///x",
     "nosuch://a/b", "blockcache://x/y"],
)  # fmt: skip
def test_a_url_goes_where_it_says_or_is_refused(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lc.InputError, match=r"^store ") as caught:
        as_place(url)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_lack_of_credentials_is_no_damage(model, bucket, monkeypatch):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name, value in {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/nowhere",
                        "AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(lc.InputError, match=r"cannot be reached.*credentials"):
        lc.extract(model, some_prompts(6), "resid 2", store="s3://bucket/without/a")
    with pytest.raises(lc.InputError, match=r"cannot be reached.*credentials"):
        lc.open_activations("s3://bucket/without/a")
    s3fs.S3FileSystem.clear_instance_cache()


def test_unusable_urls_are_one_line(model, tmp_path, bucket):
    for wrong, said in {
        "nosuch://a/b": "nosuch",
        "s3://bucket": "names no store",
        "s3://no-such-bucket/a": "store s3://no-such-bucket/a: ",
    }.items():
        with pytest.raises(lc.InputError, match=said) as caught:
            lc.extract(model, some_prompts(6), "resid 2", store=wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(lc.InputError, match="expected a folder or URL"):
        lc.extract_with_ray("native:sif-small", some_prompts(6), "resid 2", store="memory://a")
    given = UPath("memory://other/a", some="option")
    place: Any = as_place(given)
    assert place.storage_options["some"] == "option"
    assert isinstance(as_place(tmp_path), Path)
