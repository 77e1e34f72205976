"""Run directories: results of a study, and a server that shows a run while it works."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
