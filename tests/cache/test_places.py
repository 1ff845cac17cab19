"""What is left behind is removed, what is in use stays."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from samples import COUNT, KEY, arrays, build, encoder, raises

from nasfast.cache import CacheConfig, FeatureCache, places, trust
from nasfast.cache.segment import Segment


def test_a_fill_removes_what_killed_ones_left_and_no_more(tmp_path):
    left, used = tmp_path / ".a.features.tmp", tmp_path / ".b.features.tmp"
    other = tmp_path / "notes.tmp"
    for path in (left, used, other):
        path.write_bytes(b"x" * 5000)
    with used.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        cache = build(tmp_path)
        assert set(tmp_path.iterdir()) == {used, other, *cache.paths}


def test_what_a_killed_creator_left_is_taken_over(tmp_path):
    path = build(tmp_path).paths[0]
    temporary = path.rename(path.with_name(f".{path.name}.tmp"))
    os.truncate(temporary, 9000)
    content = arrays()
    cache = build(tmp_path, content)
    assert list(tmp_path.iterdir()) == [path]
    assert cache.verify() == []


def test_sweep_counts(tmp_path):
    (tmp_path / ".a.features.tmp").write_bytes(b"x" * 5000)
    assert places.sweep(tmp_path) == 8192
    assert places.sweep(tmp_path) == 0
    assert places.sweep(tmp_path / "absent") == 0


def test_sweep_keeps_files_on_disk_and_ram_in_use(tmp_path, ram):
    disk = build(tmp_path)
    disk.close()
    cache = build(tmp_path, placement="ram")
    places.sweep(tmp_path)
    places.sweep(ram)
    assert disk.paths[0].exists()
    assert cache.paths[0].exists()
    (unused := ram / "x.features").write_bytes(b"")
    places.sweep(ram, keep=unused)
    assert unused.exists()
    places.sweep(ram)
    assert not unused.exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_sweep_leaves_what_it_may_not_open(tmp_path, monkeypatch, code):
    (path := tmp_path / ".a.features.tmp").write_bytes(b"")

    opened = os.open

    def refuse(name, flags, *mode, **keywords):
        if name == path.name:
            raise OSError(code, os.strerror(code))
        return opened(name, flags, *mode, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        assert places.sweep(tmp_path) == 0
        code = errno.EIO
        with raises(OSError, f"[Errno {errno.EIO}] Input/output error: '{path}'"):
            places.sweep(tmp_path)
    assert path.exists()


def test_remove(tmp_path):
    cache = build(tmp_path)
    (path,) = cache.paths
    assert places.remove(path) is None
    assert path.exists()
    cache.close()
    size = path.stat().st_blocks * 512
    assert places.remove(path) == size > 0
    assert places.remove(path) is None


def test_remove_by_force(tmp_path):
    content = arrays()
    cache = build(tmp_path, content)
    assert places.remove(cache.paths[0], force=True)
    assert torch.equal(cache.batch(torch.tensor([1]))["labels"], content["labels"][1:2])


def test_a_creator_waits_for_another_with_a_heartbeat(tmp_path):
    """The second attaches to what the first has made, as soon as it is there."""
    content, config, first_calls, second_calls = arrays(), CacheConfig(tmp_path), [], []
    beats, begun = threading.Event(), threading.Event()

    def slowly(indices):
        begun.set()
        assert beats.wait(10)
        return encoder(content, first_calls)(indices)

    def second():
        begun.wait(10)
        FeatureCache.load_or_build(
            KEY, COUNT, encoder(content, second_calls), config, beats.set, chunk=2
        )

    thread = threading.Thread(target=second)
    thread.start()
    cache = FeatureCache.load_or_build(KEY, COUNT, slowly, config, chunk=2)
    thread.join(10)
    assert cache.verify() == []
    assert sorted(i for call in first_calls + second_calls for i in call) == [0, 1, 2, 3, 4]


@pytest.fixture
def descriptor(tmp_path):
    """Of the directory of the caches."""
    with places.opened(tmp_path) as directory:
        yield directory


def test_a_waiting_creator_may_stop(tmp_path, descriptor):
    temporary = tmp_path / ".x.features.tmp"
    file = places.creation_lock(descriptor, temporary, lambda: None)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        places.creation_lock(descriptor, temporary, stop)
    os.close(file)


def test_a_waiting_creator_sees_that_the_file_got_its_name(tmp_path, descriptor):
    temporary = tmp_path / ".x.features.tmp"
    file = places.creation_lock(descriptor, temporary, lambda: None)
    turns = []

    def turn():
        turns.append(1)
        if len(turns) == 1:
            temporary.rename(tmp_path / "x.features")  # still locked

    other = places.creation_lock(descriptor, temporary, turn)
    assert places.names(descriptor, temporary.name, other)
    assert not places.names(descriptor, temporary.name, file)
    os.close(file)
    os.close(other)


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Stands for /sys/fs/cgroup; makes this process a member, and groups with limits."""
    root, membership = tmp_path / "groups", tmp_path / "membership"
    monkeypatch.setattr(places, "_GROUPS", root)
    monkeypatch.setattr(places, "_MEMBERSHIP", membership)

    def make(member, limits):
        membership.write_text(member)
        for name, (limit, used, cached) in limits.items():
            first = "memory" in Path(name).parts
            directory = root / name
            directory.mkdir(parents=True, exist_ok=True)
            names = ("limit_in_bytes", "usage_in_bytes") if first else ("max", "current")
            (directory / f"memory.{names[0]}").write_text(f"{limit}\n")
            (directory / f"memory.{names[1]}").write_text(f"{used}\n")
            key = "total_inactive_file" if first else "inactive_file"
            (directory / "memory.stat").write_text(f"anon 7\n{key} {cached}\nactive_file 9\n")

    return make


UNLIMITED = 9223372036854771712


@pytest.mark.parametrize(
    ("member", "limits", "free"),
    [
        ("0::/a/b\n", {"a/b": (5000, 1000, 200)}, 4200),
        ("0::/a/b\n", {"a/b": (5000, 1000, 0), "a": (6000, 5000, 0)}, 1000),
        ("0::/a/b\n", {"a/b": ("max", 1000, 0), "a": (6000, 5000, 0)}, 1000),
        ("0::/a/b\n", {"a/b": (5000, 5100, 50), "a/c": (10, 5, 0)}, 0),
        ("0::/\n", {".": (5000, 1000, 0)}, 4000),
        ("0::/../other\n", {".": (5000, 1000, 0)}, 4000),
        ("3:cpu:/x\n2:memory:/a\n0::/\n", {"memory/a": (5000, 1000, 300)}, 4300),
        ("2:cpu,memory:/a:b\n", {"memory/a:b": (UNLIMITED, 1, 0), "memory": (900, 1, 0)}, 899),
        ("2:memory:/docker/a\n", {"memory": (5000, 1000, 0)}, 4000),
    ],
)
def test_room_in_ram_is_also_that_of_the_control_groups(ram, groups, member, limits, free):
    ram.mkdir()
    groups(member, limits)
    assert places.free_bytes(ram) == free
    assert places.free_bytes(ram.parent) > 5000


@pytest.mark.parametrize(
    ("member", "limits"),
    [
        ("0::/a\n", {"a": ("max", 1000, 0)}),
        ("2:memory:/a\n", {"memory/a": (UNLIMITED, 1, 0)}),
        ("0::/a\n", {}),
        ("", {}),
    ],
)
def test_groups_without_a_limit(ram, groups, member, limits):
    ram.mkdir()
    groups(member, limits)
    assert places.free_bytes(ram) > 1 << 20


def test_attaching_waits_while_ram_segments_settle(tmp_path, ram):
    cache = build(tmp_path, placement="ram")
    attached = []

    def attach():
        attached.append(Segment.open(cache.paths[0]))

    with places.settled(ram), places.settled(ram):  # a garbage collection may close one inside
        thread = threading.Thread(target=attach)
        thread.start()
        time.sleep(0.05)
        assert not attached
    thread.join(10)
    assert attached


def test_many_make_a_directory_at_once(tmp_path: Path) -> None:
    """Each finds it missing; its parents have the modes that the umask gives."""
    for number in range(50):
        place = tmp_path / str(number) / "above" / "cache"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(trust.make_directory, [place] * 8))
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
