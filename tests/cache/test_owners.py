"""Words that claim samples, and the life of those who wrote them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from samples import raises

from nasfast.cache import owners
from nasfast.utils.errors import UserError


def word_of(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return owners.owner_word(pid, int(fields[19]))


def test_word():
    word = owners.owner_word(pid=4_194_303, start=(1 << 40) - 1)
    assert word == (0b10 << 62) | ((1 << 62) - 1)
    assert owners.owner_word(5, 7) == 0b10 << 62 | 7 << 22 | 5


def test_this_process_lives():
    assert owners.this_process() == word_of(os.getpid())
    assert owners.is_alive(owners.this_process())


def test_a_pid_taken_by_a_later_process_is_not_the_owner():
    assert not owners.is_alive(owners.this_process() - (1 << 22))


@pytest.mark.parametrize(
    "word", [0, 1, 2, 1 << 63, (1 << 64) - 1, pytest.param(os.getpid(), id="own")]
)
def test_a_word_that_nobody_wrote_has_no_owner(word):
    assert not owners.is_alive(word)


def test_a_killed_process_is_dead_before_its_parent_waits():
    process = subprocess.Popen(["sleep", "60"])
    word = word_of(process.pid)
    assert owners.is_alive(word)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
    assert not owners.is_alive(word)
    process.wait()
    assert not owners.is_alive(word)


def test_a_name_with_spaces_and_parentheses(tmp_path):
    program = tmp_path / "a) R (b 1 2"
    program.symlink_to(sys.executable)
    process = subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert owners.is_alive(word_of(process.pid))
    finally:
        process.communicate(b"\n")


def test_a_process_that_proc_hides_is_alive(monkeypatch):
    def refuse(pid, signal):
        raise PermissionError

    monkeypatch.setattr(owners, "state", lambda pid: None)
    monkeypatch.setattr(os, "kill", refuse)
    assert owners.is_alive(owners.owner_word(5, 7))


def test_no_proc(monkeypatch):
    monkeypatch.setattr(owners, "state", lambda pid: None)
    with raises(
        UserError,
        f"feature cache: expected the start time of process {os.getpid()} in /proc, got none; "
        "mount /proc",
    ):
        owners.this_process()


def test_host():
    assert len(owners.host()) == 24
    assert owners.host() == owners.host()
    assert int.from_bytes(owners.host()[16:], "little") == os.stat("/proc/self/ns/pid").st_ino
