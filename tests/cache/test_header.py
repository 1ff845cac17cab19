"""The checksum, and what a file's header refuses."""

from __future__ import annotations

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from samples import COUNT, KEY, build, must_not_encode, raises

from nasfast.cache import CacheConfig, FeatureCache
from nasfast.cache import header as headers
from nasfast.cache.header import checksum
from nasfast.ops import _native
from nasfast.utils.errors import UserError

M = (1 << 64) - 1
P1, P2, P3, P4, P5 = (
    0b1001111000110111011110011011000110000101111010111100101010000111,
    0b1100001010110010101011100011110100100111110101001110101101001111,
    0b0001011001010110011001111011000110011110001101110111100111111001,
    0b1000010111101011110010100111011111000010101100101010111001100011,
    0b0010011111010100111010110010111100010110010101100110011111000101,
)


def rotate(value, bits):
    return (value << bits | value >> (64 - bits)) & M


def lane(value, word):
    return rotate((value + word * P2) & M, 31) * P1 & M


def xxh64(data, seed):
    """Written from the specification's text, step by step."""
    value, at = (seed + P5) & M, 0
    if len(data) >= 32:
        lanes = [(seed + P1 + P2) & M, (seed + P2) & M, seed, (seed - P1) & M]
        while len(data) - at >= 32:
            for i in range(4):
                word = int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little")
                lanes[i] = lane(lanes[i], word)
            at += 32
        value = sum(rotate(x, bits) for x, bits in zip(lanes, (1, 7, 12, 18))) & M
        for x in lanes:
            value = ((value ^ lane(0, x)) * P1 + P4) & M
    value = (value + len(data)) & M
    while len(data) - at >= 8:
        value ^= lane(0, int.from_bytes(data[at : at + 8], "little"))
        value, at = (rotate(value, 27) * P1 + P4) & M, at + 8
    if len(data) - at >= 4:
        value ^= int.from_bytes(data[at : at + 4], "little") * P1 & M
        value, at = (rotate(value, 23) * P2 + P3) & M, at + 4
    for byte in data[at:]:
        value = rotate(value ^ byte * P5 & M, 11) * P1 & M
    value = (value ^ value >> 33) * P2 & M
    value = (value ^ value >> 29) * P3 & M
    return value ^ value >> 32


def block(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("text", "seed", "expected"),
    [
        (b"", 0, 0xEF46DB3751D8E999),
        (b"a", 0, 0xD24EC4F1A98C6E5B),
        (b"abc", 0, 0x44BC2CF5AD770999),
        (b"Nobody inspects the spammish repetition", 0, 0xFBCEA83C8A378BF1),
        (b"xxhash", 20141025, 13067679811253438005),
    ],
)
def test_published_checksums(text, seed, expected):
    assert xxh64(text, seed) == expected
    assert checksum(block(text), seed) == expected


@given(st.binary(max_size=200), st.integers(0, M))
def test_checksum(data, seed):
    assert checksum(block(data), seed) == xxh64(data, seed)


def refuses(path, message):
    """Neither opened nor filled, and left as it is."""
    before, config = path.read_bytes(), CacheConfig(path.parent)
    with raises(ValueError, f"feature cache {path}: {message}"):
        FeatureCache.open(KEY, config)
    with raises(ValueError, f"feature cache {path}: {message}"):
        FeatureCache.load_or_build(KEY, COUNT, must_not_encode, config)
    assert path.read_bytes() == before


def change(path, at, value):
    with path.open("r+b") as file:
        file.seek(at)
        file.write(value)


@pytest.fixture
def path(tmp_path):
    cache = build(tmp_path)
    cache.close()
    return cache.paths[0]


def test_foreign_file(path):
    for content in (b"", b"NASFEATS", b"PK\x03\x04" + bytes(200)):
        path.write_bytes(content)
        refuses(
            path,
            f"expected a file that starts with b'NASFEATS', got {content[:8]!r}; delete it, or "
            "move it away",
        )


def test_another_version(path):
    change(path, 8, b"\x02")
    refuses(path, "expected format version 1, got 2; delete it, or use the nasfast that made it")


@pytest.mark.parametrize("at", [17, 30, 33, 42, 130, 200])
def test_a_flipped_byte_in_the_header(path, at):
    change(path, at, bytes([path.read_bytes()[at] ^ 4]))
    refuses(path, "damaged header, expected the checksum ..., got ...; delete it")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"first": 0, "total": 9},
            "expected all 9 samples in one file, got 5, as an earlier version split them; delete "
            "it",
        ),
        (
            {"storage": "int8"},
            "expected maps stored as auto, float16, bfloat16, float32, got 'int8' of an "
            "earlier version; delete it",
        ),
    ],
)
def test_kinds_of_earlier_versions(path, fields, message):
    rewrite(path, fields)
    refuses(path, message)


TAP = {"name": "tap0", "dtype": "float16", "shape": [7, 4, 3], "offset": 0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"count": True}, "count: expected a whole number from 1 on, got True"),
        ({"count": 5.0}, "count: expected a whole number from 1 on, got 5.0"),
        ({"count": 0}, "count: expected a whole number from 1 on, got 0"),
        (
            {"count": 1 << 63, "total": 1 << 63},
            "count: expected a whole number from 1 on, got 9223372036854775808",
        ),
        ({"count": 300}, "blocks: expected 12288, got 8192"),
        ({"first": 1000, "total": 5}, "first: expected 0, got 1000"),
        ({"placement": "cloud"}, "placement: expected file or ram, got 'cloud'"),
        ({"key": {"a": 1}}, "key: expected texts by name, got {'a': 1}"),
        ({"key": "abc"}, "key: expected texts by name, got 'abc'"),
        (
            {"more": 1},
            "fields of the header: expected ['arrays', 'count', 'key', 'placement', "
            "'sample_bytes', 'storage'], got ['arrays', 'count', 'key', 'more', 'placement', "
            "'sample_bytes', ...]",
        ),
        ({"sample_bytes": 0}, "sample_bytes: expected a whole number from 64 on, got 0"),
        ({"sample_bytes": 448}, "sample_bytes: expected 384, got 448"),
        ({"storage": "float32"}, "dtype of 'tap0': expected float32, got 'float16'"),
        ({"arrays": []}, "arrays: expected a list of them, got []"),
        ({"arrays": [[]]}, "arrays: expected dtype, name, offset, shape of each, got []"),
        ({"arrays": [TAP | {"name": 3}]}, "name: expected a text, got 3"),
        (
            {"arrays": [TAP | {"dtype": "int8"}]},
            "dtype of 'tap0': expected one of uint8, float16, bfloat16, float32, int16, int32, "
            "int64, got 'int8'",
        ),
        (
            {"arrays": [TAP | {"shape": [1, 1, 1, 1]}]},
            "shape of 'tap0': expected at most three sides, got [1, 1, 1, 1]",
        ),
        (
            {"arrays": [TAP | {"shape": [-1]}]},
            "shape of 'tap0': expected a whole number from 0 on, got -1",
        ),
        ({"arrays": [TAP | {"offset": 64}]}, "offset of 'tap0': expected 0, got 64"),
        (
            {"arrays": [TAP, TAP | {"offset": 192}]},
            "arrays: expected one of a name, got two of 'tap0'",
        ),
    ],
)
def test_fields_that_do_not_fit(path, fields, message):
    rewrite(path, fields)
    refuses(path, f"{message}; delete it")


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (16, 1 << 62, "damaged header, expected at most 1048576 bytes of JSON, got ...; delete it"),
        (24, 0, "table: expected 4096, got 0; delete it"),
        (32, 1 << 63, "blocks: expected 8192, got 9223372036854775808; delete it"),
    ],
)
def test_a_table_or_blocks_elsewhere(path, at, value, message):
    change(path, at, value.to_bytes(8, "little"))
    if at > 16:
        rewrite(path, {})
    refuses(path, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"[" * 5000, "expected a header in JSON, got maximum recursion depth exceeded..."),
        (b'{"a": 1, "a": 2}', "expected a header in JSON, got two values of 'a'"),
        (b"NaN", "expected a header of named fields, got nan"),
        (b"\xff", "expected a header in JSON, got 'utf-8' codec can't decode ..."),
    ],
)
def test_no_object_of_fields(path, text, message):
    write(path, text)
    refuses(path, f"{message}; delete it")


def test_a_longer_file(path):
    size = path.stat().st_size
    os.truncate(path, size + 1)
    refuses(path, f"too long, expected {size} bytes, got {size + 1}; delete it")


def test_a_file_of_an_earlier_version(path):
    rewrite(path, {"first": 0, "total": COUNT})
    assert FeatureCache.open(KEY, CacheConfig(path.parent)).verify() == []


def rewrite(path, fields):
    """The same file with other fields in the header."""
    data = path.read_bytes()
    length = int.from_bytes(data[16:24], "little")
    write(path, json.dumps(json.loads(data[128 : 128 + length]) | fields).encode())


def write(path, text):
    """The same file with another header."""
    data = path.read_bytes()
    prefix = data[:16] + len(text).to_bytes(8, "little") + data[24:40]
    change(path, 0, prefix + xxh64(prefix + text, 0).to_bytes(8, "little"))
    change(path, 128, text)


def test_truncated(path):
    size = path.stat().st_size
    for short in (size - 1, 8192):
        os.truncate(path, short)
        refuses(path, f"truncated, expected {size} bytes, got {short}; delete it")


def test_truncated_in_the_header(path):
    os.truncate(path, 160)
    refuses(path, "damaged header, expected the checksum ..., got ...; delete it")


def test_another_key(path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nasfast.cache.feature_cache._path", lambda key, config: path)
        with raises(
            ValueError,
            f"feature cache {path}: made for encoder='abc', data=nothing, expected encoder='def', "
            "data='x'; delete it",
        ):
            FeatureCache.open(KEY | {"encoder": "def", "data": "x"}, CacheConfig(path.parent))


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(_native, "C", None)
    monkeypatch.setattr(_native, "ERROR", "the reason")
    with raises(
        UserError, ("feature cache: expected the compiled extension, got none: the reason")
    ):
        headers.extension()
