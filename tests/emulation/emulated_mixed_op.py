"""The CUDA kernels of mixed_op on the CPU: cases, calls, and comparison with the reference."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import emulated
import torch
from emulated import first, last, poisoned
from hypothesis import strategies as st
from torch import Tensor

from nasfast.ops import mixed_op_reference
from nasfast.ops._native import accumulate
from nasfast.ops.mixed_op import FACTORS, MAPS, Branches

ALL = ("conv", "sep", "dil", "def", "skip")
FIXED, BATCH, GIVEN = range(3)
EPS = 1e-3
# of the norm of a result, relative to that of the reference in float64
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 3e-2, torch.float16: 6e-3}
TF32_TOLERANCE = 4e-3


@dataclass(frozen=True)
class Case:
    """Sizes of one call."""

    id: str
    batch: int = 2
    channels: int = 10
    size: tuple[int, int] = (5, 7)
    offset_groups: int = 2
    branches: tuple[str, ...] = ALL
    fixed: bool = False
    affine: bool = True
    add: bool = False

    def has(self, branch: str) -> bool:
        return branch in self.branches

    @property
    def outputs(self) -> int:
        """Channels of the offset map."""
        return self.offset_groups * 27

    @property
    def map_shape(self) -> tuple[int, ...]:
        return (self.batch, self.channels, *self.size)

    def sizes(
        self, norm: int | None = None, deterministic: bool = False, tf32: bool = False
    ) -> tuple[int, ...]:
        """The fields of Params."""
        norm = (FIXED if self.fixed else BATCH) if norm is None else norm
        (eps,) = struct.unpack("q", struct.pack("d", EPS))
        return (
            self.batch,
            self.channels,
            *self.size,
            self.offset_groups,
            *(norm, eps, int(self.add), int(deterministic), int(tf32)),
        )


@dataclass
class Inputs:
    """Tensors of one call as the reference takes them, in the kernel's dtypes."""

    input: Tensor
    factors: Tensor
    branches: Branches
    scale: Tensor | None
    shift: Tensor | None
    into: Tensor
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values."""
        rest = [None if t is None else t.to(dtype) for t in self.all]
        branches, scale, shift = Branches(*rest[2:12]), *rest[12:]
        input, factors, into, grad = (
            t.to(dtype) for t in (self.input, self.factors, self.into, self.grad)
        )
        return Inputs(input, factors, branches, scale, shift, into, grad)

    @property
    def all(self) -> list[Tensor | None]:
        return [self.input, self.factors, *self.branches, self.scale, self.shift]


def inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """Random ones; the offsets reach over several pixels."""
    c, wide = case.channels, accumulate(dtype)

    def weight(branch: str, *shape: int, scale: float = 0.3, to: torch.dtype = dtype) -> Any:
        return (torch.randn(*shape) * scale).to(to) if case.has(branch) else None

    factors = torch.rand(len(FACTORS)).add(0.3).to(wide)
    if not case.has("skip"):
        factors[4] = 0
    branches = Branches(
        weight("conv", c, c, 3, 3),
        weight("dil", c, c, 3, 3),
        weight("def", c, c, 3, 3),
        weight("def", c, to=wide),
        weight("def", case.outputs, c, 3, 3),
        weight("def", case.outputs, to=wide),
        weight("sep", c, 1, 3, 3),
        weight("sep", c, c, 1, 1),
        weight("sep", c, 1, 3, 3),
        weight("sep", c, c, 1, 1),
    )
    scale, shift = (torch.randn(len(MAPS), c).to(wide) if case.affine else None for _ in range(2))
    if dtype.itemsize == 2:  # the inner ReLUs are open, so that rounding shuts none
        shift = torch.zeros(len(MAPS), c) if shift is None else shift
        shift[-1] += 4
        if case.fixed:
            scale = torch.ones(len(MAPS), c) if scale is None else scale
            scale[-1] *= 0.1
    maps = (torch.randn(case.map_shape).to(dtype) for _ in range(3))
    input, into, grad = maps
    return Inputs(input, factors, branches, scale, shift, into, grad)


@dataclass
class Expected:
    """Of the reference, in float64."""

    output: Tensor
    statistics: Tensor  # of maps that are there
    gradients: list[Tensor | None]  # in the order of Inputs.all


def reference(case: Case, i: Inputs) -> Expected:
    leaves = [None if t is None else t.double().requires_grad_() for t in i.all]
    x, factors, *weights, scale, shift = leaves
    assert x is not None
    assert factors is not None
    output, statistics = mixed_op_reference(
        x, factors, Branches(*weights), scale, shift, batch_norm=not case.fixed, eps=EPS
    )
    given = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad(output, given, i.grad.double(), allow_unused=True))
    gradients = [None if t is None else next(found) for t in leaves]
    gradients = [
        torch.zeros_like(t) if g is None and t is not None else g for g, t in zip(gradients, leaves)
    ]
    before = i.into.double() if case.add else 0
    gradients[0] = gradients[0] + before
    return Expected(output.detach() + before, statistics.detach(), gradients)


def weights(i: Inputs) -> list[Tensor | None]:
    """The branches in the order of Branches in mixed_op.h, channels last."""
    conv, dil, deform, bias, offset, offset_bias, *separable = i.branches

    def arranged(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.dim() == 1 else last(tensor)

    front = [arranged(t) for t in (conv, dil, deform, bias, offset, offset_bias)]
    return [*front, *map(arranged, separable), i.factors, i.scale, i.shift]


@dataclass
class Kept:
    """What a forward pass leaves for the backward pass."""

    raw: Tensor | None  # [5, N, H, W, C]; not with fixed normalisation
    offset: Tensor | None  # [N, H, W, D * 27]; with a deformable branch
    statistics: Tensor | None  # [5, 2, C]; not with fixed normalisation


def forward_buffers(
    case: Case, dtype: torch.dtype, i: Inputs, given: Kept | None = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What the kernel reads, and raw, offset, statistics and output, in the order of Forward."""
    wide, (n, c, h, w) = accumulate(dtype), case.map_shape
    output = last(i.into).clone() if case.add else poisoned((n, h, w, c), dtype)
    return [last(i.input), *weights(i)], [
        None if case.fixed else poisoned((5, n, h, w, c), dtype),
        poisoned((n, h, w, case.outputs), wide) if case.has("def") else None,
        None if case.fixed else poisoned((5, 2, c), wide) if given is None else given.statistics,
        output if given is None else None,
    ]


def backward_buffers(
    case: Case,
    dtype: torch.dtype,
    i: Inputs,
    kept: Kept,
    wanted: Sequence[bool] = (True,) * 14,  # of Inputs.all
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """What the kernel reads, and the gradients, in the order of Backward."""
    wide = accumulate(dtype)

    def result(tensor: Tensor | None, want: bool) -> Tensor | None:
        if tensor is None or not want:
            return None
        if tensor is i.input:
            return last(i.into).clone() if case.add else poisoned(last(tensor).shape, dtype)
        return poisoned(last(tensor).shape if tensor.dim() == 4 else tensor.shape, wide)

    offset = kept.offset
    if case.fixed and offset is not None:
        offset = poisoned(offset.shape, wide)
    dx, dfactors, *rest = [result(t, want) for t, want in zip(i.all, wanted, strict=True)]
    *of_weights, dscale, dshift = rest
    read = [last(i.grad), last(i.input), *weights(i), kept.raw, offset, kept.statistics]
    return read, [dx, *of_weights, dfactors, dscale, dshift]


def gradients(written: Sequence[Tensor | None]) -> list[Tensor | None]:
    """In the order of ``Inputs.all``; maps as [N, C, H, W]."""
    dx, *of_weights, dfactors, dscale, dshift = (
        first(t) if t is not None and t.dim() == 4 else t for t in written
    )
    return [dx, dfactors, *of_weights, dscale, dshift]


class Kernels(emulated.Kernels):
    """The emulated module."""

    def forward(
        self, case: Case, dtype: torch.dtype, i: Inputs, given: Kept | None = None, **options: bool
    ) -> tuple[Tensor | None, Kept]:
        """The output, [N, C, H, W]; none with given statistics."""
        read, written = forward_buffers(case, dtype, i, given)
        sizes = case.sizes(None if given is None else GIVEN, **options)
        self.call("mixed_op_forward_cuda", dtype, sizes, [*read, *written])
        *kept, output = written
        return (None if output is None else first(output)), Kept(*kept)

    def backward(
        self,
        case: Case,
        dtype: torch.dtype,
        i: Inputs,
        kept: Kept,
        wanted: Sequence[bool] = (True,) * 14,
        **options: bool,
    ) -> list[Tensor | None]:
        """Gradients in the order of ``Inputs.all``."""
        read, written = backward_buffers(case, dtype, i, kept, wanted)
        self.call("mixed_op_backward_cuda", dtype, case.sizes(**options), [*read, *written])
        return gradients(written)


def assert_near(
    name: str, actual: Tensor | None, expected: Tensor, tolerance: float, least: float = 1e-2
) -> None:
    """Every element is written; the error's norm is small beside the result's, or ``least``."""
    assert actual is not None
    assert actual.shape == expected.shape, name
    if not actual.numel():
        return
    error = (actual.double() - expected).norm()
    scale = expected.norm().clamp_min(least)
    assert error <= tolerance * scale, f"{name}: off by {error / scale:.2e}"


NAMES = ("input", "factors", *Branches._fields, "scale", "shift")


def assert_equal_reference(
    case: Case,
    expected: Expected,
    output: Tensor | None,
    kept: Kept,
    gradients: Sequence[Tensor | None],
    tolerance: float,
) -> None:
    if output is not None:
        assert_near("output", output, expected.output, tolerance)
    if kept.statistics is not None:
        for i, branch in enumerate(("conv", "sep", "dil", "def", "sep")):
            if case.has(branch):
                assert_near(MAPS[i], kept.statistics[i], expected.statistics[i], tolerance)
    for name, gradient, wanted in zip(NAMES, gradients, expected.gradients, strict=True):
        if wanted is None:
            assert gradient is None
        elif gradient is not None:
            # a sum over pixels may be near zero where its terms are not
            least = 1e-2 if name == "input" else math.sqrt(expected.output.numel()) / 2
            assert_near(f"gradient of {name}", gradient, wanted, tolerance, least)


CASES = [
    Case("all"),
    Case("conv", branches=("conv",)),
    Case("sep", branches=("sep",)),
    Case("dil", branches=("dil",)),
    Case("def", branches=("def",), offset_groups=1, channels=3),
    Case("skip", branches=("skip",)),
    Case("conv-dil", branches=("conv", "dil"), affine=False),
    Case("add", add=True, offset_groups=1, affine=False, channels=4),
    Case("tiles", batch=1, channels=6, size=(9, 18)),
    Case("wide", batch=1, channels=70, size=(2, 3)),
    Case("pixel", batch=20, channels=6, size=(1, 1)),
]
CASES += [replace(case, id=f"{case.id}-fixed", fixed=True) for case in CASES]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Sizes of any kind, small."""
    groups = draw(st.integers(1, 3))
    return Case(
        "",
        batch=draw(st.integers(1, 2)),
        channels=groups * draw(st.sampled_from([1, 2, 5, 8, 20])),
        size=(draw(st.integers(2, 9)), draw(st.integers(1, 18))),
        offset_groups=groups,
        branches=tuple(b for b in ALL if draw(st.booleans())),
        fixed=draw(st.booleans()),
        affine=draw(st.booleans()),
        add=draw(st.booleans()),
    )
