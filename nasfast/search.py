"""``python -m nasfast.search`` is ``nasfast search``."""

import sys

from nasfast.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
