"""Waits for other processes: each says for whom, and each ends."""

from __future__ import annotations

import fcntl
import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from nasfast.cache import owners
from nasfast.cache.trust import user_name
from nasfast.utils.cli import visible
from nasfast.utils.errors import UserError

TURN = 0.02  # seconds between looks at what others do
NOTICE = 5.0  # seconds until a wait says for whom it is
BOUND = 300.0  # seconds without a sign of progress that end a wait
_LOOK = 0.5  # seconds between looks for signs of progress
_MOST = 1.0  # seconds that a turn counts for
_LOCKS = Path("/proc/locks")


class Wait:
    """One wait for others.

    Args:
        subject: file or directory that is waited for.
        pids: of the processes that are waited for, as far as they are known.
        doing: what they do: "holds its lock".
        due: what they are expected to do: "to release its lock".
        remedy: what the user can do.
        sign: something that changes as long as the others get on.
        bound: seconds without such a change that are an error.
    """

    def __init__(
        self,
        subject: Path,
        pids: Callable[[], Iterable[int]],
        doing: str,
        due: str,
        remedy: str,
        sign: Callable[[], object] = lambda: None,
        bound: float | None = None,
    ) -> None:
        self._subject, self._pids = subject, pids
        self._doing, self._due, self._remedy, self._sign = doing, due, remedy, sign
        self._bound = BOUND if bound is None else bound
        self._waited = self._still = self._unseen = 0.0  # seconds: in all, without progress, a look
        self._last, self._seen = time.monotonic(), sign()
        self._told = False

    def turn(self) -> None:
        """Sleep for a turn.

        Raises:
            UserError: nothing has changed for too long.
        """
        time.sleep(TURN)
        now = time.monotonic()
        # a turn in which this process was stopped is none in which the others might have got on
        passed, self._last = min(now - self._last, _MOST), now
        self._waited, self._still = self._waited + passed, self._still + passed
        self._unseen += passed
        if self._unseen > min(_LOOK, self._bound / 4):
            seen, self._unseen = self._sign(), 0.0
            if seen != self._seen:
                self._seen, self._still = seen, 0.0
        if self._still > self._bound:
            raise UserError(
                f"feature cache {self._subject}: expected {self._who()} {self._due}, got no sign "
                f"of it for {_span(self._bound)}; {self._remedy}"
            )
        if not self._told and self._waited > NOTICE:
            self._told = True
            warnings.warn(
                f"feature cache {self._subject}: waiting for {self._who()}, which {self._doing}",
                stacklevel=2,
            )

    def _who(self) -> str:
        text = " and ".join(described(pid) for pid in sorted(self._pids()))
        return text or "a process that this machine or container does not show"


def idle() -> None:
    """The heartbeat of who has nothing to do meanwhile."""


def lock(
    file: int,
    kind: int,
    subject: Path,
    remedy: str,
    bound: float | None = None,
    heartbeat: Callable[[], None] = idle,
) -> None:
    """Take a lock of an open file (``fcntl.LOCK_SH`` or ``LOCK_EX``), for which nobody makes others
    wait long; with a ``heartbeat`` each turn.

    Raises:
        UserError: another process holds one for too long.
    """
    wait = None
    while not try_lock(file, kind):
        wait = wait or Wait(
            subject,
            lambda: lock_holders(file),
            "holds its lock",
            "to release its lock",
            f"end that process, or {remedy}",
            bound=bound,
        )
        heartbeat()
        wait.turn()


def try_lock(file: int, kind: int) -> bool:
    """Take a lock of an open file if nobody else's forbids it; what it held before may be gone."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_holders(file: int) -> set[int]:
    """The processes that hold a lock of an open file, as far as the system shows them."""
    status = os.fstat(file)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    holders: dict[bool, set[int]] = {True: set(), False: set()}
    try:
        lines = _LOCKS.read_text().splitlines()
    except OSError:
        return set()
    for line in lines:
        words = line.split()  # 1: FLOCK ADVISORY WRITE pid major:minor:inode 0 EOF
        if words[1] != "FLOCK":
            continue
        where, _, inode = words[5].rpartition(":")
        if int(inode) == status.st_ino and int(words[4]) > 0:
            holders[where == device].add(int(words[4]))
    return holders[True] or holders[False]  # some file systems show files another device


def effort(pid: int) -> int | None:
    """Ticks of processor time that a process has used; None if there is none."""
    fields = owners.state(pid)
    return None if fields is None else int(fields[11]) + int(fields[12])


def described(pid: int) -> str:
    """A process as people know it: "process 12 (python -m nasfast search)"."""
    state = owners.state(pid)
    if state is None:
        return f"process {pid} (ended; one that it started has its place)"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        owner = os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return f"process {pid}"
    command = visible(" ".join(words).strip())
    parts = [f"{command[:80]} .." if len(command) > 80 else command or "no command line"]
    if owner != os.getuid():
        parts.append(f"of {user_name(owner)}")
    if state[0] in "Tt":
        parts.append("stopped")
    return f"process {pid} ({', '.join(parts)})"


def _span(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:g} s"
