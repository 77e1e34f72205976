"""Task sets: one function per set, each returning ``Prompts`` with known tasks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
