"""Commands of nasfast in processes that are forked from one which has imported it: they start in
milliseconds, may be killed, and what they print is kept."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SECONDS = 240
"""After which a command hangs."""


@dataclass
class Command:
    """A command that was started."""

    process: ForkServerProcess
    errors: Path

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Its exit status, -9 where it was killed; None where it still runs after the time."""
        self.process.join(seconds)
        return self.process.exitcode

    def end(self, seconds: float = SECONDS) -> tuple[int, str]:
        """Exit status and stderr.

        Raises:
            AssertionError: it hangs.
        """
        status = self.wait(seconds)
        if status is None:
            self.process.kill()
        assert status is not None, f"hangs: {self.text}"
        return status, self.text

    @property
    def text(self) -> str:
        """What it has printed to stderr so far."""
        return self.errors.read_text(errors="replace")


def start(argv: Sequence[object], errors: Path) -> Command:
    """Start ``nasfast ARGV``, with stderr to a file, and what it prints beside that."""
    return call(_nasfast, errors, [str(word) for word in argv])


def call(function: Callable[..., object], errors: Path, *arguments: object) -> Command:
    """Start a function of a module, which returns an exit status, likewise; an error that is meant
    for the user is one line, and status 2."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nasfast.api", "nasfast.__main__", "torch._dynamo"])
    process = context.Process(target=_run, args=(function, errors, arguments))
    process.start()
    return Command(process, errors)


def _nasfast(argv: list[str]) -> int:
    from nasfast.__main__ import main

    sys.argv = ["nasfast", *argv]
    return main()


def _run(function: Callable[..., object], errors: Path, arguments: Sequence[object]) -> None:
    import torch

    from nasfast.utils.cli import reports_errors

    for stream, path in ((1, errors.with_suffix(".out")), (2, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream)
        os.close(file)
    torch.set_num_threads(1)
    status: object = 1
    try:
        status = reports_errors(function)(*arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 0)
