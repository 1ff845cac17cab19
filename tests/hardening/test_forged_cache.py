"""A cache's file that somebody has forged, or that is damaged: it opens with the data that it had,
or says in one line that it does not; it is never changed."""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nasfast.cache import CacheConfig, FeatureCache
from nasfast.cache.header import _checksum_of
from nasfast.cache.segment import Segment
from nasfast.commands.cache import main
from nasfast.utils.errors import UserError

KEY, COUNT = {"encoder": "abc"}, 5
EXTREMES = [
    *(
        sign * (1 << bits) + off
        for bits in (0, 7, 12, 31, 32, 62, 63, 64)
        for off in (-1, 0, 1)
        for sign in (1, -1)
    ),
    10**30,
]
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(EXTREMES),
        st.integers(-5, 5000),
        st.floats(),
        st.text(max_size=5),
        st.sampled_from(["ram", "file", "auto", "float16", "float32", "int8", "int64", "tap"]),
    ),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a whole cache."""
    torch.manual_seed(0)
    content = {"tap": torch.randn(COUNT, 3, 7, 4).half(), "labels": torch.randint(0, 9, (COUNT, 3))}
    directory = tmp_path_factory.mktemp("original")
    cache = FeatureCache.load_or_build(
        KEY,
        COUNT,
        lambda rows: {name: array[rows] for name, array in content.items()},
        CacheConfig(directory),
    )
    cache.close()
    return cache.paths[0].read_bytes()


@pytest.fixture(scope="module")
def path(original: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where forged files are written."""
    directory = tmp_path_factory.mktemp("forged")
    FeatureCache.load_or_build(
        KEY, 1, lambda rows: {"tap": torch.zeros(1, 1)}, CacheConfig(directory)
    ).close()
    return next(directory.iterdir())


def parts(data: bytes) -> tuple[list[int], dict[str, Any]]:
    """Version, length of the JSON, table and blocks; the JSON."""
    prefix = list(struct.unpack_from("<QQQQ", data, 8))
    return prefix, json.loads(data[128 : 128 + prefix[1]])


def forged(data: bytes, prefix: list[int], text: bytes) -> bytes:
    """The file with another header, whose checksum is right."""
    head = b"NASFEATS" + struct.pack("<QQQQ", *prefix)
    head += _checksum_of(head + text).to_bytes(8, "little") + data[48:128]
    return head + text + data[128 + len(text) :]


@contextmanager
def little_memory() -> Iterator[None]:
    """A large allocation fails."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def holds(path: Path, data: bytes, original: bytes, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the file opens, and then with the original's samples; it is as it was in any case."""
    path.write_bytes(data)
    opened = False
    with little_memory():
        try:
            segment = Segment.open(path)
        except UserError as error:
            text = str(error)
            assert text.startswith(f"feature cache {path}: ")
            assert "\n" not in text
            assert len(text) < 1000
        else:
            opened = True
            assert segment.data.numpy().tobytes() == original[-segment.data.nbytes :]
            assert segment.count == COUNT
            for spec in segment.header.layout.arrays:
                segment.header.layout.view(segment.data, spec)
            assert segment.verify() == []
            segment.close()
        assert main(["ls", "--cache-dir", str(path.parent)]) == 0
        assert main(["verify", "--repair", str(path)]) == (0 if opened else 1)
        capsys.readouterr()
    assert path.read_bytes() == data
    return opened


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The ways to all values of a JSON object."""
    if where:
        yield where
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*where, key))


def test_any_field_of_a_forged_header(
    original: bytes, path: Path, capsys: pytest.CaptureFixture[str], nightly: bool
) -> None:
    prefix, fields = parts(original)
    every, seen = list(places(fields)), []

    @settings(
        max_examples=5_000 if nightly else 150,
        suppress_health_check=list(HealthCheck),
        derandomize=not nightly,
    )
    @given(st.sampled_from(every), VALUES)
    def check(where: tuple[Any, ...], value: Any) -> None:
        changed = json.loads(json.dumps(fields))
        inner = changed
        for key in where[:-1]:
            inner = inner[key]
        inner[where[-1]] = value
        text = json.dumps(changed).encode()
        data = forged(original, [prefix[0], len(text), *prefix[2:]], text)
        seen.append(holds(path, data, original, capsys))

    check()
    assert True in seen
    assert False in seen


def test_any_number_of_a_forged_prefix(
    original: bytes, path: Path, capsys: pytest.CaptureFixture[str], nightly: bool
) -> None:
    prefix, fields = parts(original)
    text = original[128 : 128 + prefix[1]]
    numbers = [n % (1 << 64) for n in EXTREMES] + [0, 1, 4095, 4096, 8191, 8192, len(original)]
    for at in range(4):
        for number in numbers if nightly else random.Random(0).sample(numbers, 12):
            changed = [*prefix[:at], number, *prefix[at + 1 :]]
            same = changed == prefix
            assert holds(path, forged(original, changed, text), original, capsys) == same
    assert fields["count"] == COUNT


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"[" * 100_000, id="nested"),
        pytest.param(b'{"count":' * 50_000, id="objects"),
        pytest.param(b"9" * 5000, id="digits"),
        pytest.param(b"\xff\xfe{\x00}\x00", id="utf-16"),
        pytest.param(b"NaN", id="nan"),
        pytest.param(b"[5]", id="list"),
        pytest.param(b"", id="empty"),
        pytest.param(b'{"count": 5, "count": 5}', id="twice"),
    ],
)
def test_a_header_that_is_no_object_of_fields(
    original: bytes, path: Path, capsys: pytest.CaptureFixture[str], text: bytes
) -> None:
    prefix, _ = parts(original)
    data = forged(original, [prefix[0], len(text), *prefix[2:]], text)
    assert not holds(path, data, original, capsys)


@pytest.mark.parametrize("field", ["key", "arrays"])
def test_words_that_a_terminal_would_obey_are_shown_as_escapes(
    original: bytes, path: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    prefix, fields = parts(original)
    evil = "\x1b[2J\n\ud800"
    if field == "key":
        fields["key"] = {evil: evil}
    else:
        fields["arrays"][0]["name"] = evil
        fields["arrays"][0]["dtype"] = "none"
    text = json.dumps(fields).encode()
    path.write_bytes(forged(original, [prefix[0], len(text), *prefix[2:]], text))
    assert main(["ls", "--cache-dir", str(path.parent)]) == 0
    out = capsys.readouterr().out
    assert r"\x1b[2J\n\ud800" in out
    out.encode()
    assert "\x1b" not in out


def test_random_damage(original: bytes, path: Path, nightly: bool) -> None:
    """Flips, cuts, swaps and insertions: every sample that is served is the one that was there."""
    seed = random.SystemRandom().randrange(10**6) if nightly else 0
    print(f"seed {seed}", file=sys.stderr)
    chance = random.Random(seed)
    size = (len(original) - parts(original)[0][3]) // COUNT
    first = len(original) - COUNT * size
    cases, refused = 2000 if nightly else 100, 0
    for _ in range(cases):
        data = bytearray(original)
        match chance.randrange(4):
            case 0:
                for _ in range(chance.randint(1, 4)):
                    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            case 1:
                del data[chance.randrange(len(data)) :]
            case 2:
                a, b, n = (chance.randrange(len(data) - 600) for _ in range(3))
                n %= 600
                data[a : a + n], data[b : b + n] = data[b : b + n], data[a : a + n]
            case 3:
                at = chance.randrange(len(data))
                data[at:at] = chance.randbytes(chance.randint(1, 64))
        path.write_bytes(data)
        try:
            segment = Segment.open(path)
        except UserError:
            refused += 1
            continue
        for row in range(COUNT):
            try:
                segment.check(torch.tensor([row]))
            except (UserError, RuntimeError):
                continue
            truth = original[first + row * size : first + (row + 1) * size]
            assert segment.data[row].numpy().tobytes() == truth
        segment.close()
    assert cases / 10 < refused < cases
