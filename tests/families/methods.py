"""Methods that read or change a whole forward: decomposition, knockout, attention, training.

A feature is a function of a `tests.families.subjects.Subject` that raises `Wrong` where our
result is not that of plain torch hooks on ``subject.network``, lets our own error of one line
through where we refuse, and raises `Nothing` where the network has nothing of the kind. The first
line of its docstring stands in docs/models.md.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.families.subjects import Subject

FEATURES: dict[str, Callable[[Subject], None]] = {
    # "decompose": decompose,
    # "knockout": knockout,
    # "head activation": head_activation,
    # "attention ratio": attention_ratio,
    # "fine-tuning": finetuning,
}
