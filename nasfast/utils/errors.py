"""Errors that a person can mend, against defects of the program."""

from __future__ import annotations

import difflib
import errno
import reprlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

DEFECT = (
    "this is a defect of nasfast: please report the text above, the command, and what "
    "`nasfast info` prints"
)


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""A full disk, a used up quota, and a limit on the size of files."""


_SHORT = reprlib.Repr()
"""It looks at the first items of the first levels alone."""
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 20


class UserError(ValueError):
    """Something that the user gave or did: an argument, a file, a setting.

    The text says what was expected, what came, and what to do. A command prints it as one line and
    exits with status 2; any other error is a defect and keeps its traceback.
    """


class NothingFoundError(UserError):
    """All that was tried failed; the command exits with status 1."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of a GPU."""
    signs = ("allocate memory", "out of memory", "alloc_failed")
    # torch raises a RuntimeError, on a CPU a plain one; onnxruntime has classes of its own
    library = isinstance(error, RuntimeError) or type(error).__module__.startswith("onnxruntime.")
    exhausted = library and any(sign in _line(error).lower() for sign in signs)
    return exhausted or isinstance(error, MemoryError)


def text_for_user(error: BaseException) -> str | None:
    """What a person should read of an error; None for a defect.

    A :class:`UserError` and what the operating system says of a file speak for themselves.
    """
    if isinstance(error, OSError) and error.errno in _FULL and error.filename is not None:
        return (
            f"{error}; make room there: what was saved before is whole, and --resume continues a "
            "search or a training from it, the same command a study"
        )
    if isinstance(error, UserError | OSError):
        return str(error)
    if out_of_memory(error):
        return (
            f"out of memory ({_line(error)}); use fewer --workers, a smaller batch, crop or "
            "network, or another --device"
        )
    return None


@contextmanager
def about(subject: object) -> Iterator[None]:
    """Begin the text of a UserError of the block with its subject, such as a file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{subject}: {error}") from error


def shown(value: object) -> str:
    """A value from a file as an error shows it: short, however long or deep it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" for the known word that is most like it, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def cause(error: BaseException) -> str:
    """The beginning of what a library says, or the error's name where it says nothing."""
    text = _line(error)
    return text if len(text) < 160 else f"{text[:160]} .."


def _line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
