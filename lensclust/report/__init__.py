"""Run directories -> one self-contained page."""

from lensclust.report.page import write_page

__all__ = ["write_page"]
