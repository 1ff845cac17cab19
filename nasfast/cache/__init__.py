"""Features of a frozen encoder, computed once and read back through a memory map.

File format (version 1, little endian): the magic ``NASFAST1``, the length of the header as
uint64, a JSON header, then one block per array at a multiple of 4096 bytes. The header holds the
key (what the features depend on), the number of samples, and per array its name, dtype, per-sample
shape and offset (from the first block). Maps are stored channels-last: ``[count, H, W, C]``.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nasfast.files import atomic_file, remove_stale

_MAGIC = b"NASFAST1"
_ALIGN = 4096
_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _nbytes(spec: Mapping[str, Any], count: int) -> int:
    item = torch.empty(0, dtype=_DTYPES[spec["dtype"]]).element_size()
    return count * int(np.prod(spec["shape"])) * item


def _layout(count: int, first: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """Per array its name, dtype, per-sample shape and offset behind the header."""
    names = {dtype: name for name, dtype in _DTYPES.items()}
    arrays: list[dict[str, Any]] = []
    end = 0
    for name, batch in first.items():
        if batch.dtype not in names:
            raise ValueError(
                f"feature cache: wanted {name} as one of {', '.join(_DTYPES)}, "
                f"got {_text(batch.dtype)}; convert it"
            )
        shape = list(_channels_last(batch)[0].shape)
        spec = {"name": name, "dtype": names[batch.dtype], "shape": shape, "offset": end}
        arrays.append(spec)
        end = _aligned(end + _nbytes(spec, count))
    return arrays


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _channels_last(batch: Tensor) -> Tensor:
    """``[n, C, H, W]`` to ``[n, H, W, C]``; labels ``[n, H, W]`` stay."""
    return batch.permute(0, 2, 3, 1) if batch.dim() == 4 else batch


class FeatureCache:
    """Read-only samples of named arrays; build with :meth:`load_or_build`.

    Attributes:
        count: number of samples.
        path: the file behind the cache.
        device: where the arrays are.
    """

    def __init__(self, path: Path, count: int, arrays: dict[str, Tensor]) -> None:
        self.path = path
        self.count = count
        self._arrays = arrays  # name -> [count, H, W, C] or [count, H, W]
        self.device = next(iter(arrays.values())).device

    def to(self, device: torch.device) -> FeatureCache:
        """The same samples resident on ``device``; on the CPU the memory map itself."""
        if device.type == "cpu":
            return self
        return FeatureCache(
            self.path, self.count, {name: a.to(device) for name, a in self._arrays.items()}
        )

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Gather samples: maps as channels-last ``[n, C, H, W]``, labels as ``[n, H, W]``."""
        out = {}
        indices = indices.to(self.device, non_blocking=True)
        for name, array in self._arrays.items():
            rows = array[indices]
            out[name] = rows.permute(0, 3, 1, 2) if rows.dim() == 4 else rows
        return out

    @classmethod
    def open(cls, path: Path, key: Mapping[str, str]) -> FeatureCache:
        """Map an existing file.

        Raises:
            ValueError: another format, another key (both are shown) or a truncated file.
        """
        with path.open("rb") as file:
            head = file.read(len(_MAGIC) + 8)
            if len(head) < len(_MAGIC) + 8 or not head.startswith(_MAGIC):
                raise ValueError(
                    f"feature cache {path}: wanted a file that starts with {_MAGIC!r}, "
                    f"got {head[:8]!r}; delete it"
                )
            (length,) = struct.unpack("<Q", head[len(_MAGIC) :])
            try:
                header = json.loads(file.read(length))
            except ValueError as error:
                raise ValueError(f"feature cache {path}: broken header; delete it") from error
        if header["key"] != dict(key):
            raise ValueError(
                f"feature cache {path}: made for {header['key']}, wanted {dict(key)}; delete it"
            )
        count, arrays, size = header["count"], {}, path.stat().st_size
        data = _aligned(len(head) + length)
        for spec in header["arrays"]:
            start, nbytes = data + spec["offset"], _nbytes(spec, count)
            if start + nbytes > size:
                raise ValueError(
                    f"feature cache {path}: truncated, array {spec['name']} ends at byte "
                    f"{start + nbytes} of {size}; delete it"
                )
            # copy-on-write: torch wants writable memory, the file is never touched
            raw = torch.from_numpy(np.memmap(path, np.uint8, "c", start, (nbytes,)))
            arrays[spec["name"]] = raw.view(_DTYPES[spec["dtype"]]).view(count, *spec["shape"])
        return cls(path, count, arrays)

    @classmethod
    def load_or_build(
        cls,
        directory: Path,
        key: Mapping[str, str],
        count: int,
        batches: Callable[[], Iterable[Mapping[str, Tensor]]],
    ) -> FeatureCache:
        """Open the cache of ``key``, or fill it.

        The file appears under its name only when it is complete. What a killed process left
        half-written is removed by the next one that fills a cache.

        Args:
            directory: where cache files live; made if absent.
            key: what the samples depend on (encoder weights, data, preprocessing, dtype).
            count: number of samples that ``batches`` yields in all.
            batches: yields named arrays, ``[n, C, H, W]`` or ``[n, H, W]``, of the same samples.
        """
        digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:20]
        path = directory / f"{digest}.features"
        if path.exists():
            return cls.open(path, key)
        directory.mkdir(parents=True, exist_ok=True)
        remove_stale(directory, "*.features")
        with atomic_file(path) as file:
            done, data, specs = 0, 0, list[dict[str, Any]]()
            for batch in batches():
                if not specs:
                    specs = _layout(count, batch)
                    header = json.dumps(
                        {"version": 1, "key": dict(key), "count": count, "arrays": specs}
                    ).encode()
                    data = _aligned(len(_MAGIC) + 8 + len(header))
                    size = data + specs[-1]["offset"] + _nbytes(specs[-1], count)
                    # a full disk is an error here, not a SIGBUS in a reader
                    os.posix_fallocate(file.fileno(), 0, size)
                    file.write(_MAGIC + struct.pack("<Q", len(header)) + header)
                for spec in specs:
                    rows = _channels_last(batch[spec["name"]].detach().cpu()).contiguous()
                    got = _text(rows.dtype), list(rows.shape[1:])
                    if got != (spec["dtype"], spec["shape"]):
                        raise ValueError(
                            f"feature cache: wanted samples of {spec['name']} as {spec['dtype']} "
                            f"{spec['shape']}, got {got[0]} {got[1]}; crop all images to one size"
                        )
                    file.seek(data + spec["offset"] + _nbytes(spec, done))
                    file.write(rows.view(torch.uint8).numpy().data)
                done += len(batch[specs[0]["name"]])
            if done != count:
                raise ValueError(f"feature cache: wanted {count} samples, got {done}")
        return cls.open(path, key)


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the identity of a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def default_directory() -> Path:
    """``$NASFAST_CACHE`` or ``~/.cache/nasfast``."""
    return Path(os.environ.get("NASFAST_CACHE", "~/.cache/nasfast")).expanduser()
