"""Extraction spread over processes and machines: replicas of a model, each writing its shards.

The process that asks holds the store's lock, lays the store out and notes that it is complete;
it loads no model and no activations pass through it. Every worker (a Ray actor: one GPU, or so
many CPUs) loads the model itself and writes shards of rows, disjoint regions, into the store. It
is given few shards ahead of its work, so that a worker that dies (its process, its machine)
leaves little undone: another is given those, and one is started in its place. A shard's bits
depend on its own prompts, the threads and the kind of processor, not on who computes it.
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
from lensclust.activations.store import Destination
from lensclust.activations.store import writing as on_disk
from lensclust.arguments import checked_arguments, require_prompts
from lensclust.errors import InputError, check_counts
from lensclust.models import SiteSelector, Source, load, shard_ranges
from lensclust.parallel import ray_session
from lensclust.progress import progress_bar
from lensclust.prompts import Prompts
from lensclust.storage import Place, as_place

log = logging.getLogger(__name__)

# Shards that a worker has been given: the one it works on, and the next.
AHEAD = 2
# Workers that one shard, or starting, may bring down before it is held to be at fault.
DEATHS = 3
# Seconds without news after which it is looked whether any machine has room for a worker.
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

    The store ends with the same bits as that of one process with as many threads on the same
    kind of processor, whichever workers die on the way.

    Args:
        source: what `load` takes, but no bridge: every worker loads it anew. A path must lead
            to the same files on all nodes.
        prompts: what to run; see `Prompts`.
        sites: what to read, as in `extract`.
        store: folder of the zarr store, on a file system that all nodes see, or its URL.
        workers: replicas of the model; default as many as the cluster has room for, at most
            one a shard.
        threads: CPU threads of a worker, and the CPUs it takes of the cluster where that has no
            GPUs; default the threads of this process.
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
        raise InputError("extract: a bridge cannot be sent to workers; give what it is loaded from")
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
        raise InputError(f"store {store}: lies in this process, where workers cannot write")
    count = threads or torch.get_num_threads()
    order = _Order(source, dict(loading or {}), count, prompts, sites, options)
    shards = len(shard_ranges(0, len(prompts), shard))
    with ray_session() as ray:
        crew = _Crew(ray, order, workers, shards)
        try:
            return on_disk.fill(
                place,
                crew.frame(),
                lambda destination, missing: crew.write(destination, missing, progress=progress),
                keys=prompts.row_digests(),
                shard=shard,
                resume=resume,
                append=append,
            )
        finally:
            crew.dismiss()


@dataclass(frozen=True)
class _Order:
    """What every worker is told."""

    source: Any
    loading: Mapping[str, Any]
    threads: int
    prompts: Prompts
    sites: SiteSelector
    options: Mapping[str, Any]


class _Replica:
    """The model in a process of its own (a Ray actor)."""

    def prepare(self, order: _Order) -> tuple[xr.Dataset, dict[str, Any]]:
        """Load the model; returns the dataset to be filled, with shapes in place of zeros."""
        torch.set_num_threads(order.threads)
        model = load(order.source, progress=False, **order.loading)
        self.reader = ShardReader(model, order.prompts, order.sites, **order.options)
        self.destination: Destination | None = None
        frame = self.reader.frame
        shapes = {n: (frame[n].dims, frame[n].shape, frame[n].dtype) for n in measured(frame)}
        return frame.drop_vars(list(shapes)), shapes

    def write(self, destination: Destination, rows: range) -> None:
        if self.destination is None or self.destination != destination:
            self.destination = destination  # kept, for it holds the store open
        for _, values in self.reader.read([rows], lambda _: None):
            self.destination.put(rows, values)


@dataclass(eq=False)
class _Worker:
    """A replica, and the shards it was given, the oldest first."""

    actor: Any
    given: dict[Any, range] = field(default_factory=dict)


class _Crew:
    """Workers that are hired, given shards, replaced when they die, and dismissed."""

    def __init__(self, ray: Any, order: _Order, workers: int | None, shards: int) -> None:
        self.ray, self.threads = ray, order.threads
        self.starting: dict[Any, _Worker] = {}
        self.ready: list[_Worker] = []
        self.outline: tuple[xr.Dataset, dict[str, Any]] | None = None
        # By the shard that a worker was at; None while it started.
        self.deaths: Counter[range | None] = Counter()
        on_cpu = str(order.loading.get("device", "")).startswith("cpu")
        has_gpus = ray.cluster_resources().get("GPU", 0) >= 1 and not on_cpu
        self.needs = {"GPU": 1, "CPU": 1} if has_gpus else {"CPU": order.threads}
        try:
            self.order = ray.put(order)
        except Exception as error:  # whatever the objects in it raise when they are pickled
            kind = type(order.source).__name__
            raise InputError(f"extract: a {kind} cannot be sent to workers: {error}") from error
        for _ in range(min(self._require_room() if workers is None else workers, shards)):
            self._hire()

    def frame(self) -> xr.Dataset:
        """What the first worker that is ready says is to be filled."""
        while self.outline is None:
            self._hear(deque(), lambda _: None)
        outline, shapes = self.outline
        zeros = {
            name: (dims, np.broadcast_to(dtype.type(0), shape))
            for name, (dims, shape, dtype) in shapes.items()
        }
        return outline.assign(zeros)

    def write(self, destination: Destination, missing: Sequence[range], *, progress: bool) -> None:
        """Have every missing shard written."""
        waiting = deque(missing)
        total = sum(len(rows) for rows in missing)
        try:
            with progress_bar("extract", total, enabled=progress) as advance:
                while waiting or any(worker.given for worker in self.ready):
                    self._hand_out(waiting, destination)
                    self._hear(waiting, advance)
        finally:
            # Before the lock goes: nobody writes to a store that is no longer held.
            self.dismiss()

    def dismiss(self) -> None:
        for worker in [*self.starting.values(), *self.ready]:
            self.ray.kill(worker.actor)
        self.starting, self.ready = {}, []

    def _hire(self) -> None:
        options = {"num_cpus": self.needs["CPU"], "num_gpus": self.needs.get("GPU", 0)}
        replica = self.ray.remote(_Replica).options(scheduling_strategy="SPREAD", **options)
        worker = _Worker(replica.remote())
        self.starting[worker.actor.prepare.remote(self.order)] = worker

    def _hand_out(self, waiting: deque[range], destination: Destination) -> None:
        # All a first shard before any a second.
        for ahead in range(AHEAD):
            for worker in self.ready:
                if waiting and len(worker.given) <= ahead:
                    rows = waiting.popleft()
                    worker.given[worker.actor.write.remote(destination, rows)] = rows

    def _hear(self, waiting: deque[range], advance: Callable[..., None]) -> None:
        """Wait for one answer: a worker that is ready, a shard that is written, or a death."""
        awaited = {ref: worker for worker in self.ready for ref in worker.given} | self.starting
        answered, _ = self.ray.wait(list(awaited), timeout=PATIENCE)
        if not answered and not self.ready:
            self._require_room()
        for ref in answered:
            worker = awaited[ref]
            try:
                answer = self.ray.get(ref)
            except self.ray.exceptions.RayTaskError as error:
                # What the worker raised, as if it had been raised here.
                raise (error.cause if isinstance(error.cause, Exception) else error) from error
            except self.ray.exceptions.RayError as error:
                self._replace(worker, waiting, error)
                continue
            if self.starting.pop(ref, None):
                self._welcome(worker, answer)
            else:
                advance(len(worker.given.pop(ref)))

    def _welcome(self, worker: _Worker, outline: tuple[xr.Dataset, dict[str, Any]]) -> None:
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
        # It may live on where nobody can reach it.
        self.ray.kill(worker.actor)
        self._hire()

    def _require_room(self) -> int:
        """The number of workers that all nodes can hold; an error if none."""
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
