"""Tidy frame -> Altair chart -> files, with neither a browser nor a network.

Every chart carries a title, a caption and a description (its alternative text), spells its data
inside itself in rounded numbers, and draws the null or the baseline beside the measurement.
Colours are told apart by colour-blind readers and never stand alone: shape repeats them.
Pictures stay small: repeated seeds become one line with its range, and what has more points
than pixels is averaged (lines) or thinned (scatter, which then says so).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
