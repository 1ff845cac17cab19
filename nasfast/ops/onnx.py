"""ONNX export: each op of nasfast as a standard ONNX operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


def onnx_translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """For ``torch.onnx.export``: ``deform_conv2d`` becomes ``DeformConv`` (opset 19 and newer).

        table = nasfast.ops.onnx_translation_table()
        options = {"dynamo": True, "custom_translation_table": table}
        torch.onnx.export(model.eval(), (image,), "model.onnx", **options)

    Batch, height and width may be dynamic; channels are attributes and may not. The border rule is
    the same. bfloat16 and mixed precision are computed in float32, between casts. Without the
    compiled extension the graph holds the operators of the reference instead.

    Raises:
        ModuleNotFoundError: onnxscript is not installed.
    """
    try:
        from onnxscript import ir, opset19
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"onnx_translation_table: expected onnxscript to be installed, got '{error}'; "
            "pip install 'nasfast[export]'"
        ) from error

    def deform_conv2d(
        input: Any,  # [N, C, H, W]
        offset: Any,  # [N, D * K * 2, Ho, Wo]
        weight: Any,  # [Co, C / G, kh, kw]
        bias: Any,  # [Co]
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        mask: Any,  # [N, D * K, Ho, Wo]
    ) -> Any:
        _, group_channels, *kernel = weight.shape
        taps = kernel[0] * kernel[1]
        tensors = [input, weight, offset, bias, mask]
        dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
        cast = len(dtypes) > 1 or ir.DataType.BFLOAT16 in dtypes
        if cast:
            single = int(ir.DataType.FLOAT)
            tensors = [None if t is None else opset19.Cast(t, to=single) for t in tensors]
        output = opset19.DeformConv(
            *tensors,
            dilations=list(dilation),
            group=_channels("input", input) // group_channels,
            kernel_shape=kernel,
            offset_group=_channels("offset", offset) // (2 * taps),
            pads=[*padding, *padding],
            strides=list(stride),
        )
        return opset19.Cast(output, to=int(input.dtype)) if cast else output

    return {torch.ops.nasfast.deform_conv2d.default: deform_conv2d}


def _channels(name: str, tensor: Any) -> int:
    channels = tensor.shape[1]
    if not isinstance(channels, int):
        raise ValueError(
            f"deform_conv2d: expected {name} of a fixed number of channels for ONNX, got "
            f"'{channels}'; leave dimension 1 out of dynamic_shapes"
        )
    return channels
