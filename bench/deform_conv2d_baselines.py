"""deform_conv2d as everybody has it: ours, the plain convolution as floor, and each theirs.

A baseline is imported when it is asked for, and skipped with the reason where that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import Call
from torch import Tensor

from nasfast.ops import deform_conv2d, deform_conv2d_reference

FLOOR = "conv2d"
TAPS = 9
# batch, channels, height, width, output channels
SHAPES = [
    (1, 64, 64, 64, 64),
    (4, 64, 64, 64, 64),
    (8, 48, 32, 32, 48),
    (2, 256, 25, 34, 256),
    (1, 256, 100, 136, 256),
]


@dataclass(frozen=True)
class Problem:
    """A 3x3 kernel with padding 1, mask and one offset group, in a channels_last model."""

    batch: int
    channels: int
    height: int
    width: int
    out_channels: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    spread: float = 1.0  # standard deviation of the offsets, pixels

    def __str__(self) -> str:
        sizes = (self.batch, self.channels, self.height, self.width, self.out_channels)
        return ",".join(map(str, sizes))

    def flops(self, backward: bool) -> int:
        """Of the matrix products; the backward has two of them."""
        pixels = self.batch * self.height * self.width
        return (6 if backward else 2) * pixels * self.channels * self.out_channels * TAPS

    def small(self) -> Problem:
        return replace(self, batch=1, height=8, width=8)

    def tensors(self) -> Tensors:
        """Offset and mask as ``conv(x).split((18, 9), 1)`` gives them, the mask after sigmoid."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int) -> Tensor:
            tensor = torch.randn(shape, generator=generator)
            return tensor.to(self.device, self.dtype, memory_format=torch.channels_last)

        size = (self.height, self.width)
        offset, mask = draw(self.batch, 3 * TAPS, *size).split((2 * TAPS, TAPS), 1)
        return Tensors(
            draw(self.batch, self.channels, *size),
            offset.mul_(self.spread),
            draw(self.out_channels, self.channels, 3, 3) / (TAPS * self.channels) ** 0.5,
            mask.sigmoid(),
            draw(self.batch, self.out_channels, *size),
        )


class Tensors(NamedTuple):
    input: Tensor  # [N, C, H, W]
    offset: Tensor  # [N, 18, H, W]
    weight: Tensor  # [Co, C, 3, 3]
    mask: Tensor  # [N, 9, H, W]
    cotangent: Tensor  # [N, Co, H, W]

    def contiguous(self) -> Tensors:
        return Tensors(*(tensor.contiguous() for tensor in self))


class Implementation(NamedTuple):
    tensors: Tensors
    function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of input, offset, weight, mask
    differentiated: Sequence[str] = ("input", "offset", "weight", "mask")  # none: forward only

    def call(self, backward: bool) -> Call:
        """Forward, or forward and the gradients."""
        *arguments, cotangent = self.tensors
        if not backward:
            return torch.no_grad()(lambda: self.function(*arguments))
        if not self.differentiated:
            raise NotImplementedError("has no backward")
        leaves = [getattr(self.tensors, name).requires_grad_() for name in self.differentiated]

        def forward_backward() -> list[Tensor]:
            output = self.function(*arguments)
            return [output.detach(), *torch.autograd.grad(output, leaves, cotangent)]

        return forward_backward


def convolution(problem: Problem) -> Implementation:
    def function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return F.conv2d(input, weight, padding=1)

    return Implementation(problem.tensors(), function, ("input", "weight"))


def nasfast(problem: Problem) -> Implementation:
    def function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return deform_conv2d(input, offset, weight, padding=1, mask=mask)

    return Implementation(problem.tensors(), function)


def nasfast_bfloat16(problem: Problem) -> Implementation:
    return nasfast(replace(problem, dtype=torch.bfloat16))


def torchvision(problem: Problem) -> Implementation:
    from torchvision.ops import deform_conv2d as theirs

    def function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return theirs(input, offset, weight, padding=1, mask=mask)

    return Implementation(problem.tensors().contiguous(), function)


def torchvision_float32(problem: Problem) -> Implementation:
    """What remains to its users where it does not know a half type."""
    return torchvision(replace(problem, dtype=torch.float32))


def mmcv(problem: Problem) -> Implementation:
    from mmcv.ops import modulated_deform_conv2d as theirs

    def function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return theirs(input, offset, mask, weight, None, 1, 1, 1, 1, 1)

    return Implementation(problem.tensors().contiguous(), function)


def sampled_by_grid_sample(
    input: Tensor,  # [N, C, H, W]
    offset: Tensor,  # [N, D * 18, H, W]
    weight: Tensor,  # [Co, C, 3, 3]
    mask: Tensor,  # [N, D * 9, H, W]
) -> Tensor:
    """All taps sampled into columns by one call, then one matrix product."""
    (n, c, h, w), d = input.shape, offset.shape[1] // (2 * TAPS)
    options = {"device": input.device, "dtype": offset.dtype}
    tap = torch.arange(TAPS, **options).view(TAPS, 1, 1)
    row = torch.arange(h, **options).view(h, 1) + tap.div(3, rounding_mode="floor") - 1
    column = torch.arange(w, **options) + tap % 3 - 1
    y, x = offset.reshape(n * d, TAPS, 2, h, w).unbind(2)  # pixels, [N * D, K, H, W]
    grid = torch.stack(((2 * (x + column) + 1) / w - 1, (2 * (y + row) + 1) / h - 1), -1)
    maps = input.reshape(n * d, c // d, h, w)
    sampled = F.grid_sample(maps, grid.flatten(1, 2), align_corners=False)  # [N * D, .., K * H, W]
    columns = sampled.view(n, d, -1, TAPS, h * w) * mask.reshape(n, d, 1, TAPS, h * w)
    return (weight.flatten(1) @ columns.view(n, c * TAPS, h * w)).view(n, -1, h, w)


def grid_sample(problem: Problem) -> Implementation:
    return Implementation(problem.tensors().contiguous(), sampled_by_grid_sample)


def compiled_gather(problem: Problem) -> Implementation:
    """The reference, which gathers the four corners, compiled by inductor."""
    compiled = torch.compile(deform_conv2d_reference, fullgraph=True)

    def function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return compiled(input, offset, weight, padding=1, mask=mask)

    return Implementation(problem.tensors().contiguous(), function)


def onnxruntime(problem: Problem) -> Implementation:
    import onnx
    import onnxruntime as theirs
    from onnx import helper

    if problem.device != "cpu":
        raise NotImplementedError("runs on the CPU here")
    tensors = problem.tensors().contiguous()
    feed = dict(zip(("X", "offset", "W", "mask"), (t.numpy() for t in tensors)))
    node = helper.make_node(
        "DeformConv", ["X", "W", "offset", "", "mask"], ["Y"], kernel_shape=[3, 3], pads=[1] * 4
    )
    inputs = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, array.shape)
        for name, array in feed.items()
    ]
    output = helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, tensors.cotangent.shape)
    model = helper.make_model(
        helper.make_graph([node], "deform_conv2d", inputs, [output]),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )
    options = theirs.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # by default its threads spin after a run and take the cores from the next call
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = theirs.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )

    def function(input: Tensor, offset: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, feed)[0])

    return Implementation(tensors, function, ())


IMPLEMENTATIONS: dict[str, Callable[[Problem], Implementation]] = {
    FLOOR: convolution,
    "nasfast": nasfast,
    "nasfast bfloat16": nasfast_bfloat16,
    "torchvision": torchvision,
    "torchvision float32": torchvision_float32,
    "mmcv": mmcv,
    "grid_sample": grid_sample,
    "compiled gather": compiled_gather,
    "onnxruntime": onnxruntime,
}


def calls(
    names: Iterable[str],
    problem: Any,
    backward: bool,
    implementations: Mapping[str, Callable[[Any], Any]] = IMPLEMENTATIONS,
    own: Sequence[str] = (FLOOR, "nasfast"),
) -> tuple[dict[str, Call], dict[str, str]]:
    """The call of each implementation that works here, and why the others do not.

    The error of one of ``own`` is raised.
    """
    working, skipped = {}, {}
    for name in names:
        try:
            call = implementations[name](problem).call(backward)
            call()
        except Exception as error:  # whatever is wrong with a baseline, the others go on
            if name in own:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            working[name] = call
    return working, skipped


def memory_calls(name: str, problem: Problem, backward: bool) -> tuple[Call, Call]:
    """What ``harness.extra_memory`` asks for."""
    # a compiled call is compiled anew for another size, and the compiler's memory is not the call's
    first = problem if name == "compiled gather" else problem.small()
    small, full = (IMPLEMENTATIONS[name](size).call(backward) for size in (first, problem))
    return small, full
