"""Sources of prompts whose task is known, one function a source, each returning ``Prompts``."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
