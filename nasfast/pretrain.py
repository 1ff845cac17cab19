"""``python -m nasfast.pretrain`` is ``nasfast pretrain``."""

import sys

from nasfast.commands.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
