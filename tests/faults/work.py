"""Three tiny pieces of work that write: a store, a training and a study run.

Each is called again and again on its folder, with ``resume``, until it ends. What a kill left
can be looked at in between: `looked_at` raises if anything half written would be taken for data,
and names the files that are done, which nobody may write again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import lensclust as lc
from lensclust.activations.store.attributes import measured_names, rows_done, rows_expected
from lensclust.activations.store.chunks import open_group
from lensclust.models.native import native_config
from lensclust.parallel import one_thread
from lensclust.prompts.prompts import Prompts
from lensclust.results.claims import decide
from lensclust.storage.safetensors import read_checksummed
from lensclust.tasks.synthetic.sif import sif
from lensclust.training.data import required_sizes
from lensclust.training.pretraining import train
from studies.emergence import Emergence
from studies.study import Context, Findings, Study

SHARD = 5
SIZES = {"n_layers": 2, "n_heads": 2, "d_model": 16, "n_ctx": 16}
PROMPTS = sif(n_tasks=3, n_inputs=4, mappings_per_task=3, strings_per_regex=16, rows_per_mapping=4)
REAL = Emergence(
    n_tasks=2,
    n_inputs=3,
    mappings_per_task=3,
    regexes_per_task=2,
    held_out_regexes=2,
    rows_per_mapping=2,
    steps=6,
    batch_size=8,
    n_checkpoints=2,
    permutations=2,
)


@dataclass(frozen=True)
class Work:
    """What is done to a folder, and what must hold of it at any time."""

    run: Callable[[Path], Any]
    looked_at: Callable[[Path], Iterable[Path]]


def some_prompts(n: int, seed: int = 0) -> Prompts:
    """Token lists of several lengths with labels of several kinds."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 99, rng.integers(2, 12)).tolist() for _ in range(n)]
    labels = {"task": ["t" * (1 + seed + i % 4) for i in range(n)], "n": range(n)}
    rows = pd.DataFrame({**labels, "share": rng.random(n), "even": np.arange(n) % 2 == 0})
    return Prompts.from_token_lists(ids, rows)


def tiny_model() -> Any:
    return lc.load(native_config("sif-small", **SIZES), device="cpu")


# -- a store, made of two calls: the second begins inside a chunk of the first -----------------

BATCHES = (some_prompts(23), some_prompts(18, seed=1))


def extract(folder: Path) -> None:
    model, sites = tiny_model(), ["resid", "head"]
    options = {"store": folder / "a", "shard": SHARD, "resume": True, "append": True}
    for prompts in BATCHES:
        lc.extract(model, prompts, sites, progress=False, **options)


def looked_at_store(folder: Path) -> list[Path]:
    store = folder / "a"
    # Whole, or refused: a store that opens holds one batch or both, and reads without an error.
    with suppress(lc.InputError):
        acts = lc.open_activations(store).load()
        assert acts.sizes["prompt"] in (23, 41)
    if not store.exists():
        return []
    group = open_group(store, "r")
    done = rows_done(group, slice(None))
    shards = [i for i in range(len(done) // SHARD) if done[i * SHARD : (i + 1) * SHARD].all()]
    assert rows_expected(group) in (23, 41)
    files = [p for name in measured_names(group) for p in (store / name).iterdir()]
    return [p for p in files if p.name[0] != "." and int(p.name.partition(".")[0]) in shards]


# -- a training --------------------------------------------------------------------------------

KNOBS = {"steps": 30, "batch_size": 8, "n_checkpoints": 5, "save_every": 3, "device": "cpu"}


def training(folder: Path) -> None:
    config = native_config("sif-small", **{**SIZES, **required_sizes(PROMPTS)})
    with one_thread():
        train(config, PROMPTS, out=folder / "t", resume=True, progress=False, **KNOBS)


def looked_at_training(folder: Path) -> list[Path]:
    for path in (folder / "t").glob("*.safetensors"):
        read_checksummed(path, "lensclust")
    state = folder / "t" / "training.state"
    if not state.exists():
        return []
    done, _ = read_checksummed(state, "lensclust-training")
    named = {f"step-{row['step']:06d}.safetensors" for row in done["scores"]}
    return [folder / "t" / name for name in named]


# -- a study run: a small one of our own, and a real one with its figures -------------------------


@dataclass(frozen=True)
class Small(Study):
    """Train a model for each seed, store its states and say how large they are."""

    steps: int = 8

    def run(self, context: Context) -> Findings:
        scores = context.sweep(partial(measure, self), context.seeds, "seed")["scores"]
        means = scores.groupby("seed")["value"].mean()
        claim = decide(
            "size",
            "States are not zero.",
            means.to_numpy(),
            source="here",
            origin="extension",
            control={"zero": 0.0},
            at_least=0.1,
        )
        return Findings(scores, [claim], {}, notes=["Only a test."])


def measure(study: Small, seed: int, folder: Path) -> dict[str, pd.DataFrame]:
    config = native_config("sif-small", **{**SIZES, **required_sizes(PROMPTS)})
    knobs = {**KNOBS, "steps": study.steps, "n_checkpoints": 3}
    with one_thread():
        run = train(config, PROMPTS, out=folder / "t", resume=True, progress=False, **knobs)
    part = PROMPTS.take(range(0, len(PROMPTS), 40))
    options = {"store": folder / "a", "shard": 8, "resume": True, "progress": False}
    acts = lc.extract(run.model(), part, "resid", **options)
    sizes = np.abs(acts.resid.values).mean((0, 1, 3))
    return {"scores": pd.DataFrame({"seed": seed, "layer": acts.layer.values, "value": sizes})}


def small_study(folder: Path) -> None:
    Small().execute(folder / "r", seeds=2, jobs=1, resume=True, progress=False)


def real_study(folder: Path) -> None:
    REAL.execute(folder / "r", seeds=1, jobs=1, resume=True, progress=False)


def looked_at_run(folder: Path) -> list[Path]:
    out = folder / "r"
    for path in (*out.glob("*.parquet"), *out.glob("*.json"), *out.glob("figures/*.json")):
        pd.read_parquet(path) if path.suffix == ".parquet" else json.loads(path.read_text())
    frames = list(out.glob("parts/*/frames/*.parquet"))
    for path in frames:
        pd.read_parquet(path)
    return frames


WORK = {
    "extract": Work(extract, looked_at_store),
    "train": Work(training, looked_at_training),
    "run": Work(small_study, looked_at_run),
    "emergence": Work(real_study, looked_at_run),
}
