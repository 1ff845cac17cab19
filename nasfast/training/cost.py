"""Size and speed of a network."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nasfast.training.loop import Runtime
from nasfast.training.trace import trace


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
    return trace(module, inputs).macs


def measured_costs(
    module: nn.Module, size: tuple[int, int], *, channels: int = 3
) -> dict[str, float]:
    """Costs of a network in evaluation mode, without auxiliary heads, for one image.

    They are "params", parameters; "macs", multiply-accumulates; and "memory", the bytes of the
    parameters and, at the most, of the maps that are there at one time, in float32. A network in
    half precision takes about half of these.
    """
    found = trace(module, torch.empty(1, channels, *size, device="meta"))
    params = count_parameters(module)
    return {"params": params, "macs": found.macs, "memory": 4 * params + found.peak}


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass, in milliseconds."""

    median: float
    p95: float
    """95th percentile."""
    runs: int
    batch: int
    size: tuple[int, int]
    """(H, W) of the images."""
    dtype: str
    backend: str
    """What computes: a library, its version, and where it has several its provider."""
    device: str
    threads: int


@torch.inference_mode()
def measure_latency(
    modules: Sequence[nn.Module],
    size: tuple[int, int],
    runtime: Runtime,
    *,
    batch: int = 1,
    channels: int = 3,
    seconds: float = 3.0,
) -> list[Latency]:
    """Time forward passes of networks, which take turns, for about ``seconds`` each after a warm-up
    of a fifth of that."""
    images = torch.rand(batch, channels, *size, device=runtime.device)
    images = images.contiguous(memory_format=torch.channels_last)

    def once(module: nn.Module) -> float:
        start = time.perf_counter()
        with runtime.autocast():
            module(images)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)
        return (time.perf_counter() - start) * 1e3

    def run_for(budget: float) -> list[list[float]]:
        rounds: list[list[float]] = []
        deadline = time.perf_counter() + budget * len(modules)
        while time.perf_counter() < deadline or len(rounds) < 5:
            rounds.append([once(module) for module in modules])
        return rounds

    run_for(seconds / 5)
    return [
        Latency(
            median=statistics.median(times),
            p95=statistics.quantiles(times, n=20, method="inclusive")[-1],
            runs=len(times),
            batch=batch,
            size=size,
            dtype=runtime.precision,
            backend=f"torch {torch.__version__}",
            device=str(runtime.device),
            threads=torch.get_num_threads(),
        )
        for times in zip(*run_for(seconds), strict=True)
    ]
