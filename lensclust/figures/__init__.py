"""Figures: tidy frame -> Altair chart -> files, without browser or network.

Every chart has a title, a caption and a description (its alternative text), contains its data in
rounded numbers, and shows the null or the baseline beside the measurement. Colours are
distinguishable for colour-blind readers and always repeated by shape.
Figures stay small: repeated seeds become one line with its range; more points than pixels are
averaged (lines) or thinned (scatter plots, with a note).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
