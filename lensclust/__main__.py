"""``python -m lensclust``: the command."""

import sys

from lensclust.cli import main

if __name__ == "__main__":
    sys.exit(main())
