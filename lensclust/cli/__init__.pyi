# Entry point of the ``lensclust`` command
from .command import main as main
