"""Batched k-means of many matrices and restarts, for a GPU.

The steps of scikit-learn (greedy k-means++, Lloyd's iterations, the restart of least inertia) run
for all restarts of all matrices of one shape together: each iteration is two batched products and
one synchronisation. On a CPU scikit-learn is faster.

Distances and centres are in float32 around each matrix's mean, as scikit-learn's; seeds are drawn
by exact differences, so that a row is never drawn twice, and inertias are summed in float64. The
draws are the host's, from one stream for every matrix: a partition depends neither on the other
matrices of its stack nor, up to rounding, on the device.

Source: Arthur & Vassilvitskii (2007), in the greedy variant of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.clustering.agreement import SCALES
from probes.clustering.kmeans import distinct
from probes.design import Group

# Maximum size of one stack on the device, and of the rows read from the host for it.
STACK_BYTES = 2**30
ITERATIONS = 300
# Centres that move less than this share of the mean variance have converged, as in scikit-learn.
SETTLED = 1e-4

Found = Int[np.ndarray, " _row"] | None


def partition(
    x: Float[np.ndarray, "row d"],
    k: int,
    *,
    n_init: int,
    seed: int,
    device: str | torch.device = "cuda",
) -> Int[np.ndarray, " row"] | None:
    """k-means cluster of each row, or None where there are fewer distinct rows than clusters.

    >>> x = np.array([[0.0], [0.1], [5.0], [5.1]])
    >>> found = partition(x, 2, n_init=2, seed=0, device="cpu")
    >>> bool(found[0] == found[1]), bool(found[1] == found[2])
    (True, False)
    """
    return partitions([x], [k], n_init=n_init, seed=seed, device=device)[0]


def partitions(
    matrices: Sequence[Float[np.ndarray, "_row _d"]],
    ks: Sequence[int],
    *,
    n_init: int,
    seed: int,
    device: str | torch.device = "cuda",
) -> list[Found]:
    """`partition` of many matrices; those of one shape and ``k`` are stacked.

    >>> x = np.random.default_rng(0).normal(size=(6, 2))
    >>> a, b, none = partitions([x, x, x * 0], [2, 2, 2], n_init=2, seed=0, device="cpu")
    >>> bool((a == b).all()), none
    (True, None)
    """
    found: list[Found] = [None] * len(matrices)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for index, (x, k) in enumerate(zip(matrices, ks, strict=True)):
        if distinct(x, k):
            alike.setdefault((*x.shape, k), []).append(index)
    for (rows, d, k), members in alike.items():
        # Rows, their products with all centres, and the cluster of each.
        each = 4 * rows * (3 * d + 4 * n_init * (k + _trials(k)))
        step = max(1, STACK_BYTES // each)
        for start in range(0, len(members), step):
            some = members[start : start + step]
            stack = torch.from_numpy(np.stack([matrices[i] for i in some]).astype(np.float32))
            labels = lloyd(stack.to(device), k, n_init=n_init, seed=seed).cpu().numpy()
            for index, own in zip(some, labels, strict=True):
                found[index] = own
    return found


def group_partitions(
    sites: Iterable[Float[np.ndarray, "row d"]],
    groups: Sequence[Group],
    *,
    scale: str,
    n_init: int,
    seed: int,
    device: str | torch.device,
) -> Iterator[tuple[Float[np.ndarray, "row d"], list[Found]]]:
    """Each site's states with the partition of each group, in stacks of sites.

    Args:
        sites: iterator over states of sites; only those of a stack are held.
        scale: as in `probes.clustering.agreement.score_groups`.
    """
    pending: list[np.ndarray] = []

    def done() -> Iterator[tuple[np.ndarray, list[Found]]]:
        points = [SCALES[scale](x[g.rows].astype(np.float32)) for x in pending for g in groups]
        ks = [group.k for group in groups] * len(pending)
        found = partitions(points, ks, n_init=n_init, seed=seed, device=device)
        for index, x in enumerate(pending):
            yield x, found[index * len(groups) : (index + 1) * len(groups)]
        pending.clear()

    for x in sites:
        if sum(held.nbytes for held in pending) > STACK_BYTES:
            yield from done()
        pending.append(x)
    yield from done()


@torch.no_grad()
def lloyd(
    x: Float[Tensor, "matrix row d"], k: int, *, n_init: int, seed: int
) -> Int[Tensor, "matrix row"]:
    """The restart of least inertia of each matrix, each with at least ``k`` distinct rows."""
    x = x - x.mean(1, keepdim=True)
    settled = SETTLED * x.var(1, correction=0).mean(1)[:, None]
    centres, emptied = seeds(x, k, n_init=n_init, seed=seed), False
    labels, apart = _nearest(x, centres)
    for _ in range(ITERATIONS):
        moved, counts = _means(x, labels, k)
        if emptied:
            moved = _filled(x, labels, apart, moved, counts)
        after, apart = _nearest(x, moved)
        still = (after == labels).all(-1) | ((moved - centres).square().sum((2, 3)) <= settled)
        centres, labels = moved, after
        done, full = still.all(), _counts(labels, k).all()
        # The only synchronisation in an iteration.
        finished, all_full = torch.stack([done, full]).tolist()
        emptied = not all_full
        if finished:
            break
    best = _inertia(x, centres, labels).argmin(1)
    return labels[torch.arange(len(x), device=x.device), best]


@torch.no_grad()
def seeds(
    x: Float[Tensor, "matrix row d"], k: int, *, n_init: int, seed: int
) -> Float[Tensor, "matrix run k d"]:
    """Greedy k-means++: the best of ``2 + log k`` rows drawn by squared distance."""
    n, rows, _ = x.shape
    trials, wide = _trials(k), torch.float32 if x.device.type == "mps" else torch.float64
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(rows, (n_init,), generator=generator)
    draws = torch.rand((k, n_init, trials), generator=generator, dtype=torch.float64)
    draws = draws.to(x.device, wide)
    runs = torch.arange(n_init, device=x.device)
    matrices = torch.arange(n, device=x.device)[:, None]
    chosen = x[matrices, first.to(x.device)[None].expand(n, -1)][:, :, None]
    nearest = _apart(x, chosen)[:, :, 0]
    picked = [chosen[:, :, 0]]
    for index in range(1, k):
        reached = nearest.to(wide).cumsum(-1)
        wanted = draws[index] * reached[..., -1:]
        # Search to the right of ties: a chosen row adds nothing and is never drawn again.
        drawn = torch.searchsorted(reached, wanted, right=True).clamp_max(rows - 1)
        candidates = x[matrices[..., None], drawn]
        closer = torch.minimum(_apart(x, candidates), nearest[:, :, None])
        best = closer.sum(-1, dtype=wide).argmin(-1)
        nearest = closer[matrices, runs, best]
        picked.append(candidates[matrices, runs, best])
    return torch.stack(picked, dim=2)


def _trials(k: int) -> int:
    return 2 + int(np.log(k))


def _apart(
    x: Float[Tensor, "matrix row d"], points: Float[Tensor, "matrix run point d"]
) -> Float[Tensor, "matrix run point row"]:
    """Squared distances from differences: 0 if and only if two rows are equal."""
    exact = "donot_use_mm_for_euclid_dist"
    apart = torch.cdist(points.flatten(1, 2), x, compute_mode=exact).square()
    return apart.unflatten(1, points.shape[1:3])


def _nearest(
    x: Float[Tensor, "matrix row d"], centres: Float[Tensor, "matrix run k d"]
) -> tuple[Int[Tensor, "matrix run row"], Float[Tensor, "matrix run row"]]:
    """The nearest centre of each row and its squared distance, in one product for all runs."""
    products = torch.matmul(centres.flatten(1, 2), x.mT).unflatten(1, centres.shape[1:3])
    nearest = (centres.square().sum(-1)[..., None] - 2 * products).min(2)
    return nearest.indices, nearest.values + x.square().sum(-1)[:, None]


def _belongs(labels: Int[Tensor, "matrix run row"], k: int) -> Bool[Tensor, "matrix run k row"]:
    return labels[:, :, None] == torch.arange(k, device=labels.device)[:, None]


def _counts(labels: Int[Tensor, "matrix run row"], k: int) -> Int[Tensor, "matrix run k"]:
    return _belongs(labels, k).sum(-1)


def _means(
    x: Float[Tensor, "matrix row d"], labels: Int[Tensor, "matrix run row"], k: int
) -> tuple[Float[Tensor, "matrix run k d"], Float[Tensor, "matrix run k"]]:
    """Mean row of each cluster (0 if empty) and cluster sizes."""
    belongs = _belongs(labels, k).to(x.dtype)
    counts = belongs.sum(-1)
    sums = torch.matmul(belongs.flatten(1, 2), x).unflatten(1, counts.shape[1:])
    return sums / counts.clamp_min(1)[..., None], counts


def _filled(
    x: Float[Tensor, "matrix row d"],
    labels: Int[Tensor, "matrix run row"],
    apart: Float[Tensor, "matrix run row"],
    means: Float[Tensor, "matrix run k d"],
    counts: Float[Tensor, "matrix run k"],
) -> Float[Tensor, "matrix run k d"]:
    """Means after moving the rows farthest from their centres into empty clusters."""
    empty = counts == 0
    farthest = apart.topk(min(counts.shape[-1], apart.shape[-1])).indices
    row = farthest.gather(2, (empty.cumsum(2) - 1).clamp_min(0))
    matrices = torch.arange(len(x), device=x.device)[:, None, None]
    taken = x[matrices, row] * empty[..., None]
    left = labels.gather(2, row)
    sums = means * counts[..., None]
    sums = sums.scatter_add(2, left[..., None].expand_as(taken), -taken) + taken
    counts = counts.scatter_add(2, left, -empty.to(counts.dtype)) + empty
    return sums / counts.clamp_min(1)[..., None]


def _inertia(
    x: Float[Tensor, "matrix row d"],
    centres: Float[Tensor, "matrix run k d"],
    labels: Int[Tensor, "matrix run row"],
) -> Float[Tensor, "matrix run"]:
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    matrices = torch.arange(len(x), device=x.device)[:, None]
    # Run by run: the differences of all runs would be the largest tensor.
    runs = range(labels.shape[1])
    away = (x - centres[matrices, run, labels[:, run]] for run in runs)
    return torch.stack([each.square().sum((1, 2), dtype=wide) for each in away], dim=1)
