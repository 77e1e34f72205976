"""Run directories -> one self-contained page."""

from lensclust.report.embed import view_frame
from lensclust.report.page import write_page

__all__ = ["view_frame", "write_page"]
