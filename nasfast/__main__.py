"""The command ``nasfast``, which ``python -m nasfast`` is too: one subcommand a module of
`nasfast.commands`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

import nasfast
from nasfast.commands import COMMANDS
from nasfast.utils.cli import reports_errors
from nasfast.utils.errors import UserError, did_you_mean


def usage() -> str:
    """The subcommands, each with what it does."""
    width = max(map(len, COMMANDS))
    lines = (f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items())
    return "\n".join(
        [
            "usage: nasfast COMMAND ...",
            "",
            "Fast neural architecture search for dense prediction.",
            "",
            *lines,
            "",
            "nasfast COMMAND --help shows the flags of a command; nasfast --version the version.",
        ]
    )


@reports_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status of the subcommand."""
    first, *rest = (sys.argv[1:] if argv is None else list(argv)) or ["--help"]
    if first in ("--help", "-h"):
        print(usage())
        return 0
    if first == "--version":
        print(f"nasfast {nasfast.__version__}")
        return 0
    if first not in COMMANDS:
        raise UserError(
            f"nasfast: expected one of {', '.join(COMMANDS)}, got {first!r}"
            f"{did_you_mean(first, COMMANDS)}"
        )
    status: int = importlib.import_module(f"nasfast.commands.{first}").main(rest)
    return status


if __name__ == "__main__":
    sys.exit(main())
