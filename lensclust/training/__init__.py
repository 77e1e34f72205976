"""Training: pretraining from nothing, fine-tuning, adapters, losses of inner states."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
