"""``python -m nasfast.train`` is ``nasfast train``; ``nasfast.train`` is the function."""

import sys

from nasfast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())
if __name__ == "nasfast.train":
    # what is here becomes the attribute `train` of the package, which is the function
    from nasfast import api

    sys.modules[__name__] = api.train  # type: ignore[assignment]
