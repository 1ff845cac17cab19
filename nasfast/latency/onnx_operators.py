"""Operators as ONNX graphs of their own, as `nasfast export` writes them into networks."""

from __future__ import annotations

from typing import Any

import torch

from nasfast.latency.operators import Operator

OPSET = 19
_PLAIN = {
    "add": "Add",
    "mul": "Mul",
    "sub": "Sub",
    "div": "Div",
    "relu": "Relu",
    "exp": "Exp",
    "sigmoid": "Sigmoid",
}
_BY_NUMBER = {"add", "sub", "mul", "div"}
"""Kinds whose second factor may be a number."""


def onnx_operator(operator: Operator) -> bytes | None:
    """The content of a file whose inputs "x0", "x1" .. are what the operator reads; None for a
    kind that is not known. BatchNorm is folded into the convolution before it."""
    from onnx import TensorProto, helper

    nodes, weights = _Graph(operator).build()
    if not nodes:
        return None
    inputs = [
        helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape)
        for i, shape in enumerate(operator.reads)
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, operator.makes)]
    graph = helper.make_graph(nodes, "operator", inputs, outputs, weights)
    opset = [helper.make_opsetid("", OPSET)]
    data: bytes = helper.make_model(graph, opset_imports=opset, ir_version=9).SerializeToString()
    return data


class _Graph:
    """Nodes and constants of one operator."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs = [f"x{i}" for i in range(len(operator.reads))]

    def node(self, kind: str, inputs: list[str], output: str = "y", **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    def constant(self, name: str, values: torch.Tensor) -> str:
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(values.numpy(), name))
        return name

    def build(self) -> tuple[list[Any], list[Any]]:
        kind = self.operator.kind
        if kind in ("conv", "deform_conv"):
            self.convolution()
        elif kind in _PLAIN and (kind not in _BY_NUMBER or len(self.inputs) == 2):
            self.node(_PLAIN[kind], self.inputs)
        elif kind in _BY_NUMBER:
            self.node(_PLAIN[kind], [*self.inputs, self.constant("number", torch.tensor(2.0))])
        else:
            self.other(kind)
        return self.nodes, self.constants

    def convolution(self) -> None:
        operator = self.operator
        stride, padding, dilation = (operator.settings[i : i + 2] for i in (0, 2, 4))
        attributes: dict[str, Any] = {
            "kernel_shape": operator.weight[2:],
            "strides": stride,
            "pads": [*padding, *padding],
            "dilations": dilation,
            "group": operator.settings[6],
        }
        x, *offsets = self.inputs
        weight = self.constant("weight", torch.randn(operator.weight))
        bias = self.constant("bias", torch.randn(operator.weight[0]))
        output = "z" if operator.activation else "y"
        if operator.kind == "conv":
            self.node("Conv", [x, weight, bias], output, **attributes)
        else:
            offset, *mask = offsets
            taps = 2 * operator.weight[2] * operator.weight[3]
            attributes["offset_group"] = operator.reads[1][1] // taps
            self.node("DeformConv", [x, weight, offset, bias, *mask], output, **attributes)
        if operator.activation == "relu":
            self.node("Relu", [output])
        elif operator.activation:
            low, high = (self.constant(f"limit{v}", torch.tensor(float(v))) for v in (0, 6))
            self.node("Clip", [output, low, high])

    def other(self, kind: str) -> None:
        operator = self.operator
        (x, *_), makes = self.inputs, operator.makes
        if kind == "cat":
            self.node("Concat", self.inputs, axis=operator.axis)
        elif kind == "mean":
            axes = self.constant("axes", torch.tensor([2, 3]))
            self.node("ReduceMean", [x, axes], keepdims=1)
        elif kind in ("resize", "bicubic"):
            sizes = self.constant("sizes", torch.tensor(makes))
            mode = "linear" if kind == "resize" else "cubic"
            self.node("Resize", [x, "", "", sizes], mode=mode, cubic_coeff_a=-0.75)
        elif kind == "pixel_shuffle":
            side = makes[2] // operator.reads[0][2]
            self.node("DepthToSpace", [x], blocksize=side, mode="CRD")
        elif kind == "copy":
            self.node("Expand", [x, self.constant("shape", torch.tensor(makes))])
        elif kind == "max_pool":
            side, stride = operator.settings
            border = [side // 2] * 4
            self.node("MaxPool", [x], kernel_shape=[side] * 2, strides=[stride] * 2, pads=border)
        elif kind == "native_batch_norm":
            zeros, ones = torch.zeros(makes[1]), torch.ones(makes[1])
            names = [self.constant(n, v) for n, v in zip("abcd", (ones, zeros, zeros, ones))]
            self.node("BatchNormalization", [x, *names])
        elif kind == "group_norm":
            (groups,) = operator.settings
            rows = self.constant("rows", torch.tensor([0, groups, -1]))
            whole = self.constant("whole", torch.tensor(makes))
            ones, zeros = (f(groups) for f in (torch.ones, torch.zeros))
            scale, shift = self.constant("ones", ones), self.constant("zeros", zeros)
            flat = self.node("Reshape", [x, rows], "flat")
            normal = self.node("InstanceNormalization", [flat, scale, shift], "normal")
            y = self.node("Reshape", [normal, whole], "map")
            weights = torch.rand(2, makes[1], 1, 1)
            weight, bias = self.constant("weight", weights[0]), self.constant("bias", weights[1])
            self.node("Add", [self.node("Mul", [y, weight], "weighed"), bias])
        elif kind == "pad":
            grown = [0] * 4 + [new - old for new, old in zip(makes, operator.reads[0], strict=True)]
            self.node("Pad", [x, self.constant("pads", torch.tensor(grown))], mode="edge")
        elif kind == "clamp":
            self.node("Clip", [x, self.constant("least", torch.tensor(0.0))])
