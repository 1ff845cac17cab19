import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nasfast
from nasfast.cache import FeatureCache, default_directory, tensors_fingerprint

KEY = {"encoder": "abc", "dtype": "float16"}
COUNT = 5


def arrays(dtype=torch.float16):
    return {
        "tap0": torch.randn(COUNT, 3, 7, 4).to(dtype),
        "tap1": torch.randn(COUNT, 8, 2, 1).to(dtype),
        "labels": torch.randint(0, 256, (COUNT, 9, 11), dtype=torch.uint8),
    }


def batches(content, sizes=(2, 2, 1)):
    start = 0
    for size in sizes:
        yield {name: array[start : start + size] for name, array in content.items()}
        start += size


def build(directory, content=None, key=KEY, count=COUNT):
    content = content or arrays()
    return FeatureCache.load_or_build(directory, key, count, lambda: batches(content))


def must_not_build():
    raise AssertionError("built again")


def parse(path):
    """An independent reader of the documented format."""
    data = path.read_bytes()
    assert data[:8] == b"NASFAST1"
    length = int.from_bytes(data[8:16], "little")
    header = json.loads(data[16 : 16 + length])
    first = -(-(16 + length) // 4096) * 4096
    out = {}
    for array in header["arrays"]:
        start, count = first + array["offset"], math.prod(array["shape"]) * header["count"]
        assert start % 4096 == 0
        dtype = {"uint8": np.uint8, "float16": np.float16, "bfloat16": np.uint16}[array["dtype"]]
        values = np.frombuffer(data, dtype, count, start)
        out[array["name"]] = values.reshape(header["count"], *array["shape"])
    return header, out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    content = arrays(dtype)
    cache = build(tmp_path / "made", content)
    assert cache.count == COUNT
    for indices in ([0, 1, 2, 3, 4], [4, 0, 4], [2]):
        read = cache.batch(torch.tensor(indices))
        assert list(read) == list(content)
        for name, array in content.items():
            assert read[name].dtype == array.dtype
            assert torch.equal(read[name], array[indices])


def test_batches_are_channels_last(tmp_path):
    read = build(tmp_path).batch(torch.tensor([3, 1]))
    assert read["tap0"].shape == (2, 3, 7, 4)
    assert read["tap0"].is_contiguous(memory_format=torch.channels_last)
    assert read["labels"].is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_documented_format(tmp_path, dtype):
    content = arrays(dtype)
    header, read = parse(build(tmp_path, content).path)
    assert header["version"] == 1
    assert header["key"] == KEY
    assert header["count"] == COUNT
    assert list(read) == list(content)
    assert np.array_equal(read["labels"], content["labels"].numpy())
    for name in ("tap0", "tap1"):
        values = torch.from_numpy(read[name].copy()).view(dtype)
        assert torch.equal(values, content[name].permute(0, 2, 3, 1))


def test_reuse_does_not_build_again(tmp_path):
    first = build(tmp_path)
    again = FeatureCache.load_or_build(tmp_path, dict(reversed(KEY.items())), 5, must_not_build)
    assert again.path == first.path
    assert torch.equal(
        again.batch(torch.tensor([1]))["tap0"], first.batch(torch.tensor([1]))["tap0"]
    )


def test_each_key_has_its_file(tmp_path):
    paths = {build(tmp_path, key=KEY | {"data": data}).path for data in ("a", "b")}
    assert set(tmp_path.iterdir()) == paths
    assert len(paths) == 2


def test_what_is_read_may_be_written_without_touching_the_file(tmp_path):
    cache = build(tmp_path)
    before = cache.path.read_bytes()
    cache.batch(torch.tensor([0]))["tap0"].zero_()
    assert cache.path.read_bytes() == before


def test_to_cpu_is_the_map_itself(tmp_path):
    cache = build(tmp_path)
    assert cache.to(torch.device("cpu")) is cache


def test_a_batch_moves_its_indices_once(tmp_path):
    class Indices:
        moves = 0

        def to(self, device, non_blocking):
            self.moves += 1
            return torch.tensor([1, 3])

    indices = Indices()
    assert len(build(tmp_path).batch(indices)["labels"]) == 2
    assert indices.moves == 1


@pytest.mark.cuda
def test_to_cuda(tmp_path):
    content = arrays()
    read = build(tmp_path, content).to(torch.device("cuda")).batch(torch.tensor([2, 0]))
    assert read["tap0"].is_cuda
    assert torch.equal(read["tap0"].cpu(), content["tap0"][[2, 0]])


def raises(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}$")


def test_another_key(tmp_path):
    path = build(tmp_path).path
    other = KEY | {"encoder": "def"}
    with raises(ValueError, f"feature cache {path}: made for {KEY}, wanted {other}; delete it"):
        FeatureCache.open(path, other)


def test_truncated(tmp_path):
    path = build(tmp_path).path
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with raises(
        ValueError,
        f"feature cache {path}: truncated, array labels ends at byte {size} of {size - 1}; "
        "delete it",
    ):
        FeatureCache.load_or_build(tmp_path, KEY, COUNT, must_not_build)


def test_truncated_in_the_header(tmp_path):
    path = build(tmp_path).path
    os.truncate(path, 40)
    with raises(ValueError, f"feature cache {path}: broken header; delete it"):
        FeatureCache.open(path, KEY)


@pytest.mark.parametrize("content", [b"", b"NASFAST1", b"PK\x03\x04 some archive of more bytes"])
def test_foreign_file(tmp_path, content):
    path = tmp_path / "x.features"
    path.write_bytes(content)
    with raises(
        ValueError,
        f"feature cache {path}: wanted a file that starts with b'NASFAST1', got {content[:8]!r}; "
        "delete it",
    ):
        FeatureCache.open(path, KEY)


@pytest.mark.parametrize(("count", "message"), [(6, "wanted 6"), (4, "wanted 4")])
def test_wrong_number_of_samples(tmp_path, count, message):
    with raises(ValueError, f"feature cache: {message} samples, got 5"):
        build(tmp_path, count=count)
    assert list(tmp_path.iterdir()) == []


def test_no_samples(tmp_path):
    with raises(ValueError, "feature cache: wanted 5 samples, got 0"):
        FeatureCache.load_or_build(tmp_path, KEY, 5, list)
    assert list(tmp_path.iterdir()) == []


def test_samples_of_another_size(tmp_path):
    content = arrays()
    parts = list(batches(content, (3, 2)))
    parts[1]["labels"] = torch.zeros(2, 11, 9, dtype=torch.uint8)
    with raises(
        ValueError,
        "feature cache: wanted samples of labels as uint8 [9, 11], got uint8 [11, 9]; "
        "crop all images to one size",
    ):
        FeatureCache.load_or_build(tmp_path, KEY, COUNT, lambda: parts)
    assert list(tmp_path.iterdir()) == []


def test_unknown_dtype(tmp_path):
    with raises(
        ValueError,
        "feature cache: wanted labels as one of uint8, float16, bfloat16, got int64; convert it",
    ):
        build(tmp_path, arrays() | {"labels": torch.zeros(COUNT, 2, 2, dtype=torch.int64)})


def test_a_crash_leaves_no_file(tmp_path):
    def crash():
        yield from batches(arrays(), (2,))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        FeatureCache.load_or_build(tmp_path, KEY, COUNT, crash)
    assert list(tmp_path.iterdir()) == []


def test_a_fill_removes_what_a_killed_one_left_and_no_more(tmp_path):
    code = (
        "import sys, time, torch\n"
        "from pathlib import Path\n"
        "from nasfast.cache import FeatureCache\n"
        "def batches():\n"
        "    yield {'labels': torch.zeros(2, 3, 3, dtype=torch.uint8)}\n"
        "    print('filling', flush=True)\n"
        "    time.sleep(60)\n"
        "FeatureCache.load_or_build(Path(sys.argv[1]), {'data': 'x'}, 4, batches)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(nasfast.__file__).parents[1])},
    )
    try:
        assert process.stdout.readline() == "filling\n"
        build(tmp_path)  # the other one lives: its file stays
        (unfinished,) = tmp_path.glob(".*.tmp")
        assert unfinished.name.endswith(f".features.{process.pid}.tmp")
    finally:
        process.kill()
        process.communicate()
    assert unfinished.exists()
    build(tmp_path)  # an existing cache is opened, nothing is filled
    assert unfinished.exists()
    cache = build(tmp_path, key={"encoder": "other"})
    assert not unfinished.exists()
    assert len(list(tmp_path.iterdir())) == 2
    assert cache.path.exists()


def test_full_disk_is_an_error(tmp_path, monkeypatch):
    def full(descriptor, offset, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


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
