"""Operators: a plain-PyTorch reference beside compiled CPU and CUDA kernels."""

from nasfast.ops.batch_norm_relu import batch_norm_relu, batch_norm_relu_reference
from nasfast.ops.deform_conv2d import DeformConv2d, deform_conv2d, deform_conv2d_reference
from nasfast.ops.depthwise_conv2d import depthwise_conv2d, depthwise_conv2d_reference
from nasfast.ops.feature_gather import (
    Field,
    PreparedGather,
    feature_gather,
    feature_gather_reference,
    gather_fields,
)
from nasfast.ops.mixed_op import Branches, mixed_op, mixed_op_reference
from nasfast.ops.onnx import onnx_translation_table
from nasfast.ops.sep_conv import sep_conv, sep_conv_reference

__all__ = [
    "Branches",
    "DeformConv2d",
    "Field",
    "PreparedGather",
    "batch_norm_relu",
    "batch_norm_relu_reference",
    "deform_conv2d",
    "deform_conv2d_reference",
    "depthwise_conv2d",
    "depthwise_conv2d_reference",
    "feature_gather",
    "feature_gather_reference",
    "gather_fields",
    "mixed_op",
    "mixed_op_reference",
    "onnx_translation_table",
    "sep_conv",
    "sep_conv_reference",
]
