"""What the tests of all ops share: the form of their samples, and of what they register."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from nasfast.ops import _native

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
    torch.float16: {"rtol": 3e-3, "atol": 3e-3},
}
LEVELS = ("x86-64-v2", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16", "x86-64-v4-amx")
native = pytest.mark.skipif(_native.C is None, reason=f"runs the reference: {_native.ERROR}")
# the same draws in every run
REPRODUCIBLE = settings(
    derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
Tensors = list[Tensor | None]


def arrange(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a layout; channels last is one of maps alone."""
    if layout == "channels_last" and tensor.dim() == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    if layout == "expanded":  # as the gradient of a sum is
        return tensor.flatten()[:1].sum().expand(tensor.shape)
    return tensor


class Slice(NamedTuple):
    """Layout of some channels of a wider channels-last tensor."""

    before: int  # channels
    after: int


def lay_out(tensor: Tensor, layout: str | Slice) -> Tensor:
    if not isinstance(layout, Slice):
        return arrange(tensor, layout)
    n, c, h, w = tensor.shape
    wide = tensor.new_full((n, layout.before + c + layout.after, h, w), math.nan)
    part = wide.contiguous(memory_format=torch.channels_last)[:, layout.before :][:, :c]
    return part.copy_(tensor)


def require_grad(tensors: Tensors) -> list[Tensor]:
    """Marks the tensors that are there; returns them."""
    return [tensor.requires_grad_() for tensor in tensors if tensor is not None]


def convert(tensors: Tensors, *to: Any) -> Tensors:
    return [None if t is None else t.detach().to(*to).clone() for t in tensors]


@dataclass(frozen=True)
class Sample:
    """Sizes and settings of one call of an op, and how it is compared with the reference."""

    id: str
    op: ClassVar[str]

    @property
    def dtypes(self) -> tuple[Any, ...]:
        return tuple(TOLERANCE)

    def check(self, dtype: Any) -> None:
        """Compares everything that the op returns with the reference."""
        raise NotImplementedError

    def call_changed(self, changes: dict[str, Any], reference: bool) -> None:
        """A call with other arguments."""
        raise NotImplementedError


@dataclass(frozen=True)
class Differentiable(Sample):
    """A sample of an op with gradients."""

    names: ClassVar[tuple[str, ...]]  # of the tensors
    weight: ClassVar[int]  # index of a tensor in whose derivatives nothing is special
    alone_is_equal: ClassVar[bool] = True  # a gradient computed alone has the same bits
    vanishing: ClassVar[bool] = False  # normalisation makes gradients vanish, all but rounding
    cotangent: Any = field(default="contiguous", kw_only=True)  # its layout

    def tensors(self, dtype: torch.dtype = torch.float64) -> Tensors:
        """Draws the tensors, in the order of ``names``."""
        raise NotImplementedError

    def invoke(self, reference: bool, **named: Any) -> tuple[Tensor, ...]:
        """Outputs of a call by argument names; the first output has gradients."""
        raise NotImplementedError

    def arguments(self, tensors: Tensors) -> tuple[Any, ...]:
        """All arguments of the registered op."""
        raise NotImplementedError

    def backward_arguments(self, tensors: Tensors, wanted: list[bool]) -> tuple[Any, ...]:
        """All but the first, which is the gradient of the output."""
        raise NotImplementedError

    def call(self, tensors: Tensors, reference: bool = False) -> tuple[Tensor, ...]:
        return self.invoke(reference, **dict(zip(self.names, tensors, strict=True)))

    def call_changed(self, changes: dict[str, Any], reference: bool) -> None:
        named = dict(zip(self.names, self.tensors(torch.float32), strict=True))
        self.invoke(reference, **named | changes)

    def draw_cotangent(self, output: Tensor, expected: Tensor) -> Tensor:
        return lay_out(torch.randn_like(output), self.cotangent)

    def assert_close(
        self, got: Tensor, expected: Tensor, dtype: torch.dtype, what: str = "", least: float = 1.0
    ) -> None:
        """Within the tolerance of ``dtype``, absolute in units of the largest value expected."""
        tolerance = dict(TOLERANCE[dtype])
        if expected.numel():
            tolerance["atol"] *= max(least, expected.abs().max().item())
        torch.testing.assert_close(
            got.double(), expected.double(), **tolerance, msg=lambda text: f"{what}: {text}"
        )

    def check(self, dtype: torch.dtype) -> None:
        """Outputs and every gradient, against autograd of the reference in float64."""
        self.check_on("cpu", dtype, dtype)

    def check_on(self, device: str, dtype: torch.dtype, tolerance: torch.dtype) -> None:
        tensors = convert(self.tensors(dtype), device)
        doubles = convert(tensors, torch.float64)
        leaves, double_leaves = require_grad(tensors), require_grad(doubles)
        (output, *others), (expected, *rest) = self.call(tensors), self.call(doubles, True)
        assert output.dtype == dtype
        self.assert_close(output, expected, tolerance, "output")
        for other, reference in zip(others, rest, strict=True):
            assert other.dtype == _native.accumulate(dtype)
            assert not other.requires_grad
            if output.numel():
                self.assert_close(other, reference, tolerance, "statistics")
        cotangent = self.draw_cotangent(output, expected)
        gradients = torch.autograd.grad(output, leaves, cotangent)
        references = torch.autograd.grad(
            expected, double_leaves, cotangent.double(), materialize_grads=True
        )
        least = max(1.0, cotangent.double().norm().item()) if self.vanishing else 1.0
        names = [
            name for name, tensor in zip(self.names, tensors, strict=True) if tensor is not None
        ]
        for name, leaf, gradient, reference in zip(
            names, leaves, gradients, references, strict=True
        ):
            assert (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape), name
            self.assert_close(gradient, reference, tolerance, name, least)

    def forward_backward(self, tensors: Tensors) -> list[Tensor]:
        """Outputs, and every gradient."""
        leaves = require_grad(tensors)
        output, *others = self.call(tensors)
        cotangent = torch.ones_like(output).cumsum(-1).sin()
        return [output.detach(), *others, *torch.autograd.grad(output, leaves, cotangent)]


@dataclass
class Op:
    """What an op registers for the suite."""

    samples: list[Any]
    few: list[str]
    """Samples that stand for all where a check takes long."""
    errors: dict[str, tuple[dict[str, Any], str]]
    """Changes of the first sample's arguments, and what is said about them."""
    parallel: list[str] = field(default_factory=list)
    """Samples that several threads compute."""
    drawn: st.SearchStrategy[tuple[Any, Any]] | None = None
    """Of samples, and dtypes for them."""
    examples: int = 0
    gradcheck: list[Any] = field(default_factory=list)
    gradgradcheck: list[Any] = field(default_factory=list)
    wanted: list[tuple[list[bool], bool]] = field(default_factory=list)
    """Gradients for opcheck of the backward op, and whether it may differentiate that, too."""
    bad_gradient: str = ""
    """What is said about a gradient that is one pixel narrower than the output."""
    convolutions: Callable[[Any, Tensors], None] | None = None
    """Runs the convolutions whose floating-point operations are those of a sample."""
    large: list[Any] = field(default_factory=list)
    """Samples that reach every tile of the CUDA kernels."""

    @property
    def name(self) -> str:
        name: str = self.samples[0].op
        return name

    @property
    def first(self) -> Any:
        return self.samples[0]

    @property
    def differentiable(self) -> bool:
        return isinstance(self.first, Differentiable)

    def find(self, *ids: str) -> list[Any]:
        return [next(sample for sample in self.samples if sample.id == id) for id in ids]


def run_python(code: str, before: str = "", **environment: str) -> str:
    """Output of code in a fresh interpreter that has imported the suite as ``t``.

    It runs ``before`` ahead of all imports but that of sys.
    """
    imports = "sys.path.insert(0, 'tests/ops'); import test_all_ops as t, torch\n"
    imports += "from nasfast.ops import _native\n"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{before}{imports}torch.manual_seed(0)\n{code}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
