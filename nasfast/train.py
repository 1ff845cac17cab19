"""``python -m nasfast.train`` is ``nasfast train``."""

import sys

from nasfast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
