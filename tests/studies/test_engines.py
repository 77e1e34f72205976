"""Sweeps over a cluster: the same results as here, from other processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from joblib import delayed, parallel_config

import lensclust as lc
from lensclust.cli.command import main
from lensclust.parallel import in_parallel, sweeps_on_ray
from probes import cluster, probe
from studies.study import Context

SWEPT = ["run", "emergence", "--preset", "smoke", "--seeds", "2", "--quiet", "--steps", "8"]
SWEPT += ["--permutations", "3", "--n-checkpoints", "2", "--jobs", "2"]


def whereabouts(n: int) -> tuple[int, int]:
    return n, os.getpid()


def where(item: int, folder: Path) -> dict[str, pd.DataFrame]:
    """A part of a study that sweeps over sites itself."""
    prompts = lc.tasks.sif(seed=item).where(split="new_string")
    acts = lc.extract(lc.load("native:sif-small"), prompts, "resid 6", progress=False)
    scores = cluster(acts, metrics="ari", permutations=2, jobs=2, progress=False).frame
    (folder / "note.txt").write_text(str(item))
    pids = [pid for _, pid in in_parallel((delayed(whereabouts)(n) for n in range(3)), jobs=2)]
    return {"scores": scores.assign(item=item), "pids": pd.DataFrame({"pid": [*pids, os.getpid()]})}


def check_sweeps(out: Path) -> None:
    """In the order of the calls, in other processes, nested, and with what it gives here."""
    found = list(in_parallel((delayed(whereabouts)(n) for n in range(12)), jobs=2))
    assert [n for n, _ in found] == list(range(12))
    assert os.getpid() not in {pid for _, pid in found}
    there = Context(out / "there", jobs=2, progress=False).sweep(where, [0, 1], "part")
    assert os.getpid() not in set(there["pids"]["pid"])
    with parallel_config(backend="sequential"):
        here = Context(out / "here", jobs=1, progress=False).sweep(where, [0, 1], "part")
    pd.testing.assert_frame_equal(there["scores"], here["scores"])
    assert (out / "there" / "parts" / "part-1" / "note.txt").read_text() == "1"
    prompts = lc.tasks.sif().where(split="both")
    acts = lc.extract(lc.load("native:sif-small"), prompts, "resid", progress=False)
    options: dict[str, Any] = {"target": "input", "groups": None, "control": None}
    sweep = probe(acts, **options, permutations=2, jobs=2, progress=False)
    with parallel_config(backend="sequential"):
        alone = probe(acts, **options, permutations=2, jobs=1, progress=False)
    pd.testing.assert_frame_equal(sweep.frame, alone.frame)


@pytest.mark.slow
def test_a_study_on_ray_ends_with_the_bytes_of_one_here(nodes, tmp_path, capsys):
    nodes.grow_to(2)
    ours, theirs = tmp_path / "here", tmp_path / "ray"
    assert main([*SWEPT, "--out", str(ours)]) == 0
    assert main([*SWEPT, "--out", str(theirs), "--engine", "ray"]) == 0
    assert (theirs / "claims.json").read_bytes() == (ours / "claims.json").read_bytes()
    assert sorted(p.name for p in (theirs / "parts").iterdir()) == ["seed-0", "seed-1"]
    capsys.readouterr()


@pytest.mark.slow
def test_sweeps_on_ray(nodes, tmp_path):
    nodes.grow_to(2)
    with sweeps_on_ray():
        check_sweeps(tmp_path)


@pytest.mark.slow
def test_sweeps_on_dask(tmp_path):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=0
        ) as workers,
        distributed.Client(workers),
        parallel_config(backend="dask"),
    ):
        check_sweeps(tmp_path)
