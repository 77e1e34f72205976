"""Settings for every test, and the browser and the cluster that some of them ask for."""

from __future__ import annotations

import os

from tests.browser import browser  # noqa: F401
from tests.ray_nodes import nodes  # noqa: F401

# Tiny models: a second thread only waits for the first. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
