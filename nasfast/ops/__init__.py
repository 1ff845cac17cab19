"""Operators: a plain-PyTorch reference beside compiled CPU and CUDA kernels."""

from nasfast.ops.deform_conv2d import DeformConv2d, deform_conv2d, deform_conv2d_reference
from nasfast.ops.feature_gather import (
    Field,
    feature_gather,
    feature_gather_reference,
    gather_fields,
)
from nasfast.ops.mixed_op import Branches, mixed_op, mixed_op_reference
from nasfast.ops.onnx import onnx_translation_table

__all__ = [
    "Branches",
    "DeformConv2d",
    "Field",
    "deform_conv2d",
    "deform_conv2d_reference",
    "feature_gather",
    "feature_gather_reference",
    "gather_fields",
    "mixed_op",
    "mixed_op_reference",
    "onnx_translation_table",
]
