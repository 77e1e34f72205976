"""Learning rates and checkpoints as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from lensclust.errors import InputError

_AFTER_WARMUP: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "constant": lambda done: 1.0,
}


def rate(step: int, steps: int, *, warmup: float, schedule: str) -> float:
    """The learning rate at a step, relative to its maximum: linear warmup, then the schedule.

    >>> [round(rate(step, 8, warmup=0.25, schedule="cosine"), 2) for step in range(8)]
    [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    rising = max(1, round(warmup * steps))
    done = max(0, step - rising) / max(1, steps - rising)
    return min((step + 1) / rising, _AFTER_WARMUP[schedule](done))


def checkpoint_steps(steps: int, n: int) -> list[int]:
    """Step 0 and log-spaced steps from a fiftieth of the training to its end.

    >>> checkpoint_steps(600, 8)
    [0, 12, 23, 44, 85, 163, 313, 600]
    """
    first = max(1, round(steps / 50))
    # Counted from the end, so that two checkpoints are the first and the last step.
    return sorted({0, *(int(step) for step in np.geomspace(steps, first, n - 1).round())})


def check_rate(lr: float, warmup: float, schedule: str, *, caller: str) -> None:
    """Raise InputError if these options are invalid; ``caller`` is named in the message."""
    if not lr > 0 or not math.isfinite(lr):
        raise InputError(f"{caller}: lr={lr}, expected a positive number")
    if not 0 <= warmup <= 1:
        raise InputError(f"{caller}: warmup={warmup}, expected a share of the steps, 0..1")
    if schedule not in _AFTER_WARMUP:
        raise InputError(
            f"{caller}: schedule={schedule!r}, expected one of {sorted(_AFTER_WARMUP)}"
        )
