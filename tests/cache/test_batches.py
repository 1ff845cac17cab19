"""Batches gathered on the host, and the thread that works ahead."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import COUNT, assert_equal, content, host, orders
from samples import raises
from torch import Tensor

import nasfast
from nasfast.cache.batches import Batches, HostSamples

PARTS = [(COUNT,), (4, 7), (1, 5, 5)]
every_parts = pytest.mark.parametrize("parts", PARTS, ids=str)


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "the thread does not come to it"
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "nasfast-batches"]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    if threads():
        gc.collect()
    assert threads() == []


@every_parts
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("indices", [[3, 10, 3, 0], [5], []], ids=str)
def test_batch(parts: tuple[int, ...], dtype: torch.dtype | None, indices: list[int]) -> None:
    """Maps in the dtype that is asked for; labels as they are."""
    encoded = content()
    chosen = torch.tensor(indices, dtype=torch.int64)
    batch = host(encoded, parts).batch(chosen, dtype)
    wanted = {name: array[chosen] for name, array in encoded.items()}
    for name in ("tap0", "tap1"):
        wanted[name] = wanted[name].to(dtype or torch.float16)
    assert_equal(batch, wanted)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
def test_int8(dtype: torch.dtype | None) -> None:
    """Times its scale, rounded once; what belongs to it is not part of a batch."""
    encoded = content(torch.float32)
    samples = host(encoded, storage="int8")
    indices = torch.tensor([7, 2])
    batch = samples.batch(indices, dtype)
    wanted = {"labels": encoded["labels"][indices]}
    for name in ("tap0", "tap1"):
        scale = encoded[name].abs().amax((2, 3), keepdim=True) / 127
        exact = (encoded[name] / scale).round() * scale
        wanted[name] = exact[indices].to(dtype or torch.float32)
    assert_equal(batch, {name: wanted[name] for name in encoded})


def test_only_samples_that_are_read_are_checked() -> None:
    samples = host(content(), (4, 7))
    samples.batch(torch.tensor([9, 1, 9, 4]))
    assert [part.checked for part in samples._sources] == [[1], [9, 9, 4]]  # type: ignore[attr-defined]


@every_parts
@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_batches_are_those_of_batch(parts: tuple[int, ...], ahead: int) -> None:
    samples, order = host(content(), parts), orders(3)
    count = 0
    for batch, indices in zip(
        samples.batches(iter(order), torch.float32, ahead), order, strict=True
    ):
        assert_equal(batch, samples.batch(indices, torch.float32))
        count += 1
    assert count == len(order)


def test_no_batches() -> None:
    assert list(host(content()).batches([])) == []


def test_batches_grow_and_may_be_empty() -> None:
    samples = host(content())
    sizes = [1, 0, 9, 3, 11, 2]
    order = [torch.arange(size) for size in sizes]
    for batch, indices in zip(samples.batches(order), order, strict=True):
        assert_equal(batch, samples.batch(indices))


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_batch_is_valid_until_the_next_is_asked_for(ahead: int) -> None:
    """However far the thread comes meanwhile; and no memory is made beyond that of the ring."""
    samples, order = host(content()), orders(4)
    batches = samples.batches(order, ahead=ahead)
    memory = set()
    for number, indices in enumerate(order):
        batch = next(batches)
        left = min(ahead, len(order) - number - 1)
        if ahead:
            wait_until(lambda left=left: batches._ready.qsize() >= left)  # type: ignore[misc]
        assert_equal(batch, samples.batch(indices))
        if len(indices) == 4:
            memory.add(batch["tap0"].data_ptr())
    assert len(memory) <= ahead + 1
    assert list(batches) == []


def test_memory_serves_the_next_epoch_too() -> None:
    samples = host(content())
    order = [torch.arange(4)] * 5
    memory = [{batch["tap0"].data_ptr() for batch in samples.batches(order)} for _ in range(3)]
    assert memory[0] == memory[1] == memory[2]


def test_iterations_at_once_have_memory_of_their_own() -> None:
    samples, order = host(content()), orders()
    for first, second, indices in zip(samples.batches(order), samples.batches(order), order):
        assert first["tap0"].data_ptr() != second["tap0"].data_ptr()
        assert_equal(first, samples.batch(indices))
        assert_equal(second, samples.batch(indices))


def test_the_last_batch_of_a_closed_iteration_keeps_its_memory() -> None:
    samples, order = host(content()), orders()
    batches = samples.batches(order)
    batch = next(batches)
    batches.close()
    assert list(batches) == []
    list(samples.batches(orders(2)))
    assert_equal(batch, samples.batch(order[0]))


def test_the_thread_works_ahead_and_no_further() -> None:
    drawn = []

    def order() -> Iterator[Tensor]:
        for number in range(9):
            drawn.append(number)
            yield torch.tensor([number])

    batches = host(content()).batches(order(), ahead=2)
    wait_until(lambda: len(drawn) == 4)  # one for each place, and one that waits
    for number in range(1, 4):
        next(batches)
        wait_until(lambda number=number: len(drawn) == 3 + number)  # type: ignore[misc]
    batches.close()
    assert len(drawn) <= 7


def test_memory_made_in_inference_mode_serves_training() -> None:
    samples, order = host(content(torch.float32)), orders()
    with torch.inference_mode():
        list(samples.batches(order))
    weight = torch.ones((), requires_grad=True)
    for batch in samples.batches(order):
        (batch["tap0"] * weight).sum().backward()


def test_memory_that_a_gradient_needs_is_missed() -> None:
    """A loss that is kept over the next batches is an error, not another number."""
    weight = torch.ones((), requires_grad=True)
    losses = [
        (batch["tap0"] * weight).sum() for batch in host(content()).batches(orders(2), ahead=1)
    ]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()


@pytest.mark.parametrize("bad", [-1, COUNT])
def test_error_of_an_index(bad: int) -> None:
    batches = host(content(), (4, 7)).batches([torch.tensor([3]), torch.tensor([2, bad])])
    assert len(next(batches)["labels"]) == 1
    with raises(
        ValueError,
        f"feature cache: expected indices from 0 to 10, got {bad}; the cache has 11 samples",
    ):
        next(batches)
    assert list(batches) == []


@pytest.mark.parametrize(
    ("indices", "got"),
    [(torch.tensor([1.0]), "float32 [1]"), (torch.tensor([[1]]), "int64 [1, 1]")],
    ids=["float", "two-dimensional"],
)
def test_error_of_indices(indices: Tensor, got: str) -> None:
    with raises(ValueError, f"feature cache: expected indices as int64 [n], got {got}"):
        host(content()).batch(indices)


def test_error_of_a_damaged_sample() -> None:
    batches = host(content(), broken=[6]).batches([torch.tensor([5]), torch.tensor([6])])
    next(batches)
    with raises(RuntimeError, "sample 6 is damaged"):
        next(batches)


def test_error_of_the_order() -> None:
    def order() -> Iterator[Tensor]:
        yield torch.tensor([1])
        raise KeyError("no more")

    batches = host(content()).batches(order())
    next(batches)
    with raises(KeyError, "'no more'"):
        next(batches)


@pytest.mark.parametrize("call", [HostSamples.batch, HostSamples.batches])
def test_error_of_the_dtype(call: Callable[..., Any]) -> None:
    with raises(
        ValueError,
        "feature cache: expected maps as one of float32, bfloat16, float16, got torch.float64",
    ):
        call(host(content()), torch.tensor([1]), torch.float64)


def test_error_of_ahead() -> None:
    with raises(
        ValueError,
        "feature cache: expected 0 batches ahead or more, got -1",
    ):
        host(content()).batches([], ahead=-1)


def test_a_consumer_that_fails_stops_the_thread() -> None:
    def consume(batches: Batches) -> None:
        for _ in batches:
            raise ZeroDivisionError

    batches = host(content()).batches(orders(9))
    (thread,) = threads()
    with pytest.raises(ZeroDivisionError):
        consume(batches)
    del batches
    gc.collect()
    assert not thread.is_alive()


def test_batches_keep_their_samples_alive() -> None:
    encoded, order = content(), orders()
    batches = host(encoded).batches(order)
    gc.collect()
    for batch, indices in zip(batches, order, strict=True):
        assert torch.equal(batch["labels"], encoded["labels"][indices])


def test_the_process_may_end_meanwhile() -> None:
    code = (
        "import torch\n"
        "from blocks import content, host, orders\n"
        "batches = host(content()).batches(orders(99))\n"
        "next(batches)\n"
        "print('done')\n"
    )
    folders = [str(Path(nasfast.__file__).parents[1]), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
