"""What a page lets its reader explore: data of a picture that the browser draws."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
