"""ONNX export: onnxruntime computes what PyTorch computes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_harness import TOLERANCE, native
from test_deform_conv2d import Block, Sample
from torch import Tensor, nn

from nasfast.ops import deform_conv2d, onnx_translation_table

EXPORT = {"dynamo": True, "verbose": False}


class Call(nn.Module):
    """One call whose tensors are inputs."""

    def __init__(self, sample: Sample) -> None:
        super().__init__()
        self.sample = sample

    def forward(self, *tensors: Tensor) -> Tensor:
        """``tensors`` are input, offset, weight, then those of bias and mask that are there."""
        rest = list(tensors[3:])
        bias = rest.pop(0) if self.sample.bias else None
        mask = rest.pop(0) if self.sample.mask else None
        return deform_conv2d(*self.sample.arguments([*tensors[:3], bias, mask]))


def export(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """The model as ONNX."""
    pytest.importorskip("onnxscript")
    table = onnx_translation_table()
    return torch.onnx.export(
        model.eval(), inputs, custom_translation_table=table, **EXPORT | options
    )


def run(program: Any, *inputs: Tensor) -> Tensor:
    """Its output, by onnxruntime."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [input.name for input in session.get_inputs()]
    feed = {name: input.detach().numpy() for name, input in zip(names, inputs)}
    return torch.from_numpy(session.run(None, feed)[0])


def operators(program: Any) -> list[str]:
    return [node.op_type for node in program.model.graph]


SAMPLES = [
    Sample("plain"),
    Sample("no-mask", mask=False),
    Sample("no-bias", bias=False),
    Sample("no-mask-no-bias", mask=False, bias=False),
    Sample("stride-2-1", stride=(2, 1), padding=(0, 2)),
    Sample("kernel-1x3", kernel=(1, 3), padding=(0, 1)),
    Sample("dilation", size=(9, 8), dilation=(2, 3), padding=(2, 1)),
    Sample("groups-2", channels=6, out_channels=4, groups=2),
    Sample("groups-2-offset-groups-2", channels=8, out_channels=6, groups=2, offset_groups=2),
    Sample("groups-1-offset-groups-2", offset_groups=2, kernel=(1, 3), stride=(2, 1)),
    Sample("far", spread=50.0),
]


@native
@pytest.mark.parametrize(
    ("sample", "dtype"),
    [
        *((sample, torch.float32) for sample in SAMPLES),
        *((SAMPLES[i], dtype) for i in (0, -3) for dtype in (torch.float64, torch.float16)),
    ],
    ids=lambda value: getattr(value, "id", str(value)),
)
def test_equals_pytorch(sample: Sample, dtype: torch.dtype) -> None:
    """Order of inputs and offset channels, attributes and border rule, also far outside."""
    model = Call(sample)
    tensors = tuple(tensor for tensor in sample.tensors(dtype) if tensor is not None)
    program = export(model, tensors)
    assert operators(program) == ["DeformConv"]
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.float16 else TOLERANCE[dtype]
    torch.testing.assert_close(run(program, *tensors), model(*tensors), **tolerance)


@native
@pytest.mark.parametrize("shift", [-1.0, -0.75, 1.5, 2.0, 1e30, float("inf"), float("nan")])
def test_border_rule(shift: float) -> None:
    """onnxruntime draws the border where we do."""
    model = Call(Sample("", padding=(0, 0), bias=False, mask=False))
    offset = torch.zeros(1, 2, 2, 3)
    offset[:, 0] = shift
    tensors = (torch.ones(1, 1, 2, 3), offset, torch.ones(1, 1, 1, 1))
    assert torch.equal(run(export(model, tensors), *tensors), model(*tensors))


@native
def test_dynamic_batch_height_and_width(tmp_path: Path) -> None:
    block, input = Block(), torch.randn(2, 4, 5, 7)
    dynamic = ({0: "batch", 2: "height", 3: "width"},)
    program = export(block, (input,), dynamic_shapes=dynamic, f=tmp_path / "block.onnx")
    assert operators(program).count("DeformConv") == 1
    assert (tmp_path / "block.onnx").is_file()
    for shape in ((2, 4, 5, 7), (1, 4, 12, 6), (3, 4, 1, 1)):
        input = torch.randn(shape)
        torch.testing.assert_close(run(program, input), block(input), **TOLERANCE[torch.float32])


class AtBorders(Call):
    """float32 at the borders, which numpy knows, and bfloat16 or autocast between them."""

    def __init__(self, sample: Sample, autocast: bool) -> None:
        super().__init__(sample)
        self.autocast = autocast

    def forward(self, *tensors: Tensor) -> Tensor:
        if not self.autocast:
            return super().forward(*(tensor.bfloat16() for tensor in tensors)).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(*tensors).float()


@native
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_bfloat16(autocast: bool) -> None:
    model = AtBorders(Sample(""), autocast)
    tensors = tuple(tensor for tensor in model.sample.tensors(torch.float32) if tensor is not None)
    program = export(model, tensors)
    assert operators(program).count("DeformConv") == 1
    expected = model(*tensors)
    torch.testing.assert_close(run(program, *tensors), expected, **TOLERANCE[torch.bfloat16])


@native
def test_dynamic_channels() -> None:
    sample = Sample("", offset_groups=2, mask=False, bias=False)
    tensors = tuple(tensor for tensor in sample.tensors() if tensor is not None)
    dynamic = (({}, {1: torch.export.Dim.DYNAMIC}, {}),)
    with pytest.raises(Exception) as error:  # the exporter's own, with the cause in its text
        export(Call(sample), tensors, dynamic_shapes=dynamic)
    assert (
        "ValueError'>: deform_conv2d: expected offset of a fixed number of channels for ONNX, got "
        "'s"
    ) in str(error.value)
    assert "'; leave dimension 1 out of dynamic_shapes" in str(error.value)


def test_without_onnxscript(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError) as error:
        onnx_translation_table()
    assert str(error.value).startswith("onnx_translation_table: expected onnxscript to be ")
    assert str(error.value).endswith("; pip install 'nasfast[export]'")
