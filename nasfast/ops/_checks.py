"""Checks of arguments that ops share, and the form of every op's errors.

Each function raises ``ValueError``: "<op>: expected <argument> <condition>, got <value>; <remedy>".
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import SupportsIndex

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALF)
Ints = int | Sequence[int]
Pair = tuple[int, int]

_LEAST = {"stride": 1, "padding": 0, "dilation": 1}


def wrong(op: str, argument: str, condition: str, got: object, remedy: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{op}: expected {argument} {condition}, got {got}; {remedy}")


def pair(op: str, argument: str, value: Ints) -> Pair:
    """(vertical, horizontal) of a setting that is one integer for both, or two."""
    if type(value) is int:
        return value, value
    both = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(both) != 2 or not all(isinstance(size, int | SupportsIndex) for size in both):
        raise wrong(op, argument, "as one integer or two (vertical, horizontal)", value, "pass two")
    first, second = (size if isinstance(size, torch.SymInt) else index(size) for size in both)
    return first, second


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
        if min(values) < _LEAST[name]:
            raise wrong(op, name, f"of at least {_LEAST[name]}", tuple(values), "change it")


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
