"""``python -m nasfast.evaluate`` is ``nasfast evaluate``."""

import sys

from nasfast.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
