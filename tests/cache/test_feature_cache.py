"""Caches: what goes in comes out, from whichever place, encoded once."""

from __future__ import annotations

import errno
import os
import pickle
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import COUNT, KEY, arrays, build, encoder, must_not_encode, raises

import nasfast
from nasfast.cache import CacheConfig, FeatureCache, default_directory, places, tensors_fingerprint

DOCUMENT = Path(__file__).parents[2] / "docs" / "feature_cache.md"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INTEGERS = [torch.int16, torch.int32, torch.int64]


@pytest.fixture(params=["file", "ram"])
def placement(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path, placement, dtype):
    content = arrays(dtype)
    cache = build(tmp_path, content, placement=placement)
    opened = FeatureCache.open(KEY, CacheConfig(tmp_path, placement))
    assert (cache.count, cache.key, cache.device) == (COUNT, KEY, torch.device("cpu"))
    assert cache.paths == opened.paths
    assert cache.to(torch.device("cpu")) is cache
    for indices in ([0, 1, 2, 3, 4], [4, 0, 4], [2], []):
        for as_type in (None, *DTYPES):
            read = opened.batch(torch.tensor(indices, dtype=torch.int64), as_type)
            assert list(read) == list(content)
            assert torch.equal(read["labels"], content["labels"][indices])
            for name in ("tap0", "tap1"):
                assert read[name].dtype == (as_type or dtype)
                assert torch.equal(read[name], content[name][indices].to(read[name].dtype))
                assert read[name].is_contiguous(memory_format=torch.channels_last)


@st.composite
def contents(draw):
    n = draw(st.integers(1, 9))
    out = {}
    for i in range(draw(st.integers(1, 3))):
        shape = (n, *draw(st.lists(st.integers(1, 6), max_size=3)))
        out[f"a{i}"] = (99 * torch.randn(shape)).to(draw(st.sampled_from([*DTYPES, *INTEGERS])))
    return out


@given(contents(), st.integers(1, 4), st.data())
@settings(max_examples=30)
def test_round_trip_of_any_layout(content, chunk, data):
    count, calls = len(content["a0"]), []
    order = data.draw(st.lists(st.integers(0, count - 1), max_size=12))
    indices = torch.tensor(order, dtype=torch.int64)
    with tempfile.TemporaryDirectory() as folder:
        config, load = CacheConfig(Path(folder)), FeatureCache.load_or_build
        cache = load(KEY, count, encoder(content, calls), config, chunk=chunk)
        # a batch may be filled up with copies
        assert sorted(i for call in calls for i in set(call)) == list(range(count))
        again = load(KEY, count, must_not_encode, config)
        for read in (cache, again, pickle.loads(pickle.dumps(cache))):
            batch = read.batch(indices)
            assert all(torch.equal(batch[name], a[indices]) for name, a in content.items())


def test_a_sample_is_a_view_of_the_file(tmp_path, placement):
    content = arrays()
    cache = build(tmp_path, content, placement=placement)
    for i in range(COUNT):
        sample = cache.sample(i)
        assert all(torch.equal(sample[name], array[i]) for name, array in content.items())
        assert sample["tap0"].stride() == (1, 12, 3)
        block = cache.segment.data[i].data_ptr()
        assert [a.data_ptr() - block for a in sample.values()] == [0, 192, 256]


@pytest.mark.parametrize("storage", ["float16", "bfloat16", "float32"])
def test_storage(tmp_path, storage):
    content = arrays(torch.float32)
    cache = build(tmp_path, content, storage=storage)
    read = cache.batch(torch.arange(5))["tap0"]
    assert torch.equal(read, content["tap0"].to(getattr(torch, storage)))
    assert build(tmp_path, content).paths != cache.paths


@pytest.mark.parametrize("dtype", DTYPES)
def test_documented_format(tmp_path, dtype):
    """The reader in the document knows nothing of nasfast."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.S)
    names: dict = {}
    exec(code, names)
    content = arrays(dtype)
    header, read = names["read"](build(tmp_path, content).paths[0])
    assert header["key"] == KEY
    assert header["count"] == COUNT
    assert list(read) == list(content)
    assert np.array_equal(read["labels"], content["labels"].numpy())
    for name in ("tap0", "tap1"):
        values = torch.from_numpy(read[name].copy()).view(dtype)
        assert torch.equal(values, content[name].permute(0, 2, 3, 1))


def test_reuse_leaves_the_file_but_notes_when(tmp_path):
    first = build(tmp_path)
    os.utime(first.paths[0], (1, 1))
    again = FeatureCache.load_or_build(
        dict(reversed(KEY.items())), COUNT, must_not_encode, CacheConfig(tmp_path)
    )
    assert again.paths == first.paths
    assert first.paths[0].stat().st_mtime == 1
    assert first.paths[0].stat().st_atime > 1


def test_each_key_has_its_file(tmp_path):
    paths = {build(tmp_path, key=KEY | {"data": data}).paths[0] for data in ("a", "b")}
    assert set(tmp_path.iterdir()) == paths
    assert len(paths) == 2


def test_a_process_elsewhere_attaches_too(tmp_path, monkeypatch):
    """Whatever its working directory and environment are."""
    content = arrays()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NASFAST_CACHE", str(tmp_path / "default"))
    pickled = [pickle.dumps(build(directory, content)) for directory in (Path("relative"), None)]
    monkeypatch.chdir("/")
    monkeypatch.setenv("NASFAST_CACHE", "/nowhere")
    for text in pickled:
        read = pickle.loads(text).batch(torch.arange(5))
        assert torch.equal(read["labels"], content["labels"])


def test_a_reader_attaches_while_it_is_filled(tmp_path):
    content, config = arrays(), CacheConfig(tmp_path)

    def encode(indices):
        first = int(indices[0])
        if first:
            cache = FeatureCache.open(KEY, config)
            assert torch.equal(cache.sample(first - 1)["tap0"], content["tap0"][first - 1])
            with raises(RuntimeError, f"...sample {first} is not there yet..."):
                cache.sample(first)
        return {name: array[indices] for name, array in content.items()}

    assert FeatureCache.load_or_build(KEY, COUNT, encode, config, chunk=2).verify() == []


def test_an_error_frees_what_was_claimed(tmp_path):
    content, config, calls = arrays(), CacheConfig(tmp_path), []

    def stop(indices):
        if 2 in indices:
            raise KeyboardInterrupt
        return {name: array[indices] for name, array in content.items()}

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.load_or_build(KEY, COUNT, stop, config, chunk=2)
    assert FeatureCache.open(KEY, config).segment.census().claimed == 0
    FeatureCache.load_or_build(KEY, COUNT, encoder(content, calls), config, chunk=2)
    assert calls == [[2, 3], [4]]


def test_an_error_in_the_first_samples_leaves_no_file(tmp_path, placement, ram):
    def stop(indices):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.load_or_build(KEY, COUNT, stop, CacheConfig(tmp_path, placement))
    assert list(tmp_path.glob("*")) == []
    assert not ram.exists() or list(ram.iterdir()) == []


def test_heartbeat_may_stop(tmp_path):
    beats = []

    def beat():
        beats.append(1)
        if len(beats) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.load_or_build(
            KEY, COUNT, encoder(arrays()), CacheConfig(tmp_path), beat, chunk=2
        )
    assert FeatureCache.open(KEY, CacheConfig(tmp_path)).segment.census().published == 4


@pytest.mark.parametrize(
    ("late", "message"),
    [
        (
            {"labels": torch.zeros(1, 11, 9, dtype=torch.uint8)},
            "feature cache: expected samples of labels as uint8 [9, 11], got uint8 [11, 9]; crop "
            "all images to one size",
        ),
        (
            {"labels": torch.zeros(1, 9, 11, dtype=torch.float16)},
            "feature cache: expected samples of labels as uint8 [9, 11], got float16 [9, 11]; crop "
            "all images to one size",
        ),
        ({"labels": None}, "feature cache: expected the arrays tap0, tap1, labels of each sample, "
         "got tap0, tap1; encode the same for all"),
        (
            {"tap0": torch.zeros(2, 3, 7, 4, dtype=torch.float16)},
            "feature cache: expected 1 samples of tap0, got 2",
        ),
    ],
)  # fmt: skip
def test_samples_that_differ(tmp_path, late, message):
    content = arrays()

    def encode(indices):
        out = {name: array[indices] for name, array in content.items()}
        if 4 in indices:
            out |= late
        return {name: array for name, array in out.items() if array is not None}

    with raises(ValueError, message):
        FeatureCache.load_or_build(KEY, COUNT, encode, CacheConfig(tmp_path), chunk=2)
    segment = FeatureCache.open(KEY, CacheConfig(tmp_path)).segment
    assert (segment.census().published, segment.census().claimed) == (4, 0)


def test_ram_goes_with_its_last_user(tmp_path, ram):
    first = build(tmp_path, placement="ram")
    second = FeatureCache.open(KEY, CacheConfig(tmp_path, "ram"))
    assert first.paths[0].parent == ram
    assert not list(tmp_path.glob("*"))
    assert ram.stat().st_mode & 0o777 == 0o700
    view = second.sample(1)["labels"]
    expected = view.clone()
    first.close()
    assert second.paths[0].exists()
    del second
    assert list(ram.iterdir()) == []
    assert torch.equal(view, expected)


def test_ram_of_the_killed_is_removed(tmp_path, ram):
    pid = os.fork()
    if pid == 0:
        _cache = build(tmp_path, placement="ram")
        os._exit(0)  # not closed, as if killed
    os.waitpid(pid, 0)
    (left,) = ram.iterdir()
    with pytest.raises(FileNotFoundError):
        FeatureCache.open({"other": "key"}, CacheConfig(tmp_path))
    assert not left.exists()


def full(directory, size, remedy):
    return (
        f"[Errno {errno.ENOSPC}] feature cache: expected {size} bytes in {directory}, got ... "
        f"free; make room with `nasfast cache rm`, or give {remedy}"
    )


@pytest.mark.parametrize(
    ("placement", "remedy"), [("file", "another --cache-dir"), ("ram", "--placement file")]
)
def test_full_file_system(mount, monkeypatch, tmp_path, placement, remedy):
    """An error before anything is written; afterwards there is as much room as before."""
    directory = mount("size=256k")
    before = places.free_bytes(directory)
    if placement == "ram":
        monkeypatch.setattr(places, "ram_directory", lambda: directory)
    content = {"tap": torch.zeros(20, 1, 64, 64)}
    with raises(OSError, full(directory, 8192 + 20 * 64 * 64 * 4, remedy)):
        build(directory if placement == "file" else tmp_path, content, placement=placement)
    assert list(directory.iterdir()) == []
    assert places.free_bytes(directory) == before
    build(directory, {"tap": content["tap"][:8]})


def test_ram_that_the_machine_has_not(monkeypatch, tmp_path, ram):
    monkeypatch.setattr(places, "free_bytes", lambda directory: 4096)
    with raises(OSError, full(ram, 8192 + COUNT * 384, "--placement file")):
        build(tmp_path, placement="ram")
    assert list(ram.iterdir()) == []
    build(tmp_path)  # of a disk, reserving itself tells


def test_more_than_ram_may_hold(tmp_path, ram):
    with raises(
        ValueError,
        "memory: expected 2.0 MB for 5 samples in RAM, got 0.9 MB; raise --memory by 2 MB, or give "
        "--placement file",
    ):
        build(tmp_path, {"tap": torch.zeros(5, 1, 316, 316)}, placement="ram", memory="0.9MB")
    assert list(ram.iterdir()) == list(tmp_path.iterdir()) == []
    build(tmp_path, placement="ram", memory=f"{COUNT * (384 + 16)}B")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8GB", 8 * 10**9), ("8 gib", 8 * 2**30), ("1.5M", 1_500_000), ("512KiB", 512 * 1024),
        ("0", 0), (" 0b", 0), ("7B", 7), ("2TB", 2 * 10**12), (None, None),
    ],
)  # fmt: skip
def test_memory(text, expected):
    assert CacheConfig(memory=text).memory_bytes == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            (
                {"memory": text},
                f"memory: expected a size such as 8GB or 512MiB, got {text!r}; give a number with "
                "B, KB, MB, GB, TB, KiB, MiB, GiB or TiB",
            )
            for text in ["", "8", "0.5", "GB", "-1GB", "8 GiBs", "8iB", "1,5GB", "lots"]
        ),
        (
            {"placement": "disk"},
            "placement: expected one of auto, file, ram, device, got 'disk'",
        ),
        (
            {"storage": "int8"},
            "storage: expected one of auto, float16, bfloat16, float32, got 'int8'",
        ),
    ],
)
def test_bad_settings(settings, message):
    with raises(ValueError, message):
        CacheConfig(**settings)


def test_another_number_of_samples(tmp_path):
    path = build(tmp_path).paths[0]
    for count, message in (
        (6, f"feature cache {path}: expected 6 samples, got 5; delete it"),
        (0, "feature cache: expected at least 1 sample, got 0"),
    ):
        with raises(ValueError, message):
            FeatureCache.load_or_build(KEY, count, must_not_encode, CacheConfig(tmp_path))


def test_open_of_what_nobody_has_made(tmp_path):
    cache = build(tmp_path)
    path = cache.paths[0]
    path.unlink()
    with raises(
        FileNotFoundError,
        f"[Errno {errno.ENOENT}] feature cache: expected {path}, got no such file; "
        "FeatureCache.load_or_build makes it",
    ):
        FeatureCache.open(KEY, cache.config)


def test_the_package_offers_it():
    assert nasfast.FeatureCache is FeatureCache
    with raises(AttributeError, "module 'nasfast' has no attribute 'FeatureCash'"):
        _ = nasfast.FeatureCash


def test_fingerprint_sees_names_shapes_dtypes_and_values():
    weight = torch.arange(6.0)
    state = {"a": weight, "b": torch.tensor(1)}
    distinct = [
        state,
        {"a": weight},
        {"a": weight, "c": torch.tensor(1)},
        {"a": weight.view(2, 3), "b": torch.tensor(1)},
        {"a": weight.double(), "b": torch.tensor(1)},
        {"a": weight + 1, "b": torch.tensor(1)},
    ]
    assert len({tensors_fingerprint(s) for s in distinct}) == len(distinct)
    conv = torch.randn(2, 3, 4, 5)
    last = conv.contiguous(memory_format=torch.channels_last)
    assert tensors_fingerprint({"b": conv, "a": weight}) == tensors_fingerprint(
        {"a": weight, "b": last}
    )


def test_default_directory(monkeypatch):
    monkeypatch.setenv("NASFAST_CACHE", "~/features")
    assert default_directory() == Path.home() / "features"
    monkeypatch.delenv("NASFAST_CACHE")
    assert default_directory() == Path.home() / ".cache" / "nasfast"
