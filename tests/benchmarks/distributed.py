"""What `extract_with_ray` costs over `extract`: one worker against one process, as many threads.

Twice: from when the worker has its model to when the store is complete, and with everything that
has to start before (Ray itself, the worker's imports, its model). Rounds of both ways are
interleaved; ratios are medians over the rounds. The stores are compared file by file.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

import lensclust as lc
from lensclust.activations.store import writing as store
from lensclust.models.native import native_config
from lensclust.storage.integrity import file_digest

ROUNDS = 3
# What was asked for.
MOST = 1.15
# A minute on one core.
PROMPTS, VOCABULARY, LONGEST = 6_000, 128, 80


def rows(full: bool = False) -> Iterator[dict[str, object]]:
    """One row without what has to start, and one with it.

    Args:
        full: four times as many prompts.
    """
    try:
        import ray
    except ImportError:
        yield {"what": "extract_with_ray, one worker", "skipped": "Ray is not installed"}
        return
    config: Any = native_config("sif-small", d_model=256, n_ctx=LONGEST, d_vocab=VOCABULARY)
    prompts = _prompts(PROMPTS * (4 if full else 1))
    threads = torch.get_num_threads()
    alone: dict[str, list[float]] = {"work": [], "all": []}
    spread: dict[str, list[float]] = {"work": [], "all": []}
    equal = True

    fill = store.fill

    def timed(*arguments: Any, **options: Any) -> Any:
        # The worker has said what is to be filled: it has its model.
        begun = time.perf_counter()
        filled = fill(*arguments, **options)
        spread["work"].append(time.perf_counter() - begun)
        return filled

    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            one, many = Path(folder) / "one", Path(folder) / "many"
            start = time.perf_counter()
            model = lc.load(config, device="cpu")
            loaded = time.perf_counter()
            lc.extract(model, prompts, "resid", store=one, progress=False)
            end = time.perf_counter()
            alone["work"].append(end - loaded)
            alone["all"].append(end - start)
            assert not ray.is_initialized()
            start = time.perf_counter()
            with patch.object(store, "fill", timed):
                lc.extract_with_ray(
                    config, prompts, "resid", store=many, workers=1, threads=threads,
                    loading={"device": "cpu"}, progress=False,
                )  # fmt: skip
            spread["all"].append(time.perf_counter() - start)
            equal &= _digests(one) == _digests(many)
    title = f"{len(prompts):,} prompts into a store: one worker on Ray"
    for part, what in {"work": "its model loaded", "all": "with all that has to start"}.items():
        yield {
            "what": f"{title}, {what}",
            "peer": f"extract in one process of {threads} threads",
            "ours / peer": float(np.median(np.divide(spread[part], alone[part]))),
            "at most": MOST,
            "peer, seconds": float(np.median(alone[part])),
            "ours, seconds": float(np.median(spread[part])),
            "largest difference": 0.0 if equal else float("inf"),
        }


def _prompts(number: int) -> lc.Prompts:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, VOCABULARY, rng.integers(40, LONGEST)).tolist() for _ in range(number)]
    return lc.Prompts.from_token_lists(ids, pd.DataFrame({"n": range(number)}))


def _digests(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): file_digest(path) for path in files}


if __name__ == "__main__":
    for row in rows():
        print(*(f"{name}: {value}" for name, value in row.items()), sep="\n  ")
