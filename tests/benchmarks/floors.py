"""What the machine can do at most, measured on the spot: a large product, a large copy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

REPETITIONS = 7
# Large enough to be bound by arithmetic, or to leave the caches; a fraction of a second each.
PRODUCT = {"cpu": 1024}
ACCELERATOR_PRODUCT = 8192
COPY_BYTES = {"cpu": 2**27}
ACCELERATOR_COPY_BYTES = 2**30


def matrix_rate(
    dtype: torch.dtype, device: str | torch.device = "cpu", *, threads: int | None = None
) -> float:
    """Operations a second of a square product: 2 n³ over the best time of several."""
    at = torch.device(device)
    n = PRODUCT.get(at.type, ACCELERATOR_PRODUCT)
    a, b = (torch.randn(n, n, device=at).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / _best(lambda: torch.matmul(a, b, out=out), at, threads)


def memory_rate(device: str | torch.device = "cpu", *, threads: int | None = None) -> float:
    """Bytes a second that a copy reads and writes, over the best time of several."""
    at = torch.device(device)
    size = COPY_BYTES.get(at.type, ACCELERATOR_COPY_BYTES)
    source = torch.zeros(size, dtype=torch.uint8, device=at)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), at, threads)


def waited(device: torch.device) -> float:
    """The clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _best(work: Callable[[], object], device: torch.device, threads: int | None) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        work()  # warms up
        times = []
        for _ in range(REPETITIONS):
            start = waited(device)
            work()
            times.append(waited(device) - start)
    finally:
        torch.set_num_threads(before)
    return min(times)


if __name__ == "__main__":
    print(f"products: {matrix_rate(torch.float32) / 1e9:.1f} Gop/s in float32")
    print(f"copies: {memory_rate() / 1e9:.1f} GB/s")
