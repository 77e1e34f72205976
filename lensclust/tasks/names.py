"""Names of task sets, for the command line, which lists them without importing what makes them."""

from __future__ import annotations

# Name -> what follows it behind a colon, of those that need it. What makes each:
# `lensclust.tasks.registry.SOURCES`.
TASK_NAMES = {
    "sif": "",
    "natural": "",
    "instruction_induction": "FOLDER",
    "classification": "DATA",
    "reading_comprehension": "",
    "linear_regression": "",
    "prompt_injection": "",
}


def spelt_names() -> list[str]:
    """Each name as it is written.

    >>> spelt_names()[2:4]
    ['instruction_induction:FOLDER', 'classification:DATA']
    """
    return [f"{name}:{more}" if more else name for name, more in TASK_NAMES.items()]
