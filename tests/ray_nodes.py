"""A Ray cluster of several simulated nodes on this machine, some of which die."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest

MEMORY = 80 * 1024 * 1024
# A node is dead after five seconds of silence, not after half a minute.
SYSTEM = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}


class Nodes:
    """Nodes of one CPU each; the first, which asks, has none."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": SYSTEM}
        head |= {"object_store_memory": MEMORY}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.workers: list[Any] = []
        level: Any = "ERROR"
        ray.init(self.cluster.address, log_to_driver=False, logging_level=level)

    def grow_to(self, number: int) -> None:
        """Have so many nodes beside the first."""
        while len(self.workers) < number:
            self.workers.append(self.cluster.add_node(num_cpus=1, object_store_memory=MEMORY))

    def kill_a_node(self) -> None:
        self.cluster.remove_node(self.workers.pop(), allow_graceful=False)

    def kill_a_worker(self, doing: str) -> None:
        """One process of the last node, found by what it says it does."""
        import psutil

        raylet = self.workers[-1].all_processes["raylet"][0].process
        for child in psutil.Process(raylet.pid).children(recursive=True):
            if doing in " ".join(child.cmdline()):
                os.kill(child.pid, signal.SIGKILL)
                return
        raise AssertionError(f"no process there says that it does {doing}")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'lensclust[ray]'")
    folder = tempfile.mkdtemp(prefix="ray")  # short: sockets lie in it
    # All that Ray writes lies there, the address of the cluster too: nothing has to be there
    # before, and no cluster of the user's is touched.
    # Ray's workers stand back behind everything else unless told otherwise: for minutes, here.
    ours = {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    started = None
    try:
        started = Nodes()
        yield started
    finally:
        ray.shutdown()
        if started is not None:
            started.cluster.shutdown()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        shutil.rmtree(folder, ignore_errors=True)
