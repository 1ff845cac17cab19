"""Folders and files that one process at a time writes to."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from nasfast.utils.errors import UserError
from nasfast.utils.locks import claimed, is_free, locked, writing, writing_to

HOLDER = """
import pathlib, sys, time
from nasfast.utils import locks
with getattr(locks, sys.argv[1])(pathlib.Path(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def hold():
    """Start another process that holds a lock; all are killed at the end."""
    others = []

    def start(kind, path):
        command = [sys.executable, "-c", HOLDER, kind, str(path)]
        other = subprocess.Popen(command, stdout=subprocess.PIPE)
        others.append(other)
        assert other.stdout.readline() == b"held\n"
        return other

    yield start
    for other in others:
        other.kill()
        other.wait()
        other.stdout.close()


@pytest.mark.parametrize("kind", [locked, claimed, writing])
def test_one_process_at_a_time(kind, hold, tmp_path):
    path = tmp_path / "a thing"
    if kind is locked:
        path.mkdir()
    other = hold(kind.__name__, path)
    with pytest.raises(UserError) as caught, kind(path):
        raise AssertionError("two hold it")
    assert str(caught.value) == (
        f"{path} is being written by process {other.pid}; wait for it or stop it first"
    )
    other.send_signal(signal.SIGKILL)
    other.wait()
    with kind(path) as free:
        assert free in (None, True)


def test_in_one_process_too(tmp_path):
    with writing(tmp_path / "x"), pytest.raises(UserError), writing(tmp_path / "x"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_claim_leaves_what_was_written_and_nothing_else(tmp_path):
    folder = tmp_path / "above" / "folder"
    with claimed(folder) as free:
        assert free
    assert not folder.exists()
    with claimed(folder) as free:
        (folder / "file").touch()
    with claimed(folder) as free:
        assert not free
    assert sorted(os.listdir(folder)) == ["file", "lock"]


def test_a_claim_removes_what_failed_to_begin(tmp_path):
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "folder"):
        _ = 1 / 0
    assert os.listdir(tmp_path) == []


def test_a_folder_of_a_process_that_was_killed_as_it_began_is_free(hold, tmp_path):
    other = hold("claimed", tmp_path / "folder")
    other.kill()
    other.wait()
    assert os.listdir(tmp_path / "folder") == ["lock"]
    assert is_free(tmp_path / "folder")
    with claimed(tmp_path / "folder") as free:
        assert free


@pytest.mark.parametrize("left", [[], ["lock"], ["lock", "a"], ["lock", "a", ".b.12-ab.tmp"]])
def test_what_a_process_had_written_as_it_was_killed_may_be_free(left, tmp_path):
    """The lock shows that such a process wrote it: a user's own file of that name stays."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    assert is_free(folder, ["a"])
    assert is_free(folder) == ("a" not in left)
    with claimed(folder, ["a"]) as free:
        assert free
        assert os.listdir(folder) == ["lock"]
        (folder / "a").touch()
    assert not folder.exists()
    folder.mkdir()
    (folder / "a").touch()
    assert not is_free(folder, ["a"])
    (folder / "lock").touch()
    (folder / "b").touch()
    assert not is_free(folder, ["a"])


def test_a_file_and_a_broken_link_are_no_free_folders(tmp_path):
    (tmp_path / "file").touch()
    assert not is_free(tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError), claimed(tmp_path / name):
            pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    """Its target would be emptied."""
    target = tmp_path / "precious"
    target.write_text("content")
    (tmp_path / "lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path):
        pass
    assert target.read_text() == "content"


def test_many_claim_at_once_and_one_has_it(tmp_path):
    """Each removes it again, while others wait for it or make it: no error, and never two."""
    inside, most, errors, turns = [0], [0], [], [0]
    end = time.monotonic() + 1.0

    def claim():
        while time.monotonic() < end:
            try:
                with claimed(tmp_path / "folder") as free:
                    assert free
                    inside[0] += 1
                    turns[0] += 1
                    most[0] = max(most[0], inside[0])
                    inside[0] -= 1
            except UserError:
                pass
            except BaseException as error:
                errors.append(error)
                raise

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (errors, most) == ([], [1])
    assert turns[0] > 20
    assert os.listdir(tmp_path) == []


def test_waiting_for_another_process(hold, tmp_path):
    other = hold("writing", tmp_path / "page")
    threading.Timer(0.3, other.kill).start()
    start = time.monotonic()
    with writing(tmp_path / "page", 30):
        assert 0.2 < time.monotonic() - start < 20
    other = hold("writing", tmp_path / "page")
    with pytest.raises(UserError, match=f"by process {other.pid}"), writing(tmp_path / "page", 0.1):
        pass


def test_a_folder_that_is_written_to_is_there_when_something_is_in_it(tmp_path):
    folder = tmp_path / "results"
    with writing_to(folder, "index"):
        assert folder.is_dir()
    assert not folder.exists()
    folder.mkdir()
    with writing_to(folder, "index"):
        pass
    assert os.listdir(folder) == []  # the user's stays


def test_a_forked_child_holds_nothing(tmp_path):
    """It may outlive its parent."""
    ours, theirs = os.pipe()
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os.write(theirs, b"!")
            signal.pause()
    assert os.read(ours, 1) == b"!"
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_full_disk_does_not_leave_a_lock_held(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left") as caught, locked(tmp_path):
            pass
    assert caught.value.filename == str(tmp_path / "lock")
    with locked(tmp_path):
        pass


def test_what_killed_processes_left_of_a_file_goes(tmp_path):
    (tmp_path / ".net[1].onnx.12-ab.tmp").touch()
    (tmp_path / ".net1.onnx.12-ab.tmp").touch()
    with writing(tmp_path / "net[1].onnx"):
        assert sorted(os.listdir(tmp_path)) == [".net1.onnx.12-ab.tmp", ".net[1].onnx.lock"]


def test_a_folder_that_may_not_be_read_is_not_free(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "train-1").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    assert not is_free(tmp_path / "train-1")
