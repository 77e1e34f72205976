"""Settings for every test."""

from __future__ import annotations

import os

# Tiny models: a second thread only waits for the first. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
