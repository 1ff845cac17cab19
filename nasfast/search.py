"""``python -m nasfast.search`` is ``nasfast search``; ``nasfast.search`` is the function."""

import sys

from nasfast.commands.search import main

if __name__ == "__main__":
    sys.exit(main())
if __name__ == "nasfast.search":
    # what is here becomes the attribute `search` of the package, which is the function
    from nasfast import api

    sys.modules[__name__] = api.search  # type: ignore[assignment]
