"""Times of networks and of their operators on a target, as it runs what is deployed."""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.device import device_name
from nasfast.inference.export import exported_bytes
from nasfast.inference.exported import import_onnxruntime, onnx_session, provider_of
from nasfast.inference.model import Model
from nasfast.latency.onnx_operators import onnx_operator
from nasfast.latency.operators import Operator
from nasfast.models import layers
from nasfast.ops import DeformConv2d
from nasfast.training.loop import Runtime
from nasfast.utils.config import BatchSize, Bound, Bounded, Channels, from_mapping
from nasfast.utils.errors import UserError, cause, out_of_memory

Backend = Literal["torch", "compiled", "onnxruntime"]
"""torch: eager, on CUDA a graph of its kernels. compiled: torch.compile. onnxruntime: an ONNX file
of nasfast export, in float32."""
_MANY = 2**20
Run = Callable[[], None]
"""One forward pass."""


@dataclass(frozen=True)
class Target(Bounded):
    """Where and how latencies are measured."""

    backend: Backend
    device: str
    threads: Annotated[int, Bound(1, 1024)]
    batch: BatchSize
    size: Annotated[tuple[int, int], Bound(1, 2**16)]
    """(H, W) of the images."""
    channels: Channels
    precision: Literal["float32", "bfloat16"]
    machine: str
    """Name of the processor or the GPU."""
    version: str
    """Of what computes."""

    @classmethod
    def of(
        cls,
        backend: Backend,
        runtime: Runtime,
        *,
        threads: int,
        batch: int,
        size: tuple[int, int],
        channels: int,
    ) -> Target:
        """This machine.

        Raises:
            UserError: the backend is not installed, or does not compute on the device.
        """
        version, precision = torch.__version__, cast(Any, runtime.precision)
        if backend == "onnxruntime":
            onnxruntime = import_onnxruntime("latency-backend onnxruntime")
            provider, available = provider_of(runtime.device), onnxruntime.get_available_providers()
            if provider not in available:
                raise UserError(
                    f"latency-backend: expected an onnxruntime that computes on {runtime.device}, "
                    f"got one of {', '.join(available)}; pip install onnxruntime-gpu, or use "
                    "--latency-backend torch"
                )
            version, precision = onnxruntime.__version__, "float32"
        device = str(runtime.device)
        machine = device_name(runtime.device)
        return cls(backend, device, threads, batch, size, channels, precision, machine, version)

    def __post_init__(self) -> None:
        """UserError for a device or numbers that there cannot be."""
        super().__post_init__()
        if not re.fullmatch(r"(cpu|cuda)(:\d{1,3})?", self.device):
            raise UserError(
                f"device: expected cpu, cuda or cuda:NUMBER, got {self.device!r}; correct it"
            )

    @property
    def runtime(self) -> Runtime:
        """Device and precision of PyTorch's backends."""
        return Runtime(torch.device(self.device), choice=self.precision)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the images of a forward pass."""
        return (self.batch, self.channels, *self.size)

    def __str__(self) -> str:
        height, width = self.size
        return (
            f"{self.backend} {self.version}, {self.precision}, {self.machine}, {self.threads} "
            f"threads, batch {self.batch}, {height}x{width}"
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, obj: Mapping[str, Any]) -> Target:
        """Inverse of `to_json`; UserError for another form."""
        return from_mapping(cls, obj, "target")


def deployed(model: Model, target: Target) -> Run:
    """A forward pass of a network as the target runs it.

    Raises:
        UserError: it cannot be exported or compiled.
    """
    device = torch.device(target.device)
    images = torch.rand(target.shape)
    if target.backend == "onnxruntime":
        data = exported_bytes(model, size=target.size)
        return _session(data, device, {"images": images})
    network: nn.Module = copy.deepcopy(model)
    runtime = target.runtime
    runtime.place(network).eval()
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    if target.backend == "compiled":
        network = _compiled(network, images, runtime)
    return _forward(network, (images,), runtime)


def single(operator: Operator, target: Target) -> Run | None:
    """A pass of one operator, as a network on the target has it; None for one that is not known
    there."""
    device = torch.device(target.device)
    inputs = [torch.rand(shape) for shape in operator.reads]
    if target.backend == "onnxruntime":
        data = onnx_operator(operator)
        if data is None:
            return None
        named = {f"x{i}": each for i, each in enumerate(inputs)}
        return _session(data, device, named)
    module = torch_operator(operator)
    if module is None:
        return None
    runtime = target.runtime
    runtime.place(module).eval()
    wide = operator.wide or (False,) * len(inputs)
    placed = tuple(
        _channels_last(each.to(device, torch.float32 if w else runtime.dtype))
        for each, w in zip(inputs, wide, strict=True)
    )
    return _forward(module, placed, runtime)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _session(data: bytes, device: torch.device, inputs: Mapping[str, Tensor]) -> Run:
    session = onnx_session(data, Path("latency"), device)
    arrays = {name: each.numpy() for name, each in inputs.items()}

    def run() -> None:
        session.run(None, arrays)

    return run


def _forward(module: nn.Module, inputs: tuple[Tensor, ...], runtime: Runtime) -> Run:
    """Eager; on CUDA a graph, where it can be recorded."""

    @torch.inference_mode()
    def eager() -> None:
        with runtime.autocast():
            module(*inputs)
        if runtime.device.type == "cuda":
            torch.cuda.synchronize(runtime.device)

    if runtime.device.type != "cuda":
        return eager
    for _ in range(3):  # what is allocated and chosen at first
        eager()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.inference_mode(), torch.cuda.graph(graph), runtime.autocast():
            module(*inputs)
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        return eager  # an operation waits for the host

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize(runtime.device)

    return replay


def _compiled(network: nn.Module, images: Tensor, runtime: Runtime) -> nn.Module:
    compiled = cast(nn.Module, torch.compile(network, dynamic=False))
    # networks share the code of their class: of the ninth one the compiler would compile nothing
    unlimited = torch._dynamo.config.patch(recompile_limit=_MANY, accumulated_recompile_limit=_MANY)
    try:
        with torch.inference_mode(), runtime.autocast(), unlimited:
            compiled(images)
    except Exception as error:  # the compiler's own, of many kinds
        raise UserError(
            "latency-backend compiled: expected torch.compile to work here, got "
            f"'{cause(error)}'; install a C++ compiler, or use --latency-backend torch"
        ) from error
    return compiled


def torch_operator(operator: Operator) -> nn.Module | None:
    """A module that does the same to maps of its shapes, or None."""
    kind, settings = operator.kind, operator.settings
    if kind in ("conv", "deform_conv"):
        (channels, out), groups = (operator.reads[0][1], operator.weight[0]), settings[6]
        kernel, stride = operator.weight[2:], settings[:2]
        padding, dilation = settings[2:4], settings[4:6]
        made: list[nn.Module] = []
        sizes: Any = kernel, stride, padding, dilation, groups, operator.bias
        if kind == "deform_conv":
            made.append(DeformConv2d(channels, out, *sizes))
        elif _is_ours(operator):
            made.append(layers.Conv2d(channels, out, kernel[0], dilation[0], groups, stride[0]))
        else:
            made.append(nn.Conv2d(channels, out, *sizes))
        if operator.normalized:
            made.append(nn.BatchNorm2d(out))
        if operator.activation:
            made.append(nn.ReLU(True) if operator.activation == "relu" else nn.ReLU6(True))
        return _Chain(*made)
    function = _functions(operator).get(kind)
    return None if function is None else _Function(function)


def _is_ours(operator: Operator) -> bool:
    """Whether it is a convolution of our layers: these have no bias, and keep the size."""
    (height, width), settings = operator.weight[2:], operator.settings
    square = height == width and all(settings[i] == settings[i + 1] for i in (0, 2, 4))
    return not operator.bias and square and settings[2] == settings[4] * (height // 2)


class _Chain(nn.Sequential):
    def forward(self, *inputs: Tensor) -> Tensor:
        first, *rest = self
        y: Tensor = first(*inputs)
        for module in rest:
            y = module(y)
        return y


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def _functions(operator: Operator) -> dict[str, Callable[..., Tensor]]:
    """What does the kinds of operators without weights."""
    makes = operator.makes
    size, channels = makes[-2:], makes[1]
    pool = operator.settings or (1, 1)

    def normalize(x: Tensor) -> Tensor:
        zeros, ones = torch.zeros(2, channels, device=x.device, dtype=torch.float32)
        return F.batch_norm(x, zeros, ones + 1, ones + 1, zeros)

    return {
        "add": torch.add if len(operator.reads) == 2 else lambda x: x + 1,
        "mul": torch.mul if len(operator.reads) == 2 else lambda x: x * 2,
        "div": torch.div if len(operator.reads) == 2 else lambda x: x / 2,
        "sub": torch.sub if len(operator.reads) == 2 else lambda x: x - 1,
        "cat": lambda *maps: torch.cat(maps, operator.axis),
        "relu": F.relu,
        "relu6": F.relu6,
        "clamp": lambda x: x.clamp(min=0),
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
        "mean": lambda x: x.sum((2, 3), keepdim=True),
        "copy": lambda x: x.expand(makes).clone(),
        "pad": lambda x: F.pad(x, (0, size[1] - x.shape[3], 0, size[0] - x.shape[2]), "replicate"),
        "resize": lambda x: F.interpolate(x, size, mode="bilinear"),
        "bicubic": lambda x: F.interpolate(x, size, mode="bicubic"),
        "pixel_shuffle": lambda x: F.pixel_shuffle(x, size[0] // x.shape[2]),
        "cast": lambda x: x.float(),
        "max_pool": lambda x: F.max_pool2d(x, pool[0], pool[1], pool[0] // 2),
        "native_batch_norm": normalize,
        "group_norm": lambda x: torch.group_norm(x, operator.settings[0]),
    }


@contextmanager
def threads(count: int) -> Iterator[None]:
    """As many threads for PyTorch, and for sessions made meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def rounds(runs: Sequence[Run], seconds: float, least: int = 5) -> list[tuple[float, ...]]:
    """Milliseconds of each of some runs, which take turns, round by round, for about ``seconds``
    each; at least so many rounds.

    A turn is two passes, of which the second is timed: what is deployed runs again and again. The
    first finds the memory as another network has left it, and takes longer after a small one.
    """
    found: list[tuple[float, ...]] = []
    deadline = time.perf_counter() + seconds * len(runs)
    while time.perf_counter() < deadline or len(found) < least:
        times = []
        for run in runs:
            run()
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
        found.append(tuple(times))
    return found


def median_time(run: Run, seconds: float, least: int = 5) -> float:
    """Median of `rounds` of one run, in milliseconds."""
    return statistics.median(time for (time,) in rounds([run], seconds, least))
