"""A file that is cut short while it is mapped: an error, or, where nothing can be raised any more,
the end of the process with a line that says why."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from samples import COUNT, KEY, build, raises

import nasfast
from nasfast.cache import CacheConfig, FeatureCache
from nasfast.cache.header import extension
from nasfast.cache.segment import Segment
from nasfast.utils.errors import UserError

PRELUDE = """
import faulthandler, mmap, os, signal, sys, threading, torch
from pathlib import Path
from nasfast.cache.segment import Segment, _Table
path = Path(sys.argv[1])

def cut(to=8192):
    os.truncate(path, to)
"""


@pytest.fixture
def path(tmp_path):
    """A cache whose samples fill many pages."""
    cache = build(tmp_path, {"tap": torch.randn(COUNT, 4, 64, 64)})
    cache.close()
    return cache.paths[0]


def run(code, path, *flags):
    """Exit status and standard error of a program."""
    root = str(Path(nasfast.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, *flags, "-c", PRELUDE + code, str(path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
        timeout=60,
    )
    return done.returncode, done.stderr


def run_forked(code, path):
    """The same in a process that need not import anything."""
    with tempfile.TemporaryFile() as errors:
        pid = os.fork()
        if pid == 0:
            try:
                signal.alarm(60)
                os.dup2(errors.fileno(), 2)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(sys, "argv", ["", str(path)])
                    exec(PRELUDE + code, {})
            except BaseException as error:
                os.write(2, repr(error).encode())
            finally:
                os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        errors.seek(0)
        return status, errors.read().decode()


def line(path, size):
    return (
        f"error: feature cache {path}: expected {size} bytes, got fewer: it was cut short, or its "
        "disk failed, while it was read; delete it, and start again: --resume continues a search\n"
    )


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("s = Segment.open(path); cut(); s.data.sum()", id="read"),
        pytest.param("s = Segment.open(path); cut(); s.data.fill_(1)", id="written"),
        pytest.param(
            "s = Segment.open(path); cut(16384); s._find_broken(torch.arange(5))", id="C++"
        ),
        pytest.param(
            "d = Segment.open(path).data; cut(); d.sum()", id="after the segment was closed"
        ),
        pytest.param(
            "s = Segment.open(path); cut()\n"
            "t = threading.Thread(target=s.data.sum); t.start(); t.join()",
            id="another thread",
        ),
        pytest.param(
            "s = Segment.open(path); cut(); pid = os.fork()\n"
            "if not pid: s.data.sum()\n"
            "os._exit(os.waitstatus_to_exitcode(os.wait()[1]))",
            id="forked child",
        ),
        pytest.param(
            "many = [Segment.open(path) for i in range(50)]; del many[::2]\n"
            "s = Segment.open(path); cut(); s.data.sum()",
            id="many maps",
        ),
        pytest.param(
            "s = Segment.open(path); del s; s = Segment.open(path); cut(); s.data.sum()",
            id="armed again",
        ),
    ],
)
def test_what_is_gone_is_read(code, path):
    size = path.stat().st_size
    assert run_forked(code, path) == (2, line(path, size))


def test_the_table_is_gone(path):
    code = "s = Segment.open(path); cut(4096); s.census()"
    table = int.from_bytes(path.read_bytes()[24:32], "little")
    assert run_forked(code, path) == (2, line(path, table + 16 * COUNT))


FOREIGN = """
s = Segment.open(path)
other = open("/proc/self/fd/%d" % os.memfd_create("x"), "r+b")
other.truncate(8192)
m = mmap.mmap(other.fileno(), 8192)
other.truncate(0)
m[5000]
"""


@pytest.mark.parametrize("faults", [False, True])
def test_other_bus_errors_go_where_they_went(path, faults):
    status, text = run(FOREIGN, path, *(["-X", "faulthandler"] if faults else []))
    assert status == -signal.SIGBUS
    assert ("Fatal Python error: Bus error" in text) == faults
    assert "feature cache" not in text


@pytest.mark.parametrize("opened", ["s = Segment.open(path)", "s = Segment.open(path); del s"])
def test_a_signal_that_was_sent_goes_where_it_went(path, opened):
    assert run(f"{opened}\nos.kill(os.getpid(), signal.SIGBUS)", path) == (-signal.SIGBUS, "")
    handled = "signal.signal(signal.SIGBUS, lambda *a: os._exit(7))"
    code = f"{handled}\n{opened}\nos.kill(os.getpid(), signal.SIGBUS)\nsignal.pause()"
    assert run_forked(code, path) == (7, "")


def test_maps_that_are_gone_are_not_taken_for_the_file(path):
    """Their addresses may be given to others."""
    segment = Segment.open(path)
    del segment
    gc.collect()
    code = "s = Segment.open(path); t = Segment.open(path); del s" + FOREIGN.replace(
        "s = Segment.open(path)\n", "\n"
    )
    assert run(code, path) == (-signal.SIGBUS, "")


def test_an_error_where_one_can_be_raised(path):
    cache = FeatureCache.open(KEY | {}, CacheConfig(path.parent))
    size = path.stat().st_size
    cache.batch(torch.tensor([1]))
    os.truncate(path, size - 1)
    message = (
        f"feature cache {path}: expected {size} bytes, got {size - 1}: it was cut short while it "
        "was read; delete it, and start again: --resume continues a search"
    )
    for read in (
        lambda: cache.sample(1),  # though it was verified before
        lambda: cache.batch(torch.tensor([1])),
        lambda: list(cache.batches([torch.tensor([1])])),
        lambda: list(cache.batches([torch.tensor([1])], ahead=0)),
    ):
        with raises(UserError, message):
            read()


def test_a_map_that_cannot_be_made(tmp_path):
    kinds = extension().FileMap
    (tmp_path / "x").write_bytes(b"x")
    with (tmp_path / "x").open("rb") as file:
        with raises(OSError, "[Errno 13] Permission denied"):
            kinds(file.fileno(), 4096, kinds.Access.WRITE, b"")
        with raises(OSError, "[Errno 22] Invalid argument"):
            kinds(file.fileno(), 0, kinds.Access.READ, b"")
        view = memoryview(kinds(file.fileno(), 1, kinds.Access.READ, b""))
        assert view.readonly
        assert bytes(view) == b"x"
