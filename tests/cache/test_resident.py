"""Samples resident on a device, which may be the CPU, with the rest on the host."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from blocks import COUNT, assert_equal, content, host, orders
from samples import build, raises
from torch import Tensor

from nasfast.cache import FeatureCache, resident
from nasfast.cache.batches import BatchMemory, HostSamples
from nasfast.cache.resident import DeviceSamples

CPU = torch.device("cpu")
DEVICES = [CPU, pytest.param(torch.device("cuda", 0), marks=pytest.mark.cuda)]
every_device = pytest.mark.parametrize("device", DEVICES, ids=["cpu", "cuda"])
every_bound = pytest.mark.parametrize("bound", [0, 1, 6, COUNT, None])


def memory(samples: HostSamples, bound: int | None) -> int | None:
    """Bytes in which so many samples fit, and no more."""
    return None if bound is None else (bound + 1) * samples.layout.sample_bytes - 1


def upload(samples: HostSamples, device: torch.device, bound: int | None) -> DeviceSamples:
    return DeviceSamples.upload(samples, device, memory(samples, bound))


@every_device
@every_bound
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_batch_is_that_of_the_host(
    device: torch.device, bound: int | None, dtype: torch.dtype | None
) -> None:
    samples = host(content(torch.float32))
    there = upload(samples, device, bound)
    assert (there.count, there.device) == (COUNT, device)
    assert len(there.data) == (COUNT if bound is None else bound)
    for indices in ([9, 0, 4, 9, 5], [10], []):
        chosen = torch.tensor(indices, dtype=torch.int64)
        for given in (chosen, chosen.to(device)):
            batch = there.batch(given, dtype)
            assert batch["tap0"].device == device
            assert_equal(batch, samples.batch(chosen, dtype))


@every_device
@every_bound
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_are_those_of_the_host(device: torch.device, bound: int | None, ahead: int) -> None:
    samples, order = host(content()), orders(3)
    order.insert(1, torch.tensor([], dtype=torch.int64))
    there = upload(samples, device, bound)
    batches = there.batches(iter(order), torch.float32, ahead)
    for batch, indices in zip(batches, order, strict=True):
        assert_equal(batch, samples.batch(indices, torch.float32))
    assert list(there.batches([], ahead=ahead)) == []


@every_device
def test_upload_in_parts(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every sample is checked before it goes."""
    samples = host(content())
    monkeypatch.setattr(resident, "_CHUNK", 3 * samples.layout.sample_bytes + 1)
    there = upload(samples, device, 9)
    assert torch.equal(there.data.cpu(), samples._segment.data[:9])
    assert samples._segment.checked == list(range(9))  # type: ignore[attr-defined]


def test_memory_for_less_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples larger than a chunk go one by one."""
    monkeypatch.setattr(resident, "_CHUNK", 1)
    samples = host(content())
    assert_equal(
        upload(samples, CPU, None).batch(torch.tensor([8])), samples.batch(torch.tensor([8]))
    )


def test_a_damaged_sample_does_not_go_up() -> None:
    samples = host(content(), broken=[6])
    with raises(RuntimeError, "sample 6 is damaged"):
        upload(samples, CPU, 7)
    there = upload(samples, CPU, 6)
    with raises(RuntimeError, "sample 6 is damaged"):
        there.batch(torch.tensor([2, 6]))
    batches = there.batches([torch.tensor([7]), torch.tensor([6])])
    next(batches)
    with raises(RuntimeError, "sample 6 is damaged"):
        next(batches)


@pytest.mark.parametrize("bound", [6, None])
@pytest.mark.parametrize("bad", [-1, COUNT])
def test_error_of_an_index(bound: int | None, bad: int) -> None:
    there = upload(host(content()), CPU, bound)
    message = f"feature cache: expected indices from 0 to 10, got {bad}; the cache has 11 samples"
    with raises(ValueError, message):
        there.batch(torch.tensor([0, bad]))
    with raises(ValueError, message):
        list(there.batches([torch.tensor([0, bad])]))


def test_error_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*size: int, **options: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    samples = host(content())
    monkeypatch.setattr(samples, "count", 10**6)
    monkeypatch.setattr(torch, "empty", full)
    gigabytes = samples.layout.sample_bytes * 10**6 / 1e9
    with raises(
        torch.OutOfMemoryError,
        f"feature cache: expected {gigabytes:.1f} GB of cpu for 1000000 samples, got out of "
        f"memory; bound it, as in --memory {int(gigabytes // 2) + 1}GB",
    ):
        DeviceSamples.upload(samples, CPU)


# ---- the cache over them


def on_cpu(cache: FeatureCache, bound: int | None) -> FeatureCache:
    """As if the CPU were a device."""
    return cache._over(upload(cache._host, CPU, bound))


def expected(cache: FeatureCache, indices: Tensor) -> dict[str, Tensor]:
    samples = [cache.sample(index) for index in indices.tolist()]
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def assert_samples(batch: dict[str, Tensor], cache: FeatureCache, indices: Tensor) -> None:
    for name, array in expected(cache, indices).items():
        assert torch.equal(batch[name].cpu(), array)


@pytest.mark.parametrize("bound", [None, 2])
def test_cache(tmp_path: Path, bound: int | None) -> None:
    cache = build(tmp_path)
    moved, order = on_cpu(cache, bound), [torch.tensor([4, 0, 2]), torch.tensor([1])]
    assert moved.resident_bytes == (bound or cache.count) * cache.layout.sample_bytes
    assert_samples(moved.batch(order[0]), cache, order[0])
    for either in (cache, moved):
        for batch, indices in zip(either.batches(order), order, strict=True):
            assert_samples(batch, cache, indices)
    assert moved.to(CPU)._samples is cache._samples
    cache.close()


@pytest.mark.parametrize(
    ("config", "given", "bound"),
    [
        ({}, None, None),
        ({"placement": "device", "memory": "1MB"}, None, 10**6),
        ({"placement": "file"}, None, 0),
        ({"placement": "file"}, 5000, 5000),
        ({"memory": "1MB"}, 5000, 5000),
    ],
    ids=["auto", "bounded", "file", "file-given", "given"],
)
def test_how_much_goes_to_a_device(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: dict[str, Any],
    given: int | None,
    bound: int | None,
) -> None:
    calls = []

    def note(samples: HostSamples, device: torch.device, memory: int | None) -> DeviceSamples:
        calls.append((device, memory))
        return DeviceSamples(samples, torch.empty(0, samples.layout.sample_bytes))

    monkeypatch.setattr(DeviceSamples, "upload", note)
    device = torch.device("cuda", 1)
    build(tmp_path, **config).to(device, given)
    assert calls == [(device, bound)]


def share(connection: Any) -> None:
    """In another process: reads what is resident, then changes it."""
    cache = connection.recv()
    batch = cache.batch(torch.tensor([1, 4]))
    connection.send({name: array.cpu().numpy() for name, array in batch.items()})
    cache._samples.data.zero_()
    if cache.device.type == "cuda":
        torch.cuda.synchronize()
    connection.send("changed")
    connection.recv()


@every_device
def test_processes_share_what_is_resident(tmp_path: Path, device: torch.device) -> None:
    """A child that gets the cache reads the same memory of the device."""
    cache = build(tmp_path)
    moved = on_cpu(cache, 3) if device.type == "cpu" else cache.to(device)
    context = torch.multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    child = context.Process(target=share, args=(other,))
    child.start()
    try:
        mine.send(moved)
        batch = {name: torch.from_numpy(array) for name, array in mine.recv().items()}
        assert_samples(batch, cache, torch.tensor([1, 4]))
        assert mine.recv() == "changed"
        assert not moved._samples.data.any()  # type: ignore[union-attr]
        mine.send("seen")
    finally:
        child.join(10)
        child.kill()
    assert child.exitcode == 0


class Streams:
    """In the place of torch.cuda: notes what is asked of streams and events, in order."""

    def __init__(self, log: list[str]) -> None:
        self.log, self.device = log, CPU
        self.names = iter(("copied", "used"))

    def Event(self) -> Any:
        name = next(self.names)
        return SimpleNamespace(
            name=name,
            synchronize=lambda: self.log.append(f"host waits until {name}"),
            record=lambda stream=None: self.log.append(name),
        )

    def wait_event(self, event: Any) -> None:
        self.log.append(f"stream waits until {event.name}")

    def stream(self, side: Any) -> Any:
        return nullcontext()

    def current_stream(self, device: torch.device) -> Any:
        return self


def test_copies_and_kernels_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory is not written before it is copied, nor a device's before it is used."""
    log: list[str] = []
    samples, streams = host(content()), Streams(log)
    monkeypatch.setattr(resident, "_cuda", streams)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: log.append("kept"))
    there = upload(samples, CPU, 6)
    there.side = streams
    transfer, memory = resident._Transfer(there), BatchMemory(samples.layout, None, CPU)
    for indices in (torch.tensor([9, 1]), torch.tensor([10, 2, 7])):
        assert_equal(transfer.fetch(indices).batch(memory), samples.batch(indices))
    fetch = ["host waits until copied", "stream waits until used", "copied"]
    assert log == [*fetch, "stream waits until copied", "kept", "used"] * 2


# ---- what only a GPU shows


@pytest.mark.cuda
@pytest.mark.parametrize("bound", [0, 6, None])
def test_cuda_streams_are_in_order(bound: int | None) -> None:
    """Slow work on a batch, queued and not waited for: the next batches do not overtake it."""
    samples, order = host(content()), orders(8)
    there = upload(samples, torch.device("cuda", 0), bound)
    kept = []
    with torch.cuda.stream(torch.cuda.Stream()):
        for batch in there.batches(order, torch.float32):
            torch.cuda._sleep(10_000_000)
            kept.append({name: array.clone() for name, array in batch.items()})
    torch.cuda.synchronize()
    for batch, indices in zip(kept, order, strict=True):
        assert_equal(batch, samples.batch(indices, torch.float32))


@pytest.mark.cuda
def test_cuda_resident_batches_do_not_wait() -> None:
    """A whole epoch is queued without one synchronisation."""
    there = upload(host(content()), torch.device("cuda", 0), None)
    list(there.batches(orders()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(there.batches(orders(2)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
