"""Waits for other processes: for whom they are, and that they end."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from samples import COUNT, KEY, arrays, build, encoder, raises

from nasfast.cache import CacheConfig, FeatureCache, places, waiting
from nasfast.cache.segment import Filler, Segment
from nasfast.commands.cache import main
from nasfast.utils.errors import UserError

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as other users")


@pytest.fixture
def soon(monkeypatch):
    """Waits speak after 0.1 s, and end after 0.6 s."""
    monkeypatch.setattr(waiting, "NOTICE", 0.1)
    monkeypatch.setattr(waiting, "BOUND", 0.6)


@contextlib.contextmanager
def process(run, *, stopped=False):
    """A forked process in which a function has run, and which then waits, or is stopped."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(60)
            kept = run(lambda: os.write(write, b"x"))
            os.write(write, b"x")
            while kept is not ...:
                time.sleep(10)
        finally:
            os._exit(1)
    try:
        assert os.read(read, 1) == b"x"
        if stopped:
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def says(text):
    """One warning, of this text, and no more."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [str(warning.message) for warning in caught] == [text]


def locked(path, kind=fcntl.LOCK_EX):
    """To hold the lock of a file or directory."""

    def run(ready):
        file = os.open(path, os.O_RDONLY)
        fcntl.flock(file, kind)
        return file

    return run


def command_line():
    words = Path("/proc/self/cmdline").read_bytes().decode().split("\0")
    text = " ".join(words).strip()
    return f"{text[:80]} .." if len(text) > 80 else text


def who(pid, *more):
    return f"process {pid} ({', '.join([command_line(), *more])})"


@pytest.fixture
def path(tmp_path):
    cache = build(tmp_path)
    cache.close()
    return cache.paths[0]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("stopped", [False, True])
def test_a_file_that_another_holds_locked(path, stopped):
    """Anybody who may read a file can lock it."""
    more = ["stopped"] if stopped else []
    with process(locked(path), stopped=stopped) as pid:
        message = (
            f"feature cache {path}: expected {who(pid, *more)} to release its lock, got no sign of "
            "it for 0.6 s; end that process, or give another --cache-dir"
        )
        with (
            says(f"feature cache {path}: waiting for {who(pid, *more)}, which holds its lock"),
            raises(UserError, message),
        ):
            build(path.parent)
        with says(f"feature cache {path}: waiting for {who(pid, *more)}, which holds its lock"):
            assert main(["verify", str(path)]) == 1
    build(path.parent)


@pytest.mark.usefixtures("soon")
def test_a_lock_that_is_released_in_time(path):
    def briefly(ready):
        file = locked(path)(ready)
        ready()
        time.sleep(0.3)
        os.close(file)
        return 0

    with (
        process(briefly) as pid,
        says(f"feature cache {path}: waiting for {who(pid)}, which holds its lock"),
    ):
        build(path.parent)


@pytest.mark.usefixtures("soon")
def test_a_holder_that_the_system_does_not_show(path, monkeypatch, tmp_path):
    """One of another container, or of another machine that shares the directory."""
    for locks in (tmp_path / "none", Path("/dev/null")):
        monkeypatch.setattr(waiting, "_LOCKS", locks)
        with (
            process(locked(path)),
            says(
                f"feature cache {path}: waiting for a process that this machine or container does "
                "not show, which holds its lock"
            ),
            raises(
                UserError,
                f"feature cache {path}: expected a process that this machine or container does not "
                "show to release its lock, got no sign of it for 0.6 s; end that process, or give "
                "another --cache-dir",
            ),
        ):
            build(path.parent)


@pytest.mark.usefixtures("soon")
def test_ram_segments_that_are_held_up(tmp_path, ram, monkeypatch):
    """By a stopped process of this user: a cache on disk does without them."""
    monkeypatch.setattr(places, "PATIENCE", 0.05)
    build(tmp_path, placement="ram").close()
    with process(locked(ram), stopped=True) as pid:
        started = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            build(tmp_path, key={"another": "one"})
        assert time.monotonic() - started < 5
        with (
            says(f"feature cache {ram}: waiting for {who(pid, 'stopped')}, which holds its lock"),
            raises(
                UserError,
                f"feature cache {ram}: expected {who(pid, 'stopped')} to release its lock, got no "
                "sign of it for 0.6 s; end that process, or give --placement file",
            ),
        ):
            build(tmp_path, placement="ram")
    assert main(["ls", "--cache-dir", str(tmp_path)]) == 0


@pytest.mark.usefixtures("soon")
def test_a_creator_that_is_stopped(tmp_path):
    path = build(tmp_path).paths[0]
    path.unlink()

    def begin(ready):
        def encode(indices):
            ready()
            time.sleep(60)

        FeatureCache.load_or_build(KEY, COUNT, encode, CacheConfig(tmp_path), chunk=2)

    with (
        process(begin, stopped=True) as pid,
        says(f"feature cache {path}: waiting for {who(pid, 'stopped')}, which makes it"),
        raises(
            UserError,
            f"feature cache {path}: expected {who(pid, 'stopped')} to make it, got no sign of it "
            "for 0.6 s; continue or end that process, or give another --cache-dir",
        ),
    ):
        build(tmp_path)
    assert build(tmp_path).verify() == []


def claim(path):
    """To claim samples 0 and 1."""

    def run(ready):
        segment = Segment.open(path)
        segment.repair([0, 1])
        filler = Filler(segment)
        assert filler.claim(2, 0).tolist() == [0, 1]
        return filler

    return run


@pytest.mark.usefixtures("soon")
def test_a_claim_that_is_never_published(path):
    """Its owner lives, and does nothing."""
    with process(claim(path), stopped=True) as pid:
        owner, started = who(pid, "stopped"), time.monotonic()
        with (
            says(f"feature cache {path}: waiting for {owner}, which has claimed samples"),
            raises(
                UserError,
                f"feature cache {path}: expected {owner} to publish the samples that it has "
                "claimed, got no sign of it for 0.6 s; continue or end that process, or give "
                "another --cache-dir",
            ),
        ):
            build(path.parent)
        assert time.monotonic() - started < 10
    calls = []
    FeatureCache.load_or_build(
        KEY, COUNT, encoder(arrays(), calls), CacheConfig(path.parent), chunk=2
    )
    assert calls == [[0, 1]]  # the other has ended


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("making", [False, True])
def test_who_computes_for_long_is_waited_for(tmp_path, making):
    """Three times the bound, in which nothing is published."""
    content = arrays()
    if not making:
        (path,) = build(tmp_path, content).paths
        Segment.open(path).repair([2])

    def work(ready):
        def encode(indices):
            ready()
            end = time.monotonic() + 3 * waiting.BOUND
            while time.monotonic() < end:
                sum(range(1000))
            return {name: array[indices] for name, array in content.items()}

        return FeatureCache.load_or_build(KEY, COUNT, encode, CacheConfig(tmp_path), chunk=8)

    with process(work), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache = FeatureCache.load_or_build(
            KEY, COUNT, encoder({}, None), CacheConfig(tmp_path), chunk=8
        )
        assert torch.equal(cache.batch(torch.arange(COUNT))["labels"], content["labels"])


def test_progress_of_others_is_progress(monkeypatch):
    monkeypatch.setattr(waiting, "BOUND", 0.2)
    seen = []

    def sign():
        seen.append(0)
        return min(len(seen), 8)

    wait = waiting.Wait(Path("x"), list, "does it", "to do it", "end it", sign)
    started = time.monotonic()
    with raises(UserError, "...expected a process that ...does not show to do it, got no sign ..."):
        while True:
            wait.turn()
    assert time.monotonic() - started > 0.2 + 6 * 0.05


def test_a_pause_of_all_is_no_wait(monkeypatch):
    """As by Ctrl-Z in a terminal: the others were stopped as well."""
    wait, now = waiting.Wait(Path("x"), list, "does it", "to do it", "end it"), time.monotonic()
    for hours in range(1, 4):
        monkeypatch.setattr(time, "monotonic", lambda hours=hours: now + 3600 * hours)
        wait.turn()
    assert wait._waited == 3


@pytest.mark.parametrize("what", ["a claim", "the file", "its creation", "RAM"])
def test_a_heartbeat_stops_a_wait(path, ram, what):
    """Ctrl-C during a search."""
    placement = "ram" if what == "RAM" else "file"
    ram.mkdir()
    ram.chmod(0o700)
    key = KEY
    if what == "its creation":
        key = {"another": "one"}
        new = build(path.parent, key=key)
        new.close()
        (temporary,) = (p.rename(p.with_name(f".{p.name}.tmp")) for p in new.paths)
    holding = {
        "a claim": claim(path),
        "the file": locked(path),
        "its creation": locked(temporary) if what == "its creation" else None,
        "RAM": locked(ram),
    }

    def stop():
        raise KeyboardInterrupt

    config = CacheConfig(path.parent, placement=placement)
    with process(holding[what]), pytest.raises(KeyboardInterrupt):
        FeatureCache.load_or_build(key, COUNT, encoder(arrays()), config, stop)


# ---- who it is


def test_a_command_line_of_another_is_one_line_without_commands_to_the_terminal(tmp_path):
    code = "import time; time.sleep(60)"
    running = subprocess.Popen(
        [sys.executable, "-c", code, "\x1b[2J\nerror: all is lost" + "x" * 99]
    )
    try:
        while b"lost" not in Path(f"/proc/{running.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        text = waiting.described(running.pid)
    finally:
        running.kill()
        running.wait()
    assert text.isprintable()
    assert text.startswith(f"process {running.pid} ({sys.executable} -c {code} "[:80])
    assert text.endswith(" ..)")
    assert waiting.described(running.pid) == (
        f"process {running.pid} (ended; one that it started has its place)"
    )


@needs_root
def test_a_process_of_another_user():
    def other(ready):
        os.setuid(65534)

    with process(other, stopped=True) as pid:
        assert waiting.described(pid) == who(pid, "of nobody", "stopped")


def test_holders_of_a_lock(tmp_path):
    (path := tmp_path / "x").touch()
    with path.open() as file, process(locked(path, fcntl.LOCK_SH)) as pid:
        assert waiting.lock_holders(file.fileno()) == {pid}
        with path.open() as other:
            fcntl.flock(other, fcntl.LOCK_SH)
            assert waiting.lock_holders(file.fileno()) == {pid, os.getpid()}


def test_the_same_inode_of_another_file_system(tmp_path, monkeypatch):
    """Is taken for the file only where none is of its own, as some hide their number."""
    (path := tmp_path / "x").touch()
    status = path.stat()
    own = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    other = f"ff:ff:{status.st_ino}"
    monkeypatch.setattr(waiting, "_LOCKS", locks := tmp_path / "locks")
    lines = [
        f"1: FLOCK  ADVISORY  WRITE 11 {other} 0 EOF",
        f"1: -> FLOCK  ADVISORY  WRITE 12 {own} 0 EOF",  # waits itself
        f"2: POSIX  ADVISORY  WRITE 13 {own} 0 EOF",
        f"3: FLOCK  ADVISORY  READ 0 {own} 0 EOF",  # of another container
    ]
    with path.open() as file:
        locks.write_text("\n".join(lines))
        assert waiting.lock_holders(file.fileno()) == {11}
        locks.write_text("\n".join([*lines, f"4: FLOCK  ADVISORY  WRITE 14 {own} 0 EOF"]))
        assert waiting.lock_holders(file.fileno()) == {14}


def test_minutes():
    assert waiting._span(300) == "5 minutes"
    assert waiting._span(60) == "60 s"
