"""Size and speed of a network."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nasfast.training.loop import Runtime


def count_parameters(module: nn.Module, *, exclude: str = "aux_heads") -> int:
    """Parameters, BatchNorm's included, outside submodules whose path has ``exclude``."""
    return sum(p.numel() for name, p in module.named_parameters() if exclude not in name)


def count_macs(module: nn.Module, size: tuple[int, int], *, channels: int = 3) -> int:
    """Multiply-accumulates of convolutions and products for one image in evaluation mode.

    Args:
        module: a network on images ``[1, channels, H, W]``; it is not run, only traced on meta
            tensors.
        size: (H, W) of the image.
        channels: of the image.
    """
    return count_macs_on(module, torch.empty(1, channels, *size, device="meta"))


def count_macs_on(module: nn.Module, inputs: object) -> int:
    """The same for a network on ``inputs``, tensors on the device "meta"."""
    meta = copy.deepcopy(module).to("meta").eval()
    counter = _Flops()  # type: ignore[no-untyped-call]
    with torch.no_grad(), counter:
        meta(inputs)
    return counter.flops // 2


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What FlopCounterMode counts, without taking apart the operations that have no formula."""

    flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result: Tensor = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, in milliseconds."""

    median: float
    low: float
    """10th percentile."""
    high: float
    """90th percentile."""
    runs: int
    batch: int
    size: tuple[int, int]
    """(H, W) of the images."""
    dtype: str
    device: str
    threads: int


@torch.inference_mode()
def measure_latency(
    module: nn.Module,
    size: tuple[int, int],
    runtime: Runtime,
    *,
    batch: int = 1,
    channels: int = 3,
    seconds: float = 3.0,
) -> Latency:
    """Time forward passes for about ``seconds`` after a warm-up of a fifth of that."""
    images = torch.rand(batch, channels, *size, device=runtime.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def once() -> float:
        start = time.perf_counter()
        with runtime.autocast():
            module(images)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        return (time.perf_counter() - start) * 1e3

    def run_for(budget: float) -> list[float]:
        times: list[float] = []
        deadline = time.perf_counter() + budget
        while time.perf_counter() < deadline or len(times) < 5:
            times.append(once())
        return times

    run_for(seconds / 5)
    times = run_for(seconds)
    deciles = statistics.quantiles(times, n=10)
    return Latency(
        median=statistics.median(times),
        low=deciles[0],
        high=deciles[-1],
        runs=len(times),
        batch=batch,
        size=size,
        dtype=runtime.precision,
        device=str(runtime.device),
        threads=torch.get_num_threads(),
    )
