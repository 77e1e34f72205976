"""Settings for every test, and the browser and the cluster that some of them ask for."""

from __future__ import annotations

import os
from importlib import import_module

import pytest

from tests.browser import browser  # noqa: F401
from tests.ray_nodes import nodes  # noqa: F401

# Tiny models: a second thread only waits for the first. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LARGE = (
    "altair",
    "datasets",
    "sklearn.cluster",
    "sklearn.discriminant_analysis",
    "sklearn.linear_model",
    "transformer_lens.model_bridge",
    "tyro",
    "upath",
    "xarray",
)


def pytest_configure(config: pytest.Config) -> None:
    """Import what is large before our packages, wherever tests run.

    jaxtyping's hook looks for a bytecode of its own of whatever is first imported inside our
    packages: every worker would compile thousands of modules of others.
    """
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        for name in LARGE:
            import_module(name)
