"""``python -m nasfast.train`` is ``nasfast train``.

Imported, it takes the place of the function ``nasfast.train``, so it can be called as that one.
"""

import sys

from nasfast import api
from nasfast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())


api.make_callable(__name__, api.train)
