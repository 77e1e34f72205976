"""A sweep of ridge probes with its permuted labels, against a loop over scikit-learn.

Both on one thread, in float64, over the same folds, labels, permutations and penalties. The loop
would take minutes, so it runs on every eighteenth head and its time is scaled up; which it is
allowed to be, since every head costs it the same. Rounds of both are interleaved.
"""

from __future__ import annotations

import time

import numpy as np
import xarray as xr
from sklearn.linear_model import RidgeClassifier
from threadpoolctl import threadpool_limits

from probes.design.folds import Design, design
from probes.linear.linear_probe import probe
from probes.linear.moments import Moments

BLOCKS, HEADS, D_HEAD, ROWS, CLASSES, FOLDS, PERMUTATIONS = 12, 12, 64, 2000, 10, 5, 100
PENALTY, EVERY, ROUNDS = 0.01, 18, 3


def rows() -> list[dict[str, object]]:
    """One row: all heads of a model of 12 layers and 12 heads."""
    acts = _activations()
    plan = design(
        acts, target="task", groups="template", control=None, folds=FOLDS,
        permutations=PERMUTATIONS,
    )  # fmt: skip
    heads = np.arange(0, BLOCKS * HEADS, EVERY)
    ours, theirs = [], []
    with threadpool_limits(1):
        # The first sweep loads what it needs, and is not timed.
        frame, scores = _ours(acts), []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            _ours(acts)
            ours.append(time.perf_counter() - start)
            scores, seconds = zip(*(_loop(acts, int(head), plan) for head in heads), strict=True)
            theirs.append(sum(seconds) * BLOCKS * HEADS / len(heads))
    accuracy = np.array(scores)
    expected = np.stack([accuracy[:, 0], accuracy[:, 1:].mean(1), accuracy[:, 1:].std(1, ddof=1)])
    found = frame[frame["metric"] == "accuracy"].iloc[heads]
    difference = found[["value", "null_mean", "null_std"]].to_numpy().T - expected
    return [
        {
            "what": f"ridge, {PERMUTATIONS} permutations: {BLOCKS * HEADS} heads, {ROWS} rows, "
            f"{CLASSES} labels, {FOLDS} folds, one core",
            "peer": f"RidgeClassifier in a loop ({len(heads)} heads timed, scaled to all)",
            "ours / peer": float(np.median(np.divide(ours, theirs))),
            "peer, seconds": float(np.median(theirs)),
            "largest difference": float(np.abs(difference).max()),
        }
    ]


def _activations() -> xr.Dataset:
    """Heads that hold the task more or less strongly, or not at all."""
    rng = np.random.default_rng(0)
    task = np.arange(ROWS) % CLASSES
    z = rng.normal(size=(ROWS, 1, BLOCKS, HEADS, D_HEAD))
    strength = rng.choice([0.0, 0.1, 0.3], size=(BLOCKS, HEADS, 1))
    z += (strength * rng.normal(size=(CLASSES, 1, BLOCKS, HEADS, D_HEAD)))[task]
    # As in real activations, a few directions have most of the variance.
    z *= np.geomspace(10, 0.1, D_HEAD)
    return xr.Dataset(
        {"z": (("prompt", "position", "block", "head", "d_head"), z.astype(np.float32))},
        {"position": ["answer"], "block": range(BLOCKS), "head": range(HEADS)}
        | {"task": ("prompt", task.astype(str))}
        | {"template": ("prompt", (np.arange(ROWS) // CLASSES % 20).astype(str))},
    )


def _ours(acts: xr.Dataset):
    return probe(acts, penalties=[PENALTY], control=None, permutations=PERMUTATIONS, jobs=1).frame


def _loop(acts: xr.Dataset, head: int, plan: Design) -> tuple[np.ndarray, float]:
    """Mean accuracy over folds of each labelling, and the seconds it took to fit and predict."""
    x = acts.z.values[:, 0, head // HEADS, head % HEADS].astype(np.float64)
    moments = Moments(n_folds=FOLDS, n_classes=CLASSES)
    moments.update(x, plan.codes[:, :1], plan.fold)
    # The relative penalty is worked out for the loop before its clock starts.
    alphas = [PENALTY * moments.training(held_out=fold).scale for fold in range(FOLDS)]
    accuracy = np.empty((FOLDS, plan.codes.shape[1]))
    start = time.perf_counter()
    for fold, alpha in enumerate(alphas):
        tested = plan.fold == fold
        train, test = x[~tested], x[tested]
        for index, codes in enumerate(plan.codes.T):
            model = RidgeClassifier(alpha=alpha).fit(train, codes[~tested])
            accuracy[fold, index] = np.mean(model.predict(test) == codes[tested])
    return accuracy.mean(0), time.perf_counter() - start


if __name__ == "__main__":
    print(*(f"{name}: {value}" for row in rows() for name, value in row.items()), sep="\n")
