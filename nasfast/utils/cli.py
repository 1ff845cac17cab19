"""What the entry points share: how a user sees text and errors."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol

P = ParamSpec("P")


def reports_errors(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate an entry point: an error meant for the user is one line on stderr and status 2.

    Any other is a defect and keeps its traceback. Ctrl-C gives status 130.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except Exception as error:
            if not meant_for_user(error):
                raise
            print(f"error: {error}", file=sys.stderr)
            return 2

    return wrapped


def meant_for_user(error: Exception) -> bool:
    """Whether an error is the user's to read: what a ``raise`` statement of nasfast says, and what
    the operating system says of a file; not one out of a library, or of another type."""
    if isinstance(error, OSError):
        return True
    ours = isinstance(error, (ValueError, RuntimeError, FloatingPointError))
    return ours and _raised_by_nasfast(error)


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


def _raised_by_nasfast(error: BaseException) -> bool:
    """Whether the innermost frame is one of nasfast and stands at a ``raise`` statement.

    The instruction tells it from an error that a builtin or an extension raised there, which has no
    frame of its own.
    """
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return False
    code, package = last.tb_frame.f_code, last.tb_frame.f_globals.get("__package__") or ""
    deliberate = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    return deliberate and package.partition(".")[0] == "nasfast"
