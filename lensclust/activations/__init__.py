"""Activations: extraction from a model into datasets in memory or in a store."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
