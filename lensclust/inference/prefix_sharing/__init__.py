"""Prefix sharing: common prefixes of prompts run once, if a self-check allows it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
