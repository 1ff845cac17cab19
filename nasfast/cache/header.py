"""What stands at the start of a cache's file. The format is in docs/feature_cache.md."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nasfast.cache.layout import STORAGES, BlockLayout, aligned, require, whole
from nasfast.ops import _native
from nasfast.utils.errors import UserError, cause, shown

MAGIC = b"NASFEATS"
VERSION = 1
STATE = struct.Struct("<QQ")  # of a sample: word, checksum
HOST = 48  # where the filling host stands
_PREFIX = struct.Struct("<8sQQQQ")  # magic, version, bytes of the JSON, table, blocks
_JSON = 128  # first byte of the JSON
_PAGE = 4096
_LONGEST = 1 << 20  # bytes of JSON; a header has a few hundred


@dataclass(frozen=True)
class Header:
    """What a segment holds."""

    key: Mapping[str, str]
    """What the samples depend on."""
    storage: str
    """How maps are stored: auto (as encoded), float16, bfloat16 or float32."""
    placement: str
    """file or ram."""
    count: int
    """Number of samples."""
    layout: BlockLayout

    def encode(self) -> tuple[bytes, int, int]:
        """The bytes before the state table; offsets of the table and of the blocks."""
        text = json.dumps(
            {
                "key": dict(self.key),
                "storage": self.storage,
                "placement": self.placement,
                "count": self.count,
                "sample_bytes": self.layout.sample_bytes,
                "arrays": self.layout.to_json(),
            }
        ).encode()
        table = aligned(_JSON + len(text), _PAGE)
        blocks = aligned(table + STATE.size * self.count, _PAGE)
        prefix = _PREFIX.pack(MAGIC, VERSION, len(text), table, blocks)
        checksum = _checksum_of(prefix + text).to_bytes(8, "little")
        return (prefix + checksum).ljust(_JSON, b"\0") + text, table, blocks

    @classmethod
    def read(cls, path: Path, file: int) -> tuple[Header, int, int]:
        """The header of a file; offsets of the table and of the blocks.

        All of it is checked here, and nothing later: a header that opens describes this file.

        Raises:
            UserError: a foreign file, another version, a kind that earlier ones wrote, a damaged
                header, fields that do not fit each other, or a truncated file.
        """
        size = os.fstat(file).st_size
        prefix = os.pread(file, _JSON, 0)
        if len(prefix) < _JSON or not prefix.startswith(MAGIC):
            raise UserError(
                f"feature cache {path}: expected a file that starts with {MAGIC!r}, got "
                f"{prefix[:8]!r}; delete it, or move it away"
            )
        _, version, length, table, blocks = _PREFIX.unpack_from(prefix)
        if version != VERSION:
            raise UserError(
                f"feature cache {path}: expected format version {VERSION}, got {version}; delete "
                "it, or use the nasfast that made it"
            )
        if length > _LONGEST:
            raise UserError(
                f"feature cache {path}: damaged header, expected at most {_LONGEST} bytes of JSON, "
                f"got {length}; delete it"
            )
        text = os.pread(file, length, _JSON)
        expected = int.from_bytes(prefix[_PREFIX.size : HOST], "little")
        got = _checksum_of(prefix[: _PREFIX.size] + text)
        if got != expected:
            raise UserError(
                f"feature cache {path}: damaged header, expected the checksum {expected:016x}, got "
                f"{got:016x}; delete it"
            )
        try:
            header = cls._from_json(text)
            require("table", aligned(_JSON + length, _PAGE), table)
            require("blocks", aligned(table + STATE.size * header.count, _PAGE), blocks)
        except UserError as error:
            raise UserError(f"feature cache {path}: {error}; delete it") from error
        end = blocks + header.count * header.layout.sample_bytes
        if size != end:
            fault = "truncated" if size < end else "too long"
            raise UserError(
                f"feature cache {path}: {fault}, expected {end} bytes, got {size}; delete it"
            )
        return header, table, blocks

    @classmethod
    def _from_json(cls, text: bytes) -> Header:
        """Raises UserError where a field is not what :meth:`encode` writes."""
        try:
            fields = json.loads(text.decode(), object_pairs_hook=_object)
        except (ValueError, RecursionError) as error:
            raise UserError(f"expected a header in JSON, got {cause(error)}") from error
        if not isinstance(fields, dict):
            raise UserError(f"expected a header of named fields, got {shown(fields)}")
        # both of earlier versions
        first, total = fields.pop("first", 0), fields.pop("total", fields.get("count"))
        names = ["arrays", "count", "key", "placement", "sample_bytes", "storage"]
        require("fields of the header", names, sorted(fields))
        count = whole("count", fields["count"], 1)
        if whole("total", total, 1) != count:
            raise UserError(
                f"expected all {total} samples in one file, got {count}, as an earlier version "
                "split them"
            )
        require("first", 0, whole("first", first, 0))
        if fields["storage"] not in STORAGES:
            raise UserError(
                f"expected maps stored as {', '.join(STORAGES)}, got {shown(fields['storage'])} of "
                "an earlier version"
            )
        if fields["placement"] not in ("file", "ram"):
            raise UserError(f"placement: expected file or ram, got {shown(fields['placement'])}")
        key = fields["key"]
        if not isinstance(key, dict) or not all(isinstance(value, str) for value in key.values()):
            raise UserError(f"key: expected texts by name, got {shown(key)}")
        layout = BlockLayout.from_json(fields["arrays"], fields["sample_bytes"], fields["storage"])
        return cls(key, fields["storage"], fields["placement"], count, layout)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two values of {shown(twice)}")
    return found


def checksum(block: Tensor, index: int) -> int:
    """XXH64 of a sample's block (uint8 ``[sample_bytes]``), with its index as the seed."""
    return int(extension().feature_cache_checksum(block.data_ptr(), block.numel(), index))


def _checksum_of(data: bytes) -> int:
    array = np.frombuffer(data, np.uint8)
    return int(extension().feature_cache_checksum(array.ctypes.data, len(data), 0))


def extension() -> Any:
    """``nasfast._C``.

    Raises:
        UserError: it cannot be imported.
    """
    if _native.C is None:
        raise UserError(
            f"feature cache: expected the compiled extension, got none: {_native.ERROR}"
        )
    return _native.C
