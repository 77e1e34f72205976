"""Independent calls spread by joblib, over whatever backend the caller has chosen."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

from joblib import Parallel
from joblib._parallel_backends import LokyBackend
from joblib.parallel import get_active_backend

from lensclust.errors import InputError, check_counts
from lensclust.own_packages import NAMES, in_the_way
from lensclust.processes import end_with


def in_parallel(calls: Iterable[Any], *, jobs: int) -> Iterable[Any]:
    """Results of `joblib.delayed` calls, in their order.

    Inside ``joblib.parallel_config(backend="ray")`` or ``"dask"`` the calls are spread over that
    cluster. Results come one by one as they are ready; Ray's backend cannot do that and gives
    them all at the end. Worker processes of this machine end with this process.

    >>> from joblib import delayed
    >>> list(in_parallel((delayed(abs)(n) for n in (-1, 2)), jobs=1))
    [1, 2]
    """
    check_counts("jobs", least=-sys.maxsize, jobs=jobs)
    if jobs == 0:
        raise InputError("jobs: expected a number of processes, or -1 for all, given 0")
    if any(in_the_way(name) is not None for name in NAMES):
        jobs = 1  # a worker process would import what has the name of our packages
    backend, _ = get_active_backend()
    gradual = getattr(backend, "supports_return_generator", False)
    options: dict[str, Any] = {}
    if isinstance(backend, LokyBackend) and "initializer" not in backend.backend_kwargs:
        options = {"initializer": end_with, "initargs": (os.getpid(),)}
    return Parallel(n_jobs=jobs, return_as="generator" if gradual else "list", **options)(calls)
