"""Names of task sets, for the command line, without importing the sets."""

from __future__ import annotations

# Name -> its argument after a colon, if there is one. The sets' functions:
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
    """Each name with the placeholder of its argument.

    >>> spelt_names()[2:4]
    ['instruction_induction:FOLDER', 'classification:DATA']
    """
    return [f"{name}:{more}" if more else name for name, more in TASK_NAMES.items()]
