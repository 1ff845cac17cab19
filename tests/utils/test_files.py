import os

import pytest

from nasfast.utils.files import atomic_file, atomic_write, sync_directory


def test_write_and_replace(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    atomic_write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert os.listdir(tmp_path) == ["file"]


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


def test_a_reader_sees_the_old_file_until_the_end(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, r=real: (calls.append(n), r(*a))[1])
    atomic_write(tmp_path / "file", "x")
    assert calls == ["fsync", "replace", "fsync"]


def test_sync_directory_closes_what_it_opens(tmp_path):
    before = os.listdir("/proc/self/fd")
    sync_directory(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == len(before)
