"""Scales of the studies' measures, and the smallest differences that matter.

Fixed once, before any run, and the same in both directions: an effect within its
margin of the bound is *negligible* (`lensclust.results.decide`). Steps are those of 100 prompts
or 200 rows, unless a measure rests on fewer: the real steps are smaller, so intervals are not
narrower than they should be.
"""

from __future__ import annotations

from lensclust.results import agreement, share

# Metric of claims on tasks: ARI is also high where states encode wordings and not tasks.
AGREED = "cross_wording_ari"
SHARE = share(of=100)
AGREEMENT = agreement(of=200)
# In shares and agreement; in rank correlation; in log probability.
SMALL, WEAK, NATS = 0.02, 0.1, 0.05
