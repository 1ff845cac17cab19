"""``python -m nasfast.info`` is ``nasfast info``."""

import sys

from nasfast.commands.info import main

if __name__ == "__main__":
    sys.exit(main())
