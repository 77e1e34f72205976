"""Linear probes at every site, and how decodable a component of the prompt is."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
