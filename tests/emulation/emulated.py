"""The CUDA kernels of deform_conv2d on the CPU: cases, calls, and comparison with the reference."""

from __future__ import annotations

import math
import os
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from nasfast.ops import deform_conv2d_reference
from nasfast.ops._native import accumulate

DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
]  # in the order of their codes
IDS = ["float32", "float64", "bfloat16", "float16"]
# of a result, relative to its largest element; the half types round samples and results
TOLERANCE = {
    torch.float32: 1e-5,
    torch.float64: 1e-12,
    torch.bfloat16: 8e-3,  # two of its steps
    torch.float16: 1e-3,
}
TF32_TOLERANCE = 2e-3


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    id: str
    batch: int = 2
    channels: int = 16
    out_channels: int = 8
    size: tuple[int, int] = (6, 9)
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    offset_groups: int = 1
    mask: bool = True
    bias: bool = True
    packed: bool = False  # offset and mask lie side by side in one tensor

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def out_size(self) -> list[int]:
        return [
            (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
            for size, pad, dilation, kernel, stride in zip(
                self.size, self.padding, self.dilation, self.kernel, self.stride
            )
        ]

    def tensors(self, dtype: torch.dtype) -> list[Tensor | None]:
        """input, offset, weight, bias, mask as the reference takes them, in the kernel's dtypes."""
        count = self.taps * self.offset_groups
        wide = accumulate(dtype)
        return [
            torch.randn(self.batch, self.channels, *self.size).to(dtype),
            # odd 32nds: no sample lies near a pixel, where the gradient jumps
            torch.randn(self.batch, 2 * count, *self.out_size, dtype=wide)
            .mul(16)
            .floor()
            .mul(2)
            .add(1)
            .div(16),
            torch.randn(self.out_channels, self.channels // self.groups, *self.kernel).to(dtype),
            torch.randn(self.out_channels, dtype=wide) if self.bias else None,
            torch.rand(self.batch, count, *self.out_size, dtype=wide) if self.mask else None,
        ]

    def sizes(self, deterministic: bool = False, tf32: bool = False) -> tuple[int, ...]:
        """The fields of Params."""
        count = self.taps * self.offset_groups
        steps = (3 * count, 3 * count) if self.packed else (2 * count, count)
        return (
            self.batch,
            self.channels,
            *self.size,
            self.out_channels,
            *self.out_size,
            *self.kernel,
            *self.stride,
            *self.padding,
            *self.dilation,
            self.groups,
            self.offset_groups,
            *steps,
            1,
            int(deterministic),
            int(tf32),
        )

    def reference(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The output, [N, Co, Ho, Wo], in float64."""
        *front, mask = (None if t is None else t.double() for t in tensors)
        return deform_conv2d_reference(*front, self.stride, self.padding, self.dilation, mask)


CASES = [
    Case("plain"),
    Case("no-mask-no-bias", mask=False, bias=False),
    Case("stride-2-1", stride=(2, 1), padding=(0, 2)),
    Case("kernel-1x1", kernel=(1, 1), padding=(0, 0), channels=24),
    Case("kernel-1x3", kernel=(1, 3), padding=(0, 1), channels=40),
    Case("kernel-5x5", kernel=(5, 5), padding=(2, 2), size=(7, 6)),
    Case("dilation", size=(9, 8), dilation=(2, 3), padding=(2, 1)),
    Case("groups-2", channels=32, out_channels=16, groups=2),
    Case("groups-3-offset-groups-2", channels=48, out_channels=12, groups=3, offset_groups=2),
    Case("groups-2-offset-groups-3", channels=48, out_channels=16, groups=2, offset_groups=3),
    Case("packed", channels=32, offset_groups=2, packed=True),
    Case("channels-3", channels=3, out_channels=5),
    Case("channels-6-odd", channels=18, out_channels=9, groups=3, offset_groups=2),
    Case("batch-0", batch=0),
    Case("batch-33", batch=33, size=(4, 5), channels=8),
    Case("wide", batch=1, channels=80, out_channels=136, size=(9, 8)),
]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes of any kind, small."""

    def pair(least: int, most: int) -> tuple[int, int]:
        return draw(st.integers(least, most)), draw(st.integers(least, most))

    groups, offset_groups = pair(1, 4)
    both = math.lcm(groups, offset_groups)
    kernel, dilation = pair(1, 4), pair(1, 2)
    spare = pair(1, 7)
    size = tuple(
        1 + reach * (taps - 1) + more for reach, taps, more in zip(dilation, kernel, spare)
    )
    return Case(
        "",
        batch=draw(st.integers(1, 3)),
        channels=both * draw(st.sampled_from([1, 2, 3, 4, 8, 12, 16])),
        out_channels=groups * draw(st.sampled_from([1, 3, 4, 8, 20, 70])),
        size=(size[0], size[1]),
        kernel=kernel,
        stride=pair(1, 3),
        padding=pair(0, 2),
        dilation=dilation,
        groups=groups,
        offset_groups=offset_groups,
        mask=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


def last(tensor: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H, W, C], contiguous."""
    return tensor.permute(0, 2, 3, 1).contiguous()


def first(tensor: Tensor) -> Tensor:
    """[N, H, W, C] -> [N, C, H, W]."""
    return tensor.permute(0, 3, 1, 2)


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Not a number before a kernel writes."""
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def arrange(case: Case, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """input, offset, mask, weight, bias as the kernels take them."""
    input, offset, weight, bias, mask = tensors
    assert input is not None
    assert offset is not None
    assert weight is not None
    shifts, factors = last(offset), None if mask is None else last(mask)
    if case.packed:
        assert factors is not None
        both = torch.cat([shifts, factors], -1)
        shifts, factors = both, both.flatten()[shifts.shape[-1] :]
    return [last(input), shifts, factors, last(weight), bias]


def buffers(
    case: Case,
    dtype: torch.dtype,
    tensors: Sequence[Tensor | None],
    grad: Tensor | None = None,
    wanted: Sequence[bool] = (True,) * 5,  # of input, offset, weight, bias, mask
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What the kernel reads and writes, in the order of Forward, or of Backward with grad."""
    input, offset, mask, weight, bias = arrange(case, tensors)
    wide, pixels = accumulate(dtype), (case.batch, *case.out_size)
    if grad is None:
        return [input, offset, mask, weight, bias], [poisoned((*pixels, case.out_channels), dtype)]
    count = case.taps * case.offset_groups
    assert input is not None
    assert weight is not None
    shapes = [
        (input.shape, dtype),
        ((*pixels, 2 * count), wide),
        (weight.shape, wide),
        ((case.out_channels,), wide),
        ((*pixels, count), wide),
    ]
    wanted = [*wanted[:4], wanted[4] and case.mask]
    written = [poisoned(*shape) if want else None for shape, want in zip(shapes, wanted)]
    return [last(grad), input, offset, mask, weight], written


class Kernels:
    """The emulated module."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.set_order = module.set_order

    def call(
        self, name: str, dtype: torch.dtype, sizes: Sequence[int], pointers: Sequence[Tensor | None]
    ) -> None:
        """With a workspace that has no byte to spare."""
        code = DTYPES.index(dtype)
        size = getattr(self.module, f"{name}_workspace")(code, sizes, 0)
        workspace = torch.full((size + 512,), 0xFF, dtype=torch.uint8)
        start = -workspace.data_ptr() % 256
        addresses = [0 if t is None else t.data_ptr() for t in pointers]
        getattr(self.module, name)(code, sizes, addresses, workspace.data_ptr() + start, 0, 0)
        assert workspace[:start].eq(0xFF).all()
        assert workspace[start + size :].eq(0xFF).all()

    def run(
        self,
        case: Case,
        dtype: torch.dtype,
        tensors: Sequence[Tensor | None],
        grad: Tensor | None = None,
        wanted: Sequence[bool] = (True,) * 5,
        deterministic: bool = False,
        tf32: bool = False,
    ) -> list[Tensor | None]:
        """[output], or the gradients in the order of ``expected``; maps as [N, C, H, W]."""
        name = "deform_conv2d_" + ("forward" if grad is None else "backward") + "_cuda"
        read, written = buffers(case, dtype, tensors, grad, wanted)
        self.call(name, dtype, case.sizes(deterministic, tf32), [*read, *written])
        return [t if t is None or t.dim() == 1 else first(t) for t in written]


def replay(
    program: Path,
    folder: Path,
    case: Case,
    dtype: torch.dtype,
    tensors: Sequence[Tensor | None],
    grad: Tensor | None = None,
    wanted: Sequence[bool] = (True,) * 5,
    deterministic: bool = False,
    tf32: bool = False,
    order: int = 0,
    skip: tuple[int, int] = (-1, -1),  # number of the barrier and of the wait to leave out
) -> tuple[subprocess.CompletedProcess[str], list[Tensor | None]]:
    """The same call in a program under a sanitizer, and what it wrote."""
    read, written = buffers(case, dtype, tensors, grad, wanted)
    done, outputs = replay_call(
        program,
        folder,
        int(grad is not None),
        DTYPES.index(dtype),
        case.sizes(deterministic, tf32),
        read,
        written,
        order,
        skip,
    )
    return done, [t if t is None or t.dim() == 1 else first(t) for t in outputs]


def replay_call(
    program: Path,
    folder: Path,
    call: int,  # its number in replay.cpp
    dtype: int,  # its code
    sizes: Sequence[int],
    read: Sequence[Tensor | None],
    written: Sequence[Tensor | None],
    order: int = 0,
    skip: tuple[int, int] = (-1, -1),
) -> tuple[subprocess.CompletedProcess[str], list[Tensor | None]]:
    """A call in a program of its own; what it wrote where it came to that, in the given shapes."""
    header = [call, dtype, order, *skip, *sizes]
    content = b""
    for tensor in read:
        header += [-1, 0] if tensor is None else [tensor.numel() * tensor.element_size(), 1]
        content += b"" if tensor is None else tensor.flatten().view(torch.uint8).numpy().tobytes()
    for tensor in written:
        header += [-1 if tensor is None else tensor.numel() * tensor.element_size(), 0]
    described, result = folder / "call", folder / "result"
    described.write_bytes(struct.pack(f"{len(header)}q", *header) + content)
    # ThreadSanitizer maps its memory at fixed addresses
    done = subprocess.run(
        ["setarch", "-R", program, described, result],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"},
    )
    data, outputs = bytearray(result.read_bytes()), list[Tensor | None]()
    for tensor in written:
        size = 0 if tensor is None else tensor.numel() * tensor.element_size()
        if tensor is None or len(data) < size:
            outputs.append(None)
            continue
        flat = torch.frombuffer(data[:size], dtype=tensor.dtype) if size else tensor.flatten()
        outputs.append(flat.view(tensor.shape))
        data = data[size:]
    return done, outputs


def assert_near(actual: Tensor | None, expected: Tensor, tolerance: float) -> None:
    """All elements are written and near, relative to the largest."""
    assert actual is not None
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    error = (actual.double() - expected).abs().max()
    scale = expected.abs().max().clamp_min(1e-3)
    assert error <= tolerance * scale, f"off by {error / scale:.2e} of the largest element"
