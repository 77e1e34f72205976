"""Extraction on a Ray cluster: replicas of a model, each writing shards.

The calling process holds the store's lock, creates the store and marks it as complete; it loads
no model, and no activations pass through it. Every worker (a Ray actor: one GPU, or ``threads``
CPUs) loads the model and writes shards of rows, which are disjoint regions of the store. Its
queue is short, so that a worker that dies (its process, its machine) leaves few shards: they go
to another worker, and a new one is started. A shard's bits depend on its prompts, the number of
threads and the kind of processor, not on the worker.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from transformer_lens.model_bridge import TransformerBridge
from upath import UPath

from lensclust.activations.reader import ShardReader
from lensclust.activations.skeleton import measured
from lensclust.activations.store import Destination, writing as on_disk
from lensclust.arguments import checked_arguments, require_prompts
from lensclust.errors import InputError, check_counts
from lensclust.models import SiteSelector, Source, load, shard_ranges
from lensclust.parallel import ray_session
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.storage import Place, as_place

log = logging.getLogger(__name__)

# Length of a worker's queue: the current shard, and the next.
AHEAD = 2
# Workers that may die at one shard, or at starting, before it counts as the cause.
DEATHS = 3
# Seconds without a result after which the cluster is checked for room for a worker.
PATIENCE = 10.0


@checked_arguments
def extract_with_ray(
    source: Source,
    prompts: Prompts,
    sites: SiteSelector,
    *,
    store: str | Place,
    workers: int | None = None,
    threads: int | None = None,
    loading: Mapping[str, Any] | None = None,
    at: str | Sequence[str] = "answer",
    batch_tokens: int | None = None,
    shard: int = 512,
    share_prefixes: bool = True,
    dtype: str = "float32",
    resume: bool = False,
    append: bool = False,
    progress: bool = True,
) -> xr.Dataset:
    """Read activations as `extract` does, by several replicas of a model on a Ray cluster.

    The store is bit-identical to that of one process with as many threads on the same kind of
    processor, even if workers die.

    Args:
        source: as in `load`, but not a bridge: every worker loads it. A path must lead to the
            same files on all nodes.
        prompts: the prompts to run; see `Prompts`.
        sites: sites to read, as in `extract`.
        store: folder of the zarr store, on a file system shared by all nodes, or its URL.
        workers: replicas of the model; default as many as the cluster has room for, at most
            one per shard.
        threads: CPU threads of a worker, and the CPUs it takes of a cluster without GPUs; default
            the threads of this process.
        loading: options of `load`, such as ``{"dtype": torch.bfloat16}``. With
            ``{"device": "cpu"}`` workers take no GPU.
        at, batch_tokens, shard, share_prefixes, dtype, resume, append, progress: as in `extract`.

    Returns:
        The dataset, read lazily from the store.

    Raises:
        InputError: as `extract`; if Ray is not installed, the source cannot be sent to workers,
            their weights or versions differ, no node has room for one, or workers keep dying.

    >>> import lensclust as lc
    >>> prompts = lc.tasks.sif().where(split="new_string")
    >>> acts = extract_with_ray("native:sif-small", prompts, "resid",
    ...                         store="acts.zarr", workers=4)  # doctest: +SKIP
    """
    check_counts("extract", workers=workers, threads=threads, shard=shard)
    require_prompts("extract", prompts)
    if isinstance(source, TransformerBridge):
        raise InputError("extract: a bridge cannot be sent to workers; give the source of `load`")
    if isinstance(source, (str, Path)) and Path(source).exists():
        source = str(Path(source).absolute())
    options = {
        "at": at,
        "batch_tokens": batch_tokens,
        "share_prefixes": share_prefixes,
        "dtype": dtype,
    }
    place = as_place(store).absolute()
    if isinstance(place, UPath) and place.protocol == "memory":
        raise InputError(f"store {store}: is in this process's memory, expected a folder or URL")
    count = threads or torch.get_num_threads()
    order = _Task(source, dict(loading or {}), count, prompts, sites, options)
    shards = len(shard_ranges(0, len(prompts), shard))
    with ray_session() as ray:
        pool = _WorkerPool(ray, order, workers, shards)
        try:
            return on_disk.fill(
                place,
                pool.frame(),
                lambda destination, missing: pool.write(destination, missing, progress=progress),
                keys=prompts.row_digests(),
                shard=shard,
                resume=resume,
                append=append,
            )
        finally:
            pool.stop()


@dataclass(frozen=True)
class _Task:
    """The task that is sent to every worker."""

    source: Any
    loading: Mapping[str, Any]
    threads: int
    prompts: Prompts
    sites: SiteSelector
    options: Mapping[str, Any]


class _Replica:
    """The model in a separate process (a Ray actor)."""

    def prepare(self, order: _Task) -> tuple[xr.Dataset, dict[str, Any]]:
        """Load the model; return the dataset to be filled, with shapes instead of values."""
        torch.set_num_threads(order.threads)
        model = load(order.source, progress=False, **order.loading)
        self.reader = ShardReader(model, order.prompts, order.sites, **order.options)
        self.destination: Destination | None = None
        frame = self.reader.frame
        shapes = {n: (frame[n].dims, frame[n].shape, frame[n].dtype) for n in measured(frame)}
        return frame.drop_vars(list(shapes)), shapes

    def write(self, destination: Destination, rows: range) -> None:
        if self.destination is None or self.destination != destination:
            self.destination = destination  # kept, because it holds the store open
        for _, values in self.reader.read([rows], lambda _: None):
            self.destination.put(rows, values)


@dataclass(eq=False)
class _Worker:
    """A replica and its queue of shards, the oldest first."""

    actor: Any
    given: dict[Any, range] = field(default_factory=dict)


class _WorkerPool:
    """Worker pool: starts workers, assigns shards, replaces dead workers, and stops them."""

    def __init__(self, ray: Any, order: _Task, workers: int | None, shards: int) -> None:
        self.ray, self.threads = ray, order.threads
        self.starting: dict[Any, _Worker] = {}
        self.ready: list[_Worker] = []
        self.outline: tuple[xr.Dataset, dict[str, Any]] | None = None
        # Number of deaths by the worker's shard; None while it started.
        self.deaths: Counter[range | None] = Counter()
        on_cpu = str(order.loading.get("device", "")).startswith("cpu")
        has_gpus = ray.cluster_resources().get("GPU", 0) >= 1 and not on_cpu
        self.needs = {"GPU": 1, "CPU": 1} if has_gpus else {"CPU": order.threads}
        try:
            self.order = ray.put(order)
        except Exception as error:  # pickling may raise anything
            kind = type(order.source).__name__
            raise InputError(f"extract: a {kind} cannot be sent to workers: {error}") from error
        for _ in range(min(self._require_room() if workers is None else workers, shards)):
            self._start()

    def frame(self) -> xr.Dataset:
        """The dataset to be filled, from the first worker that is ready."""
        while self.outline is None:
            self._poll(deque(), lambda _: None)
        outline, shapes = self.outline
        zeros = {
            name: (dims, np.broadcast_to(dtype.type(0), shape))
            for name, (dims, shape, dtype) in shapes.items()
        }
        return outline.assign(zeros)

    def write(self, destination: Destination, missing: Sequence[range], *, progress: bool) -> None:
        """Have the workers write every missing shard."""
        waiting = deque(missing)
        total = sum(len(rows) for rows in missing)
        try:
            with progress_bar("extract", total, enabled=progress) as advance:
                while waiting or any(worker.given for worker in self.ready):
                    self._assign(waiting, destination)
                    self._poll(waiting, advance)
        finally:
            # Before the lock is released: no worker may write to an unlocked store.
            self.stop()

    def stop(self) -> None:
        for worker in [*self.starting.values(), *self.ready]:
            self.ray.kill(worker.actor)
        self.starting, self.ready = {}, []

    def _start(self) -> None:
        options = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs.get("GPU", 0)}
        replica = self.ray.remote(_Replica).options(scheduling_strategy="SPREAD", **options)
        worker = _Worker(replica.remote())
        self.starting[worker.actor.prepare.remote(self.order)] = worker

    def _assign(self, waiting: deque[range], destination: Destination) -> None:
        # Every worker gets a first shard before any gets a second.
        for ahead in range(AHEAD):
            for worker in self.ready:
                if waiting and len(worker.given) <= ahead:
                    rows = waiting.popleft()
                    worker.given[worker.actor.write.remote(destination, rows)] = rows

    def _poll(self, waiting: deque[range], advance: Callable[..., None]) -> None:
        """Wait for one event: a worker that is ready, a shard that is written, or a death."""
        awaited = {ref: worker for worker in self.ready for ref in worker.given} | self.starting
        answered, _ = self.ray.wait(list(awaited), timeout=PATIENCE)
        if not answered and not self.ready:
            self._require_room()
        for ref in answered:
            worker = awaited[ref]
            try:
                answer = self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as error:
                # Raise the worker's error here.
                raise (error.cause if isinstance(error.cause, Exception) else error) from error
            except self.ray.exceptions.RayError as error:
                self._replace(worker, waiting, error)
                continue
            if self.starting.pop(ref, None):
                self._register(worker, answer)
            else:
                advance(len(worker.given.pop(ref)))

    def _register(self, worker: _Worker, outline: tuple[xr.Dataset, dict[str, Any]]) -> None:
        if self.outline is None:
            self.outline = outline
        first, other = self.outline[0].attrs, outline[0].attrs
        for name in first:
            if first[name] != other[name]:
                raise InputError(
                    f"extract: workers differ in {name}: {first[name]!r} and {other[name]!r}"
                )
        self.deaths[None] = 0
        self.ready.append(worker)

    def _replace(self, worker: _Worker, waiting: deque[range], error: Exception) -> None:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        log.warning("extract: a worker died, its shards go to others: %s", reason)
        shard = next(iter(worker.given.values()), None)
        self.deaths[shard] += 1
        if self.deaths[shard] == DEATHS:
            at = "while they started" if shard is None else f"at rows {shard[0]} to {shard[-1]}"
            raise InputError(f"extract: {DEATHS} workers died {at}, the last of: {reason}")
        waiting.extendleft(reversed(worker.given.values()))
        self.starting = {ref: each for ref, each in self.starting.items() if each is not worker}
        self.ready = [each for each in self.ready if each is not worker]
        # It may still run on an unreachable node.
        self.ray.kill(worker.actor)
        self._start()

    def _require_room(self) -> int:
        """The number of workers for which the nodes have room; an error if none."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        room = sum(
            min(int(node.get(kind, 0) // number) for kind, number in self.needs.items())
            for node in nodes
        )
        if room == 0:
            wanted = ", ".join(f"{number} {kind}" for kind, number in self.needs.items())
            raise InputError(
                f"extract: no node has room for a worker ({wanted}); threads={self.threads}"
            )
        return room
