"""What a score is compared with: which rows may trade labels, and how often."""

from probes.design.flips import flipped_p, smallest_flip_p
from probes.design.units import (
    COARSE,
    INPUT,
    ROWS,
    TASK,
    UNEQUAL_ROWS,
    Exchange,
    Units,
    exchangeable,
    nested,
    row_columns,
)

__all__ = [
    "COARSE",
    "INPUT",
    "ROWS",
    "TASK",
    "UNEQUAL_ROWS",
    "Exchange",
    "Units",
    "exchangeable",
    "flipped_p",
    "nested",
    "row_columns",
    "smallest_flip_p",
]
