"""Errors that a person can mend, against defects of the program."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave or did: an argument, a file, a setting.

    The text says what was expected, what came, and what to do. A command prints it as one line and
    exits with status 2; any other error is a defect and keeps its traceback.
    """
