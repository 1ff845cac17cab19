"""``python -m nasfast.search`` is ``nasfast search``.

Imported, it takes the place of the function ``nasfast.search``, so it can be called as that one.
"""

import sys
from types import ModuleType

from nasfast.commands.search import main

if __name__ == "__main__":
    sys.exit(main())


class _Function(ModuleType):
    def __call__(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        from nasfast import api

        return api.search(*args, **kwargs)


sys.modules[__name__].__class__ = _Function
