"""Workers that no longer do anything are named: a search that waits for one says so."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from nasfast.cache.owners import state
from nasfast.cache.waiting import effort

_LOOK = 1.0
"""Seconds between two looks at the workers."""
_QUIET = 60.0
"""Seconds without any use of a processor after which a worker is named."""
_LONG = 600.0
"""Seconds with a candidate after which a worker is named whose use of a processor is unknown, if
that is also `_TIMES` as long as any candidate took before."""
_TIMES = 10
_FIRST = 360.0
"""Seconds that stand for the longest candidate before there was one."""


@dataclass(frozen=True)
class Activity:
    """What a worker's process does.

    Attributes:
        process: its number; None where the worker is on another machine.
        used: seconds that it has used processors for; None where that is not known.
        stopped: whether it was stopped by a signal, and waits for another.
    """

    process: int | None = None
    used: float | None = None
    stopped: bool = False

    @classmethod
    def of(cls, process: int) -> Activity:
        """That of a process of this machine, as Linux tells it."""
        fields, ticks = state(process), effort(process)
        if fields is None or ticks is None:  # another system, or it has ended
            return cls(process)
        return cls(process, ticks / os.sysconf("SC_CLK_TCK"), fields[0] in "Tt")


@dataclass
class _Watched:
    candidate: int | None
    used: float | None = None
    quiet: float = 0.0
    """Seconds without use of a processor."""
    there: float = 0.0
    """Seconds with the candidate."""
    named: bool = False


class Watch:
    """Warns, once for each worker and candidate.

    Time in which this process was stopped itself, as by Ctrl-Z, does not count.

    Args:
        activity: of a worker, by its number.
    """

    def __init__(self, activity: Callable[[int], Activity]) -> None:
        self._activity = activity
        self._watched: dict[int, _Watched] = {}
        self._looked = time.monotonic()
        self._longest = 0.0

    def look(self, at_work: Mapping[int, int | None]) -> None:
        """Look at the workers, now and then.

        Args:
            at_work: candidates by worker; None where it is starting.
        """
        passed = time.monotonic() - self._looked
        if passed < _LOOK:
            return
        self._looked += passed
        for worker, watched in list(self._watched.items()):
            if worker not in at_work or at_work[worker] != watched.candidate:
                if watched.candidate is not None:
                    self._longest = max(self._longest, watched.there)
                del self._watched[worker]
        for worker, candidate in at_work.items():
            watched = self._watched.setdefault(worker, _Watched(candidate))
            self._update(worker, watched, min(passed, 2 * _LOOK))

    def _update(self, worker: int, watched: _Watched, seconds: float) -> None:
        activity = self._activity(worker)
        watched.there += seconds
        watched.quiet = watched.quiet + seconds if activity.used == watched.used else 0.0
        watched.used = activity.used
        if activity.used is None:
            lost = watched.there > max(_LONG, _TIMES * (self._longest or _FIRST))
            what = f"has not answered for {watched.there:.0f} s"
        else:
            lost = watched.quiet > _QUIET
            what = f"has computed nothing for {watched.quiet:.0f} s"
        if not lost or watched.named:
            return
        watched.named = True
        doing = "as it starts" if watched.candidate is None else f"at candidate {watched.candidate}"
        process = "" if activity.process is None else f" (process {activity.process})"
        remedy = f": kill {activity.process} lets another process do its work"
        if activity.stopped:
            remedy = f": it was stopped; kill -CONT {activity.process} lets it go on"
        elif activity.process is None:
            remedy = "; look at it, or stop the search and continue it with --resume"
        warnings.warn(
            f"workers: worker {worker}{process} {what} {doing}, for which the search waits{remedy}",
            stacklevel=4,
        )
