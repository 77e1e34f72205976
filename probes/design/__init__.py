"""What a score is compared with: which rows may trade labels, and how often."""

from probes.design.units import Exchange, Units, exchangeable, row_columns

__all__ = ["Exchange", "Units", "exchangeable", "row_columns"]
