"""Checks of arguments that ops share, and the form of every op's errors.

"<op>: expected <argument> <condition>, got <value>; <remedy>" is a ``TypeError`` where an argument
is of a wrong kind, else a ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)
Ints = int | Sequence[int]
Pair = tuple[int, int]

_LEAST = {"stride": 1, "padding": 0, "dilation": 1}
_BELOW = {"stride": 2**63, "padding": 2**47, "dilation": 2**63}
"""Kernels compute positions in 64 bits, from several paddings; memory has addresses of 47 bits."""


def wrong(op: str, argument: str, condition: str, got: object, remedy: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{op}: expected {argument} {condition}, got {got}; {remedy}")


def wrong_kind(op: str, argument: str, kind: str, got: object, remedy: str) -> TypeError:
    """The error to raise for an argument that is no ``kind``."""
    return TypeError(f"{op}: expected {argument} as {kind}, got {type(got).__name__}; {remedy}")


def check_tensors(op: str, *, optional: Sequence[str] = (), **tensors: object) -> None:
    """What is read as a tensor is one, in dense memory; the ``optional`` may be None."""
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        if not isinstance(tensor, Tensor):
            kind = "a tensor or None" if name in optional else "a tensor"
            raise wrong_kind(op, name, kind, tensor, "pass a torch.Tensor")
        if tensor.layout != torch.strided or tensor.is_nested:
            got = "a nested one" if tensor.is_nested else tensor.layout
            raise TypeError(f"{op}: expected {name} as a dense tensor, got {got}; convert it")


def number(op: str, argument: str, value: Any) -> float:
    """A setting that is one number."""
    if type(value) is float:
        return value
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return float(value)
    except OverflowError:  # of an integer
        raise wrong(op, argument, "as a finite number", value, "change it") from None
    except (TypeError, ValueError, RuntimeError):
        raise wrong_kind(op, argument, "a number", value, "pass a float") from None


def flag(op: str, argument: str, value: object) -> bool:
    """A setting that is on or off."""
    if not isinstance(value, bool):
        raise wrong_kind(op, argument, "a bool", value, "pass True or False")
    return value


def integer(op: str, argument: str, value: Any) -> int:
    """A setting that is one integer."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        return index(value)
    except (TypeError, ValueError, RuntimeError):
        raise wrong_kind(op, argument, "an integer", value, "pass an int") from None


def pair(op: str, argument: str, value: Any) -> Pair:
    """(vertical, horizontal) of a setting that is one integer for both, or two."""
    if type(value) is int:
        return value, value
    several = isinstance(value, Sequence) and not isinstance(value, str)
    both = tuple(value) if several else (value, value)
    try:
        if len(both) != 2:
            raise TypeError
        return integer(op, argument, both[0]), integer(op, argument, both[1])
    except TypeError:
        form = "as one integer or two (vertical, horizontal)"
        raise wrong(op, argument, form, value, "pass two") from None


def check_float(op: str, input: Tensor) -> None:
    if input.dtype not in FLOATS:
        raise wrong(op, "input", "of a float dtype", input.dtype, "convert it with input.float()")


def check_dimensions(op: str, name: str, tensor: Tensor, dims: int) -> None:
    if tensor.dim() != dims:
        shape, remedy = tuple(tensor.shape), "reshape it (a single image is a batch of 1)"
        raise wrong(op, name, f"of {dims} dimensions", f"shape {shape}", remedy)


def check_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], remedy: str) -> None:
    if tensor.shape != shape:
        raise wrong(op, name, f"of shape {tuple(shape)}", tuple(tensor.shape), remedy)


def check_depthwise(op: str, name: str, kernels: Tensor, input: Tensor) -> None:
    """An image, and a kernel for each of its channels; both are of 4 dimensions."""
    _, channels, height, width = input.shape
    if height == 0 or width == 0 or channels == 0:
        got = f"shape {tuple(input.shape)}"
        raise wrong(op, "input", "of sizes above 0", got, "pass an image")
    if kernels.shape[:2] != (channels, 1) or 0 in kernels.shape[2:]:
        shape = f"of shape [{channels}, 1, kh, kw], one kernel for each channel of input"
        remedy = "build the layer for the channels of its input"
        raise wrong(op, name, shape, tuple(kernels.shape), remedy)


def check_like(op: str, name: str, tensor: Tensor, input: Tensor, or_float32: bool = False) -> None:
    """Dtype and device of the input; ``or_float32`` also that beside a half-precision input."""
    or_float32 = or_float32 and input.dtype in HALF
    if tensor.dtype != input.dtype and not (or_float32 and tensor.dtype == torch.float32):
        dtype = f"of the dtype of input, {input.dtype}" + or_float32 * " (or torch.float32)"
        raise wrong(op, name, dtype, tensor.dtype, f"convert it with {name}.to(input.dtype)")
    check_device(op, name, tensor, input)


def check_device(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    if tensor.device != input.device:
        device = f"on the device of input, {input.device}"
        raise wrong(op, name, device, tensor.device, f"move it with {name}.to(input.device)")


def check_settings(op: str, **settings: Pair) -> None:
    """Stride, padding and dilation, by name."""
    for name, values in settings.items():
        if len(values) != 2:  # of a registered op
            raise wrong(op, name, "as two integers (vertical, horizontal)", values, "pass two")
        if min(values) < _LEAST[name]:
            raise wrong(op, name, f"of at least {_LEAST[name]}", tuple(values), "change it")
        if max(values) >= _BELOW[name]:
            below = f"below 2**{_BELOW[name].bit_length() - 1}"
            raise wrong(op, name, below, tuple(values), "change it")


def check_wanted(op: str, wanted: Sequence[bool], count: int) -> None:
    """Which gradients a registered backward pass computes."""
    if len(wanted) != count:
        raise wrong(op, "wanted", f"of {count} flags", len(wanted), "pass one for each gradient")


def output_size(
    op: str,
    image: Sequence[int],
    kernel: Sequence[int],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
) -> Pair:
    """Height and width of a convolution's output, at least 1."""
    height, width = (
        (size + 2 * pad - dilated * (taps - 1) - 1) // step + 1
        for size, taps, step, pad, dilated in zip(
            image, kernel, stride, padding, dilation, strict=True
        )
    )
    if height < 1 or width < 1:
        raise wrong(
            op,
            "input",
            f"as large as the dilated kernel {kernel[0]}x{kernel[1]}",
            f"{image[0]}x{image[1]}, which gives an output of {height}x{width}",
            "enlarge the image or the padding",
        )
    return height, width


def check_output(op: str, shape: Sequence[int]) -> None:
    """Of sizes that are known: an output that memory may hold, were its batch not empty."""
    if math.prod(max(size, 1) for size in shape) >= 2**47:
        raise wrong(op, "padding", "that gives fewer than 2**47 outputs", list(shape), "change it")


def effective(sizes: Sequence[int], steps: Pair) -> Pair:
    """Strides of an output, or dilations of a kernel: 1 along a side of one pixel.

    There they mean nothing and may be of any size, which kernels would compute with.
    """
    vertical, horizontal = steps
    return 1 if sizes[0] == 1 else vertical, 1 if sizes[1] == 1 else horizontal
