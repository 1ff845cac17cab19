"""Stopping at a step's end on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class StopRequested(BaseException):
    """Raised by :meth:`Interrupt.check` after a signal; not an error of the program."""


class Interrupt:
    """While entered, SIGINT and SIGTERM ask for a stop; a second signal stops at once. In another
    thread than the main one, which alone may handle signals, nothing asks."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raise :class:`StopRequested` if a signal came."""
        if self.requested:
            raise StopRequested

    def __enter__(self) -> Self:
        self._previous = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
            if threading.current_thread() is threading.main_thread()
        }
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
