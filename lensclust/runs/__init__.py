"""Run directories: what a study leaves behind, and how it is looked at while it is made."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
