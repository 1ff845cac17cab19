"""How every benchmark measures: calls in turn, medians, extra memory, one line on the machine.

The calls of a benchmark run interleaved (A B C A B C ...), so that a change of the
machine's speed affects all of them alike, and multiples are medians of ratios within one round.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nasfast.device import machine_info
from nasfast.ops import _native
from nasfast.training.graphs import capture

Call = Callable[[], Any]
Clock = Callable[[Call], float]  # seconds of a call
MIB = 2**20


def cpu_clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class CudaClock:
    """Time on the current stream between two events, from a cold L2 cache."""

    def __init__(self) -> None:
        floats = torch.cuda.get_device_properties().L2_cache_size  # bytes: four times the cache
        self.larger_than_cache = torch.empty(floats, device="cuda")

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.larger_than_cache.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def cuda_graphs(calls: Mapping[str, Call]) -> tuple[dict[str, Call], dict[str, str]]:
    """The calls as replays of CUDA graphs, free of the time that Python takes to launch them.

    A call that cannot be captured stays as it is; the second result says why.
    """
    replays, reasons = dict(calls), {}
    for name, call in calls.items():
        try:
            graph, _ = capture(call, torch.cuda.Stream())
        except RuntimeError as error:  # it synchronises, say
            cause = error.__context__ or error  # ending a failed capture fails as well
            reasons[name] = str(cause).strip().partition("\n")[0]
        else:
            replays[name] = graph.replay
    return replays, reasons


def backends() -> dict[str, dict[str, str]]:
    """What runs each op on each type of device."""
    return _native.BACKENDS


def require_kernels(call: Call, device: str) -> set[str]:
    """Runs a call: the entries of the extension that it used.

    Raises:
        RuntimeError: it used none, or some op has only its reference on the device.
    """
    entries: set[str] = set()
    run = _native.call

    def recording(entry: str, *arguments: Any) -> None:
        entries.add(entry)
        run(entry, *arguments)

    found = {op: by_device.get(device, "nothing") for op, by_device in backends().items()}
    references = [f"{op}: {text}" for op, text in found.items() if text.startswith("reference")]
    with mock.patch.object(_native, "call", recording):
        call()
    if references or not entries:
        raise RuntimeError(
            f"expected kernels of nasfast on {device}, got "
            f"{'; '.join(references) or 'a call that runs none'}; build with NASFAST_CUDA=on"
        )
    return entries


def kernel_times(call: Call) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of each CUDA kernel in a call, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    profile: Any = profiler.profiler
    # as they come: PyTorch's own tables take minutes for the 40,000 launches of a search step
    for event in profile.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            launches, ms = found.get(event.name(), (0, 0.0))
            found[event.name()] = launches + 1, ms + event.duration_ns() / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def clock_of(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else cpu_clock


@dataclass(frozen=True)
class Peaks:
    """What this machine reaches."""

    flops: float
    """FLOP/s of a matrix product."""
    bandwidth: float
    """Bytes read and written a second by a copy."""


def measure_peaks(
    device: torch.device, dtype: torch.dtype, size: int | None = None, clock: Clock | None = None
) -> Peaks:
    """The best of some runs: products of square matrices, and copies of 64 size^2 bytes."""
    size = size or (8192 if device.type == "cuda" else 2048)
    clock = clock or clock_of(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(64 * size * size, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    product, copy = (
        min(clock(call) for _ in range(7)) for call in (lambda: a @ b, lambda: target.copy_(source))
    )
    return Peaks(2 * size**3 / product, 2 * source.numel() / copy)


class Rounds:
    """Times of interleaved calls, one of each per round."""

    def __init__(self, calls: Mapping[str, Call], clock: Clock = cpu_clock) -> None:
        self.calls, self.clock = calls, clock
        self.times: dict[str, list[float]] = {name: [] for name in calls}

    def warm_up(self, seconds: float, least: int = 7, most: int = 200) -> int:
        """Runs each call; how many rounds then take about ``seconds``."""
        start = time.perf_counter()
        for call in self.calls.values():
            call()
            self.clock(call)
        return min(most, max(least, round(seconds / (time.perf_counter() - start))))

    def time(self, *names: str) -> None:
        """One run of each of these calls, after one that makes caches and thread pools its own."""
        for name in names:
            self.calls[name]()
            self.time_warm(name)

    def time_warm(self, name: str) -> None:
        """One run of a call that has just run."""
        self.times[name].append(self.clock(self.calls[name]))

    def multiple(self, name: str, of: str) -> float:
        """Median over the rounds of the call's time divided by that of another."""
        return statistics.median(a / b for a, b in zip(self.times[name], self.times[of]))


@dataclass(frozen=True)
class Row:
    """Result of one call."""

    ms: float
    """Median."""
    gflops: float
    """GFLOP/s; for all calls of a benchmark the same floating-point operations."""
    multiple: float
    """Of the time of the floor."""
    extra_mib: float | None
    """Memory at the peak beyond the result; None where it was not measured."""
    times: list[float]
    """Seconds, one of each round."""

    def __str__(self) -> str:
        memory = "" if self.extra_mib is None else f", +{self.extra_mib:.1f} MiB"
        return f"{self.multiple:.2f}x, {self.ms:.2f} ms, {self.gflops:.0f} GFLOP/s{memory}"


def rows(
    rounds: Rounds, floor: str, flops: float, extra_bytes: Mapping[str, int | None]
) -> dict[str, Row]:
    """Result of each call."""
    result = {}
    for name, times in rounds.times.items():
        median, extra = statistics.median(times), extra_bytes.get(name)
        multiple = rounds.multiple(name, floor)
        mib = None if extra is None else extra / MIB
        result[name] = Row(1e3 * median, flops / median / 1e9, multiple, mib, times)
    return result


def extra_memory(make: Callable[..., tuple[Call, Call]], *arguments: Any) -> int | None:
    """Bytes that a call needs at its peak beyond the tensors that it returns.

    ``make(*arguments)`` gives a small call, which loads and starts whatever the first call does,
    and the call in question. It runs in a fresh process, so that no buffer of an earlier call hides
    a need, and counts resident memory, so that it matters not who allocates. None where the system
    is not Linux or forbids it.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # torch is imported once
    with ProcessPoolExecutor(1, context) as pool:
        job = pool.submit(_resident_growth, torch.get_num_threads(), make, arguments)
        return job.result()


def _resident_growth(
    threads: int, make: Callable[..., tuple[Call, Call]], arguments: Sequence[Any]
) -> int:
    torch.set_num_threads(threads)
    libc = ctypes.CDLL(None)
    libc.mallopt(-3, 65536)  # M_MMAP_THRESHOLD: whatever is larger comes from and returns to Linux
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: no huge pages, which round up
    small, call = make(*arguments)
    small()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    result = call()
    return max(0, _status("VmHWM") - before - result_bytes(result))


def cuda_extra_memory(call: Call) -> int:
    """Bytes that a call allocates at its peak beyond the tensors that it returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    return max(0, torch.cuda.max_memory_allocated() - before - result_bytes(result))


def result_bytes(result: Tensor | Sequence[Tensor]) -> int:
    tensors = [result] if isinstance(result, Tensor) else result
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


def machine_line() -> str:
    info: dict[str, Any] = machine_info()
    devices = ", ".join(info["cuda_devices"]) or f"{info['cpu']} ({info['isa_level']})"
    commit = f" at {info['git_commit'][:9]}" if info["git_commit"] else ""
    return (
        f"{devices}, {info['threads']} threads, torch {info['torch']}, "
        f"nasfast {info['nasfast']}{commit}"
    )


def write_result(found: Mapping[str, object], path: Path | None) -> None:
    """Print what was measured as JSON, and keep it in a file where one is given."""
    text = json.dumps(found, indent=1)
    print(text)
    if path is not None:
        path.write_text(text + "\n")


def table(head: str, lines: Mapping[str, Mapping[str, object]]) -> str:
    """Markdown: a line of each case, a column of each implementation."""
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    text = [f"| {' | '.join([head, *names])} |", "|---" * (1 + len(names)) + "|"]
    for case, line in lines.items():
        cells = [str(line.get(name, "")) for name in names]
        text.append(f"| {' | '.join([case, *cells])} |")
    return "\n".join(text)
