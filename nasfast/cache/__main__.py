"""``python -m nasfast.cache`` is ``nasfast cache``."""

import sys

from nasfast.commands.cache import main

if __name__ == "__main__":
    sys.exit(main())
