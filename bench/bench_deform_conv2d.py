"""deform_conv2d against its reference and a plain convolution of the same shape.

    pytest bench/bench_deform_conv2d.py

The legs run in turn, one after the other, so that a change of the machine's speed meets all; the
printed lines and ``extra_info`` give the median of each in ms and as a multiple of the convolution,
which is the floor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nasfast.device import machine_info
from nasfast.ops import deform_conv2d, deform_conv2d_reference

# batch, channels, out_channels, size
SHAPES = {"decoder": (2, 48, 48, (64, 80)), "head": (1, 256, 256, (40, 52))}


def legs(
    shape: tuple[int, int, int, tuple[int, int]], backward: bool
) -> dict[str, Callable[[], Any]]:
    """The calls to time, a 3x3 kernel with mask, channels last."""
    batch, channels, out_channels, size = shape
    last = torch.channels_last
    input = torch.randn(batch, channels, *size).to(memory_format=last)
    offset, mask = torch.randn(batch, 18, *size), torch.rand(batch, 9, *size)
    weight = torch.randn(out_channels, channels, 3, 3)
    leaves = [input, offset, weight, mask]
    for leaf in leaves:
        leaf.requires_grad_(backward)
    cotangent = torch.randn(batch, out_channels, *size).to(memory_format=last)

    def leg(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], Any]:
        if not backward:
            return function
        return lambda: torch.autograd.grad(function(), leaves, cotangent)

    return {
        "convolution": leg(lambda: F.conv2d(input, weight, None, 1, 1), [input, weight]),
        "nasfast": leg(lambda: deform_conv2d(input, offset, weight, None, 1, 1, 1, mask), leaves),
        "reference": leg(
            lambda: deform_conv2d_reference(input, offset, weight, None, 1, 1, 1, mask), leaves
        ),
    }


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_deform_conv2d(
    benchmark: Any,
    capsys: pytest.CaptureFixture[str],
    shape: tuple[int, int, int, tuple[int, int]],
    backward: bool,
) -> None:
    calls = legs(shape, backward)
    times: dict[str, list[float]] = {name: [] for name in calls}

    def round_of_all() -> None:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)

    benchmark.pedantic(round_of_all, rounds=9, warmup_rounds=2)
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    floor = medians["convolution"]
    report = {name: f"{1e3 * t:.2f} ms, {t / floor:.1f}x" for name, t in medians.items()}
    benchmark.extra_info.update(report | {"machine": machine_info()})
    with capsys.disabled():
        print("", *(f"{name:12} {row}" for name, row in report.items()), sep="\n  ")
