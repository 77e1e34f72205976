"""Scales of what studies measure, and the smallest differences that matter.

Stated once, before any run is looked at, and the same in both directions: an effect within its
margin of the bound is *negligible* (`lensclust.results.decide`). Steps are those of 100 prompts
or 200 rows, unless a measure rests on fewer: the real steps are smaller, so intervals are not
narrower than they should be.
"""

from __future__ import annotations

from lensclust.results import agreement, share

# Decides claims on tasks: ARI alone is high too where states know wordings and nothing of tasks.
AGREED = "cross_wording_ari"
SHARE = share(of=100)
AGREEMENT = agreement(of=200)
# In shares and agreement; in rank correlation; in log probability.
SMALL, WEAK, NATS = 0.02, 0.1, 0.05
