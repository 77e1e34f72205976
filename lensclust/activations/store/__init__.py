"""Store of activations: a zarr group that can be resumed, appended to and verified."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
