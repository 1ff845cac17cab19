"""A step of a searched detector's decoder beside the same network with grid_sample.

    pytest bench/bench_detector.py --benchmark-json=detector.json

A step is pyramid, head and losses of the architecture that the authors of NAS-FCOS found, forward
and backward, on features of MobileNet-v2 from a cache and dense targets, as the search trains
candidates. Each row: multiple of ours, ms, GFLOP/s. The baselines differ in the deformable
convolution alone. "grid_sample" samples all taps by one call for one matrix product, which is what
can be written with PyTorch; in a network that is channels last, and in one that is not. The floor
has a plain convolution in its place, with the convolution that predicts the offsets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import harness
import pytest
import torch
from deform_conv2d_baselines import sampled_by_grid_sample
from harness import Call
from torch import Tensor, nn
from torch.nn import functional as F

from nasfast.encoders import MobileNetV2
from nasfast.models.detector import EXTRA, DetectorConfig, DetectorDecoder
from nasfast.models.pyramids import ModulatedDeformConv
from nasfast.ops import DeformConv2d
from nasfast.spaces.nas_fcos import FOUND
from nasfast.tasks.detection.assign import assign
from nasfast.tasks.detection.losses import DetectionLoss, loss_sums, normalized, normalizers
from nasfast.training.cost import count_macs_on

Tables = dict[str, dict[str, dict[str, object]]]
SIDE, BATCH, CLASSES = 384, 8, 20
OURS, FLOOR = "nasfast", "convolution"


class GridSample(DeformConv2d):
    """Positions are float32, in which autocast samples as well."""

    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None
        assert self.bias is not None
        positions = offset.to(torch.promote_types(offset.dtype, torch.float32))
        sampled = sampled_by_grid_sample(input, positions, self.weight, mask)
        return sampled + self.bias[:, None, None]


class Convolution(DeformConv2d):
    def forward(self, input: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        output = F.conv2d(input, self.weight, self.bias, padding=1)
        return output + 0 * (offset[:, :1] + offset[:, -1:])  # so that offsets have gradients


VARIANTS = {
    OURS: (DeformConv2d, torch.channels_last),
    "grid_sample": (GridSample, torch.channels_last),
    "grid_sample NCHW": (GridSample, torch.contiguous_format),
    FLOOR: (Convolution, torch.channels_last),
}


@dataclass(frozen=True)
class Problem:
    width: int
    dtype: torch.dtype  # of the taps; bfloat16: by autocast
    batch: int = BATCH

    def decoder(self) -> DetectorDecoder:
        torch.manual_seed(0)
        info = MobileNetV2().feature_info
        decoder = DetectorDecoder(FOUND, info, CLASSES + EXTRA, DetectorConfig(self.width))
        for module in decoder.modules():
            if isinstance(module, ModulatedDeformConv):  # offsets of about a pixel
                nn.init.normal_(module.offset.weight, std=(9 * self.width) ** -0.5)
        return decoder

    def taps(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        sizes = [(i.channels, SIDE // i.stride) for i in MobileNetV2().feature_info]
        return [
            torch.randn(self.batch, c, side, side, generator=generator).relu().to(self.dtype)
            for c, side in sizes
        ]

    def flops(self) -> int:
        """Of the convolutions, forward and backward."""
        with torch.device("meta"):
            decoder, taps = self.decoder(), [tap[:1].to("meta").float() for tap in self.taps()]
            return 6 * self.batch * count_macs_on(decoder, taps)

    def call(self, variant: str) -> Call:
        kind, layout = VARIANTS[variant]
        half = self.dtype == torch.bfloat16
        decoder: Any = self.decoder().to(memory_format=layout)  # type: ignore[call-overload]
        decoder.to(torch.float32 if half else self.dtype)
        for module in decoder.modules():
            if isinstance(module, DeformConv2d):
                module.__class__ = kind
        taps = [tap.contiguous(memory_format=layout) for tap in self.taps()]
        parameters, settings = list(decoder.parameters()), DetectionLoss(size_scale=SIDE / 800)
        points = targets(self.batch)

        def step() -> list[Tensor]:
            with torch.autocast("cpu", self.dtype, enabled=half):
                output, _ = decoder(taps)
            sums, weights = loss_sums(output, *points, settings), normalizers(*points, settings)
            loss = normalized(sums, weights).sum()
            return [output.detach(), *torch.autograd.grad(loss, parameters)]

        return step


def targets(batch: int) -> tuple[Tensor, Tensor]:
    """Dense ones of ten boxes an image."""
    generator = torch.Generator().manual_seed(0)
    center = SIDE * torch.rand(batch, 10, 2, generator=generator)
    half = 10 + 70 * torch.rand(batch, 10, 2, generator=generator)
    boxes = torch.cat([center - half, center + half], 2).clamp(0, SIDE)
    labels = torch.randint(CLASSES, (batch, 10), generator=generator)
    return assign(boxes, labels, (SIDE, SIDE), size_scale=SIDE / 800)


def test_variants_agree() -> None:
    """What is timed is the same function, with the same gradients."""
    problem = Problem(64, torch.float64, 1)
    ours, *others = (problem.call(name)() for name in VARIANTS if name != FLOOR)
    largest = max(float(gradient.norm()) for gradient in ours[1:])
    for other in others:
        torch.testing.assert_close(other[0], ours[0])
        for got, want in zip(other[1:], ours[1:], strict=True):  # some are 0 but for rounding
            assert (got - want).norm() <= 1e-4 * (want.norm() + 1e-3 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [64, 128])
def test_step(
    benchmark: Any, pytestconfig: pytest.Config, tables: Tables, width: int, dtype: torch.dtype
) -> None:
    problem = Problem(width, dtype)
    rounds = harness.Rounds({name: problem.call(name) for name in VARIANTS})
    count = rounds.warm_up(pytestconfig.getoption("seconds"), least=3)

    def setup() -> None:
        rounds.time(*(name for name in VARIANTS if name != OURS))
        rounds.calls[OURS]()

    benchmark.pedantic(rounds.time_warm, args=(OURS,), setup=setup, rounds=count)
    rows = harness.rows(rounds, OURS, problem.flops(), {})
    benchmark.extra_info.update(
        machine=harness.machine_line(), rows={name: asdict(row) for name, row in rows.items()}
    )
    name = str(dtype).removeprefix("torch.")
    tables.setdefault(f"decoder step, {BATCH} crops of {SIDE}, {name}", {})[f"width {width}"] = (
        dict(rows)
    )
