"""``python -m nasfast.search`` is ``nasfast search``.

Imported, it takes the place of the function ``nasfast.search``, so it can be called as that one.
"""

import sys

from nasfast import api
from nasfast.commands.search import main

if __name__ == "__main__":
    sys.exit(main())


api.make_callable(__name__, api.search)
