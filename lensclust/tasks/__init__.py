"""Sources of prompts whose task is known, one function a source, each returning ``Prompts``.

Each function has the name of its module and takes its place here: ``tasks.natural`` is the
function, ``from lensclust.tasks.natural import ...`` still reaches the module.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
