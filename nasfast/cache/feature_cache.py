"""The samples of a cache: encoded once, and read by any process on any device."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nasfast.cache import places, trust, waiting
from nasfast.cache.batches import Batch, HostSamples
from nasfast.cache.header import STATE, Header
from nasfast.cache.layout import STORAGES, BlockLayout, stored
from nasfast.cache.resident import DeviceSamples
from nasfast.cache.segment import Filler, Segment, create
from nasfast.utils.errors import UserError
from nasfast.utils.files import expanded

Encode = Callable[[Tensor], Mapping[str, Tensor]]
PLACEMENTS = ("auto", "file", "ram", "device")
_UNITS = {None: 0, "K": 1, "M": 2, "G": 3, "T": 4}


@dataclass(frozen=True)
class CacheConfig:
    """Where and how a feature cache is kept."""

    directory: Path | None = None
    """Folder of the files; by default $NASFAST_CACHE or ~/.cache/nasfast. Where others may write to
    it, this user's folder in it (:func:`used_directory`)."""
    placement: Literal["auto", "file", "ram", "device"] = "auto"
    """file: on disk, used again by the next search; ram: shared memory, gone with its last user;
    device: on disk, and read once into the memory of each GPU; auto: device on CUDA, else file."""
    memory: str | None = None
    """Bound of what is kept in RAM or on a device, such as 8GB. RAM has to hold all samples; those
    that do not fit on a device are read from the file."""
    storage: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Type of the stored maps; auto: as they are encoded."""

    def __post_init__(self) -> None:
        for name, known in (("placement", PLACEMENTS), ("storage", STORAGES)):
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name}: expected one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        _ = self.memory_bytes

    @property
    def memory_bytes(self) -> int | None:
        """The bound in bytes.

        Raises:
            UserError: no size; only 0 needs no unit.
        """
        if self.memory is None:
            return None
        text = self.memory.strip().upper()
        match = re.fullmatch(r"(\d+(?:\.\d+)?) *(?:([KMGT])(I?)B?|B)|0", text)
        if match is None:
            raise UserError(
                f"memory: expected a size such as 8GB or 512MiB, got {self.memory!r}; give a "
                "number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"
            )
        return int(float(match[1] or 0) * (1024 if match[3] else 1000) ** _UNITS[match[2]])


class FeatureCache:
    """Samples of named arrays, encoded once and shared by all processes that use them.

    Attributes:
        count: number of samples.
        key: what they depend on.
        layout: their arrays.
        segment: the attached file.
        device: where batches are.
    """

    def __init__(self, segment: Segment, config: CacheConfig) -> None:
        header = segment.header
        # what another process needs to attach too
        self.config = dataclasses.replace(config, directory=_directory(config))
        self.segment = segment
        self.count, self.key, self.layout = header.count, dict(header.key), header.layout
        self._host = HostSamples(segment)
        self._samples: HostSamples | DeviceSamples = self._host
        self.device = self._host.device
        segment.touch()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files: one."""
        return (self.segment.path,)

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
            UserError: a file of another key, foreign, damaged or in use by processes of another
                machine or container; samples of several sizes, or more than the bound lets RAM
                hold; a directory or file of another user; a process that stopped while it filled.
            ValueError: no samples, or arrays that cannot be stored.
            OSError: a directory that cannot be written, or is too small for the whole.
        """
        if count < 1:
            raise ValueError(f"feature cache: expected at least 1 sample, got {count}")
        request = _Request(key, count, encode, config, heartbeat, chunk)
        segment = request.obtain()
        try:
            request.fill(segment)
        except BaseException:
            segment.close()
            raise
        return cls(segment, config)

    @classmethod
    def open(
        cls,
        key: Mapping[str, str],
        config: CacheConfig = CacheConfig(),
    ) -> FeatureCache:
        """Attach an existing cache, which others may be filling still.

        Raises:
            FileNotFoundError: nobody has made it.
            UserError: a file of another key, foreign or damaged.
        """
        path = _path(key, config)
        try:
            return cls(_attach(path, key, config), config)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT,
                f"feature cache: expected {path}, got no such file; FeatureCache.load_or_build "
                "makes it",
            ) from error

    def sample(self, index: int) -> Batch:
        """Zero-copy views of one published sample, not to be written to.

        Returns:
            Arrays as stored: maps ``[C, H, W]`` with channels-last strides.

        Raises:
            ValueError: no sample of the cache.
            UserError: a damaged sample.
            RuntimeError: a sample that is not published.
        """
        self.segment.check(torch.tensor([index]))
        out = {}
        for spec in self.layout.arrays:
            array = self.layout.view(self.segment.data[index : index + 1], spec)[0]
            out[spec.name] = array.permute(2, 0, 1) if spec.is_map else array
        return out

    def batch(self, indices: Tensor, dtype: torch.dtype | None = None) -> Batch:
        """Gather samples (int64 ``[n]``) into new memory on the cache's device.

        Args:
            indices: any samples, in any order.
            dtype: type of the maps; None: as stored.

        Returns:
            Maps as channels-last ``[n, C, H, W]``, labels ``[n, H, W]`` as stored.
        """
        return self._samples.batch(indices, dtype)

    def batches(
        self, order: Iterable[Tensor], dtype: torch.dtype | None = None, ahead: int = 1
    ) -> Iterator[Batch]:
        """Gather batches (int64 ``[n]`` each) into reused memory, ahead of who reads them.

        Args:
            order: the samples of each batch; drawn in order and ahead, maybe by another thread.
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
            UserError: a damaged sample.
            RuntimeError: a sample that is not published.
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
        """What its samples take in shared memory or on the device."""
        if isinstance(self._samples, DeviceSamples):
            return self._samples.data.nbytes
        return self.segment.data.nbytes if places.is_ram(self.segment.path) else 0

    def _over(self, samples: HostSamples | DeviceSamples) -> FeatureCache:
        if samples is self._samples:
            return self
        moved = FeatureCache(self.segment, self.config)
        moved._host, moved._samples, moved.device = self._host, samples, samples.device
        return moved

    def verify(self) -> list[int]:
        """Read everything: the published samples whose checksum does not match."""
        return self.segment.verify()

    def close(self) -> None:
        """No longer use the file; one in RAM goes with its last user."""
        self.segment.close()

    def __reduce__(self) -> tuple[object, ...]:
        """Another process attaches the file, and shares what is resident on a device."""
        resident = self._samples.data if isinstance(self._samples, DeviceSamples) else None
        return _reopen, (self.key, self.config, resident)


def _reopen(key: Mapping[str, str], config: CacheConfig, resident: Tensor | None) -> FeatureCache:
    cache = FeatureCache.open(key, config)
    return cache if resident is None else cache._over(DeviceSamples(cache._host, resident))


@dataclass(frozen=True)
class _Request:
    """The arguments of :meth:`FeatureCache.load_or_build`."""

    key: Mapping[str, str]
    count: int
    encode: Encode
    config: CacheConfig
    heartbeat: Callable[[], None]
    chunk: int

    def obtain(self) -> Segment:
        """Attach or make the file."""
        path = _path(self.key, self.config)

        def begin() -> tuple[Header, Tensor]:
            samples = torch.arange(min(self.chunk, self.count))
            rows = self._rows(samples, samples, len(samples))
            layout = BlockLayout.of(rows)
            placement = "ram" if places.is_ram(path) else "file"
            if placement == "ram":
                self._check_memory(layout)
            key = dict(self.key)
            header = Header(key, self.config.storage, placement, self.count, layout)
            return header, layout.pack(rows)

        while True:
            try:
                segment = _attach(path, self.key, self.config, self.heartbeat)
            except FileNotFoundError:
                places.sweep(path.parent, keep=path)
                made = create(path, begin, self.heartbeat)
                if made is None:
                    continue
                segment = made
            if segment.count != self.count:
                segment.close()
                raise UserError(
                    f"feature cache {path}: expected {self.count} samples, got {segment.count}; "
                    "delete it"
                )
            return segment

    def _check_memory(self, layout: BlockLayout) -> None:
        bound = self.config.memory_bytes
        size = self.count * (layout.sample_bytes + STATE.size)
        if bound is not None and size > bound:
            raise UserError(
                f"memory: expected {size / 1e6:.1f} MB for {self.count} samples in RAM, got "
                f"{bound / 1e6:.1f} MB; raise --memory by {math.ceil((size - bound) / 1e6)} MB, or "
                "give --placement file"
            )

    def fill(self, segment: Segment) -> None:
        """Encode what nobody else does, and wait for the rest."""
        if segment.census().complete:
            return
        filler, start, wait = Filler(segment), 0, None
        try:
            while not segment.census().complete:
                self.heartbeat()
                rows = filler.claim(self.chunk, start)
                if len(rows):
                    wait = None
                    begin = start = int(rows[0]) // self.chunk * self.chunk
                    size = min(self.chunk, segment.count - begin)
                    encoded = self._rows(rows, rows - begin, size)
                    filler.write(rows, segment.header.layout.pack(encoded))
                    start += self.chunk
                elif not filler.reap():
                    wait = wait or filler.wait()
                    wait.turn()
        except BaseException:
            filler.release()
            raise

    def _rows(self, indices: Tensor, places: Tensor, size: int) -> dict[str, Tensor]:
        """What is stored of samples, encoded at their places in a batch of the usual size.

        An encoder may round otherwise in a batch of another size: the places of what a killed
        process has published hold copies of the first sample.
        """
        padded = indices[:1].repeat(size)
        padded[places] = indices
        rows = stored(self.encode(padded), size, self.config.storage)
        return rows if len(indices) == size else {name: row[places] for name, row in rows.items()}


def _attach(
    path: Path,
    key: Mapping[str, str],
    config: CacheConfig,
    heartbeat: Callable[[], None] = waiting.idle,
) -> Segment:
    places.sweep(places.ram_directory(), keep=path)
    segment = Segment.open(path, heartbeat)
    made = dict(segment.header.key) | {"storage": segment.header.storage}
    expected = dict(key) | {"storage": config.storage}
    differ = [name for name in made | expected if made.get(name) != expected.get(name)]
    if differ:
        segment.close()
        raise UserError(
            f"feature cache {path}: made for {_values(made, differ)}, expected "
            f"{_values(expected, differ)}; delete it"
        )
    return segment


def _values(key: Mapping[str, str], names: list[str]) -> str:
    return ", ".join(f"{n}={key[n]!r}" if n in key else f"{n}=nothing" for n in names)


def _path(key: Mapping[str, str], config: CacheConfig) -> Path:
    text = json.dumps([dict(key), config.storage], sort_keys=True)
    name = hashlib.sha256(text.encode()).hexdigest()[:20] + places.SUFFIX
    return (places.ram_directory() if config.placement == "ram" else _directory(config)) / name


def _directory(config: CacheConfig) -> Path:
    return used_directory(config.directory)


def used_directory(asked: Path | None) -> Path:
    """The folder of caches on disk: what was asked for, or the default; where others may write to
    it, this user's folder in it (`trust.private_directory`).

    Raises:
        UserError: another user's, in which this one may make no folder.
    """
    directory = trust.private_directory(expanded(asked or default_directory()).absolute())
    # what lies there itself goes with its last user
    return directory / "files" if directory == places.ram_directory() else directory


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes: the identity of a set of weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def default_directory() -> Path:
    """``$NASFAST_CACHE`` or ``~/.cache/nasfast``; below the temporary directory where there is no
    home, as in a container without HOME."""
    given = os.environ.get("NASFAST_CACHE")
    try:
        return expanded(given or "~/.cache/nasfast")
    except UserError:
        if given:
            raise
        return Path(tempfile.gettempdir()) / f"nasfast-{os.getuid()}"
