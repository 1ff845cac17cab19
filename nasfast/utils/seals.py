"""Checksums within the files of runs and models: what damage made of a file is not taken for what
was written, as a reward with another digit would be.

They are of the content, not of its form: spaces and the order of keys may change. Files that have
none, of earlier versions or written by hand, are read as they are.
"""

from __future__ import annotations

import json
import tomllib
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from safetensors.torch import save
from torch import Tensor

from nasfast.utils.errors import UserError
from nasfast.utils.files import read_object, read_toml
from nasfast.utils.tensors import raw_bytes

__all__ = [
    "CHECKSUM",
    "packed",
    "read_sealed",
    "read_sealed_toml",
    "require_seal",
    "require_tensors",
    "sealed",
    "sealed_json",
    "sealed_toml",
    "unsealed",
]

CHECKSUM = "checksum"
"""Key of the checksum in JSON and TOML."""
METADATA = "nasfast.checksum"
"""Key of the checksum in the metadata of a file of tensors."""


def sealed(form: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the checksum of what it holds."""
    return {**form, CHECKSUM: _sum(json.loads(json.dumps(form)))}


def sealed_json(form: Mapping[str, Any]) -> str:
    """Text of a file: an object with its checksum."""
    return json.dumps(sealed(form), indent=2) + "\n"


def sealed_toml(form: Mapping[str, Any]) -> str:
    """Text of a TOML file with its checksum, which comes first."""
    return tomli_w.dumps({CHECKSUM: _sum(tomllib.loads(tomli_w.dumps(form))), **form})


def unsealed(form: Mapping[str, Any], where: Path | str) -> dict[str, Any]:
    """What `sealed` was given.

    Args:
        form: that was read.
        where: it stands, for the error.

    Raises:
        UserError: it holds something else than what was written.
    """
    content = {name: value for name, value in form.items() if name != CHECKSUM}
    if CHECKSUM in form:
        require_seal(
            form[CHECKSUM], _sum(content), where, "remove its checksum where it was edited"
        )
    return content


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a JSON file; UserError where it is none, or not what nasfast wrote."""
    return unsealed(read_object(path), path)


def read_sealed_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file, likewise."""
    return unsealed(read_toml(path), path)


def require_seal(written: object, found: str, where: Path | str, remedy: str) -> None:
    """Raise UserError where two checksums differ."""
    if written != found:
        raise UserError(
            f"{where}: expected what nasfast wrote, with the checksum {str(written)[:16]}, got "
            f"other content, of {found}: it is damaged or was edited; restore it from a copy, or "
            f"{remedy}"
        )


def packed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with a checksum of tensors and metadata; the same bytes for the same."""
    data = save(dict(tensors), {**metadata, METADATA: _sum_of_tensors(tensors, metadata)})
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:begin])
    # the library writes metadata in an order that differs from process to process
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[begin:]


def require_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The metadata without the checksum of `packed`; UserError where it is of other content."""
    others = {name: text for name, text in metadata.items() if name != METADATA}
    if METADATA in metadata:
        found = _sum_of_tensors(tensors, others)
        require_seal(metadata[METADATA], found, f"weights: {path}", "train again")
    return others


def _sum(content: object) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return f"{zlib.crc32(text.encode()):08x}"


def _sum_of_tensors(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    value = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        described = f"\n{name} {tensor.dtype} {list(tensor.shape)}\n"
        value = zlib.crc32(raw_bytes(tensor), zlib.crc32(described.encode(), value))
    return f"{value:08x}"
