import os
import pwd
from pathlib import Path
from unittest import mock

import pytest

from nasfast.cache import default_directory
from nasfast.utils.errors import UserError
from nasfast.utils.files import (
    atomic_directory,
    atomic_file,
    atomic_write,
    data_path,
    expanded,
    remove_unfinished,
)


def test_write_and_replace(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "größe")
    with atomic_file(path) as file:
        file.write(b"\x00\xff")
        file.flush()
        assert path.read_text(encoding="utf-8") == "größe"
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file"]


def test_what_killed_processes_left_is_in_nobodys_way_and_removed(tmp_path):
    """In a container every process may have the number 1."""
    left = tmp_path / f".files.{os.getpid()}.tmp"
    left.mkdir()
    (left / "half").touch()
    (tmp_path / ".a.7-12.tmp").symlink_to(tmp_path)
    for content in (b"first", b"second"):
        atomic_directory(tmp_path / "files", {"a": content})
        assert (tmp_path / "files" / "a").read_bytes() == content
        assert os.listdir(tmp_path / "files") == ["a"]
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["files"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")

    def fail():
        with atomic_file(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    opened = len(os.listdir("/proc/self/fd"))
    atomic_write(tmp_path / "file", "x")
    assert calls == ["fsync", "replace", "fsync"]
    assert len(os.listdir("/proc/self/fd")) == opened


def test_an_error_names_the_file_and_not_its_temporary_one(tmp_path):
    path = tmp_path / "absent" / "file"
    with pytest.raises(FileNotFoundError) as error:
        atomic_write(path, "x")
    assert error.value.filename == str(path)


def test_without_a_home_directory(monkeypatch):
    """As in a container whose user has no name."""
    monkeypatch.delenv("NASFAST_CACHE", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", mock.Mock(side_effect=KeyError("uid not found")))
    monkeypatch.setenv("TMPDIR", "/tmp")
    monkeypatch.setattr("tempfile.tempdir", None)
    assert default_directory() == Path(f"/tmp/nasfast-{os.getuid()}")
    message = "~/data: expected a home directory for ~, got none; set HOME, or give the whole path"
    with pytest.raises(UserError, match=f"^{message}$"):
        expanded("~/data")
    monkeypatch.setenv("NASFAST_CACHE", "~/features")
    with pytest.raises(UserError, match=r"^~/features: expected a home directory"):
        default_directory()


def test_a_data_folder_that_a_run_cannot_record(tmp_path):
    with pytest.raises(UserError) as error:
        data_path(f"{tmp_path}/caf\udce9")
    assert str(error.value) == (
        f"data: expected a folder whose path is UTF-8, got '{tmp_path}/caf\\udce9'; rename it"
    )
