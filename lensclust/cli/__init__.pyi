# The ``lensclust`` command: arguments in, one line out where they are unusable
from .command import main as main
