"""Size and speed of a network."""

from __future__ import annotations

import copy
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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
    counter = _Flops()  # type: ignore[no-untyped-call]
    with torch.no_grad(), counter:
        _evaluating(module)(inputs)
    return counter.flops // 2


def _evaluating(module: nn.Module) -> nn.Module:
    """A network of the same parameters in evaluation mode."""
    twin = copy.copy(module)
    twin.training = False
    twin._modules = {
        name: None if part is None else _evaluating(part) for name, part in module._modules.items()
    }
    return twin


class _Flops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What FlopCounterMode counts, without taking apart the operations that have no formula.

    Nothing is computed: of each operation, whatever the device of its tensors, there is only the
    form of the result, which is worked out once in a process.
    """

    flops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = tuple((name, _form_of(value)) for name, value in (kwargs or {}).items())
        form, flops = _traced(func, _form_of(args), named)
        self.flops += flops
        return _of_form(form)


class _Form(NamedTuple):
    """What the form of a result depends on in a tensor."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def _form_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _Form(value.shape, value.stride(), value.dtype)
    return tuple(map(_form_of, value)) if isinstance(value, (list, tuple)) else value


def _of_form(form: Any) -> Any:
    """The inverse, on the device "meta"."""
    if isinstance(form, _Form):
        return torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device="meta")
    return tuple(map(_of_form, form)) if isinstance(form, tuple) else form


@functools.lru_cache(2**14)
def _traced(func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
    """Form of an operation's result, and its floating-point operations."""
    values, named = _of_form(args), {name: _of_form(value) for name, value in kwargs}
    result = func(*values, **named)
    formula = flop_registry.get(func._overloadpacket)
    flops = 0 if formula is None else int(formula(*values, **named, out_val=result))
    return _form_of(result), flops


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
