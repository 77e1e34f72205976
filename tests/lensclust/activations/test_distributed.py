"""Extraction by several workers: the store of one process, bit by bit, whoever dies on the way."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

import lensclust as lc
from lensclust.activations.store import attributes as store_notes, writing as store
from lensclust.activations.store.chunks import open_group
from lensclust.cli.command import main
from lensclust.storage.integrity import file_digest
from tests.lensclust.activations.test_store import some_prompts
from tests.tiny import hf_model, tiny_tokenizer

SITES = ["resid", "head"]


def many_prompts() -> lc.Prompts:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 99, rng.integers(20, 60)).tolist() for _ in range(1200)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(len(ids))}))


def files(folder: Path) -> dict[Path, str]:
    """Digest of every file below a folder."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): file_digest(path) for path in found}


def rows_there(path: Path) -> int:
    group = open_group(path, "r")
    return int(store_notes.rows_done(group, slice(None)).sum())


def when_some_are_there(path: Path, fewest: int, then: Callable[[], None]) -> threading.Thread:
    """Call something as soon as so many rows are in a store; rows before and after are noted."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if path.exists() and (rows := rows_there(path)) >= fewest:
                watcher.seen = rows  # pyright: ignore[reportAttributeAccessIssue]
                then()
                return
            time.sleep(0.02)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.seen = 0  # pyright: ignore[reportAttributeAccessIssue]
    watcher.start()
    return watcher


@pytest.mark.slow
@pytest.mark.parametrize("dies", ["node", "worker"])
def test_a_death_half_way_leaves_the_store_of_one_process(nodes, tmp_path, caplog, dies):
    prompts, options = many_prompts(), {"shard": 8, "progress": False}
    nodes.grow_to(2)
    ways: dict[str, Callable[[], None]] = {
        "node": nodes.kill_a_node,
        "worker": lambda: nodes.kill_a_worker("Replica.write"),
    }
    path = tmp_path / "many"
    watcher: Any = when_some_are_there(path, 160, ways[dies])
    many = lc.extract_with_ray(
        "native:sif-small", prompts, SITES, store=path, workers=2, threads=1, **options
    )
    watcher.join()
    assert 160 <= watcher.seen < len(prompts)
    assert any("a worker died, its shards go to others" in text for text in caplog.messages)
    one = lc.extract(lc.load("native:sif-small"), prompts, SITES, store=tmp_path / "1", **options)
    assert files(path) == files(tmp_path / "1")
    xr.testing.assert_identical(many.load(), one.load())
    assert store.verify(path).size == 0
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["1", "many"]


@pytest.mark.slow
def test_the_command_writes_the_store_of_one_process(nodes, tmp_path):
    nodes.grow_to(2)
    command = ["extract", "--model", "native:sif-small", "--tasks", "sif", "--quiet", "--out"]
    spread = ["--engine", "ray", "--workers", "2", "--threads", "1"]
    assert main([*command, str(tmp_path / "one")]) == 0
    assert main([*command, str(tmp_path / "many"), *spread]) == 0
    assert files(tmp_path / "many") == files(tmp_path / "one")


@pytest.mark.slow
def test_prefixes_resuming_and_appending_are_those_of_one_process(nodes, tmp_path):
    """From a folder, of a model that shares prefixes; two calls, and shards that went missing."""
    nodes.grow_to(1)
    hf_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer(tmp_path / "model")
    shots = [[3 + (7 * i + k) % 50 for k in range(40)] for i in range(2)]
    ids = [[*shots[i % 2], 3 + i % 50, 5] for i in range(40)]
    calls = [
        lc.Prompts.from_token_lists(ids[:n], pd.DataFrame({"n": range(n), "call": [n] * n}))
        for n in (40, 23)
    ]
    options = {"shard": 16, "append": True, "progress": False}
    model = lc.load(tmp_path / "model")
    assert lc.plan_prefixes(model, calls[0], shard=16).sharing == 40
    for prompts in calls:
        lc.extract(model, prompts, SITES, store=tmp_path / "one", **options)
        lc.extract_with_ray(
            tmp_path / "model", prompts, SITES, store=tmp_path / "many", threads=1, **options
        )
    assert files(tmp_path / "many") == files(tmp_path / "one")
    (tmp_path / "many" / store_notes.DONE / "3").unlink()
    store_notes.note(open_group(tmp_path / "many", "r+"), written=40)
    with pytest.raises(lc.InputError, match="finish it with resume=True"):
        lc.extract_with_ray(
            tmp_path / "model", calls[1], SITES, store=tmp_path / "many", threads=1, **options
        )
    lc.extract_with_ray(
        tmp_path / "model", calls[1], SITES, store=tmp_path / "many", threads=1, resume=True,
        **options,
    )  # fmt: skip
    assert files(tmp_path / "many") == files(tmp_path / "one")


class Unsteady(dict):
    """The configuration of a model that has another seed in every process that receives it.

    Whoever receives it waits until two have: or else the first has done all the work before the
    second has started.
    """

    meeting: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return _seeded_here, (dict(self), self.meeting)


def _seeded_here(fields: dict[str, Any], meeting: Path) -> dict[str, Any]:
    (meeting / str(os.getpid())).touch()
    until = time.monotonic() + 60
    while len(list(meeting.iterdir())) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return {**fields, "seed": os.getpid()}


@pytest.mark.slow
def test_what_goes_wrong_at_a_worker_is_one_line_here(nodes, tmp_path):
    nodes.grow_to(2)
    options: dict[str, Any] = {"store": tmp_path / "a", "threads": 1, "shard": 4}
    sizes = {"n_layers": 2, "n_heads": 2, "d_model": 16, "d_head": 8, "n_ctx": 16, "d_vocab": 100}
    unsteady = Unsteady(sizes, d_mlp=32, act_fn="gelu", normalization_type="LN")
    unsteady.meeting = tmp_path / "meeting"
    unsteady.meeting.mkdir()
    with pytest.raises(lc.InputError, match=r"workers differ in weights: '\w+' and '\w+'"):
        lc.extract_with_ray(unsteady, some_prompts(400), "resid 2", workers=2, **options)
    shutil.rmtree(tmp_path / "a", ignore_errors=True)
    with pytest.raises(lc.InputError, match="site 'resid 9' does not exist"):
        lc.extract_with_ray("native:sif-small", some_prompts(8), "resid 9", **options)
    with pytest.raises(lc.InputError, match=r"no node has room for a worker \(64 CPU\)"):
        lc.extract_with_ray(
            "native:sif-small", some_prompts(8), "resid 6", **{**options, "threads": 64}
        )
    assert not (tmp_path / "a").exists()
    lc.extract(
        lc.load("native:sif-small", seed=1), some_prompts(8), "resid 6", store=tmp_path / "a"
    )
    before = files(tmp_path / "a")
    with pytest.raises(lc.InputError, match="holds weights"):
        lc.extract_with_ray("native:sif-small", some_prompts(8), "resid 6", **options)
    assert files(tmp_path / "a") == before


def test_refusals_need_no_cluster(tmp_path, monkeypatch):
    prompts = some_prompts(4)
    model = lc.load("native:sif-small")
    with pytest.raises(lc.InputError, match="a bridge cannot be sent to workers"):
        lc.extract_with_ray(model, prompts, "resid", store=tmp_path / "a")
    for name in ("workers", "threads", "shard"):
        none: dict[str, Any] = {name: 0}
        with pytest.raises(lc.InputError, match=f"{name}=0, expected at least 1"):
            lc.extract_with_ray("native:sif-small", prompts, "resid", store=tmp_path / "a", **none)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(lc.InputError, match=r"not installed: pip install 'lensclust\[ray\]'"):
        lc.extract_with_ray("native:sif-small", prompts, "resid", store=tmp_path / "a")
    assert not list(tmp_path.iterdir())
