"""Who fills a cache: the word that claims a sample, and whether its owner still lives."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from nasfast.utils.errors import UserError

FREE, PUBLISHED = 0, 1
_PID_BITS, _START_BITS = 22, 40
_TAG = 2  # in the top two bits: an owner is neither FREE nor PUBLISHED


def owner_word(pid: int, start: int) -> int:
    """64 bits: tag (2), start in ticks since boot (40), pid (22)."""
    return _TAG << 62 | (start & (1 << _START_BITS) - 1) << _PID_BITS | pid


def this_process() -> int:
    """The owner word of the calling process."""
    start = _start_time(os.getpid())
    if start is None:
        raise UserError(
            f"feature cache: expected the start time of process {os.getpid()} in /proc, got none; "
            "mount /proc"
        )
    return owner_word(os.getpid(), start)


def pid_of(word: int) -> int:
    """The pid of an owner."""
    return word & (1 << _PID_BITS) - 1


def is_alive(word: int) -> bool:
    """Whether the owner runs: a process of its pid that started when it did, and is no zombie.

    A word that nobody wrote (a damaged one) has no living owner.
    """
    pid = pid_of(word)
    if word >> 62 != _TAG or pid == 0:
        return False
    start = _start_time(pid)
    if start is not None:
        return owner_word(pid, start) == word
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's, hidden in /proc
    return state(pid) is None  # else it ended meanwhile


def host() -> bytes:
    """24 bytes that differ wherever pids mean something else: boot id and pid namespace."""
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    namespace = os.stat("/proc/self/ns/pid").st_ino
    return boot.bytes + namespace.to_bytes(8, "little")


def state(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat behind the name, from the third on; None without a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return text[text.rindex(")") + 1 :].split()  # the name may hold spaces and parentheses


def _start_time(pid: int) -> int | None:
    """Ticks since boot at which a process started; None if there is none, or a zombie."""
    fields = state(pid)
    if fields is None or fields[0] in "ZX":
        return None
    return int(fields[19])
