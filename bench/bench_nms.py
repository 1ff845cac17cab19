"""Class-aware suppression on the CPU beside the loop that people write with torch.

    pytest bench/bench_nms.py --benchmark-json=nms.json

10,000 boxes of 80 classes, as the 5 x 1,000 candidates of two images, on one thread: the time of
each, as a multiple of ours, which keeps all (as the others do) or the best 100 (as detection does).
torchvision's is measured where it can be loaded. "first call" includes loading what was compiled,
in this process, or compiling it.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import harness
import pytest
import torch
from torch import Tensor

from nasfast.tasks.detection.nms import nms

Tables = dict[str, dict[str, dict[str, object]]]
BOXES, CLASSES, THRESHOLD = 10_000, 80, 0.6
SIDE = 1000  # of the image, in pixels


def crowded(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes ``[1, count, 4]`` around objects of one class each, about 25 an object; scores and
    labels."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    objects = max(1, count // 25)
    center, size = SIDE * rand(objects, 2), 10 + 150 * rand(objects, 2)
    labels = torch.randint(CLASSES, (objects,), generator=generator)
    of = torch.randint(objects, (count,), generator=generator)
    center = center[of] + 0.3 * size[of] * (rand(count, 2) - 0.5)
    half = size[of] * (0.8 + 0.4 * rand(count, 2)) / 2
    boxes = torch.cat([center - half, center + half], 1)
    return boxes[None], rand(1, count), labels[of][None]


def scattered(count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Likewise, anywhere, of any class: few are dropped."""
    generator = torch.Generator().manual_seed(seed)
    center = SIDE * torch.rand(count, 2, generator=generator)
    half = 5 + 75 * torch.rand(count, 2, generator=generator)
    boxes = torch.cat([center - half, center + half], 1)
    scores = torch.rand(1, count, generator=generator)
    return boxes[None], scores, torch.randint(CLASSES, (1, count), generator=generator)


SCENES = {"around objects": crowded, "anywhere": scattered}


def loop(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices of the kept of ``[C, 4]``, class by class and box by box."""
    kept = []
    for label in labels.unique():
        order = (labels == label).nonzero()[:, 0]
        order = order[scores[order].argsort(descending=True)]
        while len(order):
            best, order = order[0], order[1:]
            kept.append(best)
            low = torch.maximum(boxes[best, :2], boxes[order, :2])
            high = torch.minimum(boxes[best, 2:], boxes[order, 2:])
            both = (high - low).clamp(min=0).prod(1)
            area, areas = (
                (each[..., 2] - each[..., 0]) * (each[..., 3] - each[..., 1])
                for each in (boxes[best], boxes[order])
            )
            order = order[both <= threshold * (area + areas - both)]
    index = torch.stack(kept)
    return index[scores[index].argsort(descending=True)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("scene", SCENES)
def test_nms(benchmark: Any, pytestconfig: pytest.Config, tables: Tables, scene: str) -> None:
    found = SCENES[scene](BOXES)
    one = [each[0] for each in found]
    first = harness.cpu_clock(lambda: nms(*found, THRESHOLD, None))
    calls: dict[str, harness.Call] = {
        "nasfast": lambda: nms(*found, THRESHOLD, None),
        "nasfast, the best 100": lambda: nms(*found, THRESHOLD, 100),
        "loop": lambda: loop(*one, THRESHOLD),
    }
    try:
        from torchvision.ops import batched_nms
    except (ImportError, RuntimeError):  # its binary is of another torch
        pass
    else:
        calls["torchvision"] = lambda: batched_nms(*one, THRESHOLD)
    rounds = harness.Rounds(calls)
    count = rounds.warm_up(pytestconfig.getoption("seconds"))
    others = [name for name in calls if name != "nasfast"]

    def setup() -> None:
        rounds.time(*others)
        calls["nasfast"]()

    benchmark.pedantic(rounds.time_warm, args=("nasfast",), setup=setup, rounds=count)
    kept = int((calls["nasfast"]() >= 0).sum())
    rows = {name: 1e3 * statistics.median(times) for name, times in rounds.times.items()}
    benchmark.extra_info.update(
        machine=harness.machine_line(), ms=rows, kept=kept, times=rounds.times, first_call=first
    )
    title = f"suppression of {BOXES:,} boxes of {CLASSES} classes"
    tables.setdefault(title, {})[f"{scene}, {kept:,} kept"] = {
        **{
            name: f"{rounds.multiple(name, 'nasfast'):.2f}x, {ms:.2f} ms"
            for name, ms in rows.items()
        },
        "first call": f"{1e3 * first:.0f} ms",
    }
