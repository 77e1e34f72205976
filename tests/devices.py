"""Which devices a test runs on: the CPU, and a GPU where there is one."""

from __future__ import annotations

import pytest
import torch

needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]
