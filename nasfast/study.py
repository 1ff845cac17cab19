"""``python -m nasfast.study`` is ``nasfast study``.

Imported, it takes the place of the function ``nasfast.study``, so it can be called as that one.
"""

import sys

from nasfast import api
from nasfast.commands.study import main

if __name__ == "__main__":
    sys.exit(main())


api.make_callable(__name__, api.study)
