"""Measured comparisons: ours and its peers in one process, as ratios."""
