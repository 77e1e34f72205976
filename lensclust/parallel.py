"""Parallel independent calls with joblib, on the backend that the caller has chosen."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from joblib import Parallel
from joblib._parallel_backends import LokyBackend
from joblib.parallel import get_active_backend
from threadpoolctl import threadpool_limits

from lensclust.errors import InputError, check_counts
from lensclust.own_packages import NAMES, in_the_way
from lensclust.processes import end_with


def in_parallel(calls: Iterable[Any], *, jobs: int) -> Iterable[Any]:
    """Results of `joblib.delayed` calls, in their order.

    Inside ``joblib.parallel_config(backend="ray")`` or ``"dask"`` the calls run on that cluster.
    Results are yielded as they are ready; Ray's backend cannot do that and returns all at the end.
    Worker processes of this machine end with this process.

    >>> from joblib import delayed
    >>> list(in_parallel((delayed(abs)(n) for n in (-1, 2)), jobs=1))
    [1, 2]
    """
    check_counts("jobs", least=-sys.maxsize, jobs=jobs)
    if jobs == 0:
        raise InputError("jobs: expected a number of processes, or -1 for all, given 0")
    if any(in_the_way(name) is not None for name in NAMES):
        jobs = 1  # a worker would import the module with our package's name
    backend, _ = get_active_backend()
    gradual = getattr(backend, "supports_return_generator", False)
    options: dict[str, Any] = {}
    if isinstance(backend, LokyBackend) and "initializer" not in backend.backend_kwargs:
        options = {"initializer": end_with, "initargs": (os.getpid(),)}
    return Parallel(n_jobs=jobs, return_as="generator" if gradual else "list", **options)(calls)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch and the BLAS on one thread inside the block.

    >>> with one_thread():
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def ray_session() -> Iterator[Any]:
    """The module ``ray``, connected; a session that is started here ends with the block.

    An existing session of the caller (``ray.init``) is used. Otherwise Ray looks for a cluster
    (``RAY_ADDRESS``, then one of ``ray start`` on this machine), and if there is none starts one
    on this machine, without dashboard.

    Raises:
        InputError: if Ray is not installed, or there is no cluster at the given address.
    """
    try:
        import ray
    except ImportError:
        raise InputError("ray: is not installed: pip install 'lensclust[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"ray: there is no cluster to connect to: {reason}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler exits as a failure
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def sweeps_on_ray() -> Iterator[None]:
    """Context in which sweeps (all calls through joblib) run on a Ray cluster.

    Each item runs in a process on any node; ``jobs=-1`` means one per CPU. Files that items write
    must be on a file system shared by all nodes.

    Raises:
        InputError: as `ray_session`.
    """
    with ray_session():
        from joblib import parallel_config
        from ray.util.joblib import register_ray

        register_ray()
        with parallel_config(backend="ray"):
            yield
