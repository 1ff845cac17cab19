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
from nasfast.cache.batches import HostSamples


def checks(samples: HostSamples) -> list[int]:
    """The samples that were checked."""
    return samples._segment.checked  # type: ignore[attr-defined]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "the thread does not come to it"
        time.sleep(0.001)


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("nasfast-batches")]


@pytest.fixture(autouse=True)
def _no_thread_stays() -> Iterator[None]:
    yield
    if threads():  # of an iteration in a reference cycle; a collection takes half a second
        gc.collect()
    wait_until(lambda: threads() == [])


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("indices", [[3, 10, 3, 0], [5], []], ids=str)
def test_batch(dtype: torch.dtype | None, indices: list[int]) -> None:
    """Maps in the dtype that is asked for; labels as they are."""
    encoded = content()
    chosen = torch.tensor(indices, dtype=torch.int64)
    samples = host(encoded)
    expected = {name: array[chosen] for name, array in encoded.items()}
    for name in ("tap0", "tap1"):
        expected[name] = expected[name].to(dtype or torch.float16)
    assert_equal(samples.batch(chosen, dtype), expected)
    assert checks(samples) == indices


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_batches_are_those_of_batch(ahead: int) -> None:
    samples, order = host(content()), orders(3)
    batches = samples.batches(iter(order), torch.float32, ahead)
    for batch, indices in zip(batches, order, strict=True):
        assert_equal(batch, samples.batch(indices, torch.float32))
    assert list(samples.batches([], ahead=ahead)) == []


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_a_batch_is_valid_until_the_next_is_asked_for(ahead: int) -> None:
    """However far the thread comes meanwhile: to what ``ahead`` says, in as much memory."""
    samples, order, drawn = host(content()), orders(4), []

    def draws() -> Iterator[Tensor]:
        for indices in order:
            drawn.append(len(indices))
            yield indices

    batches, memory = samples.batches(draws(), ahead=ahead), set()
    for number, indices in enumerate(order):
        batch = next(batches)
        fetched = sum(len(indices) for indices in order[: number + 1 + ahead])
        wait_until(lambda fetched=fetched: len(checks(samples)) == fetched)  # type: ignore[misc]
        assert sum(drawn) == fetched
        assert torch.equal(batch["labels"], samples.batch(indices)["labels"])
        del checks(samples)[-len(indices) :]
        if len(indices) == 4:  # memory that had fewer grows for these
            memory.add(batch["tap0"].data_ptr())
    assert len(memory) <= ahead + 1
    assert list(batches) == []


def test_batches_grow_and_may_be_empty() -> None:
    samples = host(content())
    sizes = [1, 0, 9, 3, 11, 2]
    order = [torch.arange(size) for size in sizes]
    for batch, indices in zip(samples.batches(order), order, strict=True):
        assert_equal(batch, samples.batch(indices))


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


INDEX = "feature cache: expected indices from 0 to 10, got {}; the cache has 11 samples"
TYPE = "feature cache: expected indices as int64 [n], got {}"


def order_that_fails() -> Iterator[Tensor]:
    yield torch.tensor([1])
    raise KeyError("no more")


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ([torch.tensor([3]), torch.tensor([2, -1])], ValueError, INDEX.format(-1)),
        ([torch.tensor([3]), torch.tensor([COUNT])], ValueError, INDEX.format(COUNT)),
        ([torch.tensor([3]), torch.tensor([1.0])], ValueError, TYPE.format("float32 [1]")),
        ([torch.tensor([3]), torch.tensor([[1]])], ValueError, TYPE.format("int64 [1, 1]")),
        ([torch.tensor([5]), torch.tensor([6])], RuntimeError, "sample 6 is damaged"),
        (order_that_fails, KeyError, "'no more'"),
    ],
    ids=["negative", "too-large", "float", "two-dimensional", "damaged", "order"],
)
def test_errors_come_where_the_batch_would(
    order: Any, error: type[Exception], message: str, ahead: int
) -> None:
    given = order() if callable(order) else order
    batches = host(content(), broken=[6]).batches(given, None, ahead)
    assert len(next(batches)["labels"]) == 1
    with raises(error, message):
        next(batches)
    assert list(batches) == []


def test_errors_of_arguments() -> None:
    samples = host(content())
    message = "feature cache: expected maps as one of float32, bfloat16, float16, got torch.float64"
    with raises(ValueError, message):
        samples.batch(torch.tensor([1]), torch.float64)
    with raises(ValueError, message):
        samples.batches([torch.tensor([1])], torch.float64)
    with raises(ValueError, "feature cache: expected 0 batches ahead or more, got -1"):
        samples.batches([], ahead=-1)


def test_a_consumer_that_fails_stops_the_thread() -> None:
    def consume() -> None:
        for _ in host(content()).batches(orders(9)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()


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
