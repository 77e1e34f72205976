"""Run directories -> one self-contained page; a view -> a frame for a notebook."""

from lensclust.report.page import view_frame, write_page

__all__ = ["view_frame", "write_page"]
