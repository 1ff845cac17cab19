"""How the arrays of a sample lie in its block, and how encoded features become blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from nasfast.ops import Field
from nasfast.utils.errors import UserError, shown

ALIGN = 64  # bytes: blocks and arrays start at multiples, for whole vector and cache-line loads

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.uint8, torch.float16, torch.bfloat16, torch.float32),
        *(torch.int16, torch.int32, torch.int64),
    )
}
STORAGES = ("auto", "float16", "bfloat16", "float32")


def aligned(offset: int, to: int = ALIGN) -> int:
    """The next multiple of ``to``."""
    return -(-offset // to) * to


def dtype_name(dtype: torch.dtype) -> str:
    """As in the header: "float16"."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ArraySpec:
    """One array of a sample."""

    name: str
    dtype: torch.dtype
    """As stored."""
    shape: tuple[int, ...]
    """Of one sample: maps ``[H, W, C]``, labels ``[H, W]``."""
    offset: int
    """First byte in the block."""

    @classmethod
    def from_json(cls, fields: object) -> Self:
        """The array that a header describes.

        Raises:
            UserError: it is none.
        """
        names = ["dtype", "name", "offset", "shape"]
        if not isinstance(fields, dict) or sorted(fields) != names:
            raise UserError(f"arrays: expected {', '.join(names)} of each, got {shown(fields)}")
        name, dtype, shape = fields["name"], fields["dtype"], fields["shape"]
        if not isinstance(name, str):
            raise UserError(f"name: expected a text, got {shown(name)}")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise UserError(f"dtype of {shown(name)}: expected one of {known}, got {shown(dtype)}")
        if not isinstance(shape, list) or len(shape) > 3:
            text = f"expected at most three sides, got {shown(shape)}"
            raise UserError(f"shape of {shown(name)}: {text}")
        sides = tuple(whole(f"shape of {shown(name)}", side, 0) for side in shape)
        return cls(name, DTYPES[dtype], sides, whole("offset", fields["offset"], 0))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_map(self) -> bool:
        return len(self.shape) == 3

    @property
    def raw(self) -> bool:
        """Whether batches are gathered as bytes: the kernels know integers of one byte alone."""
        return self.dtype in (torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class BlockLayout:
    """The arrays of a sample's block, in order."""

    arrays: tuple[ArraySpec, ...]
    sample_bytes: int
    """Bytes of a block, a multiple of 64; what no array fills is zero."""

    @cached_property
    def fields(self) -> list[Field]:
        """The arrays as :func:`nasfast.ops.gather_fields` takes them."""
        return [
            Field(spec.offset, (spec.nbytes,), torch.uint8)
            if spec.raw
            else Field(spec.offset, spec.shape, spec.dtype)
            for spec in self.arrays
        ]

    def view(self, data: Tensor, spec: ArraySpec) -> Tensor:
        """An array of all samples of ``data`` (uint8 ``[n, sample_bytes]``), zero-copy."""
        raw = data[:, spec.offset : spec.offset + spec.nbytes]
        return raw.view(spec.dtype).view(len(data), *spec.shape)

    @classmethod
    def of(cls, rows: Mapping[str, Tensor]) -> Self:
        """The layout of what :func:`stored` returns."""
        specs, end = [], 0
        for name, array in rows.items():
            spec = ArraySpec(name, array.dtype, tuple(array.shape[1:]), end)
            specs.append(spec)
            end = aligned(end + spec.nbytes)
        if end == 0:
            raise ValueError(f"feature cache: expected values in {', '.join(rows)}, got none")
        return cls(tuple(specs), end)

    def pack(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Blocks, uint8 ``[n, sample_bytes]``, of what :func:`stored` returns.

        Raises:
            UserError: other types or shapes than the layout's.
            ValueError: other arrays.
        """
        names = [spec.name for spec in self.arrays]
        if list(rows) != names:
            raise ValueError(
                f"feature cache: expected the arrays {', '.join(names)} of each sample, got "
                f"{', '.join(rows)}; encode the same for all"
            )
        n = len(next(iter(rows.values())))
        blocks = torch.zeros(n, self.sample_bytes, dtype=torch.uint8)
        for spec in self.arrays:
            array = rows[spec.name]
            if (array.dtype, tuple(array.shape[1:])) != (spec.dtype, spec.shape):
                raise UserError(
                    f"feature cache: expected samples of {spec.name} as {dtype_name(spec.dtype)} "
                    f"{list(spec.shape)}, got {dtype_name(array.dtype)} {list(array.shape[1:])}; "
                    "crop all images to one size"
                )
            self.view(blocks, spec).copy_(array)
        return blocks

    def to_json(self) -> list[dict[str, Any]]:
        return [
            {
                "name": spec.name,
                "dtype": dtype_name(spec.dtype),
                "shape": list(spec.shape),
                "offset": spec.offset,
            }
            for spec in self.arrays
        ]

    @classmethod
    def from_json(cls, arrays: object, sample_bytes: object, storage: str) -> Self:
        """The layout that a header describes.

        Raises:
            UserError: it is none that :meth:`of` gives.
        """
        if not isinstance(arrays, list) or not arrays:
            raise UserError(f"arrays: expected a list of them, got {shown(arrays)}")
        specs: list[ArraySpec] = []
        end = 0
        for found in arrays:
            spec = ArraySpec.from_json(found)
            require(f"offset of {shown(spec.name)}", end, spec.offset)
            if spec.name in [other.name for other in specs]:
                raise UserError(f"arrays: expected one of a name, got two of {shown(spec.name)}")
            if spec.is_map and spec.dtype.is_floating_point and storage != "auto":
                require(f"dtype of {shown(spec.name)}", storage, dtype_name(spec.dtype))
            specs.append(spec)
            end = aligned(end + spec.nbytes)
        require("sample_bytes", end, whole("sample_bytes", sample_bytes, ALIGN))
        return cls(tuple(specs), end)


def whole(name: str, value: object, least: int) -> int:
    """A whole number of a header that a file can have: below 2^63. True and 1.0 are none."""
    if type(value) is not int or not least <= value < 1 << 63:
        raise UserError(f"{name}: expected a whole number from {least} on, got {shown(value)}")
    return value


def require(name: str, expected: object, got: object) -> None:
    """Raises UserError where a value of a header is not what the others ask for."""
    if got != expected:
        raise UserError(f"{name}: expected {expected}, got {shown(got)}")


def stored(arrays: Mapping[str, Tensor], n: int, storage: str) -> dict[str, Tensor]:
    """What is kept of n encoded samples: maps channels-last, in the type of ``storage``.

    Raises:
        ValueError: no arrays, another number of samples, or a type or a number of dimensions that
            cannot be stored.
    """
    if not arrays:
        raise ValueError("feature cache: expected named arrays of the samples, got none")
    rows: dict[str, Tensor] = {}
    for name, array in arrays.items():
        if not 1 <= array.dim() <= 4:
            raise ValueError(
                f"feature cache: expected {name} as maps [n, C, H, W] or labels [n, H, W], got "
                f"{list(array.shape)}"
            )
        if len(array) != n:
            raise ValueError(f"feature cache: expected {n} samples of {name}, got {len(array)}")
        array = array.detach()
        if array.dim() == 4:
            array = array.permute(0, 2, 3, 1)
            if storage != "auto" and array.is_floating_point():
                array = array.to(DTYPES[storage])
        if array.dtype not in DTYPES.values():
            raise ValueError(
                f"feature cache: expected {name} as one of {', '.join(DTYPES)}, got "
                f"{dtype_name(array.dtype)}; convert it"
            )
        rows[name] = array
    return rows
