"""The samples of a cache, over its segments."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nasfast.cache import places
from nasfast.cache.batches import HostSamples
from nasfast.cache.header import STATE, Header
from nasfast.cache.layout import STORAGES, Layout, stored
from nasfast.cache.resident import DeviceSamples
from nasfast.cache.segment import Filler, Segment, create

Encode = Callable[[Tensor], Mapping[str, Tensor]]
PLACEMENTS = ("auto", "file", "ram", "device")
_UNITS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class CacheConfig:
    """Where and how a feature cache is kept."""

    directory: Path | None = None
    """Folder of the files; by default $NASFAST_CACHE or ~/.cache/nasfast."""
    placement: Literal["auto", "file", "ram", "device"] = "auto"
    """file: on disk, used again by the next search; ram: shared memory, gone with its last user;
    device: on disk, and read once into the memory of each GPU; auto: device on CUDA, else file."""
    memory: str | None = None
    """Bound of what is kept in RAM or on a device, such as 8GB; the rest stays on disk."""
    storage: Literal["auto", "float16", "bfloat16", "float32", "int8"] = "auto"
    """Type of the stored maps; auto: as they are encoded."""

    def __post_init__(self) -> None:
        for name, known in (("placement", PLACEMENTS), ("storage", STORAGES)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        _ = self.memory_bytes

    @property
    def memory_bytes(self) -> int | None:
        """The bound in bytes.

        Raises:
            ValueError: no size; only 0 needs no unit.
        """
        if self.memory is None:
            return None
        text = self.memory.strip().upper()
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(I?)B?|B)|0", text)
        if match is None:
            raise ValueError(
                f"memory: expected a size such as 8GB or 512MiB, got {self.memory!r}; give a "
                "number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"
            )
        return int(float(match[1] or 0) * (1024 if match[3] else 1000) ** _UNITS[match[2]])


class FeatureCache:
    """Samples of named arrays, encoded once and shared by all processes that want them.

    Attributes:
        count: number of samples.
        key: what they depend on.
        layout: their arrays.
        segments: the attached files, in the order of their samples.
        device: where batches are.
    """

    def __init__(self, attached: tuple[Segment, ...], config: CacheConfig) -> None:
        header = attached[0].header
        # what another process needs to attach too
        self.config = dataclasses.replace(config, directory=_directory(config))
        self.segments = attached
        self.count, self.key, self.layout = header.total, dict(header.key), header.layout
        self._host = HostSamples(self.layout, attached)
        self._samples: HostSamples | DeviceSamples = self._host
        self.device = self._host.device
        for segment in attached:
            if segment.header.layout != self.layout:
                raise ValueError(
                    f"feature cache {segment.path}: expected the arrays of {self.paths[0]}, got "
                    "others; delete it"
                )
            segment.touch()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(segment.path for segment in self.segments)

    @classmethod
    def load_or_build(
        cls,
        key: Mapping[str, str],
        count: int,
        encode: Encode,
        config: CacheConfig = CacheConfig(),
        heartbeat: Callable[[], None] = lambda: None,
        *,
        chunk: int = 16,
    ) -> FeatureCache:
        """Attach the cache of ``key``, made and filled where it is not, with whoever else fills it.

        Args:
            key: what the samples depend on (encoder weights, data, preprocessing, dtype).
            count: number of samples.
            encode: from indices (int64 ``[n]``) to named arrays of those samples, maps
                ``[n, C, H, W]`` and labels ``[n, H, W]``. Called for samples that this process has
                claimed: each is encoded once, however many processes there are.
            config: where and how.
            heartbeat: called each turn of encoding or waiting; may raise to stop.
            chunk: samples that are encoded at a time.

        Returns:
            The cache with every sample published.

        Raises:
            ValueError: a file of another key, foreign or damaged; encoded arrays that differ.
            OSError: a directory that cannot be written, or is too small for the whole.
            RuntimeError: processes of another machine or container use it.
        """
        if count < 1:
            raise ValueError(f"feature cache: expected at least 1 sample, got {count}")
        request = _Request(key, count, encode, config, heartbeat, chunk)
        attached: list[Segment] = []
        try:
            while sum(segment.count for segment in attached) < count:
                attached.append(request.obtain(attached))
            for segment in attached:
                request.fill(segment)
        except BaseException:
            for segment in attached:
                segment.close()
            raise
        return cls(tuple(attached), config)

    @classmethod
    def open(
        cls,
        key: Mapping[str, str],
        config: CacheConfig = CacheConfig(),
    ) -> FeatureCache:
        """Attach an existing cache, which others may be filling still.

        Raises:
            FileNotFoundError: nobody has made it, or not all its files.
            ValueError: a file of another key, foreign or damaged.
        """
        name = _name(key, config)
        first = _attach_existing(_first_path(name, config), key, config)
        if first.count == first.header.total:
            return cls((first,), config)
        rest = _attach_existing(_rest_path(name, config, first.count), key, config)
        return cls((first, rest), config)

    def sample(self, index: int) -> dict[str, Tensor]:
        """Zero-copy views of one published sample, not to be written to.

        Returns:
            Arrays as stored: maps ``[C, H, W]`` with channels-last strides; int8 maps with their
            ``.scale`` and ``.error``.

        Raises:
            ValueError: no sample of the cache.
            RuntimeError: a sample that is not published or is damaged.
        """
        segment = next((s for s in self.segments if index < s.first + s.count), self.segments[-1])
        row = index - segment.first
        segment.check(torch.tensor([row]))
        out = {}
        for spec in self.layout.arrays:
            array = self.layout.view(segment.data[row : row + 1], spec.name)[0]
            out[spec.name] = array.permute(2, 0, 1) if spec.is_map else array
        return out

    def batch(self, indices: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Gather samples (int64 ``[n]``) into new memory on the cache's device.

        Args:
            indices: any samples, in any order.
            dtype: type of the maps; None: as stored, and float32 for int8 maps.

        Returns:
            Maps as channels-last ``[n, C, H, W]``, labels ``[n, H, W]`` as stored.
        """
        return self._samples.batch(indices, dtype)

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[dict[str, Tensor]]:
        """Gather batches (int64 ``[n]`` each) into reused memory, ahead of who reads them.

        Args:
            order: the samples of each batch; consumed in order and ahead, maybe by another thread.
            dtype: as for :meth:`batch`.
            ahead: batches that a thread gathers while one is read; 0 gathers each when it is asked
                for, which costs least where no processor is idle.

        Returns:
            Batches like those of :meth:`batch`; each is valid until the next is asked for.
        """
        return self._samples.batches(order, dtype, ahead)

    def to(self, device: torch.device, memory: int | None = None) -> FeatureCache:
        """The same samples with batches on ``device``.

        Args:
            device: where the first samples become resident; the CPU has what is mapped.
            memory: bytes that they may take there. By default those of the configuration, or none
                where its placement is file or ram: then all come from the host.

        Raises:
            RuntimeError: a sample that is not published or is damaged.
            torch.OutOfMemoryError: the device has not as much memory.
        """
        samples: HostSamples | DeviceSamples = self._host
        if device.type != "cpu":
            if device.type == self.device.type and device.index in (None, self.device.index):
                return self
            if memory is None:
                resident = self.config.placement in ("auto", "device")
                memory = self.config.memory_bytes if resident else 0
            samples = DeviceSamples.upload(self._host, device, memory)
        return self._over(samples)

    @property
    def resident_bytes(self) -> int:
        """What its samples take in RAM segments or on the device."""
        if isinstance(self._samples, DeviceSamples):
            return self._samples.data.nbytes
        return sum(s.data.nbytes for s in self.segments if s.header.placement == "ram")

    def _over(self, samples: HostSamples | DeviceSamples) -> FeatureCache:
        if samples is self._samples:
            return self
        moved = FeatureCache(self.segments, self.config)
        moved._host, moved._samples, moved.device = self._host, samples, samples.device
        return moved

    def errors(self) -> dict[str, float]:
        """Relative root mean square error of each int8 map over the published samples."""
        out = {}
        for spec in self.layout.visible:
            if self.layout.scale_of(spec) is not None:
                sums = torch.zeros(2, dtype=torch.float64)
                for segment in self.segments:
                    array = self.layout.view(segment.data, f"{spec.name}.error")
                    sums += array[segment.published()].double().sum(0)
                error, square = sums.tolist()
                out[spec.name] = (error / square) ** 0.5 if square else 0.0
        return out

    def verify(self) -> list[int]:
        """Read everything: the published samples whose checksum does not match."""
        return [segment.first + row for segment in self.segments for row in segment.verify()]

    def close(self) -> None:
        """No longer use the files; a RAM segment goes with its last user."""
        for segment in self.segments:
            segment.close()

    def __reduce__(self) -> tuple[object, ...]:
        """Another process attaches the files, and shares what is resident on a device."""
        resident = self._samples.data if isinstance(self._samples, DeviceSamples) else None
        return _reopen, (self.key, self.config, resident)


def _reopen(key: Mapping[str, str], config: CacheConfig, resident: Tensor | None) -> FeatureCache:
    cache = FeatureCache.open(key, config)
    return cache if resident is None else cache._over(DeviceSamples(cache._host, resident))


@dataclass(frozen=True)
class _Request:
    """What :meth:`FeatureCache.load_or_build` was asked for."""

    key: Mapping[str, str]
    count: int
    encode: Encode
    config: CacheConfig
    heartbeat: Callable[[], None]
    chunk: int

    def obtain(self, before: list[Segment]) -> Segment:
        """Attach or make the segment behind those before."""
        first = sum(segment.count for segment in before)
        name = _name(self.key, self.config)
        path = _rest_path(name, self.config, first) if before else _first_path(name, self.config)

        def begin() -> tuple[Header, Tensor]:
            memory = self.config.memory_bytes if places.is_ram(path) else None
            if before:
                layout = before[0].header.layout
                blocks = torch.empty(0, layout.sample_bytes, dtype=torch.uint8)
            else:
                size = min(self.chunk, self.count)
                # with a bound the whole chunk may not fit
                samples = torch.arange(size if memory is None else 1)
                rows = self._rows(samples, samples, size)
                layout = Layout.of(rows)
                blocks = layout.pack(rows)
            count = self.count - first
            if memory is not None:
                count = min(count, memory // (layout.sample_bytes + STATE.size))
                if count == 0:
                    raise ValueError(
                        f"memory: expected room for one sample of {layout.sample_bytes} bytes, got "
                        f"{self.config.memory}; give more, or placement file"
                    )
            placement = "ram" if places.is_ram(path) else "file"
            key, storage = dict(self.key), self.config.storage
            return Header(key, storage, placement, first, count, self.count, layout), blocks

        while True:
            try:
                segment = _attach(path, self.key, self.config)
            except FileNotFoundError:
                places.sweep(path.parent, keep=path)
                made = create(path, begin, self.heartbeat)
                if made is None:
                    continue
                segment = made
            if segment.header.total != self.count:
                segment.close()
                raise ValueError(
                    f"feature cache {path}: expected {self.count} samples, got "
                    f"{segment.header.total}; delete it"
                )
            return segment

    def fill(self, segment: Segment) -> None:
        """Encode what nobody else does, and wait for the rest."""
        if segment.census().complete:
            return
        filler, start = Filler(segment), 0
        try:
            while not segment.census().complete:
                self.heartbeat()
                rows = filler.claim(self.chunk, start)
                if len(rows):
                    begin = start = int(rows[0]) // self.chunk * self.chunk
                    size = min(self.chunk, segment.count - begin)
                    encoded = self._rows(rows + segment.first, rows - begin, size)
                    filler.write(rows, segment.header.layout.pack(encoded))
                    start += self.chunk
                elif not filler.reap():
                    time.sleep(places.TURN)
        except BaseException:
            filler.release()
            raise

    def _rows(self, indices: Tensor, places: Tensor, size: int) -> dict[str, Tensor]:
        """What is stored of samples, encoded at their places in a batch of the usual size.

        An encoder may round otherwise in a batch of another size: the places of what a killed
        process has published, or of what does not fit, hold copies of the first sample.
        """
        padded = indices[:1].repeat(size)
        padded[places] = indices
        rows = stored(self.encode(padded), size, self.config.storage)
        return rows if len(indices) == size else {name: row[places] for name, row in rows.items()}


def _attach(path: Path, key: Mapping[str, str], config: CacheConfig) -> Segment:
    places.sweep(places.ram_directory(), keep=path)
    segment = Segment.open(path)
    made = dict(segment.header.key) | {"storage": segment.header.storage}
    wanted = dict(key) | {"storage": config.storage}
    differ = [name for name in made | wanted if made.get(name) != wanted.get(name)]
    if differ:
        segment.close()
        raise ValueError(
            f"feature cache {path}: made for {_values(made, differ)}, expected "
            f"{_values(wanted, differ)}; delete it"
        )
    return segment


def _attach_existing(path: Path, key: Mapping[str, str], config: CacheConfig) -> Segment:
    try:
        return _attach(path, key, config)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            errno.ENOENT,
            (
                f"feature cache: expected {path}, got no such file; "
                "FeatureCache.load_or_build makes it"
            ),
        ) from error


def _values(key: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{n}={key[n]!r}" if n in key else f"{n}=nothing" for n in names)


def _name(key: Mapping[str, str], config: CacheConfig) -> str:
    text = json.dumps([dict(key), config.storage], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _first_path(name: str, config: CacheConfig) -> Path:
    """Of the segment that starts at sample 0; RAM segments of other bounds are others."""
    if config.placement != "ram" or config.memory_bytes == 0:
        return _directory(config) / f"{name}{places.SUFFIX}"
    bound = "" if config.memory is None else f"-{config.memory_bytes}"
    return places.ram_directory() / f"{name}{bound}{places.SUFFIX}"


def _rest_path(name: str, config: CacheConfig, first: int) -> Path:
    return _directory(config) / f"{name}-from-{first}{places.SUFFIX}"


def _directory(config: CacheConfig) -> Path:
    return (config.directory or default_directory()).expanduser().absolute()


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
