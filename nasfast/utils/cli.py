"""What the entry points share: how a user sees text and errors."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol

from nasfast.utils.errors import DEFECT, NothingFoundError, UserError, text_for_user

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
    console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Text with escapes for the bytes of a file's name that are no UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def visible(text: str) -> str:
    """Text of others on one line: escapes for line breaks, and for commands to the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def refuse_others(settings: type, argv: Sequence[str], remedy: str) -> None:
    """Raise UserError at a flag of the command line that is no field of the settings.

    Args:
        settings: dataclass that the command line is parsed to.
        argv: the command line.
        remedy: what to do instead.
    """
    known = [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(settings)]
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in (*known, "--help"):
            raise UserError(
                f"resume: expected some of {', '.join(known)}, got {word.partition('=')[0]}; "
                f"{remedy}"
            )


def flag_value(argv: Sequence[str], flag: str) -> str | None:
    """Value of a flag before the command line is parsed; None where it is absent."""
    for i, word in enumerate(argv):
        if word == flag and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
    return None
