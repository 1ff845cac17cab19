"""One file: states of its samples, damage, locks, and the processes that share it."""

from __future__ import annotations

import errno
import gc
import os
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from samples import COUNT, KEY, arrays, build, encoder, must_not_encode, raises

import nasfast
from nasfast.cache import CacheConfig, FeatureCache, owners, places
from nasfast.cache import segment as segments
from nasfast.cache.segment import Filler, Segment
from nasfast.utils.errors import UserError

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(nasfast.__file__).parents[1])}


@pytest.fixture
def path(tmp_path):
    cache = build(tmp_path)
    cache.close()
    return cache.paths[0]


def table_of(path):
    return int.from_bytes(path.read_bytes()[24:32], "little")


def set_words(path, words):
    """Overwrite the first samples' words."""
    with path.open("r+b") as file:
        for i, word in enumerate(words):
            file.seek(table_of(path) + 16 * i)
            file.write(struct.pack("<Q", word))


def flip(path, at):
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def fill(path, encode):
    return FeatureCache.load_or_build(KEY, COUNT, encode, CacheConfig(path.parent), chunk=2)


def test_census(path):
    set_words(path, [0, owners.this_process(), owners.this_process()])
    segment = Segment.open(path)
    assert segment.census() == segments.Census(published=2, claimed=2, count=5)
    assert segment.published() == [3, 4]
    assert not segment.census().complete


def test_claims_are_aligned_chunks_round_the_table(path):
    set_words(path, [0] * 5)
    filler = Filler(Segment.open(path))
    assert filler.claim(2, 3).tolist() == [2, 3]
    assert filler.claim(2, 4).tolist() == [4]
    assert filler.claim(2, 5).tolist() == [0, 1]
    assert filler.claim(2, 0).tolist() == []
    filler.release()
    set_words(path, [1])
    assert filler.claim(4, 0).tolist() == [1, 2, 3]


def test_one_process_gets_all_of_a_chunk():
    """Two begin with the same one at the same moment, again and again."""
    code = """
import mmap, os
import numpy as np
from nasfast.ops._native import C
words = np.frombuffer(mmap.mmap(-1, 16 * 500 * 4096), np.uint64).reshape(500, 4096, 2)
ready = np.frombuffer(mmap.mmap(-1, 16), np.int64)
me = 0 if os.fork() else 1
for i, table in enumerate(words):
    ready[me] = i + 1
    while ready[1 - me] <= i:
        pass
    C.feature_cache_claim(table.ctypes.data, 4096, 4096, 0, 2 << 62 | 1 + me)
if me:
    os._exit(0)
os.wait()
owners = words[:, :, 0]
print((owners > 1).all(), (owners != owners[:, :1]).any(1).sum())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.stdout.split() == ["True", "0"], done.stderr


def test_only_the_owner_publishes(path):
    set_words(path, [0] * 5)
    segment = Segment.open(path)
    filler = Filler(segment)
    rows = filler.claim(2, 0)
    filler.release()
    with raises(
        UserError,
        f"feature cache {path}: sample 0 was taken from this process while it encoded; start it "
        "again",
    ):
        filler.write(rows, torch.zeros(2, segment.header.layout.sample_bytes, dtype=torch.uint8))
    assert segment.census().published == 0


def test_claims_of_the_dead_are_reaped(path):
    process = subprocess.Popen(["sleep", "60"])
    start = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19])
    dead = owners.owner_word(process.pid, start)
    set_words(path, [dead, 1, dead, 0])
    filler = Filler(Segment.open(path))
    assert filler.reap() == 0
    assert filler.claim(3, 0).tolist() == [3]  # a chunk of others is left to them
    process.kill()
    process.wait()
    assert filler.reap() == 2
    assert filler.claim(5, 0).tolist() == []
    assert filler.claim(3, 0).tolist() == [0, 2]


@pytest.mark.parametrize("at", [0, 63, -1])
def test_a_flipped_byte_in_the_data(path, at):
    segment = Segment.open(path)
    size = segment.header.layout.sample_bytes
    flip(path, path.stat().st_size - 3 * size + at % size)
    got, expected = segment._sums(2)
    with raises(
        UserError,
        f"feature cache {path}: sample 2 is damaged: expected the checksum {expected:016x}, got "
        f"{got:016x}; free it with `nasfast cache verify --repair {path}`, and the next "
        "search encodes it again",
    ):
        segment.check(torch.tensor([1, 2]))
    segment.check(torch.tensor([0, 1, 3, 4]))
    assert segment.verify() == [2]


@pytest.mark.parametrize("at", range(16))
def test_a_flipped_byte_in_the_state_table(path, at):
    """Served is what was there, or nothing, or it is encoded again."""
    content, calls = arrays(), []
    flip(path, table_of(path) + 16 * 2 + at)
    if at < 8:
        cache = fill(path, encoder(content, calls))
        assert calls == [[2, 2]]  # in a batch of the usual size
        assert torch.equal(cache.batch(torch.tensor([2]))["labels"], content["labels"][2:3])
    else:
        cache = fill(path, must_not_encode)
        with raises(UserError, f"feature cache {path}: sample 2 is damaged: ..."):
            cache.sample(2)


def test_a_block_in_another_place(path):
    segment = Segment.open(path)
    size, data = segment.header.layout.sample_bytes, path.read_bytes()
    first, table = len(data) - COUNT * size, table_of(path)
    swapped = bytearray(data)
    swapped[first : first + size] = data[first + size : first + 2 * size]
    swapped[table : table + 16] = data[table + 16 : table + 32]
    path.write_bytes(swapped)
    assert Segment.open(path).verify() == [0]


def test_a_sample_is_verified_once(path):
    segment = Segment.open(path)
    segment.check(torch.tensor([2]))
    flip(path, path.stat().st_size - 3 * segment.header.layout.sample_bytes)
    segment.check(torch.tensor([2]))
    with raises(UserError, "...sample 2 is damaged..."):
        Segment.open(path).check(torch.tensor([2]))


def test_not_published(path):
    for word in (0, owners.this_process()):
        set_words(path, [1, word])
        segment = Segment.open(path)
        with raises(
            RuntimeError,
            f"feature cache {path}: sample 1 is not there yet; FeatureCache.load_or_build returns "
            "when all are",
        ):
            segment.check(torch.tensor([0, 1]))


def test_published_while_it_is_looked_at(path, monkeypatch):
    """Not yet there for the check, there for the report."""
    find, answers = Segment._find_broken, [1]
    monkeypatch.setattr(
        Segment, "_find_broken", lambda *args: answers.pop() if answers else find(*args)
    )
    Segment.open(path).check(torch.tensor([0, 1]))
    assert not answers


@pytest.mark.parametrize("row", [-1, COUNT, 1 << 40, -(1 << 40)])
def test_no_such_sample(path, row):
    with raises(ValueError, f"feature cache {path}: expected a sample of 0 to 4, got {row}"):
        Segment.open(path).check(torch.tensor([0, row]))


def test_repair(path):
    segment = Segment.open(path)
    flip(path, path.stat().st_size - 1)
    segment.repair(segment.verify())
    assert segment.published() == [0, 1, 2, 3]
    calls = []
    fill(path, encoder(arrays(), calls))
    assert calls == [[4]]


def test_no_repair_of_what_is_in_use(path):
    segment, other = Segment.open(path), Segment.open(path)
    with raises(
        UserError,
        f"feature cache {path}: in use, its damaged samples stay; end the processes that use it "
        "first",
    ):
        segment.repair([1])
    assert segment.in_use()
    other.close()
    assert not segment.in_use()
    segment.repair([1])
    assert segment.published() == [0, 2, 3, 4]


def foreign(path):
    """As if another container had claimed what is not published."""
    with path.open("r+b") as file:
        file.seek(48)
        file.write(b"x" * 24)
    set_words(path, [owners.this_process()] * 2)  # alive, but pids mean nothing there


def test_another_hosts_claims_are_free_when_it_has_gone(path):
    foreign(path)
    calls = []
    fill(path, encoder(arrays(), calls))
    assert calls == [[0, 1]]
    assert path.read_bytes()[48:72] == owners.host()


def test_in_use_by_another_host(path, monkeypatch):
    monkeypatch.setattr(segments, "_PATIENCE", 0.05)
    foreign(path)
    other = Segment.open(path)
    with raises(
        UserError,
        f"feature cache {path}: in use by another machine or container; wait until it has ended, "
        "or give another --cache-dir",
    ):
        fill(path, must_not_encode)
    assert other.census().claimed == 2


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_as_a_new_file_is_attached(path, monkeypatch):
    """It is closed once: the second time, its number might be another file's."""
    header = Segment.open(path).header
    blocks = torch.empty(0, header.layout.sample_bytes, dtype=torch.uint8)
    closed, close = [], os.close

    settled = places.settled

    @contextmanager
    def interrupted(directory, **arguments):
        with settled(directory, **arguments) as file:
            yield file
        raise KeyboardInterrupt

    def note(file):
        closed.append(file)
        close(file)

    gc.collect()
    with monkeypatch.context() as patch:
        patch.setattr(places, "settled", interrupted)
        patch.setattr(os, "close", note)
        with pytest.raises(KeyboardInterrupt):
            segments.create(path.with_name("new.features"), lambda: (header, blocks), lambda: None)
        gc.collect()
    assert len(set(closed)) == len(closed) == 3  # of the file and, twice, its directory


@pytest.fixture
def unreserved(monkeypatch):
    """As a file system that cannot reserve room."""
    entries = SimpleNamespace(feature_cache_allocate=lambda file, size: errno.EOPNOTSUPP)
    monkeypatch.setattr(places, "extension", lambda: entries)


def test_the_table_takes_its_room_where_none_can_be_reserved(unreserved, tmp_path):
    """It is written through a map, where a full disk would be SIGBUS."""
    content = {"tap": torch.randn(600, 4, 2, 2)}

    def encode(indices):
        if 2 in indices:
            raise KeyboardInterrupt
        return {"tap": content["tap"][indices]}

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.load_or_build(KEY, 600, encode, CacheConfig(tmp_path), chunk=2)
    (path,) = tmp_path.iterdir()
    with path.open("rb") as file:
        assert os.lseek(file.fileno(), table_of(path), os.SEEK_HOLE) >= table_of(path) + 16 * 600
    assert build(tmp_path, content).verify() == []


def test_no_room_where_none_can_be_reserved(unreserved, monkeypatch, tmp_path):
    monkeypatch.setattr(places, "free_bytes", lambda directory: 100)
    with raises(OSError, f"...expected ... bytes in {tmp_path}, got 100 free; make room with ..."):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_copy_is_allocated_before_it_is_filled(tmp_path):
    content = {"tap": torch.zeros(COUNT, 1, 64, 64)}
    cache = build(tmp_path, content)
    cache.close()
    (path,) = cache.paths
    data = path.read_bytes()
    with path.open("wb") as file:  # its zeros become a hole, as `cp --sparse` leaves them
        file.write(data[:8192])
        file.truncate(len(data))
    set_words(path, [0])
    assert path.stat().st_blocks * 512 < len(data)
    fill(path, encoder(content))
    assert path.stat().st_blocks * 512 >= len(data)


def test_a_copy_is_a_cache(path, tmp_path):
    directory = tmp_path / "copy"
    directory.mkdir()
    shutil.copy(path, directory)
    assert FeatureCache.open(KEY, CacheConfig(directory)).verify() == []


def test_data_outlives_the_segment_and_the_file(path):
    segment = Segment.open(path)
    data, before = segment.data, segment.data.clone()
    segment.close()
    path.unlink()
    del segment
    assert torch.equal(data, before)


def test_what_is_written_to_a_view_stays_here(path):
    segment, before = Segment.open(path), path.read_bytes()
    segment.data.zero_()
    assert path.read_bytes() == before
    assert Segment.open(path).data.any()


def test_a_forked_child_leaves_its_parents_lock(path, tmp_path):
    ram = build(tmp_path, placement="ram")
    disk = Segment.open(path)
    pid = os.fork()
    if pid == 0:
        try:
            ram.close()
            disk.close()
        finally:
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert places.remove(path) is None
    assert ram.paths[0].exists()
    ram.close()
    assert not ram.paths[0].exists()


def forked(run):
    """The status of a forked process that runs a function."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(60)
            run()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


def test_a_forked_child_sees_that_its_parent_uses_the_file(path):
    """They share the descriptor, and its lock would be the child's as well."""
    segment = Segment.open(path)

    def child():
        assert segment.in_use()
        with raises(UserError, f"feature cache {path}: in use, its damaged samples stay; ..."):
            segment.repair([1])

    assert not segment.in_use()
    assert forked(child) == 0
    assert segment.published() == [0, 1, 2, 3, 4]
    assert places.remove(path) is None  # the lock is still the parent's


def test_a_forked_child_reads_batches(tmp_path):
    """With as many threads as the parent, which has used them."""
    content = arrays(count=64)
    cache = build(tmp_path, content)
    indices = torch.arange(64)

    def read(ahead):
        for batch in cache.batches([indices, indices], torch.float32, ahead):
            assert torch.equal(batch["tap0"], content["tap0"].float())
        assert torch.equal(cache.batch(indices)["labels"], content["labels"])

    torch.set_num_threads(2)
    try:
        read(0)
        assert forked(lambda: [read(ahead) for ahead in (0, 1)]) == 0
        read(1)
    finally:
        torch.set_num_threads(1)


def test_batches_that_the_parent_began_end_in_a_forked_child(tmp_path):
    """Their thread did not come along: the child would wait for it."""
    cache = build(tmp_path)
    batches = cache.batches([torch.tensor([i]) for i in range(5)])
    next(batches)

    def child():
        with raises(
            RuntimeError,
            "feature cache: expected the process that began these batches, got a forked child, "
            "which has no thread that fetches them; begin new ones there",
        ):
            next(batches)

    assert forked(child) == 0
    assert len(list(batches)) == 4


def test_a_forked_child_reads_what_is_published_later(tmp_path):
    """Maps are shared over a fork, states and blocks alike."""
    content, status = arrays(), []

    def encode(indices):
        if indices[0] == 2:
            cache = FeatureCache.open(KEY, CacheConfig(tmp_path))
            read, write = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.read(read, 1)
                same = torch.equal(cache.sample(4)["tap0"], content["tap0"][4])
                os._exit(0 if same else 1)
            status.append((pid, write))
        return {name: array[indices] for name, array in content.items()}

    FeatureCache.load_or_build(KEY, COUNT, encode, CacheConfig(tmp_path), chunk=2)
    ((pid, write),) = status
    os.write(write, b"x")
    os.close(write)
    assert os.waitpid(pid, 0)[1] == 0


def test_read_only_file_system(mount):
    directory = mount("size=1m")
    content = arrays()
    build(directory, content).close()
    (path,) = directory.iterdir()
    (directory / ".x.features.tmp").touch()  # of a killed creator
    subprocess.run(["mount", "-o", "remount,ro", str(directory)], check=True)
    cache = fill(path, must_not_encode)
    assert torch.equal(cache.batch(torch.arange(5))["tap0"], content["tap0"])
    assert Segment.open(path).in_use()
    cache.close()
    with raises(
        OSError,
        f"[Errno {errno.EROFS}] feature cache: cannot write to {directory}: Read-only file "
        "system; give another --cache-dir",
    ):
        build(directory, key={"data": "other"})


def test_an_incomplete_cache_that_cannot_be_written(path, monkeypatch):
    set_words(path, [0])
    opened = os.open

    def refuse(name, flags, *mode, **keywords):
        if flags & os.O_RDWR and not flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return opened(name, flags, *mode, **keywords)

    monkeypatch.setattr(os, "open", refuse)
    message = (
        f"[Errno {errno.EACCES}] feature cache: cannot write to {path}: Permission denied; give "
        "another --cache-dir"
    )
    with raises(OSError, message):
        fill(path, must_not_encode)
    with raises(OSError, message):
        Segment.open(path).repair([1])
    assert Segment.open(path).published() == [1, 2, 3, 4]


def test_private_memory_of_a_reader(tmp_path):
    """Two processes map the same pages; what a reader has alone is bookkeeping."""
    content = {"tap": torch.zeros(64, 64, 64, 64)}  # 64 MiB
    content["tap"][:, 0, 0, 0] = torch.arange(64)
    cache = build(tmp_path, content)
    for i in range(64):
        cache.sample(i)
    code = """
import sys, torch
from pathlib import Path
from nasfast.cache import CacheConfig, FeatureCache

def private():
    fields = dict(line.split(":") for line in open("/proc/self/smaps_rollup").readlines()[1:])
    return sum(int(fields[name].split()[0]) for name in ("Private_Clean", "Private_Dirty"))

def read(path, key):
    cache = FeatureCache.open(key, CacheConfig(Path(path)))
    return cache, [float(cache.sample(i)["tap"].sum()) for i in range(cache.count)]

read(sys.argv[1], {"data": "warm-up"})
before = private()
cache, sums = read(sys.argv[2], {"encoder": "abc", "dtype": "float16"})
print(private() - before, sums == [float(i) for i in range(64)])
"""
    small = build(tmp_path / "small", {"tap": torch.zeros(1, 1, 8, 8)}, {"data": "warm-up"})
    done = subprocess.run(
        [sys.executable, "-c", code, str(small.paths[0].parent), str(tmp_path)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr
    kib, right = done.stdout.split()
    assert right == "True"
    assert int(kib) < 8 * 1024
