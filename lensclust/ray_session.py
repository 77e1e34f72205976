"""Ray, for as long as it is needed: started here, or the cluster that is there already."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lensclust.errors import InputError


@contextmanager
def ray_session() -> Iterator[Any]:
    """The module ``ray``, connected; what was started here ends with the block.

    A session of the caller's (``ray.init``) is used as it is. Otherwise Ray looks for a cluster
    (``RAY_ADDRESS``, then one that ``ray start`` left on this machine), and if there is none
    starts one on this machine, without its dashboard.

    Raises:
        InputError: if Ray is not installed, or there is no cluster where it was told to look.
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
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process as if it had failed
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def sweeps_on_ray() -> Iterator[None]:
    """Inside the block, sweeps (whatever goes through joblib) run on a Ray cluster.

    Each item is done by a process on any of the nodes; ``jobs=-1`` is one for each of their
    CPUs. What items write must lie on a file system that all nodes see.

    Raises:
        InputError: as `ray_session`.
    """
    with ray_session():
        from joblib import parallel_config
        from ray.util.joblib import register_ray

        register_ray()
        with parallel_config(backend="ray"):
            yield
