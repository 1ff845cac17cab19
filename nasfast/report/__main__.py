"""``python -m nasfast.report`` is ``nasfast report``."""

import sys

from nasfast.commands.report import main

if __name__ == "__main__":
    sys.exit(main())
