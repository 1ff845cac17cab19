"""Samples of a feature cache in batches: ours, the forms people use, and a plain memory copy.

All give the same samples in the same order. An implementation is a function of a
:class:`Store` that gives a call; every call gives the batches of one pass over all samples.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Call
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from nasfast.cache import CacheConfig, FeatureCache
from nasfast.cache.batches import BatchMemory
from nasfast.cache.layout import BlockLayout, stored
from nasfast.ops import gather_fields

Batch = dict[str, Tensor]
Pass = Callable[[], Iterable[Any]]
COPY = "memory copy"
BATCH = 8
# of crops of 256: the taps of MobileNet-v2, and teacher logits of 128 classes for the bytes to add
# up to 1.34 MiB a sample
SHAPES: dict[str, tuple[int, ...]] = {
    "tap0": (24, 64, 64),
    "tap1": (32, 32, 32),
    "tap2": (96, 16, 16),
    "tap3": (320, 8, 8),
    "teacher": (128, 64, 64),
    "labels": (64, 64),
}
SMALL: dict[str, tuple[int, ...]] = {"tap0": (8, 4, 6), "teacher": (16, 2, 2), "labels": (4, 6)}
SAMPLES = 384  # 515 MiB
REPEATS = 3  # of a measurement of memory


class Store:
    """The same samples in every form, each made when it is asked for.

    Args:
        folder: of the files.
        samples: how many.
        shapes: of maps ``[C, H, W]`` and labels ``[H, W]``.
    """

    def __init__(
        self, folder: Path, samples: int = SAMPLES, shapes: dict[str, tuple[int, ...]] = SHAPES
    ) -> None:
        self.folder, self.samples, self.shapes = folder, samples, shapes
        order = torch.randperm(samples, generator=torch.Generator().manual_seed(1))
        self.order = list(order.split(BATCH))

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder, self.samples, self.shapes)

    @cached_property
    def _base(self) -> Batch:
        generator = torch.Generator().manual_seed(0)
        base = {
            name: torch.randn(1, *shape, generator=generator) for name, shape in self.shapes.items()
        }
        return base | {"labels": (base["labels"].abs() * 9).to(torch.uint8)}

    def encode(self, indices: Tensor) -> Batch:
        """Samples that differ, as an encoder would give them."""
        factors = 1 + indices / self.samples
        out = {}
        for name, base in self._base.items():
            factor = factors.view(-1, *[1] * (base.dim() - 1))
            values = (
                base * factor if base.is_floating_point() else base.expand(len(indices), -1, -1)
            )
            out[name] = values.half() if values.is_floating_point() else values
        return out

    @cached_property
    def cache(self) -> FeatureCache:
        config = CacheConfig(self.folder / "cache", "file")
        return FeatureCache.load_or_build({"bench": "samples"}, self.samples, self.encode, config)

    @cached_property
    def blocks(self) -> Tensor:
        """The memory map of the cache. uint8 [samples, sample_bytes]"""
        return self.cache.segment.data

    def every(self) -> Iterator[tuple[int, Batch]]:
        for i in range(self.samples):
            yield i, {name: x[0] for name, x in self.encode(torch.tensor([i])).items()}

    @cached_property
    def files(self) -> list[Path]:
        """One for each sample, by ``torch.save``."""
        folder = self.folder / "files"
        paths = [folder / f"{i:06d}.pt" for i in range(self.samples)]
        if not folder.exists():
            folder.mkdir()
            for i, sample in self.every():
                torch.save(sample, paths[i])
        return paths

    @cached_property
    def memmaps(self) -> dict[str, NDArray[Any]]:
        """An array of all samples each, in NumPy's files."""
        folder = self.folder / "memmaps"
        if not folder.exists():
            folder.mkdir()
            maps = {
                name: np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
                    folder / f"{name}.npy",
                    "w+",
                    np.uint8 if len(shape) == 2 else np.float16,
                    (self.samples, *shape),
                )
                for name, shape in self.shapes.items()
            }
            for i, sample in self.every():
                for name, x in sample.items():
                    maps[name][i] = x.numpy()
            for array in maps.values():
                array.flush()
        return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in self.shapes}

    @cached_property
    def shared(self) -> tuple[SharedMemory, dict[str, NDArray[Any]]]:
        """The same arrays in shared memory, and what keeps it."""
        memory = SharedMemory(create=True, size=sum(a.nbytes for a in self.memmaps.values()))
        arrays, offset = {}, 0
        for name, source in self.memmaps.items():
            arrays[name] = np.ndarray(source.shape, source.dtype, memory.buf, offset)
            arrays[name][:] = source
            offset += source.nbytes
        memory.unlink()  # it goes with this process
        return memory, arrays


class FilesDataset(Dataset[Batch]):
    def __init__(self, paths: list[Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Batch:
        sample: Batch = torch.load(self.paths[index])
        return sample

    def __len__(self) -> int:
        return len(self.paths)


class MemmapDataset(Dataset[Batch]):
    def __init__(self, arrays: dict[str, NDArray[Any]]) -> None:
        self.arrays = arrays

    def __getitem__(self, index: int) -> Batch:
        return {name: torch.from_numpy(a[index].copy()) for name, a in self.arrays.items()}

    def __len__(self) -> int:
        return len(self.arrays["labels"])


def copy(store: Store) -> Pass:
    """Blocks of as many samples as a batch has, one batch after the other, into one place."""
    chunks = store.blocks.split(BATCH)
    out = torch.empty_like(chunks[0])
    return lambda: (out[: len(chunk)].copy_(chunk) for chunk in chunks)


def numpy_copy(store: Store) -> Pass:
    chunks = [chunk.numpy() for chunk in store.blocks.split(BATCH)]
    out = np.empty_like(chunks[0])
    return lambda: (np.copyto(out[: len(chunk)], chunk) for chunk in chunks)


def widening_copy(store: Store) -> Pass:
    """Blocks read as float16, written as float32."""
    chunks = store.blocks.view(torch.float16).split(BATCH)
    out = torch.empty_like(chunks[0], dtype=torch.float32)
    return lambda: (out[: len(chunk)].copy_(chunk) for chunk in chunks)


def batch(store: Store) -> Pass:
    return lambda: (store.cache.batch(indices) for indices in store.order)


def batches(store: Store) -> Pass:
    return lambda: store.cache.batches(store.order)


def batches_when_asked(store: Store) -> Pass:
    return lambda: store.cache.batches(store.order, ahead=0)


def batches_float32(store: Store) -> Pass:
    return lambda: store.cache.batches(store.order, torch.float32)


def batches_float32_when_asked(store: Store) -> Pass:
    return lambda: store.cache.batches(store.order, torch.float32, ahead=0)


def views(store: Store) -> Pass:
    """Tensors over the memory map; nothing reads them."""
    return lambda: ([store.cache.sample(i) for i in b.tolist()] for b in store.order)


def views_read(store: Store) -> Pass:
    """The same, and every byte read once."""
    return lambda: ([total(sample) for sample in samples] for samples in views(store)())


def total(sample: Batch) -> int:
    """The sum of a sample as words of eight bytes."""
    lasts = (x.permute(1, 2, 0) if x.dim() == 3 else x for x in sample.values())
    return sum(int(x.reshape(-1).view(torch.int64).sum()) for x in lasts)


def files(store: Store) -> Pass:
    dataset = FilesDataset(store.files)
    return lambda: (default_collate([dataset[i] for i in b.tolist()]) for b in store.order)


def memmap(store: Store) -> Pass:
    return lambda: (rows(store.memmaps, indices) for indices in store.order)


def shared_memory(store: Store) -> Pass:
    _, arrays = store.shared
    return lambda: (rows(arrays, indices) for indices in store.order)


def rows(arrays: dict[str, NDArray[Any]], indices: Tensor) -> Batch:
    return {name: torch.from_numpy(array[indices.numpy()]) for name, array in arrays.items()}


def loader(dataset: Dataset[Batch], store: Store) -> Pass:
    order = [indices.tolist() for indices in store.order]
    made = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    return lambda: made


def loader_files(store: Store) -> Pass:
    return loader(FilesDataset(store.files), store)


def loader_memmap(store: Store) -> Pass:
    return loader(MemmapDataset(store.memmaps), store)


IMPLEMENTATIONS: dict[str, Callable[[Store], Pass]] = {
    COPY: copy,
    "memory copy, NumPy": numpy_copy,
    "batch": batch,
    "batches": batches,
    "batches, none ahead": batches_when_asked,
    "views": views,
    "views, read": views_read,
    "memory copy, float32": widening_copy,
    "batches, float32": batches_float32,
    "batches, float32, none ahead": batches_float32_when_asked,
    "shared memory": shared_memory,
    "memmap": memmap,
    "torch.save files": files,
    "DataLoader(2), memmap": loader_memmap,
    "DataLoader(2), files": loader_files,
}
FLOORS = (COPY, "memory copy, NumPy")


def gather_calls(
    device: str,
    samples: int,
    batch: int,
    dtype: torch.dtype,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
) -> tuple[dict[str, Call], int]:
    """Batches of samples that are resident on a device, with maps in ``dtype``, and their bytes.

    Every call gives the same samples; the copy writes the bytes of a batch and reads as many.
    """
    encoded = Store(Path(), 1, shapes).encode(torch.zeros(1, dtype=torch.int64))
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(samples, (batch,), generator=generator).to(device)
    rows = stored(encoded, 1, "float16")
    layout = BlockLayout.of(rows)
    data = layout.pack(rows).to(device).repeat(samples, 1)
    outs = BatchMemory(layout, dtype, torch.device(device)).first(batch)
    size = sum(out.nbytes for out in outs)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device=device)
    return {
        "copy": lambda: target.copy_(source),
        "nasfast": partial(gathered, data, indices, layout, outs),
        "indexing": partial(indexed, data, indices, layout, dtype),
    }, size


def gathered(
    data: Tensor, indices: Tensor, layout: BlockLayout, outs: list[Tensor]
) -> list[Tensor]:
    gather_fields(data, indices, layout.fields, outs)
    return outs


def indexed(data: Tensor, indices: Tensor, layout: BlockLayout, dtype: torch.dtype) -> list[Tensor]:
    """PyTorch's indexing, array by array."""
    arrays = [layout.view(data, spec)[indices] for spec in layout.arrays]
    return [array.to(dtype) if array.is_floating_point() else array for array in arrays]


def drain(given: Pass) -> None:
    for _ in given():
        pass


@dataclass(frozen=True)
class Rate:
    """What an implementation reaches."""

    samples_per_second: float
    of_copy: float
    """Speed as a multiple of the plain memory copy's."""


def together(store: Store, name: str, processes: int, seconds: float) -> float:
    """Samples a second that so many processes of one thread read in all, at the same time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nasfast.cache"])  # imported once
    barrier, results = context.Barrier(processes), context.SimpleQueue()
    arguments = (store, name, seconds, barrier, results)
    started = [context.Process(target=_read_for, args=arguments) for _ in range(processes)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    failed = [process.exitcode for process in started if process.exitcode]
    if failed:
        raise RuntimeError(f"{name}: expected {processes} readers, got exit codes {failed}")
    return sum(results.get() for _ in started)


def _read_for(store: Store, name: str, seconds: float, barrier: Any, results: Any) -> None:
    torch.set_num_threads(1)
    given = IMPLEMENTATIONS[name](store)
    drain(given)  # checksums, buffers, pages
    barrier.wait()
    count, start = 0, time.perf_counter()
    while (spent := time.perf_counter() - start) < seconds:
        for indices, _ in zip(store.order, given()):
            count += len(indices)
            if time.perf_counter() - start > seconds:
                break
    results.put(count / spent)
    del given  # a DataLoader ends its workers


PRIVATE = """
import sys, torch
torch.set_num_threads(1)
sys.path[:0] = {path!r}
name = {name!r}
if name:
    import pathlib, feature_cache_baselines
    store = feature_cache_baselines.Store(pathlib.Path({folder!r}), {samples!r}, {shapes!r})
    given = feature_cache_baselines.IMPLEMENTATIONS[name](store)
    feature_cache_baselines.drain(given)
lines = open("/proc/self/smaps_rollup").read().splitlines()
print(sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024)
"""


def private_memory(store: Store, name: str | None) -> int:
    """Bytes that a fresh process shares with no other, with torch alone, or after it has read all.

    The kernel calls pages of a file private as long as one process alone maps them: this process
    should have read the store.
    """
    code = PRIVATE.format(
        path=sys.path,
        name=name,
        folder=str(store.folder),
        samples=store.samples,
        shapes=store.shapes,
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    return int(done.stdout)
