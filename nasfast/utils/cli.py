"""What the entry points share: how a user sees text and errors."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol

from nasfast.utils.errors import DEFECT, NothingFoundError, text_for_user

P = ParamSpec("P")


def reports_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate an entry point: an error meant for the user is one line on stderr and status 2,
    or 1 where the work was done and came to nothing.

    Any other is a defect: it is raised, and what to report follows its traceback. Ctrl-C gives
    status 130.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except Exception as error:
            text = text_for_user(error)
            if text is None:
                error.add_note(DEFECT)
                raise
            print(f"error: {text}", file=sys.stderr)
            return 1 if isinstance(error, NothingFoundError) else 2

    return wrapped


class TextConsole(Protocol):
    """What :func:`say` needs of a rich console."""

    def print(self, *text: str, markup: bool, highlight: bool, soft_wrap: bool) -> None: ...


def say(console: TextConsole, text: str) -> None:
    """Print plain text: no markup, no colours, no wrapping of the commands and paths in it."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Value of a flag before the command line is parsed; None where it is absent."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
