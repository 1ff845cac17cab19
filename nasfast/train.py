"""``python -m nasfast.train`` is ``nasfast train``.

Imported, it takes the place of the function ``nasfast.train``, so it can be called as that one.
"""

import sys
from types import ModuleType

from nasfast.commands.train import main

if __name__ == "__main__":
    sys.exit(main())


class _Function(ModuleType):
    def __call__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        from nasfast import api

        return api.train(*args, **kwargs)


sys.modules[__name__].__class__ = _Function
