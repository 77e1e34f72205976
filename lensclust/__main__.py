"""``python -m lensclust``: the command."""

from lensclust.cli import main

raise SystemExit(main())
